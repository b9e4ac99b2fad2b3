"""``efftrain search subnet``: the best sub-network of a trained supernet within MACs, parameters or a latency.

No weight is trained. The supernet comes from the newest checkpoint of the run; candidates are compared on fixed images
that are not of the held-out split, and only the winner is evaluated on that.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .checkpoint.reader import AVERAGE, Checkpoint
from .checkpoint.survey import newest
from .config.loader import LoadedConfig, build_methods
from .core.errors import CheckpointError, ConfigError
from .data.augment.chain import normalize
from .data.evaluation import EvalLoader
from .data.manifest import Manifest
from .data.remote import open_data
from .methods.elasticvit.bank import MemoryBank
from .methods.elasticvit.calibrate import batch_norms
from .methods.elasticvit.config import KEY, ElasticViTConfig, levels_of
from .methods.elasticvit.evolution import pareto
from .methods.elasticvit.levels import macs_text
from .methods.elasticvit.search import Labelled, Scorer, Search, from_first_only, limits_of
from .models.adapters import create_model
from .models.elastic import save_extracted
from .models.elastic.named import space_of
from .observe.console import Console
from .planning import with_labels
from .train_setup import start_processes

logger = logging.getLogger(__name__)

SUBNET, TABLE, REPORT, PLOT = "subnet.safetensors", "evaluated.json", "subnet.json", "pareto.png"
_BATCH = 128


def check_subnet_search(config: LoadedConfig) -> ElasticViTConfig:
    """The configuration of the method with its search.

    Raises:
        ConfigError: nothing to search, or the model is no supernet.
    """
    settings = config.methods.get("elasticvit")
    if not isinstance(settings, ElasticViTConfig) or settings.search is None:
        found = '"search": null' if isinstance(settings, ElasticViTConfig) else f"methods {sorted(config.methods)}"
        raise ConfigError(
            f"{KEY}.search: there is no search for a sub-network, found {found}; add one to {KEY}, for example "
            f'--set "{KEY}.search={{\\"macs\\": 200000000}}"'
        )
    build_methods(config)
    return settings


class SubnetSearch:
    """A search from start to end. Collective.

    Args:
        config: the loaded file; `check_subnet_search` holds.
        output: folder of what is found; None takes "search" in the run's output.
        checkpoint: to search on; None takes the newest of the run.

    Raises:
        EffTrainError: whatever is wrong with configuration, data or checkpoint.
    """

    def __init__(self, config: LoadedConfig, output: str | Path | None = None, checkpoint: str | Path | None = None):
        self.settings = check_subnet_search(config)
        assert self.settings.search is not None
        self.search = self.settings.search
        section = config.efftrain
        self.rank, self.world, self.device = start_processes(config)
        self.console = Console(self.rank)
        run_folder = Path(section.run.output)
        self.folder = Path(output) if output is not None else run_folder / "search"
        self.found = Checkpoint(newest(Path(checkpoint) if checkpoint is not None else run_folder))
        data = section.data
        self._remote = {"cache_dir": data.cache_dir, "cache_gb": data.cache_gb, "allow_pipe": data.allow_pipe}
        self.config = config
        train = self._open(self.search.data or data.train, held_out=False)
        num_classes = section.model.num_classes or len(train.classes)
        space = space_of(section.model.name, section.model.kwargs, num_classes)
        if space is None:
            raise ConfigError(f"efftrain.model.name: {section.model.name} is no supernet")
        self.space, self.num_classes = space, num_classes
        self.levels = levels_of(self.settings, space)
        self.average = AVERAGE in self.found.keys if self.search.average is None else self.search.average
        self.net = self._supernet()
        calibration, images = self._images(train)
        self.scorer = Scorer(self.net, self._ready, calibration, images)

    # -- parts ---------------------------------------------------------------------------------------------------

    def _open(self, where: str, *, held_out: bool) -> Manifest:
        return with_labels(open_data(where, **self._remote), self.config.efftrain.data, held_out=held_out)

    def _supernet(self) -> torch.nn.Module:
        """The supernet with the weights of the checkpoint.

        Raises:
            CheckpointError: its parameters are others.
        """
        model = self.config.efftrain.model
        resolution = self.config.efftrain.data.resolution
        net = create_model(model.name, resolution=resolution, num_classes=self.num_classes, **model.kwargs)
        own = {name: list(parameter.shape) for name, parameter in net.named_parameters()}
        stored = self.found.shapes | self.found.frozen
        wrong = sorted(name for name in {*own, *stored} if own.get(name) != stored.get(name))
        if wrong:
            raise CheckpointError(
                f"{self.found.folder}: {wrong[0]} is {stored.get(wrong[0])}, {model.name} of this configuration has "
                f"{own.get(wrong[0])}"
            )
        with torch.no_grad():
            for name, parameter in net.named_parameters():
                parameter.copy_(self.found.parameter(name, average=self.average))
        return net.requires_grad_(False).eval().to(self.device)

    def _loader(self, manifest: Manifest, limit: int | None, *, shared: bool) -> EvalLoader:
        """Images as in an evaluation: this rank's, or all of them on every rank."""
        data = self.config.efftrain.data
        return EvalLoader(
            manifest,
            rank=self.rank if shared else 0,
            world=self.world if shared else 1,
            batch=data.eval_batch or _BATCH,
            resolution=data.eval_resolution or data.resolution,
            crop=data.eval_crop,
            interpolation=data.interpolation,
            workers=min(data.workers, 2),
            num_classes=self.num_classes,
            limit=limit,
            strict=shared,
        )

    def _images(self, manifest: Manifest) -> tuple[list[Labelled], list[Labelled]]:
        """(images for batch normalisation, others on which sub-networks are compared), evenly spaced.

        Raises:
            ConfigError: the shards have fewer images.
        """
        wanted = self.search.calibrate if batch_norms(self.net) else 0
        total = wanted + self.search.images
        if total > manifest.kept:
            raise ConfigError(
                f"{KEY}.search: calibrate {wanted} and images {self.search.images} are more than the "
                f"{manifest.kept:,} images there are"
            )
        loader = self._loader(manifest, total, shared=False)
        images, labels = [], []
        for batch in loader:
            keep = batch.valid
            images.append(batch.images[keep])
            labels.append(batch.labels[keep])
        loader.close()
        every, targets = torch.cat(images), torch.cat(labels)
        # spread over all of them alike, as neighbours are of one class where shards are sorted
        places = torch.arange(len(every))
        for_norms = (places + 1) * wanted // len(every) > places * wanted // len(every)
        size = self.config.efftrain.data.eval_batch or _BATCH

        def batches(mask: Tensor) -> list[Labelled]:
            return list(zip(every[mask].split(size), targets[mask].split(size), strict=True)) if mask.any() else []

        return batches(for_norms), batches(~for_norms)

    def _ready(self, images: Tensor) -> Tensor:
        data = self.config.efftrain.data
        return normalize(images.to(self.device), data.mean, data.std, torch.float32)

    def _seeds(self) -> list[Any]:
        """Entries of the memory bank of the checkpoint, the best first."""
        stored = self.found.methods.get("elasticvit", {}).get("bank")
        if not self.search.seeds or stored is None:
            return []
        bank = MemoryBank(self.space, self.levels, 10**6)
        bank.load_state_dict(json.loads(stored))
        entries = [entry for level in range(len(self.levels)) for entry in bank.entries(level)]
        return [entry.config for entry in sorted(entries, key=lambda entry: -entry.score)]

    # -- the run -------------------------------------------------------------------------------------------------

    def run(self) -> dict[str, Any]:
        """Search, evaluate the winner, and write everything on rank 0.

        Returns:
            What ``subnet.json`` holds, on all ranks.
        """
        config, found = self.search, self.found
        origin = {
            "checkpoint": found.folder.name,
            "step": found.step,
            "average": self.average,
            "images": [config.images, config.calibrate, config.data],
        }
        # measured latencies are asked for on one rank only
        limits = from_first_only(lambda: limits_of(config, self.space, self.levels.formula)) or []
        searched = Search(
            config,
            self.space,
            self.scorer,
            limits,
            seeds=self._seeds(),
            folder=self.folder,
            origin=origin,
            tell=self.console.write,
        )
        self.console.write(
            f"search   {config.algorithm}, {config.evaluations:,} evaluations on {config.images:,} images; "
            f"{found.folder}, {'average of the weights' if self.average else 'weights'}, "
            f"{self.world} rank{'s' * (self.world > 1)}"
            + (f"; going on behind {searched.resumed:,} evaluations" if searched.resumed else "")
        )
        best = searched.run()
        score = searched.scores.get(best)
        self.scorer.prepare(best)
        held_out = self._held_out()
        result = {
            "space": self.space.to_dict(),
            "config": best.to_dict(),
            "macs": self.space.macs(best),
            "params": self.space.params(best),
            "search_top1": score.top1 if score else None,
            "search_loss": score.loss if score else None,
            **held_out,
            **origin,
            "evaluations": len(searched.scores),
            "algorithm": config.algorithm,
            "seed": config.seed,
            "limits": config.model_dump(include={"macs", "params", "latency", "latency_from"}),
        }
        if self.rank == 0:
            self._write(searched, best, result)
        return result

    def _held_out(self) -> dict[str, float]:
        """The winner, as it is set, on the held-out split; empty without one. Collective."""
        data = self.config.efftrain.data
        if data.val is None:
            return {}
        loader = self._loader(self._open(data.val, held_out=True), None, shared=True)
        sums = torch.zeros(3, dtype=torch.float64, device=self.device)
        with torch.no_grad():
            for batch in loader:
                keep = batch.valid
                if not keep.any():
                    continue
                logits = self.net(self._ready(batch.images[keep])).float()
                labels = batch.labels[keep].to(self.device)
                sums[0] += (logits.argmax(1) == labels).sum()
                sums[1] += torch.nn.functional.cross_entropy(logits, labels, reduction="sum").double()
                sums[2] += len(labels)
        loader.close()
        if self.world > 1:
            dist.all_reduce(sums)
        return {"val_top1": float(sums[0] / sums[2]), "val_loss": float(sums[1] / sums[2])}

    def _write(self, searched: Search, best: Any, result: dict[str, Any]) -> None:
        table = searched.table()
        net = self.space.extract(self.net.cpu(), best).eval()
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            save_extracted(self.folder / SUBNET, net, self.space, best)
            (self.folder / REPORT).write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
            (self.folder / TABLE).write_text(json.dumps(table) + "\n", encoding="utf-8")
            plot(table, result, self.folder / PLOT)
        except OSError as error:
            raise ConfigError(f"--output: cannot write {self.folder}: {error}") from error
        held = f", held out {100 * result['val_top1']:.2f}%" if "val_top1" in result else ""
        self.console.write(
            f"best     {macs_text(result['macs'])} MACs, {result['params']:,} parameters, "
            f"top1 {100 * (result['search_top1'] or 0):.2f}% in the search{held}\n"
            f"written  {self.folder}: {SUBNET}, {REPORT}, {TABLE}, {PLOT}"
        )


def plot(table: Sequence[dict[str, Any]], result: dict[str, Any], path: Path) -> None:
    """Top-1 over MACs of all evaluated sub-networks, the best for each cost joined, the winner marked."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    costs, scores = [row["macs"] / 1e6 for row in table], [100 * row["top1"] for row in table]
    figure = Figure(figsize=(6, 4), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.scatter(costs, scores, s=6, alpha=0.4, linewidths=0, label="evaluated")
    front = pareto(costs, scores)
    axes.plot([costs[j] for j in front], [scores[j] for j in front], drawstyle="steps-post", label="best at this cost")
    axes.scatter([result["macs"] / 1e6], [100 * result["search_top1"]], marker="*", s=120, label="chosen", zorder=3)
    axes.set_xlabel("MACs of one image (M)")
    axes.set_ylabel("top-1 on the images of the search (%)")
    axes.legend()
    figure.savefig(path)


def run_subnet_search(
    config: LoadedConfig, output: str | Path | None = None, checkpoint: str | Path | None = None
) -> dict[str, Any]:
    """Search, print what was found on rank 0, and write it. Collective; see `SubnetSearch`."""
    return SubnetSearch(config, output, checkpoint).run()
