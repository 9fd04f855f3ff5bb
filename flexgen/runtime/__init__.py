"""Runs a schedule: the executor, and the state of one call that its steps work on."""
