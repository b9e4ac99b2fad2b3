"""``efftrain search subnet``: the best sub-network of a trained supernet within MACs, parameters or a latency.

No weight is trained. The supernet comes from the newest checkpoint of the run; candidates are compared on fixed images
that are not of the held-out split, and only the winner is evaluated on that. Where a part of the training shards is
held out (efftrain.data.hold_out), that part compares them.
"""

from __future__ import annotations

import hashlib
import json
import logging
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from .checkpoint.reader import AVERAGE, Checkpoint
from .checkpoint.survey import newest
from .config.loader import LoadedConfig, build_methods
from .core.errors import ConfigError
from .core.ranks import from_first, from_first_only, on_every_rank
from .data.augment.chain import normalize
from .data.evaluation import EvalLoader
from .data.manifest import Manifest
from .methods.elasticvit.bank import MemoryBank
from .methods.elasticvit.calibrate import batch_norms
from .methods.elasticvit.config import KEY, ElasticViTConfig, levels_of
from .methods.elasticvit.levels import macs_text, shape_text
from .methods.elasticvit.search import Labelled, Scorer, Search, latency_of, limits_of
from .models.elastic import save_extracted
from .observe.console import Console
from .observe.report.figures import to_png
from .observe.report.subnets import RESULT, TABLE, FoundSubnet, pareto_figure
from .observe.tensorboard import TensorBoard
from .planning import held_out_data
from .train_setup import start_processes
from .train_supernets import load_supernet, opened, space_of_run

logger = logging.getLogger(__name__)

