"""The efftrain command, one file a verb."""
