"""A checkpoint without an engine: what it says about itself, and its values one parameter at a time.

Only JSON and safetensors are read; nothing of a checkpoint is ever executed, and no other module is imported because a
checkpoint names it. Neither DeepSpeed nor a device is needed.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..core.errors import CheckpointError
from .folder import read_manifest
from .plain import from_plain

FORMAT = 1
MASTERS, AVERAGE = "fp32", "ema"
_MAX_WORLD = 1 << 20


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Turn whatever damaged content causes into an error that names the file."""
    try:
        yield
    except CheckpointError:
        raise
    except (OSError, LookupError, TypeError, ValueError, AttributeError, SafetensorError, struct.error) as error:
        raise CheckpointError(f"{path}: not readable ({type(error).__name__}: {error})") from error


@dataclass(frozen=True)
class Piece:
    """A stretch of one parameter in the file of one rank.

    Attributes:
        rank: whose file.
        start: first element in the flattened parameter.
        length: number of elements.
        flat: number of the tensor that holds it.
        offset: first element in that tensor.
    """

    rank: int
    start: int
    length: int
    flat: int
    offset: int


class _Tensors(Mapping[str, Tensor]):
    """The tensors of one safetensors file, read when asked for."""

    def __init__(self, path: Path):
        self.path = path
        with _reading(path):
            self._handle: Any = safe_open(str(path), framework="pt", device="cpu")
            self._keys = set(self._handle.keys())

    def __getitem__(self, key: str) -> Tensor:
        with _reading(self.path):
            if key not in self._keys:
                raise CheckpointError(f"{self.path}: has no tensor {key}")
            return self._handle.get_tensor(key)

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(self._keys))

    def __len__(self) -> int:
        return len(self._keys)

    def shape(self, key: str) -> list[int]:
        """Shape of a tensor, without reading it."""
        with _reading(self.path):
            return list(self._handle.get_slice(key).get_shape())

    def dtype(self, key: str) -> str:
        """Type of a tensor as safetensors names it, e.g. "F32"."""
        with _reading(self.path):
            return str(self._handle.get_slice(key).get_dtype())

    def stretch(self, key: str, offset: int, length: int) -> Tensor:
        """Part of a one-dimensional tensor.

        Raises:
            CheckpointError: it ends before.
        """
        with _reading(self.path):
            if key not in self._keys:
                raise CheckpointError(f"{self.path}: has no tensor {key}")
            values = self._handle.get_slice(key)[offset : offset + length]
        if values.numel() != length:
            raise CheckpointError(f"{self.path}: {key} ends before element {offset + length}")
        return values


