"""Shards, the position-exact reader and device-side augmentation."""
