"""`int8` for products that round activations to int8 (`a8`) on a CPU: faster, and less accurate."""

from flexgen.quant.groupwise import RoundedGroupwise

CODEC = RoundedGroupwise("int8_a8", bits=8)
