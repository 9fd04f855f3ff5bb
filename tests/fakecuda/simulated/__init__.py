"""A CUDA device without a GPU: torch's own host code on a simulated runtime. `tests/fakecuda/run.py` starts it."""
