"""The results of a run: the trace of its steps and the report of its phases. Needs no torch."""
