"""The search for a sub-network on a trained supernet: limits, scores of candidates, and the loop over many ranks.

Every rank holds the whole supernet and evaluates its share of the candidates; rank 0 alone runs the search itself, so
that measured latencies need not agree between machines.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...core.errors import CheckpointError, ConfigError, EffTrainError
from ...core.files import write_whole
from ...core.ranks import from_first, from_first_only, gather, on_every_rank, rank, world_size
from ...models.elastic import Space
from .calibrate import calibrate
from .config import KEY, SearchConfig
from .evolution import Evolution, RandomSearch
from .latency import TableLatency, load_latency
from .latency_space import provider_text
from .limits import Limit, Predictor, latency_limit, macs_limit, params_limit
from .searcher import Searcher

STATE, LATENCIES = "state.json", "latency.json"
"""Files in the folder of a search: what it goes on from, and the blocks that were measured for it."""
_PART = 8
"""Sub-networks that a rank evaluates between two savings of the state."""
Labelled = tuple[Tensor, Tensor]
"""(images [B, C, H, W] uint8, labels [B])."""


@dataclass(frozen=True)
class Score:
    """How well a sub-network does: share of right predictions and mean cross-entropy."""

    top1: float
    loss: float


class Scorer:
    """Evaluates sub-networks of a supernet that one process holds whole.

    Args:
        net: the supernet, on `device`.
        ready: from uint8 images to what the network takes, on its device.
        calibration: for batch normalisation; empty for none.
        images: on which they are compared.
    """

    def __init__(
        self,
        net: nn.Module,
        ready: Callable[[Tensor], Tensor],
        calibration: Sequence[Labelled],
        images: Sequence[Labelled],
    ) -> None:
        self.net, self.ready = net.eval(), ready
        self.calibration, self.images = calibration, images

    def prepare(self, config: Any) -> None:
        """Set a sub-network and estimate its batch normalisation."""
        self.net.set_config(config)  # type: ignore[operator]
        if self.calibration:
            batches = ((self.ready(images), len(images)) for images, _ in self.calibration)
            calibrate(self.net, self.net, batches, pooled=False)

    @torch.no_grad()
    def score(self, config: Any) -> Score:
        """Evaluate a sub-network."""
        self.prepare(config)
        right = seen = 0
        loss = 0.0
        for images, labels in self.images:
            logits = self.net(self.ready(images)).float()
            labels = labels.to(logits.device)
            right += int((logits.argmax(1) == labels).sum())
            loss += float(F.cross_entropy(logits, labels, reduction="sum"))
            seen += len(labels)
        return Score(right / seen, loss / seen)


def limits_of(
    config: SearchConfig, space: Space[Any], formula: str, folder: Path | None = None, net: nn.Module | None = None
) -> list[Limit]:
    """The limits of a search, cheap ones first.

    Args:
        config: of the search.
        space: of the supernet.
        formula: how MACs are counted.
        folder: of the search, which keeps what is measured; None keeps nothing.
        net: the supernet, of whose kind networks are measured.

    Raises:
        ConfigError: one that no sub-network keeps, a latency table that does not fit, or a missing package.
    """
    found = []
    try:
        if config.macs is not None:
            low, high = _range(config.macs)
            found.append(macs_limit(space, high, low, formula))
        if config.params is not None:
            low, high = _range(config.params)
            found.append(params_limit(space, high, low))
        if config.latency is not None:
            low, high = _range(config.latency)
            provider = provider_of(config.latency_from, space, folder, net)
            found.append(latency_limit(space, provider, high, low, about=provider_text(provider, space)))
        for limit in found:
            limit.check(space)
    except ConfigError as error:
        raise ConfigError(f"{KEY}.search: {error}") from error
    return found


def provider_of(source: str, space: Space[Any], folder: Path | None = None, net: nn.Module | None = None) -> Predictor:
    """The provider of latencies that a search names.

    Args:
        source: "onnxruntime", the file of a table, or "package.module:function" of one's own; the function is called
            with the space.
        space: of the supernet.
        folder: for the times of blocks that are measured, which are read from there where they are known; None keeps
            none.
        net: the supernet, of whose kind networks are measured; None takes the usual kind.

    Raises:
        ConfigError: a missing package or function, a table that does not fit, or something that is no provider.
    """
    if source == "onnxruntime":
        from .latency_blocks import BlockLatency

        file = None if folder is None else folder / LATENCIES
        if file is None or not file.is_file():
            return BlockLatency(space, net, file=file)
        try:
            return BlockLatency(space, net, table=load_latency(file), file=file)
        except ConfigError as error:
            raise ConfigError(f"{file}: {error}; remove the file, or name another --output") from error
    module, colon, name = source.partition(":")
    if not colon or Path(source).exists():
        return TableLatency(space, load_latency(source), None if net is None else space.options(net))
    where = f'latency_from: "{source}"'
    if not module or not name:
        raise ConfigError(f'{where}; "onnxruntime", the JSON file of a table or "package.module:function" is needed')
    try:
        make = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise ConfigError(f"{where}: {error}") from error
    try:
        provider = make(space)
    except EffTrainError:
        raise
    except Exception as error:  # it may be anybody's code
        raise ConfigError(f"{where}: {type(error).__name__}: {error}") from error
    missing = [key for key in ("unit", "device", "predict") if not hasattr(provider, key)]
    if missing:
        raise ConfigError(f"{where}: {type(provider).__name__} has no {', '.join(missing)}, so it is no provider")
    return provider


def latency_of(
    config: SearchConfig, space: Space[Any], limits: Sequence[Limit], subnet: Any, net: nn.Module | None = None
) -> dict[str, Any]:
    """Latency of the choice with its unit and device, where it was limited; else nothing."""
    found = next((limit for limit in limits if not limit.cheap), None)
    if found is None:
        return {}
    value = float(found.measure(space.codes(subnet)[None])[0])
    words = {"latency": value, "latency_unit": found.unit, "latency_device": found.name.partition(" on ")[2]}
    if config.latency_from != "onnxruntime":
        return words
    from .latency_ort import OrtLatency

    # the search adds up measured blocks; the choice alone is measured as a whole
    return {**words, "latency_whole": OrtLatency(space, net).predict(subnet)}


def _range(value: Any) -> tuple[Any, Any]:
    return tuple(value) if isinstance(value, (tuple, list)) else (0, value)  # type: ignore[return-value]


def make_searcher(config: SearchConfig, space: Space[Any], limits: Sequence[Limit], seeds: Sequence[Any]) -> Searcher:
    """The search itself.

    Raises:
        ConfigError: a limit that no sub-network keeps.
    """
    options: dict[str, Any] = {"evaluations": config.evaluations, "seed": config.seed}
    if config.algorithm == "random":
        return RandomSearch(space, limits, **options)
    return Evolution(space, limits, population=config.population, seeds=seeds, **options)


class Search:
    """A search in a folder: it goes on from the state that is there, and keeps its state as it goes.

    Args:
        config: of the search.
        space: of the supernet.
        scorer: of this rank.
        limits: of the candidates; read on rank 0.
        seeds: sub-networks to begin with.
        folder: for the state; None keeps none.
        origin: what the scores depend on (checkpoint, images, what is compared); a state of another origin is not
            gone on from.
        formula: how MACs are counted.
        tell: shows a line.
    """

    def __init__(
        self,
        config: SearchConfig,
        space: Space[Any],
        scorer: Scorer,
        limits: Sequence[Limit],
        *,
        seeds: Sequence[Any] = (),
        folder: Path | None = None,
        origin: dict[str, Any] | None = None,
        formula: str = "exact",
        tell: Callable[[str], None] = lambda text: None,
    ) -> None:
        self.config, self.space, self.scorer, self.folder, self.tell = config, space, scorer, folder, tell
        self.origin, self.formula = origin or {}, formula
        self._latency = next((limit for limit in limits if not limit.cheap), None)
        self.scores: dict[Any, Score] = {}
        self.resumed = 0
        self.searcher: Searcher | None = from_first_only(lambda: make_searcher(config, space, limits, seeds))
        if folder is not None:
            self.scores = from_first(lambda: self._load(folder / STATE))
            self.resumed = len(self.scores)

    def run(self) -> Any:
        """Search to the end. Collective.

        Returns:
            The best sub-network, on all ranks.
        """
        while True:
            configs = from_first(lambda: None if self._on_first.done else self._on_first.ask(_PART * world_size()))
            if configs is None:
                break
            places = range(rank(), len(configs), world_size())
            mine = on_every_rank(lambda own=places, all=configs: {j: self.scorer.score(all[j]) for j in own})
            found: dict[int, Score] = {}
            for part in gather(mine):
                found |= part
            self.scores |= {config: found[place] for place, config in enumerate(configs)}
            from_first(lambda configs=configs: self._told(configs))
        return from_first(lambda: self._on_first.best.config)  # type: ignore[union-attr]

    @property
    def _on_first(self) -> Searcher:
        assert self.searcher is not None
        return self.searcher

    def value(self, score: Score) -> float:
        """What is compared, larger is better."""
        return score.top1 if self.config.score == "top1" else -score.loss

    def _told(self, configs: list[Any]) -> None:
        searcher = self._on_first
        searcher.tell(configs, [self.value(self.scores[config]) for config in configs])
        best = searcher.best
        if best is not None and configs:
            score = self.scores[best.config]
            self.tell(
                f"generation {searcher.generation}: {len(searcher.evaluated):,} of {self.config.evaluations:,} "
                f"evaluated, best top1 {100 * score.top1:.2f}%, loss {score.loss:.3f}"
            )
        if self.folder is not None:
            self._save(self.folder / STATE)

    def _save(self, path: Path) -> None:
        rows = [[self.space.codes(c).tolist(), score.top1, score.loss] for c, score in self.scores.items()]
        text = json.dumps({"origin": self.origin, "search": self._on_first.state_dict(), "scores": rows})
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_whole(path, text)
        except OSError as error:
            raise ConfigError(f"cannot write {path}: {error}") from error

    def _load(self, path: Path) -> dict[Any, Score]:
        if not path.is_file():
            return {}
        try:
            state = json.loads(path.read_text(encoding="utf-8"))
            there, own = state["origin"], self.origin
            if there != own:
                keys = [key for key in {**own, **there} if (key in own, own.get(key)) != (key in there, there.get(key))]
                before, now = ({key: of.get(key) for key in keys} for of in (there, own))
                raise CheckpointError(f"the search there is of {before}, this one of {now}")
            self._on_first.load_state_dict(state["search"])
            rows = state["scores"]
            return {self.space.config(np.array(codes, np.int8)): Score(top1, loss) for codes, top1, loss in rows}
        except (ValueError, KeyError, TypeError, CheckpointError) as error:
            raise CheckpointError(f"{path}: {error}; remove the file, or name another --output") from error

    def table(self) -> list[dict[str, Any]]:
        """All evaluated sub-networks with costs and scores, in the order of their evaluation; on rank 0."""
        rows = []
        for one in self._on_first.evaluated:
            score = self.scores[one.config]
            row = {
                "config": one.config.to_dict(),
                "macs": self.space.macs(one.config, self.formula),
                "params": self.space.params(one.config),
                "top1": score.top1,
                "loss": score.loss,
                "generation": one.generation,
            }
            if self._latency is not None:
                row["latency"] = float(self._latency.measure(self.space.codes(one.config)[None])[0])
            rows.append(row)
        return rows
