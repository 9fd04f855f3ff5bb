"""Arithmetic that torch does slowly on a CPU, compiled; each with a version in torch for every device."""
