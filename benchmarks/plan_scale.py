"""A dry run at the size of ImageNet-22K: 14.2 M samples in 6,500 shards, 8 nodes of 8 ranks, no picture and no device.

    python benchmarks/plan_scale.py [--samples N] [--shards N] [--nodes N] [--gpus N] [--folder F] [--out F]

The shards are empty files of the right length, the index is drawn; all code that a rank runs between its start and its
first batch is the real one. Each figure of a rank comes from a process of its own. Exits with 1 where a limit breaks.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from common import ROOT, own_environment, store

LIMITS = {"plan_s": 5.0, "resume_s": 5.0, "peak_gb": 1.0}
"""Seconds for the order of an epoch and for a resume, and GB (10^9 bytes) of a rank's largest resident size.

The seconds are CPU time, which other jobs on the machine do not change; wall time and load are in the result, too.
"""
CONFIG = ROOT / "ds_configs" / "et_vit_base_in22k.json"
BATCH, MICRO = 4096, 64
EPOCH = 37.613  # where the resume goes to, in epochs


def make(folder: Path, samples: int, shards: int, seed: int = 0) -> None:
    """A manifest and an index of that size, and shards that take no space on the disk."""
    from efftrain_ds.data.labels import label_set
    from efftrain_ds.data.manifest import INDEX, ROW, Manifest, Shard

    rng = np.random.default_rng(seed)
    synsets = label_set("imagenet-22k").synsets
    weights = rng.integers(900, 1100, shards).astype(np.float64)  # shards of unequal length
    ends = np.round(np.cumsum(weights) / weights.sum() * samples).astype(np.int64)
    counts = np.diff(np.concatenate([[0], ends]))
    hasher, listed = hashlib.sha256(), []
    with (folder / INDEX).open("wb") as stream:
        for number, count in enumerate(counts.tolist()):
            rows = np.zeros(count, ROW)
            rows["shard"] = number
            rows["size"] = np.clip(rng.lognormal(11.3, 0.5, count), 4_000, 2_000_000)
            blocks = (rows["size"].astype(np.int64) + 511) // 512 * 512 + 1536  # header, picture, label
            rows["offset"] = np.cumsum(blocks) - blocks + 512
            rows["label"] = rng.integers(0, len(synsets), count)
            rows["width"], rows["height"] = rng.integers(200, 800, (2, count))
            name, length = f"train-{number:06d}.tar", int(blocks.sum()) + 1024
            with (folder / name).open("wb") as shard:
                shard.truncate(length)
            listed.append(Shard(name, length, hashlib.sha256(name.encode()).hexdigest(), count))
            data = rows.tobytes()
            hasher.update(data)
            stream.write(data)
    Manifest(folder, "train", synsets, tuple(listed), samples, hasher.hexdigest()).write()


class Clock:
    """Wall and CPU seconds of the parts of a process, and its resident size after each."""

    def __init__(self) -> None:
        self.parts: dict[str, dict[str, float]] = {}
        self._last = (time.perf_counter(), time.process_time())

    def part(self, name: str) -> None:
        """What happened since the last call."""
        now = (time.perf_counter(), time.process_time())
        self.parts[name] = {
            "wall_s": round(now[0] - self._last[0], 3),
            "cpu_s": round(now[1] - self._last[1], 3),
            "resident_mb": round(memory()["VmRSS"] / 1e6),
        }
        self._last = now

    def seconds(self, *names: str, kind: str = "wall_s") -> float:
        """Sum over parts."""
        return round(sum(self.parts[name][kind] for name in names), 3)


def memory() -> dict[str, int]:
    """Resident bytes of this process: now, largest, and without file pages that processes share."""
    rows = (line.split() for line in Path("/proc/self/status").read_text().splitlines())
    return {row[0][:-1]: int(row[1]) * 1024 for row in rows if row[0] in ("VmRSS:", "VmHWM:", "RssAnon:")}


def _loader(manifest: Any, rank: int, world: int) -> Any:
    from efftrain_ds.data.loader import TicketSpec, TrainLoader

    return TrainLoader(
        manifest,
        seed=0,
        rank=rank,
        world=world,
        spec_at=lambda _: TicketSpec(BATCH, MICRO),
        resolution=224,
        workers=0,
        streams=None,
    )


def rank_process(folder: Path, world: int, resume: bool, labels: str | None) -> dict[str, Any]:
    """What one rank does before its first batch."""
    clock = Clock()
    import efftrain_ds.train_setup  # noqa: F401  (all that a training process imports)
    from efftrain_ds.config.loader import load_config
    from efftrain_ds.data.labels import apply_labels
    from efftrain_ds.data.manifest import load_manifest
    from efftrain_ds.planning import make_plan

    clock.part("imports")
    manifest = load_manifest(folder)
    digest = manifest.digest
    clock.part("manifest")
    if labels is not None:
        manifest = apply_labels(manifest, target=labels, missing="drop")
        kept = manifest.kept
        clock.part("label_map")
    loader = _loader(manifest, world - 1, world)
    clock.part("shards_checked")
    if resume:
        state = {**loader.state_dict(), "consumed": int(EPOCH * loader.order.samples_per_epoch) // BATCH * BATCH}
        clock.part("state")
        loader.load_state_dict(state)
    spec = loader.spec_at(loader.consumed)
    first = [ticket.ids.tolist() for ticket in loader.tickets(loader.consumed, spec)]
    clock.part("first_step")
    loader.manifest.table[np.asarray(first[0])]
    for step in range(1, 200):
        list(loader.tickets(loader.consumed + step * BATCH, spec))
    clock.part("next_199_steps")
    edge = loader.order.samples_per_epoch * (loader.consumed // loader.order.samples_per_epoch + 1) - BATCH // 2
    loader.order.ids(edge, BATCH)  # a step over the end of the epoch: two orders are in memory
    clock.part("next_epoch")
    steps = None
    if not resume and labels is None:
        steps = make_plan(load_config(CONFIG, world=world), world=world).schedule.total_steps
        clock.part("priced_plan")
    found = memory()
    start = ("manifest", *(["label_map"] if labels else []), "shards_checked", "first_step")
    return {
        "digest": digest[:16],
        "kept": kept if labels is not None else manifest.samples,
        "parts": clock.parts,
        "plan_s": clock.seconds("first_step", kind="cpu_s"),
        "plan_wall_s": clock.seconds("first_step"),
        "start_s": clock.seconds(*start, kind="cpu_s"),
        "start_wall_s": clock.seconds(*start),
        "peak_gb": round(found["VmHWM"] / 1e9, 3),
        "private_gb": round(found["RssAnon"] / 1e9, 3),
        "steps_of_the_run": steps,
        "consumed": loader.consumed,
    }


def sharding(folder: Path, nodes: int, gpus: int) -> dict[str, Any]:
    """Every ticket of every rank in one epoch: each sample once, and how the work is spread."""
    from efftrain_ds.data.manifest import load_manifest

    world = nodes * gpus
    manifest = load_manifest(folder)
    loader = _loader(manifest, 0, world)
    n, spec = loader.order.samples_per_epoch, loader.spec_at(0)
    seen = np.zeros(n, np.uint8)
    samples = np.zeros(world, np.int64)
    volume = np.zeros(world, np.int64)
    touched = np.zeros((world, len(manifest.shards)), bool)
    together = []
    sizes, shard_of = manifest.table["size"].astype(np.int64), manifest.table["shard"].astype(np.int64)
    steps = -(-n // BATCH)
    for step in range(steps):
        in_step = []
        for rank in range(world):
            loader.rank = rank
            for ticket in loader.tickets(step * BATCH, spec):
                ids = ticket.ids[ticket.positions < n]
                seen[ids] += 1
                samples[rank] += len(ids)
                volume[rank] += int(sizes[ids].sum())
                touched[rank, shard_of[ids]] = True
                in_step.append(np.unique(shard_of[ids]))
        if step % 100 == 0:
            together.append(len(np.unique(np.concatenate(in_step))))
    per_node = touched.reshape(nodes, gpus, -1).any(axis=1).sum(axis=1)
    middle = steps // 2 * BATCH
    return {
        "nodes": nodes,
        "ranks": world,
        "streams": loader.order.streams,
        "steps": steps,
        "every_sample_once": bool((seen == 1).all()),
        "samples_per_rank": [int(samples.min()), int(samples.max())],
        "gb_per_rank": [round(float(volume.min()) / 1e9, 2), round(float(volume.max()) / 1e9, 2)],
        "shards_per_rank": [int(touched.sum(axis=1).min()), int(touched.sum(axis=1).max())],
        "shards_per_node": [int(per_node.min()), int(per_node.max())],
        "shards_in_one_step_of_all_ranks": [min(together), max(together)],
        "same_samples_with_other_worlds": all(_same(folder, loader, middle, w) for w in (1, 7 * 8, 16, 128)),
    }


def _same(folder: Path, loader: Any, position: int, world: int) -> bool:
    """Whether 4 steps from a position on take the same samples on another number of ranks."""
    batch = BATCH if BATCH % world == 0 else world * MICRO
    from efftrain_ds.data.loader import TicketSpec

    own_rank, own_world = loader.rank, loader.world
    loader.world, found = world, {}
    for step in range(4):
        for loader.rank in range(world):
            for ticket in loader.tickets(position + step * batch, TicketSpec(batch, min(MICRO, batch // world))):
                found |= dict(zip(ticket.positions.tolist(), ticket.ids.tolist(), strict=True))
    loader.rank, loader.world = own_rank, own_world
    ids = loader.order.ids(position, 4 * batch).tolist()
    return found == {position + i: row for i, row in enumerate(ids)}


def _in_a_process(*arguments: str) -> dict[str, Any]:
    command = [sys.executable, __file__, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=own_environment(), cwd=ROOT, check=False)
    if done.returncode:
        raise SystemExit(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> int:
    """Parse the arguments, run every part, store the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=14_197_122)
    parser.add_argument("--shards", type=int, default=6_500)
    parser.add_argument("--nodes", type=int, default=8)
    parser.add_argument("--gpus", type=int, default=8)
    parser.add_argument("--folder", type=Path, help="where to make the index (350 MB); default: a temporary folder")
    parser.add_argument("--out")
    parser.add_argument("--part", choices=("rank", "resume", "labels", "sharding"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    world = args.nodes * args.gpus
    if args.part is not None:
        if args.part == "sharding":
            found = sharding(args.folder, args.nodes, args.gpus)
        else:
            labels = "imagenet-12k" if args.part == "labels" else None
            found = rank_process(args.folder, world, args.part == "resume", labels)
        print(json.dumps(found))
        return 0
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.folder or Path(temporary)
        start = time.perf_counter()
        make(folder, args.samples, args.shards)
        made = round(time.perf_counter() - start, 1)
        common = ("--nodes", str(args.nodes), "--gpus", str(args.gpus), "--folder", str(folder))
        parts = {part: _in_a_process(*common, "--part", part) for part in ("rank", "resume", "labels", "sharding")}
        size = (folder / "index.bin").stat().st_size
    ranks = [parts[part] for part in ("rank", "resume", "labels")]
    worst = {
        "plan_s": max(part["plan_s"] for part in ranks),
        "resume_s": parts["resume"]["start_s"],
        "plan_wall_s": max(part["plan_wall_s"] for part in ranks),
        "resume_wall_s": parts["resume"]["start_wall_s"],
        "peak_gb": max(part["peak_gb"] for part in ranks),
    }
    even = parts["sharding"]["samples_per_rank"]
    holds = {name: worst[name] < limit for name, limit in LIMITS.items()}
    holds["every_sample_once"] = parts["sharding"]["every_sample_once"]
    holds["balanced"] = even[1] - even[0] <= BATCH // world
    holds["same_samples_with_other_worlds"] = parts["sharding"]["same_samples_with_other_worlds"]
    result = {
        "samples": args.samples,
        "shards": args.shards,
        "index_mb": round(size / 1e6),
        "made_s": made,
        "load": [round(load, 1) for load in os.getloadavg()],
        "limits": LIMITS,
        "worst": worst,
        "holds": holds,
        **parts,
    }
    path = store("plan_scale", "python benchmarks/plan_scale.py", result, args.out)
    print(json.dumps({"worst": worst, "holds": holds, "sharding": parts["sharding"]}, indent=1))
    print(path)
    return 0 if all(holds.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
