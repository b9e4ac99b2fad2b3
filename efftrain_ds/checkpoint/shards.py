"""One rank's part of a checkpoint: its fragments of masters, moments and average as plain tensors, and an index.

The index says which stretch of which parameter lies where, so any number of ranks and any ZeRO stage can read it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..core.errors import CheckpointError
from ..zero.access import Layout
from .writer import Part


def rank_parts(
    rank: int,
    layout: Layout,
    shadow: list[Tensor] | None,
    local: dict[str, Tensor],
    plain: dict[str, Any],
) -> list[Part]:
    """The files of one rank. Their tensors are views of the training state: write or copy them before the next step.

    Args:
        rank: this rank.
        layout: where the state is.
        shadow: tensors of the average, parallel to the flats, or None.
        local: further tensors of this rank (buffers, RNG states).
        plain: further JSON of this rank.
    """
    tensors = {f"local.{name}": t.detach() for name, t in local.items()}
    index: list[list] = []
    scalars: list[dict] = []
    if not (layout.replicated and rank > 0):
        sources = {key: layout.tensors(key, create=False) for key in ["fp32", *layout.state_keys()]}
        if shadow is not None:
            sources["ema"] = shadow
        for key, flats in sources.items():
            for number, flat in enumerate(flats):
                tensors[f"{key}.{number}"] = flat.detach().reshape(-1)
        index = [[f.name, f.start, f.length, f.flat, f.offset] for f in layout.fragments]
        scalars = [layout.scalars(i) for i in range(len(layout.flats))]
        plain = {**plain, "keys": list(sources)}
    text = json.dumps({**plain, "fragments": index, "scalars": scalars}) + "\n"
    return [Part(f"rank-{rank:05d}.safetensors", tensors), Part(f"rank-{rank:05d}.json", text)]


def open_tensors(path: Path) -> Any:
    """A safetensors file for reading.

    Raises:
        CheckpointError: it cannot be read as one; nothing else (a pickle) is ever tried.
    """
    try:
        return safe_open(str(path), framework="pt", device="cpu")
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path}: not a readable safetensors file ({error})") from error


def read_tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a file.

    Raises:
        CheckpointError: as `open_tensors`.
    """
    handle = open_tensors(path)
    return {name: handle.get_tensor(name) for name in handle.keys()}


@dataclass
class _Source:
    path: Path
    start: int
    length: int
    flat: int
    offset: int
    scalars: dict[str, float]


class ShardReader:
    """Read access to all ranks' fragments of one checkpoint.

    Raises:
        CheckpointError: a rank's index is not readable.
    """

    def __init__(self, folder: Path, world: int):
        self.folder = folder
        self.sources: dict[str, list[_Source]] = {}
        self.keys: list[str] = []
        self._open: dict[Path, Any] = {}
        for rank in range(world):
            document = self.rank_document(rank)
            self.keys += [key for key in document.get("keys", ()) if key not in self.keys]
            path = folder / f"rank-{rank:05d}.safetensors"
            for name, start, length, flat, offset in document["fragments"]:
                source = _Source(path, start, length, flat, offset, document["scalars"][flat])
                self.sources.setdefault(name, []).append(source)

    def rank_document(self, rank: int) -> dict:
        """JSON of one rank."""
        path = self.folder / f"rank-{rank:05d}.json"
        try:
            return json.loads(path.read_text())
        except (OSError, json.JSONDecodeError) as error:
            raise CheckpointError(f"{path}: {error}") from error

    def local(self, rank: int) -> dict[str, Tensor]:
        """Further tensors of one rank."""
        handle = self._handle(self.folder / f"rank-{rank:05d}.safetensors")
        return {k[len("local.") :]: handle.get_tensor(k) for k in handle.keys() if k.startswith("local.")}

    def _handle(self, path: Path) -> Any:
        if path not in self._open:
            self._open[path] = open_tensors(path)
        return self._open[path]

    def check(self, shapes: dict[str, torch.Size]) -> None:
        """Open every file, and compare names and element counts with the model's.

        Raises:
            CheckpointError: a file is not readable, or parameters are missing, unknown or of another size.
        """
        for path in {source.path for sources in self.sources.values() for source in sources}:
            self._handle(path)
        missing = sorted(set(shapes) - set(self.sources))
        unknown = sorted(set(self.sources) - set(shapes))
        sizes = [
            f"{name} has {sum(s.length for s in self.sources[name])} elements, the model's has {shapes[name].numel()}"
            for name in sorted(set(shapes) & set(self.sources))
            if sum(s.length for s in self.sources[name]) != shapes[name].numel()
        ]
        found = [f"not in the checkpoint: {', '.join(missing[:5])}"] if missing else []
        found += [f"not in the model: {', '.join(unknown[:5])}"] if unknown else []
        found += sizes[:5]
        if found:
            raise CheckpointError(f"{self.folder}: the checkpoint belongs to another model\n  " + "\n  ".join(found))

    def pieces(self, name: str, start: int, length: int, key: str) -> Iterator[tuple[int, Tensor]]:
        """(offset in the wanted stretch, values) for every stored piece that overlaps it."""
        for source in self.sources[name]:
            low, high = max(start, source.start), min(start + length, source.start + source.length)
            if low < high:
                first = source.offset + low - source.start
                view = self._handle(source.path).get_slice(f"{key}.{source.flat}")
                yield low - start, view[first : first + high - low]

    def scalars_of(self, name: str) -> dict[str, float]:
        """Step count and the like of one parameter."""
        return self.sources[name][0].scalars


@torch.no_grad()
def read_into(reader: ShardReader, layout: Layout, shadow: list[Tensor] | None, optimizer_state: bool = True) -> None:
    """Fill the masters, the optimizer state and the average of this rank. The caller refreshes the weights.

    Raises:
        CheckpointError: the checkpoint belongs to another model.
    """
    reader.check(layout.shapes)
    for key in reader.keys:
        if key == "ema":
            targets = shadow
        elif key == "fp32":
            targets = layout.tensors("fp32")
        else:
            targets = layout.tensors(key) if optimizer_state else None
        if targets is None:
            continue
        for fragment in layout.fragments:
            view = layout.values(fragment, targets)
            for at, values in reader.pieces(fragment.name, fragment.start, fragment.length, key):
                view[at : at + values.numel()].copy_(values)
    if "ema" not in reader.keys and shadow is not None:
        for target, master in zip(shadow, layout.tensors("fp32"), strict=True):
            target.copy_(master)
    if not optimizer_state:
        return
    if not set(reader.keys) - {"fp32", "ema"}:  # saved before the first step, or just after a reset
        for number, flat in enumerate(layout.flats):
            for key in layout.state_keys():
                if key in layout.base.state.get(flat.master, {}):
                    layout.base.state[flat.master][key].zero_()
            layout.set_scalars(number, dict.fromkeys(layout.scalars(number), 0.0))
        return
    seen: dict[int, dict[str, float]] = {}
    for fragment in layout.fragments:
        seen.setdefault(fragment.flat, {}).update(reader.scalars_of(fragment.name))
    for number, values in seen.items():
        layout.set_scalars(number, values)
    # a flat that holds only padding on this rank still needs the step of its group
    fallback = next(iter(seen.values()), {})
    if not seen and reader.sources:
        fallback = reader.scalars_of(next(iter(reader.sources)))
    for number in range(len(layout.flats)):
        if number not in seen and fallback:
            layout.set_scalars(number, fallback)
