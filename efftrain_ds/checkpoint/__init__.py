"""Atomic checkpoints of plain tensors."""
