"""Supernets on the bundled images: {random, complexity-aware} x {uniform, performance-aware}, and what a search finds.

    python benchmarks/elastic_accuracy.py [--seeds 1] [--epochs 12] [--ranks 2] [--budgets 520000,880000] [--out F]

A part of the training images is kept apart for the search, the test images judge. All sub-networks run with the weights
that they inherit (the average over the training), no one is trained again; batch normalisation of each is estimated on
training images. For each supernet:

- the smallest and the largest sub-network of the space;
- for each budget (a level: MACs from L to L + window) random sub-networks, the same ones for all supernets;
- for each budget the sub-network that evolution found on the images kept apart, and, where asked for, the one that
  as many random candidates gave.

The difference of the searched one is to the mean of the random ones on the test images.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

from arms import FIXED, chosen
from common import ROOT, own_environment, spread, store
from curriculum import run

from efftrain_ds.core.errors import ConfigError

KEY = "efftrain.methods.elasticvit"
RANDOM = [f"{KEY}.walk=random", f"{KEY}.smallest=1"]
AWARE = [f"{KEY}.walk=adjacent", f"{KEY}.smallest=3"]
UNIFORM = [f"{KEY}.preference=uniform", f"{KEY}.bank=null"]
PERFORMANCE = [f"{KEY}.preference=wide_shallow"]  # the bank is on as in the file
ARMS: dict[str, tuple[str, list[str]]] = {
    "random_uniform": ("random levels, one smallest; any sub-network", [*RANDOM, *UNIFORM]),
    "random_performance": ("random levels, one smallest; preferred and banked sub-networks", [*RANDOM, *PERFORMANCE]),
    "complexity_uniform": ("neighbouring levels, three smallest; any sub-network", [*AWARE, *UNIFORM]),
    "complexity_performance": (
        "neighbouring levels, three smallest; preferred and banked sub-networks",
        [*AWARE, *PERFORMANCE],
    ),
}
"""Name of every arm: what it is, and its changes to the configuration."""
TEST = "bundled:fashion_mnist/val"
CLASSES = 10
CHUNKS = 500
"""Of 4,096 random sub-networks each, until a budget is given up."""


def judge(config: str, folder: Path, overrides: list[str], options: dict[str, Any]) -> dict[str, Any]:
    """Everything that is asked of one supernet; runs in a process of its own.

    Args:
        config: the configuration.
        folder: of the run.
        overrides: its changes.
        options: "budgets", "draws", "evaluations", "algorithms", "seed", "threads".

    Returns:
        "fixed": top-1 by name; "budgets": a table each; "seconds" of the parts.
    """
    import torch

    from efftrain_ds.config.loader import load_config
    from efftrain_ds.core.rng import numpy_rng
    from efftrain_ds.methods.elasticvit.search import Scorer
    from efftrain_ds.train_subnet import SubnetSearch

    def searched(macs: Sequence[int], algorithm: str) -> SubnetSearch:
        search = options["search"] | {"macs": list(macs), "algorithm": algorithm, "seed": options["seed"]}
        text = f"{KEY}.search={json.dumps(search)}"
        name = f"{algorithm}-{macs[0]}"
        return SubnetSearch(load_config(ROOT / config, overrides=[*overrides, text], world=1), folder / name, folder)

    began = time.monotonic()
    with contextlib.redirect_stdout(io.StringIO()):
        first = searched([1, 10**12], "random")
        torch.set_num_threads(options["threads"])
        space, window = first.space, first.levels.window
        judging = Scorer(first.net, first.ready, first.scorer.calibration, first.labelled(TEST))
        fixed = {"smallest": judging.score(space.min()).top1, "largest": judging.score(space.max()).top1}
        budgets, spent = [], {"search": 0.0}
        for macs in options["budgets"]:
            limits = [macs, macs + window]
            rng = numpy_rng(options["seed"], "draws", macs)
            drawn = draw(space, limits, options["draws"], rng, first.levels.formula)
            found: dict[str, Any] = {"macs": limits, "drawn": []}
            for one in drawn:
                test, own = judging.score(one), first.scorer.score(one)
                costs = {"macs": space.macs(one, first.levels.formula), "params": space.params(one)}
                scores = {"top1": test.top1, "loss": test.loss, "search_top1": own.top1, "search_loss": own.loss}
                found["drawn"].append({**costs, **scores})
            for algorithm in options["algorithms"]:
                start = time.monotonic()
                search = searched(limits, algorithm)
                torch.set_num_threads(options["threads"])
                best = search.run()
                spent["search"] += time.monotonic() - start
                score = judging.score(space.parse(best["config"]))
                keys = ("config", "macs", "params", "search_top1", "search_loss", "evaluations")
                found[algorithm] = {"top1": score.top1, "loss": score.loss, **{key: best[key] for key in keys}}
            budgets.append(found)
    spent["all"] = time.monotonic() - began
    return {"fixed": fixed, "budgets": budgets, "judge_seconds": spent}


def draw(space: Any, limits: Sequence[int], count: int, rng: Any, formula: str = "exact") -> list[Any]:
    """Different random sub-networks, uniform over the space within limits of MACs.

    Raises:
        ConfigError: nothing lies there, or too little to be met.
    """
    from efftrain_ds.methods.elasticvit.limits import macs_limit

    limit = macs_limit(space, limits[1], limits[0], formula)
    limit.check(space)
    found: dict[Any, None] = {}
    for _ in range(CHUNKS):
        codes = space.sample_codes(rng, 4096)
        for row in codes[limit.inside(codes)]:
            found.setdefault(space.config(row))
        if len(found) >= count:
            return list(found)[:count]
    raise ConfigError(
        f"MACs from {limits[0]:,} to {limits[1]:,}: {len(found)} sub-networks in {CHUNKS * 4096:,} random ones of the "
        f"space; {count} are needed"
    )


def check_budgets(config: str, overrides: list[str], options: dict[str, Any]) -> None:
    """Refuse budgets in which too few sub-networks lie, before anything is trained.

    Raises:
        ConfigError: names the first such budget, or no supernet is trained.
    """
    from efftrain_ds.config.loader import load_config
    from efftrain_ds.core.rng import numpy_rng
    from efftrain_ds.methods.elasticvit.config import ElasticViTConfig, levels_of
    from efftrain_ds.models.elastic.named import space_of

    loaded = load_config(ROOT / config, overrides=overrides, world=1)
    model, settings = loaded.efftrain.model, loaded.methods.get("elasticvit")
    space = space_of(model.name, model.kwargs, model.num_classes or CLASSES)
    if space is None or not isinstance(settings, ElasticViTConfig):
        raise ConfigError(f"--config: {config} trains no supernet")
    levels = levels_of(settings, space)
    for macs in options["budgets"]:
        try:
            draw(space, [macs, macs + levels.window], options["draws"], numpy_rng(0, "draws", macs), levels.formula)
        except ConfigError as error:
            raise ConfigError(f"--budgets: {error}") from error


def main() -> None:
    """Train and judge all arms for all seeds, store the result, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="ds_configs/smoke_elasticvit_fmnist.json")
    parser.add_argument("--epochs", type=float, default=12)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--ranks", type=int, default=2, help="of the training, and processes that judge")
    parser.add_argument("--arms", default=",".join(ARMS), help=f"which of {', '.join(ARMS)}")
    parser.add_argument("--budgets", default="520000,880000,1500000", help="least MACs of each; a level's window above")
    parser.add_argument("--draws", type=int, default=5, help="random sub-networks for each budget")
    parser.add_argument("--evaluations", type=int, default=150, help="of each search")
    parser.add_argument(
        "--kept", type=int, default=1000, help="training images kept apart for the search, of 10 classes"
    )
    parser.add_argument("--calibrate", type=int, default=512, help="training images for batch normalisation")
    parser.add_argument("--score", default="loss", help="what the search compares: loss or top1")
    parser.add_argument("--algorithms", default="evolution", help="evolution, random or both")
    parser.add_argument("--set", dest="overrides", action="append", default=[])
    parser.add_argument("--out")
    args = parser.parse_args()
    names = chosen(parser, args, ARMS)
    rows: dict[str, list[dict[str, Any]]] = {arm: [] for arm in names}
    start = time.monotonic()
    os.environ.update(own_environment())  # for the processes that judge
    with tempfile.TemporaryDirectory() as scratch:
        hold_out = json.dumps({"per_class": args.kept // CLASSES})
        fixed = [*FIXED, f"efftrain.run.epochs={args.epochs:g}", "efftrain.data.val=null"]
        fixed.append(f"efftrain.data.hold_out={hold_out}")
        search = {"images": args.kept // CLASSES * CLASSES, "calibrate": args.calibrate, "score": args.score}
        search["evaluations"] = args.evaluations
        options = {"budgets": [int(text) for text in args.budgets.split(",")], "draws": args.draws, "search": search}
        options |= {"algorithms": args.algorithms.split(","), "threads": 1}
        try:
            check_budgets(args.config, [*fixed, *args.overrides], options)
        except ConfigError as error:
            parser.error(str(error))
        for seed in range(args.seeds):
            turn = seed % len(names)
            order = [*names[turn:], *names[:turn]]  # no arm always comes first
            changes = {arm: [*fixed, f"efftrain.run.seed={seed}", *args.overrides, *ARMS[arm][1]] for arm in order}
            folders = {arm: Path(scratch) / f"{arm}-{seed}" for arm in order}
            for arm in order:
                found = run(args.config, args.ranks, folders[arm], changes[arm])
                rows[arm].append({key: found[key] for key in ("seconds", "wall")})
                print(f"seed {seed} {arm:<24}trained in {found['wall']:6.1f} s", flush=True)
            with ProcessPoolExecutor(args.ranks, multiprocessing.get_context("spawn")) as pool:
                jobs = {
                    arm: pool.submit(judge, args.config, folders[arm], changes[arm], options | {"seed": seed})
                    for arm in order
                }
                for arm, job in jobs.items():
                    rows[arm][-1] |= (found := job.result())
                    seconds = found["judge_seconds"]["all"]
                    print(f"seed {seed} {arm:<24}judged in {seconds:7.1f} s  {_words(found)}", flush=True)
    settings = {key: value for key, value in vars(args).items() if key not in ("out", "overrides")}
    arms = {arm: {"about": ARMS[arm][0], **_summary(found)} for arm, found in rows.items()}
    result = {**settings, "set": args.overrides, "seconds": time.monotonic() - start, "arms": arms, "runs": rows}
    path = store("elastic_accuracy", " ".join(["python", *sys.argv]), result, args.out)
    shown = path.relative_to(ROOT) if path.is_relative_to(ROOT) else path
    print(f"\n{_markdown(arms)}\n\nin {result['seconds'] / 60:.1f} minutes, written to {shown}")


def _searched(budget: dict[str, Any]) -> list[str]:
    """Names of the searches of a budget."""
    return [name for name in ("evolution", "random") if name in budget]


def _words(found: dict[str, Any]) -> str:
    """One supernet in a line."""
    words = [f"smallest {100 * found['fixed']['smallest']:.1f}"]
    for budget in found["budgets"]:
        mean = statistics.mean(one["top1"] for one in budget["drawn"])
        best = ", ".join(f"{100 * budget[name]['top1']:.1f}" for name in _searched(budget))
        words.append(f"{budget['macs'][0] / 1e3:.0f} K: {100 * mean:.1f} -> {best}")
    return "  ".join([*words, f"largest {100 * found['fixed']['largest']:.1f}"])


def _summary(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Means over the seeds, in shares; spreads of the gains."""
    summary: dict[str, Any] = {"seconds": spread([one["seconds"] for one in runs])}
    summary |= {name: statistics.mean(one["fixed"][name] for one in runs) for name in ("smallest", "largest")}
    summary["budgets"] = []
    for same in zip(*(one["budgets"] for one in runs), strict=True):
        tops = [[one["top1"] for one in budget["drawn"]] for budget in same]
        means = [statistics.mean(found) for found in tops]
        row: dict[str, Any] = {"macs": same[0]["macs"], "random_top1": statistics.mean(means)}
        row["random_stdev"] = statistics.mean(statistics.stdev(found) if len(found) > 1 else 0.0 for found in tops)
        for name in _searched(same[0]):
            scores = [budget[name]["top1"] for budget in same]
            row[name] = {
                "top1": statistics.mean(scores),
                "gain": spread([score - mean for score, mean in zip(scores, means, strict=True)]),
                "drawn_beaten": statistics.mean(
                    statistics.mean(score > top for top in found) for score, found in zip(scores, tops, strict=True)
                ),
            }
        summary["budgets"].append(row)
    return summary


def _markdown(arms: dict[str, dict[str, Any]]) -> str:
    """Top-1 in percent: random ones of a budget as mean +- standard deviation, and the searched one with its gain."""
    first = next(iter(arms.values()))
    heads = ["Supernet", "Smallest"]
    for row in first["budgets"]:
        low, high = (f"{macs / 1e3:,.0f}" for macs in row["macs"])
        heads += [f"{low}-{high} K MACs, random", *(f"{name} search" for name in _searched(row))]
    lines = ["| " + " | ".join([*heads, "Largest"]) + " |", "|" + "---|" * (len(heads) + 1)]
    for name, arm in arms.items():
        cells = [f"{name}: {arm['about']}", f"{100 * arm['smallest']:.1f}"]
        for row in arm["budgets"]:
            cells.append(f"{100 * row['random_top1']:.1f} +- {100 * row['random_stdev']:.1f}")
            for one in _searched(row):
                gain = {key: 100 * value for key, value in row[one]["gain"].items()}
                words = f"{gain['median']:+.1f}"
                if gain["max"] > gain["min"]:
                    words += f", {gain['min']:+.1f} to {gain['max']:+.1f}"
                cells.append(f"{100 * row[one]['top1']:.1f} ({words})")
        lines.append("| " + " | ".join([*cells, f"{100 * arm['largest']:.1f}"]) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