SUBNET, PLOT, BOARD = "subnet.safetensors", "pareto.png", "tensorboard"
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

    Attributes:
        net: the supernet, on this rank's device.
        scorer: of sub-networks on the images of the search.

    Raises:
        EffTrainError: whatever is wrong with configuration, data or checkpoint.
    """

    def __init__(self, config: LoadedConfig, output: str | Path | None = None, checkpoint: str | Path | None = None):
        self.settings = check_subnet_search(config)
        assert self.settings.search is not None
        self.search = self.settings.search
        section = config.efftrain
        self.rank, self.world, self.device = start_processes(config)
        if self.world > 1 and self.search.latency is not None and self.search.latency_from == "onnxruntime":
            raise ConfigError(
                f'{KEY}.search.latency_from: "onnxruntime" measures on one rank, for which the other '
                f"{self.world - 1} would wait too long; run the search on one rank, or measure a table first "
                '("efftrain search subnet FILE --measure_latency TABLE") and name that file'
            )
        self.console = Console(self.rank)
        self.config = config
        run_folder = Path(section.run.output)
        self.folder = Path(output) if output is not None else run_folder / "search"
        on_every_rank(lambda: self._load(Path(checkpoint) if checkpoint is not None else run_folder))

    # -- parts ---------------------------------------------------------------------------------------------------

    def _load(self, source: Path) -> None:
        """Checkpoint, space, supernet and images of this rank."""
        section = self.config.efftrain
        self.found = Checkpoint(newest(source))
        train = opened(self.config, section.data.train)
        self.space, self.num_classes = space_of_run(self.config, train)
        self.levels = levels_of(self.settings, self.space)
        self.average = AVERAGE in self.found.keys if self.search.average is None else self.search.average
        self.net = load_supernet(self.config, self.found, self.num_classes, average=self.average).to(self.device)
        if not self.search.calibrate and batch_norms(self.net):
            raise ConfigError(
                f"{KEY}.search.calibrate: 0, but {section.model.name} has batch normalisation, whose statistics are of "
                "no sub-network until they are estimated; at least 1 image is needed, some thousands are better"
            )
        calibration, images = self._images(train)
        self.scorer = Scorer(self.net, self.ready, calibration, images)

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

    def _images(self, train: Manifest) -> tuple[list[Labelled], list[Labelled]]:
        """(images for batch normalisation, others on which sub-networks are compared), evenly spaced.

        Raises:
            ConfigError: the shards have fewer images.
        """
        wanted, compared = self.search.calibrate if batch_norms(self.net) else 0, self.search.images
        if self.search.data is None and self.config.efftrain.data.hold_out is None:
            self._enough(train, wanted + compared, f"calibrate {wanted} and images {compared}")
            every, labels = self._read(train, wanted + compared)
            # spread over all of them alike, as neighbours are of one class where shards are sorted
            places = torch.arange(len(every))
            for_norms = (places + 1) * wanted // len(every) > places * wanted // len(every)
            return self._batches(every[for_norms], labels[for_norms]), self._batches(
                every[~for_norms], labels[~for_norms]
            )
        if self.search.data is not None:
            other = opened(self.config, self.search.data, whole=True)
        else:
            other = opened(self.config, self.config.efftrain.data.train, held_out=True)
        self._enough(train, wanted, f"calibrate {wanted}")
        self._enough(other, compared, f"images {compared}")
        return self._batches(*self._read(train, wanted)), self._batches(*self._read(other, compared))

    def _enough(self, manifest: Manifest, count: int, what: str) -> None:
        if count > manifest.kept:
            raise ConfigError(
                f"{KEY}.search: {what} are more than the {manifest.kept:,} images there are in {manifest.folder}"
            )

    def _read(self, manifest: Manifest, count: int) -> Labelled:
        """`count` images of a data set, evenly spaced, without those that cannot be read."""
        images, labels = [torch.empty(0, dtype=torch.uint8)], [torch.empty(0, dtype=torch.long)]
        if count:
            with closing(self._loader(manifest, count, shared=False)) as loader:
                for batch in loader:
                    images.append(batch.images[batch.valid])
                    labels.append(batch.labels[batch.valid])
        return torch.cat(images[1:] or images), torch.cat(labels)

    def _batches(self, images: Tensor, labels: Tensor) -> list[Labelled]:
        size = self.config.efftrain.data.eval_batch or _BATCH
        return list(zip(images.split(size), labels.split(size), strict=True)) if len(images) else []

    def ready(self, images: Tensor) -> Tensor:
        """Images [B, C, H, W] uint8 as the supernet takes them, on its device."""
        data = self.config.efftrain.data
        return normalize(images.to(self.device), data.mean, data.std, torch.float32)

    def _input(self, side: int) -> dict[str, Any]:
        """How an image becomes an input: scaled so that the centre crop has the side of the data, then to `side`."""
        data = self.config.efftrain.data
        return {
            "size": [getattr(self.space, "in_chans", 3), side, side],
            "loaded": data.eval_resolution or data.resolution,
            "crop": data.eval_crop,
            "interpolation": data.interpolation,
            "mean": list(data.mean),
            "std": list(data.std),
        }

    def _part(self) -> str | None:
        """Which part of the training shards is held out, in words; None where nothing is."""
        hold_out = self.config.efftrain.data.hold_out
        return None if hold_out is None else f"held out {hold_out.text()}, seed {hold_out.seed}"

    def labelled(self, where: str) -> list[Labelled]:
        """All images of some shards, in memory, loaded as in an evaluation."""
        manifest = opened(self.config, where, held_out=True, whole=True)
        return self._batches(*self._read(manifest, manifest.kept))

    def _seeds(self) -> list[Any]:
        """Entries of the memory bank of the checkpoint, the best first; none where the search is to be random."""
        stored = self.found.methods.get("elasticvit", {}).get("bank")
        if not self.search.seeds or self.search.algorithm == "random" or stored is None:
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
        config, found, formula = self.search, self.found, self.levels.formula
        origin = self._origin()
        # measured latencies are asked for on one rank only
        limits = from_first_only(lambda: limits_of(config, self.space, formula, self.folder, self.net)) or []
        searched = Search(
            config,
            self.space,
            self.scorer,
            limits,
            seeds=self._seeds(),
            folder=self.folder,
            origin=origin,
            formula=formula,
            tell=self.console.write,
        )
        self.console.write(
            f"search   {config.algorithm}, {config.evaluations:,} evaluations on {config.images:,} images; "
            f"{found.folder}, {'average of the weights' if self.average else 'weights'}, "
            f"{self.world} rank{'s' * (self.world > 1)}"
            + (f"; going on behind {searched.resumed:,} evaluations" if searched.resumed else "")
        )
        for limit in limits:
            if limit.about:
                self.console.write(f"latency  {limit.about}")
        best = searched.run()
        score = searched.scores.get(best)
        latency = from_first(lambda: latency_of(config, self.space, limits, best, self.net))
        held_out = self._held_out(best)
        result = {
            "space": self.space.to_dict(),
            "config": best.to_dict(),
            "macs": self.space.macs(best, formula),
            "params": self.space.params(best),
            **latency,
            "search_top1": score.top1 if score else None,
            "search_loss": score.loss if score else None,
            **held_out,
            **origin,
            "evaluations": len(searched.scores),
            "algorithm": config.algorithm,
            "seed": config.seed,
            "input": self._input(best.resolution),
            "limits": config.model_dump(include={"macs", "params", "latency", "latency_from"}),
        }
        if self.rank == 0:
            self._write(searched.table(), best, result)
        return result

    def _origin(self) -> dict[str, Any]:
        """What scores and costs depend on: a search of another one cannot go on."""
        config, found, data = self.search, self.found, self.config.efftrain.data
        # another checkpoint of the same step has other files
        files = hashlib.sha256(json.dumps(found.files, sort_keys=True).encode()).hexdigest()[:16]
        return {
            "checkpoint": found.folder.name,
            "step": found.step,
            "files": files,
            "average": self.average,
            "images": [config.images, config.calibrate, config.data or self._part()],
            "loaded": [data.eval_resolution or data.resolution, data.eval_crop, data.interpolation],
            "score": config.score,
            "formula": self.levels.formula,
            "latency_from": config.latency_from if config.latency is not None else None,
        }

    def _held_out(self, best: Any) -> dict[str, float]:
        """The winner on images that had no part in the search; empty without any. It stays set. Collective."""
        sums = on_every_rank(lambda: self._judge(best))
        if sums is None:
            return {}
        if self.world > 1:
            dist.all_reduce(sums)
        return {"val_top1": float(sums[0] / sums[2]), "val_loss": float(sums[1] / sums[2])}

    def _judge(self, best: Any) -> Tensor | None:
        """(right, sum of losses, images) of this rank's share of the held-out images; None without any."""
        self.scorer.prepare(best)
        data = self.config.efftrain.data
        where = held_out_data(data)
        if where is None or (data.hold_out is not None and self.search.data is None):
            return None
        sums = torch.zeros(3, dtype=torch.float64, device=self.device)
        manifest = opened(self.config, where, held_out=True)
        with closing(self._loader(manifest, None, shared=True)) as loader, torch.no_grad():
            for batch in loader:
                keep = batch.valid
                if not keep.any():
                    continue
                logits = self.net(self.ready(batch.images[keep])).float()
                labels = batch.labels[keep].to(self.device)
                sums[0] += (logits.argmax(1) == labels).sum()
                sums[1] += torch.nn.functional.cross_entropy(logits, labels, reduction="sum").double()
                sums[2] += len(labels)
        return sums

    def _write(self, table: list[dict[str, Any]], best: Any, result: dict[str, Any]) -> None:
        net = self.space.extract(self.net.cpu(), best).eval()
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            save_extracted(self.folder / SUBNET, net, self.space, best)
            (self.folder / RESULT).write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
            (self.folder / TABLE).write_text(json.dumps(table) + "\n", encoding="utf-8")
            to_png(pareto_figure([FoundSubnet(self.folder.name, result, table)]), self.folder / PLOT)
            if self.config.efftrain.observe.tensorboard:
                self._to_tensorboard(table)
        except OSError as error:
            raise ConfigError(f"--output: cannot write {self.folder}: {error}") from error
        held = f", held out {100 * result['val_top1']:.2f}%" if "val_top1" in result else ""
        timed = f", {result['latency']:.4g} {result['latency_unit']}" if "latency" in result else ""
        timed += f" (as a whole {result['latency_whole']:.4g})" if "latency_whole" in result else ""
        self.console.write(
            f"best     {macs_text(result['macs'])} MACs, {result['params']:,} parameters{timed}, "
            f"top1 {100 * (result['search_top1'] or 0):.2f}% in the search{held}\n"
            f"         {shape_text(best)}\n"
            f"written  {self.folder}: {SUBNET}, {RESULT}, {TABLE}, {PLOT}\n"
            f"export   efftrain export {self.folder / SUBNET} --output DIR --format onnx"
        )

    def _to_tensorboard(self, table: list[dict[str, Any]]) -> None:
        """The picture, and each score and the best so far over the number of evaluations."""
        from PIL import Image

        board = TensorBoard(self.folder / BOARD, purge_step=0)
        best = 0.0
        for count, row in enumerate(table, 1):
            best = max(best, row["top1"])
            board.scalars({"search/top1": row["top1"], "search/best_top1": best, "search/loss": row["loss"]}, count)
        with Image.open(self.folder / PLOT) as picture:
            board.image("search/pareto", np.asarray(picture.convert("RGB")), len(table))
        board.close()


def run_subnet_search(
    config: LoadedConfig, output: str | Path | None = None, checkpoint: str | Path | None = None
) -> dict[str, Any]:
    """Search, print what was found on rank 0, and write it. Collective; see `SubnetSearch`."""
    return SubnetSearch(config, output, checkpoint).run()
