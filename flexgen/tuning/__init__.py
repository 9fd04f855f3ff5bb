"""Tuning: runs trials of the best predicted policies, and corrects the machine's figures with their times."""
