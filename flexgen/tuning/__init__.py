"""Finding a policy by trial runs: the best predictions run, and the figures are corrected by what they show."""
