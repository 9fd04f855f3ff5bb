"""Runs a schedule: the executor, and the state of the call that its steps change."""