class Checkpoint:
    """Read access to one checkpoint folder.

    Args:
        folder: the checkpoint.
        hashes: compare the SHA-256 of every file with the manifest, not only the sizes.

    Raises:
        CheckpointError: not complete, damaged, or of another format.
    """

    def __init__(self, folder: Path, *, hashes: bool = True):
        self.folder = folder
        self.files = read_manifest(folder, hashes=hashes)
        path = folder / "state.json"
        with _reading(path):
            self.document: dict[str, Any] = json.loads(path.read_text())
            found = self.document.get("format")
        if found != FORMAT:
            raise CheckpointError(f"{folder}: format {found}, this version reads format {FORMAT}")
        with _reading(path):
            self.step, self.world = int(self.document["step"]), int(self.document["world"])
            self.zero_stage = int(self.document["zero_stage"])
            self.shapes = {str(n): [int(i) for i in shape] for n, shape in self.document["shapes"].items()}
        if not 1 <= self.world <= _MAX_WORLD:
            raise CheckpointError(f"{path}: world {self.world}")
        self._ranks: dict[int, _Tensors] = {}

    # -- what it says about itself -----------------------------------------------------------------------------

    @cached_property
    def _state(self) -> _Tensors:
        return _Tensors(self.folder / "state.safetensors")

    def _plain(self, key: str) -> Any:
        with _reading(self.folder / "state.json"):
            return from_plain(self.document[key], self._state)  # type: ignore[arg-type]

    @cached_property
    def extra(self) -> dict[str, Any]:
        """The caller's own state: {"efftrain": ..., "client": ...}."""
        found = self._plain("extra")
        return found if isinstance(found, dict) else {}

    @property
    def client(self) -> dict[str, Any]:
        """What the training loop stored: data position, best scores, configuration."""
        return dict(self.extra.get("client") or {})

    @property
    def methods(self) -> dict[str, dict[str, Any]]:
        """State of every method, by name."""
        return dict((self.extra.get("efftrain") or {}).get("methods") or {})

    @property
    def architecture(self) -> dict[str, Any] | None:
        """Changes of parameters up to this step, where the run could make any."""
        return (self.extra.get("efftrain") or {}).get("architecture")

    @cached_property
    def config(self) -> dict[str, Any] | None:
        """Resolved configuration of the run; None in embedded use.

        Raises:
            CheckpointError: it is not JSON.
        """
        text = self.client.get("config")
        if text is None:
            return None
        with _reading(self.folder / "state.json"):
            found = json.loads(text)
            if not isinstance(found, dict):
                raise TypeError("the configuration is not an object")
            return found

    @cached_property
    def groups(self) -> list[dict[str, Any]]:
        """Parameter groups of the optimizer, without their members."""
        return list(self._plain("groups") or [])

    # -- values ------------------------------------------------------------------------------------------------

    def _tensors(self, rank: int) -> _Tensors:
        if rank not in self._ranks:
            self._ranks[rank] = _Tensors(self.folder / f"rank-{rank:05d}.safetensors")
        return self._ranks[rank]

    def rank_document(self, rank: int) -> dict[str, Any]:
        """Index of one rank.

        Raises:
            CheckpointError: not readable.
        """
        path = self.folder / f"rank-{rank:05d}.json"
        with _reading(path):
            return dict(json.loads(path.read_text()))

    @cached_property
    def _index(self) -> tuple[dict[str, list[Piece]], tuple[str, ...], dict[str, dict[str, float]]]:
        pieces: dict[str, list[Piece]] = {}
        keys: dict[str, None] = {}
        scalars: dict[str, dict[str, float]] = {}
        for rank in range(self.world):
            document = self.rank_document(rank)
            with _reading(self.folder / f"rank-{rank:05d}.json"):
                keys |= dict.fromkeys(str(key) for key in document.get("keys", ()))
                for name, start, length, flat, offset in document["fragments"]:
                    if min(start, length, flat, offset) < 0:
                        raise ValueError(f"negative position of {name}")
                    pieces.setdefault(name, []).append(Piece(rank, start, length, flat, offset))
                    scalars.setdefault(name, dict(document["scalars"][flat]))
        for name, found in pieces.items():
            found.sort(key=lambda piece: piece.start)
            ends = [0, *(piece.start + piece.length for piece in found)]
            if [piece.start for piece in found] != ends[:-1] or ends[-1] != math.prod(self.shapes.get(name, [0])):
                raise CheckpointError(f"{self.folder}: the pieces of {name} do not make up the parameter")
        missing = sorted(set(self.shapes) - set(pieces))
        if missing:
            raise CheckpointError(f"{self.folder}: no values of {', '.join(missing[:3])}")
        return pieces, tuple(keys), scalars

    @property
    def keys(self) -> tuple[str, ...]:
        """Kinds of values of every trained parameter: "fp32", moments of the optimizer, "ema"."""
        return self._index[1]

    @property
    def pieces(self) -> dict[str, list[Piece]]:
        """Where each trained parameter lies."""
        return self._index[0]

    def scalars_of(self, name: str) -> dict[str, float]:
        """Step count and the like of one trained parameter."""
        return self._index[2].get(name, {})

    @cached_property
    def frozen(self) -> dict[str, list[int]]:
        """Shapes of the parameters that do not train, by name."""
        head = "frozen."
        return {key[len(head) :]: self._state.shape(key) for key in self._state if key.startswith(head)}

    @cached_property
    def buffers(self) -> dict[str, list[int]]:
        """Shapes of the buffers of the first rank, by name."""
        tensors, head = self._tensors(0), "local.buffer."
        return {key[len(head) :]: tensors.shape(key) for key in tensors if key.startswith(head)}

    def frozen_dtype(self, name: str) -> str:
        """Type of a frozen parameter as safetensors names it."""
        return self._state.dtype(f"frozen.{name}")

    def parameter(self, name: str, *, average: bool = False) -> Tensor:
        """fp32 values of one parameter, put together from the ranks' pieces.

        Args:
            name: as in `named_parameters`.
            average: take the average of the weights; a frozen parameter is its own average.

        Raises:
            CheckpointError: there is no such parameter, no average, or a file is damaged.
        """
        if name in self.frozen:
            return self._state[f"frozen.{name}"].float()
        if name not in self.shapes:
            raise CheckpointError(f"{self.folder}: has no parameter {name}")
        key = AVERAGE if average else MASTERS
        if key not in self.keys:
            raise CheckpointError(f"{self.folder}: holds no average of the weights (efftrain.model.ema was not set)")
        whole = torch.empty(math.prod(self.shapes[name]), dtype=torch.float32)
        for piece in self.pieces[name]:
            values = self._tensors(piece.rank).stretch(f"{key}.{piece.flat}", piece.offset, piece.length)
            whole[piece.start : piece.start + piece.length] = values
        return whole.view(self.shapes[name])

    def buffer(self, name: str) -> Tensor:
        """A buffer of the first rank.

        Raises:
            CheckpointError: there is none of that name.
        """
        return self._tensors(0)[f"local.buffer.{name}"]
