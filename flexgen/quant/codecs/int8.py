"""Integers of 8 bits in groups of 64 values: 8.5 bits per value."""

from flexgen.quant.groupwise import Groupwise

CODEC = Groupwise("int8", bits=8)
