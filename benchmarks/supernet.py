"""Supernet training: a step of several passes against the same passes written directly on DeepSpeed.

    python benchmarks/supernet.py [--stages 1] [--ranks 2] [--rounds 10] [--steps 5] [--out F]

Model and space are those of the bundled smoke run. All engines live in the same processes, start from the same weights,
see the same images and run the same sub-networks, which are drawn before; rounds take turns, and the ratio is taken
round by round, of wall clock and of the first rank's processor time. "passes" is our step with the arithmetic of the
direct one, so that the weights end equal: sampling, losses, sum of gradients. The others add, one after the other, what
DeepSpeed does not do. The case with the memory bank is a lower bound: the bank starts empty and holds few entries so
early, so it scores each new sub-network, but is seldom scored again as a whole.
"""

from __future__ import annotations

import argparse
import copy
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from common import ROOT, launcher, own_environment, spread, store

SMOKE = ROOT / "ds_configs" / "smoke_elasticvit_fmnist.json"
AIM = 1.05
BANK = "and the memory bank"
LOWER = "a lower bound: the bank starts empty"
EQUAL: dict[str, Any] = {"bank": None, "agc": None, "decay_unused": True}
CASES: dict[str, tuple[bool, dict[str, Any]]] = {
    "passes": (False, EQUAL),
    "and the guard": (True, EQUAL),
    "and unused blocks stay as they are": (True, {**EQUAL, "decay_unused": False}),
    "and clipping by unit": (True, {**EQUAL, "decay_unused": False, "agc": 0.1}),
    BANK: (True, {"decay_unused": False, "agc": 0.1}),
}
"""Whether there is a guard, and the method's settings."""
BATCH = 64


class Direct:
    """The same passes as one would write them: DeepSpeed's accumulation over the sub-networks of a step."""

    def __init__(self, model: Any, config: dict[str, Any], modes: tuple[str, ...], smoothing: float) -> None:
        import deepspeed

        config = {**config, "gradient_accumulation_steps": len(modes)}
        parameters = model.parameters()
        self.engine, *_ = deepspeed.initialize(model=model, model_parameters=parameters, config=config)
        self.modes, self.smoothing = modes, smoothing

    def step(self, images: Any, labels: Any, subnets: list[Any]) -> None:
        """Forward, loss and backward of each sub-network, one update."""
        import torch.nn.functional as F

        from efftrain_ds.methods.elasticvit.losses import alpha_div

        seen = []
        for mode, subnet in zip(self.modes, subnets, strict=True):
            logits = self.engine(images, subnet)
            if mode == "smallest":
                loss = alpha_div(logits, sum(seen) / len(seen))
            else:
                loss = F.cross_entropy(logits.float(), labels, label_smoothing=self.smoothing)
                seen.append(logits.detach().float().softmax(-1))
            self.engine.backward(loss * len(self.modes))  # DeepSpeed divides by its accumulation
            self.engine.step()


class Ours:
    """The method in a loop of one's own."""

    def __init__(self, model: Any, config: dict[str, Any], method: dict[str, Any], steps: int, guard: bool) -> None:
        import efftrain_ds

        section = {"run": {"steps": steps}, "methods": {"elasticvit": method}, **({} if guard else {"guard": None})}
        config = {**config, "gradient_accumulation_steps": 1, "efftrain": section}
        parameters = model.parameters()
        self.engine, *_ = efftrain_ds.initialize(model=model, model_parameters=parameters, config=config)

    def step(self, images: Any, labels: Any, subnets: list[Any]) -> None:
        """As in docs/embedding.md; the method draws the sub-networks itself."""
        from efftrain_ds.core.batch import Batch

        engine = self.engine
        batch = engine.prepare_batch(Batch(images=images, labels=labels))
        for _ in engine.each_pass():
            loss = engine.loss(engine(batch.images), batch)
            engine.backward(loss)
            engine.step()
        drawn = [one.config for one in engine.methods[0].drawn]
        assert not subnets or drawn == subnets, "the sub-networks are not those of the direct loop"


def subnets_of(engine: Any, steps: int) -> list[list[Any]]:
    """The sub-networks that a method without a memory bank will draw, by step; a copy of it draws them."""
    twin, schedule, drawn = copy.deepcopy(engine.methods[0]), engine.schedule, []
    twin._told = True  # nothing is to be written down
    for step in range(steps):
        twin.on_step_start(SimpleNamespace(step=step, progress=schedule.progress(step)))
        drawn.append([one.config for one in twin.drawn])
    return drawn


def difference(first: Any, second: Any) -> float:
    """Largest difference of two modules' parameters, which may be partitioned."""
    from efftrain_ds.zero.access import gather_full

    worst = 0.0
    with gather_full(list(first.parameters())), gather_full(list(second.parameters())):
        for a, b in zip(first.parameters(), second.parameters(), strict=True):
            worst = max(worst, float((a.detach() - b.detach()).abs().max()))
    return worst


