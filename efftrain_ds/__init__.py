"""EffTrain-DS."""
