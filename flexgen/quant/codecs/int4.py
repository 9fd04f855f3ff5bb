"""Integers of 4 bits in groups of 64 values: 4.5 bits per value."""

from flexgen.quant.groupwise import Groupwise

CODEC = Groupwise("int4", bits=4)
