"""Counter-based randomness: every draw is a pure function of (seed, labels), never of rank, worker or time."""

from __future__ import annotations

import hashlib

import numpy as np
import torch


def derive_seed(seed: int, *labels: int | str) -> int:
    """63-bit seed for the stream named by `labels`; equal on every rank, process and Python hash seed."""
    text = "\x1f".join([str(int(seed)), *[f"{type(label).__name__}:{label}" for label in labels]])
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") >> 1


def numpy_rng(seed: int, *labels: int | str) -> np.random.Generator:
    """Philox generator for the stream named by `labels`."""
    return np.random.Generator(np.random.Philox(key=derive_seed(seed, *labels)))


def torch_rng(device: torch.device | str, seed: int, *labels: int | str) -> torch.Generator:
    """Torch generator on `device` for the stream named by `labels`."""
    generator = torch.Generator(device=device)
    generator.manual_seed(derive_seed(seed, *labels))
    return generator
