"""The efftrain section of the DeepSpeed JSON."""