def worker(stage: int, rounds: int, steps: int, out: str) -> None:
    """One rank: rounds of all cases in turn, interleaved."""
    import logging

    import torch
    import torch.distributed as dist

    from efftrain_ds.models.adapters import create_model

    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    document = json.loads(SMOKE.read_text())
    section = document["efftrain"]
    side, method = section["data"]["resolution"], section["methods"]["elasticvit"]
    config = {
        "train_micro_batch_size_per_gpu": BATCH,
        "gradient_clipping": 0.0,
        "steps_per_print": 1000000000,
        "optimizer": document["optimizer"],
        "zero_optimization": {"stage": stage},
    }
    model = create_model("elasticvit", resolution=side, num_classes=10, **section["model"]["kwargs"])
    total = (rounds + 1) * steps
    engines: dict[str, Any] = {
        name: Ours(copy.deepcopy(model), copy.deepcopy(config), {**method, **changes}, total, guard)
        for name, (guard, changes) in CASES.items()
    }
    passes = engines["passes"].engine
    settings = passes.methods[0].config
    engines = {"direct": Direct(model, config, settings.modes, settings.label_smoothing), **engines}
    drawn, device = subnets_of(passes, total), passes.device
    generator = torch.Generator().manual_seed(dist.get_rank())
    images = torch.randn(BATCH, 3, side, side, generator=generator).to(device)
    labels = torch.randint(10, (BATCH,), generator=generator).to(device)

    def go(name: str, turn: int) -> tuple[float, float]:
        dist.barrier()
        if device.type == "cuda":
            torch.cuda.synchronize()
        begin, busy = time.perf_counter(), time.process_time()
        for number in range(turn * steps, (turn + 1) * steps):
            # those of the memory bank depend on its scores
            engines[name].step(images, labels, [] if name == BANK else drawn[number])
        if device.type == "cuda":
            torch.cuda.synchronize()
        return (time.perf_counter() - begin) / steps, (time.process_time() - busy) / steps

    times: dict[str, list[tuple[float, float]]] = {name: [] for name in engines}
    for turn in range(rounds + 1):
        for name in list(engines) if turn % 2 == 0 else list(engines)[::-1]:
            found = go(name, turn)
            if turn:  # the first round warms up
                times[name].append(found)
    worst = difference(engines["direct"].engine.module, passes.module)
    if dist.get_rank() == 0:
        Path(out).write_text(json.dumps({"times": times, "difference": worst}))


def measure(stage: int, ranks: int, rounds: int, steps: int) -> dict[str, Any]:
    """One ZeRO stage in processes of its own: steps a second, and ratios to the direct loop."""
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch) / "times.json"
        command = [*launcher(ranks), str(Path(__file__)), "--worker", str(out), "--stages", str(stage)]
        command += ["--rounds", str(rounds), "--steps", str(steps)]
        done = subprocess.run(command, cwd=ROOT, env=own_environment(), capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f"ZeRO {stage}: {done.stdout[-2000:]}\n{done.stderr[-2000:]}")
        found = json.loads(out.read_text())
    times = found["times"]
    result: dict[str, Any] = {"largest_difference_of_weights": found["difference"], "cases": {}}
    for name, rows in times.items():
        pairs = list(zip(rows, times["direct"], strict=True))
        result["cases"][name] = {
            "steps_per_second": spread([1 / wall for wall, _ in rows]),
            "ratio": spread([own[0] / direct[0] for own, direct in pairs]),
            "ratio_cpu": spread([own[1] / direct[1] for own, direct in pairs]),
        }
    return result


def main() -> None:
    """Launch the ranks for each stage, store and print the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stages", default="1", help="ZeRO stages, e.g. 0,1,3")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--steps", type=int, default=5, help="of each case in a round")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--local_rank", type=int, default=-1, help=argparse.SUPPRESS)
    parser.add_argument("--out")
    args = parser.parse_args()
    stages = [int(text) for text in args.stages.split(",")]
    if args.worker:
        worker(stages[0], args.rounds, args.steps, args.worker)
        return
    result: dict[str, Any] = {"ranks": args.ranks, "rounds": args.rounds, "steps": args.steps, "zero": {}}
    result["notes"] = {BANK: LOWER}
    for stage in stages:
        result["zero"][stage] = found = measure(stage, args.ranks, args.rounds, args.steps)
        print(f"ZeRO {stage}: largest difference of the weights {found['largest_difference_of_weights']:.1e}")
        for name, row in found["cases"].items():
            ratio = row["ratio"]["median"]
            text = f"  {name:36s}{row['steps_per_second']['median']:7.2f} steps/s  x{ratio:.3f}"
            text += f"  processor time x{row['ratio_cpu']['median']:.3f}"
            notes = {"passes": f"  ({'within' if ratio <= AIM else 'ABOVE'} x{AIM})", BANK: f"  ({LOWER})"}
            print(text + notes.get(name, ""), flush=True)
    print(f"written to {store('supernet', ' '.join(['python', *sys.argv]), result, args.out)}")


if __name__ == "__main__":
    main()
