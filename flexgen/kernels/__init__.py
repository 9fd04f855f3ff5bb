"""Compiled kernels for operations that are slow in torch on a CPU. Each also has a torch version for every device."""
