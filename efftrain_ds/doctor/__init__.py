"""Checks of a machine, and of a configuration on it, before a run: what fails, why, and what to do about it."""
