"""What a run has done: the trace of its steps, and the report of its phases. No torch."""
