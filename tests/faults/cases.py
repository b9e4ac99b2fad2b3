"""The faults of the reliability table. Each case breaks real runs and returns one row."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from efftrain_ds.checkpoint.folder import newest_good, verify
from efftrain_ds.core.errors import CheckpointError

from .fleet import ROOT, Fleet, Outcome, limit_file_size
from .saving_loop import trials
from .setup_of_runs import EVERY, STEPS, config_of, debris, events, final_state, resumed_at
from .small_disk import fill, small_disk


@dataclass
class Row:
    """One line of the table.

    Attributes:
        fault: what was done.
        trials: how often.
        passed: how often everything held.
        lost_steps: most optimizer steps that had to be done again.
        recovery_s: longest time from the new start to the resume.
        problems: what did not hold.
    """

    fault: str
    trials: int = 0
    passed: int = 0
    lost_steps: int | None = None
    recovery_s: float | None = None
    problems: list[str] = field(default_factory=list)

    def trial(self, name: str, problems: list[str], lost: int | None = None, recovery: float | None = None) -> None:
        """Count one trial; no problems means that it passed."""
        self.trials += 1
        self.passed += not problems
        self.problems += [f"{name}: {problem}" for problem in problems]
        if lost is not None:
            self.lost_steps = max(self.lost_steps or 0, lost)
        if recovery is not None:
            self.recovery_s = max(self.recovery_s or 0.0, recovery)


class Suite:
    """Cases by name; `full` runs every trial, else each fault at least once."""

    def __init__(self, folder: Path, full: bool = False):
        self.folder, self.full = folder, full
        self.fleet = Fleet(folder / "logs")
        self._references: dict[str, dict[str, str]] = {}

    @property
    def reference(self) -> dict[str, str]:
        """Final state of the uninterrupted run."""
        return self.reference_of("reference", {})

    def reference_of(self, name: str, methods: dict[str, Any]) -> dict[str, str]:
        """Final state of an uninterrupted run with other methods; `name` is its folder."""
        if name not in self._references:
            output = self.folder / name
            outcome = self.fleet.run(config_of(output, **methods))
            assert outcome.codes == [0, 0], outcome.text[0][-3000:]
            self._references[name] = final_state(output)
        return self._references[name]

    def fresh(self, name: str) -> Path:
        """An empty output folder."""
        output = self.folder / name
        shutil.rmtree(output, ignore_errors=True)
        return output

    def go_on(
        self, output: Path, broken: Outcome, reference: dict[str, str] | None = None, **changes: object
    ) -> tuple[list[str], int, float]:
        """Run again without a fault: it must end with the state of the uninterrupted run."""
        before = time.time()
        again = self.fleet.run(config_of(output, **changes))
        problems = []
        if again.codes != [0, 0]:
            return [f"the second run ended with {again.codes}: {again.text[0][-400:]}"], STEPS, again.seconds
        if final_state(output) != (self.reference if reference is None else reference):
            problems.append("the end differs from the uninterrupted run")
        if debris(output):
            problems.append(f"left behind: {debris(output)}")
        found = events(output, "resume")
        recovery = found[-1]["time"] - before if found else again.seconds
        return problems, broken.last_step - resumed_at(output), recovery

    # -- F1, F2: a rank is killed ------------------------------------------------------------------------------

    def killed(self) -> Row:
        """F1: SIGKILL at seeded places; the run goes on and ends as if nothing had been."""
        row = Row("F1 kill -9 of a rank or of all")
        rng = random.Random(0)
        places = [("step.end:kill,rank=1,hit=5", "step")]
        if self.full:
            places.append(("rebuild.create:kill", "rebuild"))
            places.append(("save.rank_file:kill,rank=0,hit=5", "save"))
            hits = {"step.begin": STEPS, "step.before_update": STEPS, "step.end": STEPS - 1, "save.begin": 4,
                    "save.rank_file": 8, "stage.enter": 2, "rebuild.teardown": 1, "rebuild.restore": 1,
                    "eval.batch": 8}  # fmt: skip
            while len(places) < 30:
                point = rng.choice(list(hits))
                who = rng.choice(["", ",rank=0", ",rank=1"])
                places.append((f"{point}:kill{who},hit={rng.randint(1, hits[point])}", point))
        for number, (fault, point) in enumerate(places):
            output = self.fresh(f"killed-{number}")
            held_out = _HELD_OUT if point == "eval.batch" else {}
            broken = self.fleet.run(config_of(output, **held_out), faults=fault, grace_s=8)
            killed = [r for r, c in enumerate(broken.codes) if c == -signal.SIGKILL and r not in broken.orphans]
            problems = [] if killed else [f"nobody was killed by the fault: {broken.codes}"]
            found, lost, recovery = self.go_on(output, broken, **held_out)
            if lost > EVERY:
                found.append(f"{lost} steps lost, the interval is {EVERY}")
            row.trial(fault, problems + found, lost, recovery)
        if self.full:
            self._killed_inside(row)
        return row

    def _killed_inside(self, row: Row) -> None:
        """Kills inside what only some methods do: a change of masks, the measurements of a search."""
        for name, (fault, methods) in _INSIDE.items():
            output, reference = self.fresh(f"killed-{name}"), self.reference_of(name, methods)
            broken = self.fleet.run(config_of(output, **methods), faults=fault, grace_s=8)
            problems = [] if broken.codes[1] == -signal.SIGKILL else [f"rank 1 ended with {broken.codes[1]}"]
            found, lost, recovery = self.go_on(output, broken, reference, **methods)
            if lost > EVERY:
                found.append(f"{lost} steps lost, the interval is {EVERY}")
            row.trial(fault, problems + found, lost, recovery)

    def killed_while_saving(self) -> Row:
        """F2: killed between the shards, the manifest, the rename and the pointer: always a readable checkpoint."""
        row = Row("F2 killed between shards, manifest, rename, latest; at random moments of saving")
        expected = {
            "save.before_manifest": 3, "save.before_rename": 3, "save.replacing": 3, "save.before_latest": 3,
            "save.end": 6,
        }  # fmt: skip
        chosen = expected if self.full else {k: expected[k] for k in ("save.before_latest",)}
        for point, step in chosen.items():
            output = self.fresh(point.replace(".", "-"))
            broken = self.fleet.run(config_of(output), faults=f"{point}:kill,hit=2", grace_s=8)
            problems = [] if broken.codes[0] == -signal.SIGKILL else [f"rank 0 ended with {broken.codes[0]}"]
            found, lost, recovery = self.go_on(output, broken)
            if resumed_at(output) != step:
                found.append(f"resumed at {resumed_at(output)}, expected {step}")
            row.trial(point, problems + found, lost, recovery)
        if self.full:
            self._killed_in_background(row)
        count = 100 if self.full else 6
        found = trials(self.folder, count)
        row.trials, row.passed, row.problems = row.trials + count, row.passed + count - len(found), row.problems + found
        return row

    def _killed_in_background(self, row: Row) -> None:
        """The same where threads write the checkpoint, or wait for the disk, beside the training."""
        for background, fault in _IN_BACKGROUND:
            output, changes = self.fresh("background"), {"efftrain/checkpoint/background": background}
            broken = self.fleet.run(config_of(output, **changes), faults=fault, grace_s=12)
            killed = [r for r, c in enumerate(broken.codes) if c == -signal.SIGKILL and r not in broken.orphans]
            problems = [] if killed else [f"nobody was killed by the fault: {broken.codes}"]
            found, lost, recovery = self.go_on(output, broken, **changes)
            if resumed_at(output) not in (EVERY, 2 * EVERY):
                found.append(f"resumed at {resumed_at(output)}, a checkpoint of step {EVERY} was complete")
            row.trial(f"background {background}, {fault}", problems + found, lost, recovery)
        for background, point in ((True, "save.rank_file"), ("sync", "save.before_sync")):
            self._ended_beside_a_save(row, background, point)

    def _ended_beside_a_save(self, row: Row, background: bool | str, point: str) -> None:
        """A run that ends by an error of all ranks while a save is running leaves it complete."""
        output = self.fresh("ended")
        changes = {"efftrain/checkpoint/background": background, "efftrain/guard/max_nonfinite": 2}
        config = _poisoned(config_of(output, **changes), {"loss": [EVERY, EVERY + 1]})
        outcome = self.fleet.run(config, faults=f"{point}:sleep=3,rank=1")
        problems = [] if outcome.codes == [76, 76] else [f"ended with {outcome.codes}: {outcome.text[0][-400:]}"]
        found = newest_good(output / "checkpoints")
        if found is None or found.name != f"step-{EVERY:08d}" or debris(output):
            problems.append(f"the save was lost: {found}, {debris(output)}")
        row.trial(f"ended with 76 beside a save in the background ({background})", problems)

    # -- F3: damage ----------------------------------------------------------------------------------------------

    def damaged(self) -> Row:
        """F3: every file, every kind of damage: found, named, the older one taken."""
        row = Row("F3 flipped bit, cut, empty, missing, swapped files")
        self.reference  # noqa: B018
        source = self.folder / "reference" / "checkpoints"
        newest, older = source / f"step-{STEPS:08d}", source / f"step-{STEPS - EVERY:08d}"
        for name in sorted(json.loads((newest / "manifest.json").read_text())["files"]):
            for kind, damage in _DAMAGE.items():
                root = self.fresh("damaged")
                shutil.copytree(newest, root / newest.name)
                shutil.copytree(older, root / older.name)
                (root / "latest").write_text(newest.name + "\n")
                if not damage(root / newest.name, name):
                    continue
                problems = []
                try:
                    verify(root / newest.name)
                    problems.append("loaded silently")
                except CheckpointError as error:
                    if name not in str(error) and kind != "swapped":
                        problems.append(f"does not name the file: {error}")
                if newest_good(root) != root / older.name:
                    problems.append("the older checkpoint was not taken")
                row.trial(f"{kind} {name}", problems)
        for kind, damage in {**_DAMAGE, "no text": _no_text}.items():
            root = self.fresh("damaged")
            shutil.copytree(newest, root / newest.name)
            shutil.copytree(older, root / older.name)
            (root / "latest").write_text(newest.name + "\n")
            if damage(root / newest.name, "manifest.json"):
                problems = [] if newest_good(root) == root / older.name else ["the older checkpoint was not taken"]
                row.trial(f"{kind} manifest.json", problems)
            if damage(root, "latest"):
                problems = [] if newest_good(root) == root / older.name else ["no checkpoint was taken"]
                row.trial(f"{kind} latest", problems)
        return row

    # -- F4: no space --------------------------------------------------------------------------------------------

    def disk_full(self) -> Row:
        """F4: writes fail in the middle of a run; it goes on, and saves again when there is room."""
        row = Row("F4 disk full, with curves and pictures")
        cases = {}
        if self.full:
            cases = {
                "fault point, rank 1": "save.rank_file:oserror,rank=1,hit=3",
                "fault point, manifest": "save.before_manifest:oserror,hit=2",
                "fault point, in the background": "save.rank_file:oserror,rank=0,hit=5",
            }
        for name, fault in cases.items():
            output = self.fresh("disk-full")
            changes = {"efftrain/checkpoint/background": True} if "background" in name else {}
            outcome = self.fleet.run(config_of(output, **_WATCHED, **changes), faults=fault)
            row.trial(name, self._survived(output, outcome))
        output = self.fresh("disk-full-real")
        with small_disk(output, 64) as real:
            if real:
                row.trial("a full file system", self._on_a_full_disk(output))
        if self.full or not real:
            row.trial("RLIMIT_FSIZE", self._limited())
        return row

    def _on_a_full_disk(self, output: Path) -> list[str]:
        """Not a byte can be written from the first checkpoint on until the next one has failed."""

        def squeeze(pids: list[int]) -> None:
            while not (output / "checkpoints" / "latest").exists() and _alive(pids[0]):
                time.sleep(0.02)
            ballast = fill(output)
            while not self.fleet.said("checkpoint not saved") and _alive(pids[0]):
                time.sleep(0.02)
            ballast.unlink()

        outcome = self.fleet.run(config_of(output, **_WATCHED), during=squeeze)
        problems = self._survived(output, outcome)
        for what in ("TensorBoard files", "pictures"):
            if outcome.text[0].count(f"{what} cannot be written, the run goes on") != 1:
                problems.append(f"{what}: one warning expected in {outcome.text[0][-2000:]}")
        if sorted({e["step"] for e in events(output, "log")}) != list(range(1, STEPS + 1)):
            problems.append("events are lost that could have waited")
        return problems

    def _limited(self) -> list[str]:
        """No file can have more bytes than a small checkpoint needs: writing it fails half way."""
        output = self.fresh("disk-full-limit")

        def squeeze(pids: list[int]) -> None:
            first = output / "checkpoints" / f"step-{EVERY:08d}" / "manifest.json"
            failed = 0
            limited = False
            while not failed and _alive(pids[0]):
                if first.exists() and not limited:
                    limited = True
                    for pid in pids:
                        limit_file_size(pid, 200_000)
                failed = len(events(output, "checkpoint_failed"))
                time.sleep(0.02)
            for pid in pids:
                if _alive(pid):
                    limit_file_size(pid, -1)

        return self._survived(output, self.fleet.run(config_of(output, **_WATCHED), during=squeeze))

    def _survived(self, output: Path, outcome: Outcome) -> list[str]:
        problems = [] if outcome.codes == [0, 0] else [f"ended with {outcome.codes}: {outcome.text[0][-400:]}"]
        failed = events(output, "checkpoint_failed")
        if len(failed) != 1 or outcome.text[0].count("checkpoint not saved") != 1:
            problems.append(f"{len(failed)} failures in the journal, one warning expected")
        if not problems and final_state(output) != self.reference:
            problems.append("the end differs from the run with enough space")
        if debris(output):
            problems.append(f"left behind: {debris(output)}")
        for folder in (output / "checkpoints").glob("step-*"):
            verify(folder)
        return problems

    # -- F5: signals ---------------------------------------------------------------------------------------------

    def signalled(self) -> Row:
        """F5: SIGTERM in every phase: saved at most one step later, exit 75 on all ranks, the end is the same."""
        row = Row("F5 SIGTERM at one rank, in evaluation, in a rebuild, beside a save in the background, at all")
        # with the step after which it must be saved at the latest: that of the signal, which the ranks complete
        cases = {"evaluation, rank 1": ("eval.batch:term,rank=1,hit=2", 6)}
        if self.full:
            cases |= {
                "rank 0, twice at once": ("step.begin:term,rank=0,hit=5; step.before_update:term,rank=0,hit=5", 5),
                "rebuild, rank 0": ("rebuild.create:term,rank=0", 7),
                "rank 0 only": ("step.begin:term,rank=0,hit=5", 5),
                "all ranks": ("step.before_update:term,hit=4", 4),
                "SIGINT": ("step.begin:int,rank=1,hit=2", 2),
                "while saving": ("save.rank_file:term,rank=1,hit=1", 4),
                "first step": ("step.begin:term,hit=1", 1),
                "background": ("save.rank_file:sleep=4,rank=0,hit=1; step.begin:term,rank=1,hit=4", 4),
                "background sync": ("save.before_sync:sleep=4,rank=1,hit=1; step.begin:term,rank=0,hit=4", 4),
            }
        for name, (fault, step) in cases.items():
            self._signalled(row, name, fault, step)
        if not self.full:
            return row
        row.trial("the launcher's group", self._launcher_signalled())
        output = self.fresh("signalled-twice")
        again = "step.begin:term,rank=0,hit=5; save.begin:sleep=3.2,hit=2; save.rank_file:term,rank=0,hit=5"
        broken = self.fleet.run(config_of(output), faults=again, grace_s=8)
        problems = [] if broken.codes[0] == 128 + signal.SIGTERM else [f"rank 0 ended with {broken.codes[0]}"]
        found, lost, recovery = self.go_on(output, broken)
        row.trial("again 3 s later", problems + found, lost, recovery)
        return row

    def _signalled(self, row: Row, name: str, fault: str, step: int) -> None:
        output = self.fresh("signalled")
        beside = "background" in name
        changes: dict[str, Any] = _HELD_OUT if "eval" in fault else {}
        if beside:
            changes = {"efftrain/checkpoint/background": "sync" if "sync" in name else True}
        broken, seconds = self._seconds_to_the_end(config_of(output, **changes), fault)
        problems = [] if broken.codes == [75, 75] else [f"ended with {broken.codes}: {broken.text[0][-400:]}"]
        saved = events(output, "preempted")
        if not saved or saved[-1]["step"] > step or seconds > 30:
            problems.append(f"ended {seconds:.1f} s after the signal, saved (step {step} is the last): {saved}")
        if beside and not any(e["step"] == EVERY for e in events(output, "checkpoint")):
            problems.append("no save was running")
        if beside and saved and saved[-1]["seconds"] < 0.5:
            problems.append(f"the save before was complete already: {saved}")
        found, lost, recovery = self.go_on(output, broken, **changes)
        if lost > 0:
            found.append(f"{lost} steps lost")
        row.trial(name, problems + found, max(lost, 0), recovery)

    def _seconds_to_the_end(self, config: dict, fault: str) -> tuple[Outcome, float]:
        """A run in which a rank signals itself, and the seconds from there until all ranks have ended."""
        heard: list[float] = []

        def listen(pids: list[int]) -> None:
            while not self.fleet.said(_HEARD) and any(_alive(pid) for pid in pids):
                time.sleep(0.02)
            heard.append(time.monotonic())

        outcome = self.fleet.run(config, faults=fault, during=listen)
        return outcome, time.monotonic() - heard[0]

    def _launcher_signalled(self) -> list[str]:
        """SIGTERM to DeepSpeed's launcher, which passes it on, and to the ranks at the same time."""
        output = self.fresh("signalled-launcher")
        config = self.folder / "launcher.json"
        config.write_text(json.dumps(config_of(output, **{"efftrain/run/steps": 2000})))
        command = [str(Path(sys.executable).parent / "deepspeed"), "--num_accelerators", "2", "launch/train.py"]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
        environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environment.get('PATH', '')}"
        environment.setdefault("TORCH_EXTENSIONS_DIR", str(ROOT / ".torch_extensions"))
        running = subprocess.Popen(
            [*command, "--ds_config", str(config)],
            cwd=ROOT, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True,
        )  # fmt: skip
        begun = time.monotonic()
        while not events(output, "log") and running.poll() is None and time.monotonic() - begun < 120:
            time.sleep(0.1)
        asked = time.monotonic()
        os.killpg(running.pid, signal.SIGTERM)
        running.wait(60)
        while not events(output, "preempted") and time.monotonic() - asked < 30:
            time.sleep(0.1)
        if not events(output, "preempted"):
            return ["not saved within 30 s"]
        return [] if newest_good(output / "checkpoints") else ["no checkpoint"]

    # -- F6: other worlds and stages -----------------------------------------------------------------------------

    def other_world(self) -> Row:
        """F6: 2 -> 1 -> 2 ranks and ZeRO 2 -> 3 -> 1; every sample once, the end near that of the whole run."""
        row = Row("F6 world 2 -> 1 -> 2, ZeRO 2 -> 3 -> 1")
        still = {**_HELD_OUT, "efftrain/model/drop_path": 0.0, "efftrain/data/randaugment": None}
        still |= {f"efftrain/data/{name}": 0.0 for name in ("erasing", "mixup", "cutmix")}
        whole = self.fresh("world-whole")
        problems = []
        if self.fleet.run(config_of(whole, **still)).codes != [0, 0]:
            problems.append("the whole run failed")
        output = self.fresh("world")
        plan = [(2, 2, "step.begin:term,hit=4"), (1, 3, "step.begin:term,hit=3"), (2, 1, "")]
        steps = []
        for world, stage, fault in plan:
            changes = {**still, "zero_optimization/stage": stage, "train_micro_batch_size_per_gpu": 4}
            outcome = self.fleet.run(config_of(output, **changes), world=world, faults=fault)
            if outcome.codes != [75 if fault else 0] * world:
                problems.append(f"world {world}, stage {stage}: {outcome.codes}: {outcome.text[0][-400:]}")
            steps.append(outcome.last_step)
        if steps != [4, 7, STEPS]:
            problems.append(f"stopped at {steps}, expected [4, 7, {STEPS}]")
        a, b = (events(folder, "eval")[-1:] for folder in (whole, output))
        if not a or not b or abs(a[0]["loss"] - b[0]["loss"]) > 1e-5 * abs(a[0]["loss"]) + 1e-5:
            problems.append(f"held-out loss {[e['loss'] for e in a]} and {[e['loss'] for e in b]}")
        row.trial("2 -> 1 -> 2", problems)
        return row

    # -- F7, F10, F12: a rank goes wrong -------------------------------------------------------------------------

    def nonfinite(self) -> Row:
        """F7: NaN on one rank: the step is applied nowhere and told; after k in a row the run ends with 76."""
        row = Row("F7 NaN in loss or gradient of one rank")
        for kind in ("loss", "gradient") if self.full else ("gradient",):
            output = self.fresh(f"nan-{kind}")
            outcome = self.fleet.run(_poisoned(config_of(output), {kind: [4]}))
            problems = [] if outcome.codes == [0, 0] else [f"ended with {outcome.codes}: {outcome.text[0][-400:]}"]
            told = events(output, "nonfinite")
            if len(told) != 1 or told[0]["step"] != 4 or told[0]["findings"][0]["rank"] != 1:
                problems.append(f"journal: {told}")
            if not list((output / "faults").glob("*")):
                problems.append("no replay file")
            row.trial(kind, problems)
        output = self.fresh("nan-row")
        outcome = self.fleet.run(
            _poisoned(config_of(output, **{"efftrain/guard/max_nonfinite": 3}), {"loss": [4, 5, 6]})
        )
        row.trial("3 in a row", [] if outcome.codes == [76, 76] else [f"ended with {outcome.codes}"])
        return row

    def stalled(self) -> Row:
        """F10: a rank stops answering: all end in time, with stacks and the name of the late one."""
        row = Row("F10 a rank stalls (SIGSTOP, in its own code, in another collective)")
        limit = 4.0
        cases: dict[str, tuple[str, dict[str, Any]]] = {"SIGSTOP": ("step.begin:stop,rank=1,hit=4", {})}
        if self.full:
            cases["in its own code"] = ("step.begin:sleep=1000,rank=1,hit=4", {})
            cases["in another collective"] = ("", {"elsewhere": 3})
        for name, (fault, poison) in cases.items():
            output = self.fresh("stalled")
            config = _poisoned(config_of(output, **{"efftrain/guard/stall_s": limit}), poison)
            outcome = self.fleet.run(config, faults=fault, grace_s=10)
            seconds = time.time() - max((e["time"] for e in events(output, "log")), default=0.0)
            problems = []
            # a stopped process is killed by the others
            expected = [78, -signal.SIGKILL if "stop" in fault else 78]
            if outcome.codes != expected or outcome.orphans:
                problems.append(f"ended with {outcome.codes}, killed by the driver: {outcome.orphans}")
            if seconds > limit + 10:
                problems.append(f"ended {seconds:.1f} s after the last step")
            for rank, code in enumerate(expected):
                if code == 78 and not list(output.rglob(f"stall.rank{rank}.txt")):
                    problems.append(f"no stack dump of rank {rank}")
            said = "".join(outcome.text)
            # in another collective none of two is late, but it is said where each of them waits
            named = "late: rank 1 " in said if not poison else "rank 1 in barrier, called by loss_term" in said
            if not named:
                problems.append("the rank is not named")
            row.trial(name, problems, recovery=seconds)
        return row

    def disagreeing(self) -> Row:
        """F12: ranks decide differently: noticed at the next step, on all of them."""
        row = Row("F12 ranks disagree on a decision")
        output = self.fresh("disagree")
        outcome = self.fleet.run(_poisoned(config_of(output), {"decision": 5}))
        problems = [] if outcome.codes == [77, 77] else [f"ended with {outcome.codes}: {outcome.text[0][-400:]}"]
        if outcome.last_step > 5:
            problems.append(f"noticed only after step {outcome.last_step}")
        row.trial("rank 1 decides otherwise at step 5", problems)
        return row

    def rebuild_fails(self) -> Row:
        """F11: a change of parameters fails half way: the old state is back, and a new start ends as it should."""
        row = Row("F11 rebuild fails half way")
        output = self.fresh("rebuild-fails")
        broken = self.fleet.run(config_of(output), faults="rebuild.restore:error")
        problems = [] if broken.codes == [2, 2] else [f"ended with {broken.codes}"]
        if "the state before the rebuild is restored" not in broken.text[0]:
            problems.append("does not say that the state is restored")
        found, lost, recovery = self.go_on(output, broken)
        row.trial("after the new engine was created", problems + found, lost, recovery)
        return row

    # -- F9, F13, F14: what the run is given ---------------------------------------------------------------------

    def malicious(self) -> Row:
        """F9: pickles in a checkpoint are not run, whatever file they pretend to be."""
        row = Row("F9 malicious pickle in a checkpoint")
        self.reference  # noqa: B018
        for name in ("rank-00000.safetensors", "state.safetensors", "mp_rank_00_model_states.pt"):
            output = self.fresh("malicious")
            source = self.folder / "reference" / "checkpoints" / f"step-{STEPS - EVERY:08d}"
            folder = output / "checkpoints" / source.name
            shutil.copytree(source, folder)
            canary = self.folder / "canary"
            _pickle_bomb(folder / name, canary, into_manifest=name.endswith("safetensors"))
            outcome = self.fleet.run(config_of(output))
            problems = ["the code in the pickle ran"] if canary.exists() else []
            expected = [2, 2] if name.endswith("safetensors") else [0, 0]
            if outcome.codes != expected:
                problems.append(f"ended with {outcome.codes}: {outcome.text[0][-400:]}")
            row.trial(name, problems)
            if not self.full:
                break
        return row

    def changed_config(self) -> Row:
        """F13: what may change on a resume is listed, what may not is refused with a difference."""
        row = Row("F13 resume with a changed configuration")
        output = self.fresh("changed")
        self.fleet.run(config_of(output), faults="step.begin:term,hit=5")
        cases = {
            "run/seed": (1, "efftrain.run.seed: 0 -> 1"),
            "model/kwargs/num_heads": (4, "efftrain.model.kwargs.num_heads: 2 -> 4"),
            "methods/autoprog/depth_start": (0.75, "efftrain.methods.autoprog.depth_start: 0.5 -> 0.75"),
        }
        for key, (value, text) in list(cases.items())[: None if self.full else 1]:
            outcome = self.fleet.run(config_of(output, **{f"efftrain/{key}": value}))
            problems = [] if outcome.codes == [2, 2] else [f"ended with {outcome.codes}"]
            if text not in outcome.text[0]:
                problems.append(f"{text!r} not in {outcome.text[0][-600:]}")
            row.trial(key, problems)
        outcome = self.fleet.run(config_of(output, **{"efftrain/observe/eval_every": "50%", "gradient_clipping": 0.9}))
        problems = [] if outcome.codes == [0, 0] else [f"ended with {outcome.codes}: {outcome.text[0][-400:]}"]
        for text in ("gradient_clipping: 1.0 -> 0.9", "efftrain.observe.eval_every"):
            if text not in outcome.text[0]:
                problems.append(f"{text} is not listed")
        row.trial("allowed", problems)
        return row

    def surroundings(self) -> Row:
        """F14: a loader process is killed; the output folder cannot be written."""
        row = Row("F14 loader process killed, output folder not writable")

        def kill_worker(pids: list[int]) -> None:
            while _alive(pids[1]):
                for child in _children(pids[1]) if events(output, "start") else []:
                    with suppress(ProcessLookupError):
                        os.kill(child, signal.SIGKILL)
                time.sleep(0.02)

        output = self.fresh("loader")
        outcome = self.fleet.run(config_of(output, **{"efftrain/data/workers": 1}), during=kill_worker, grace_s=8)
        said = "\n".join(outcome.text)
        problems = [] if 0 not in outcome.codes and "worker" in said else [f"ended with {outcome.codes}: {said[-400:]}"]
        row.trial("loader process", problems)
        blocked = self.folder / "a-file"
        blocked.write_text("")
        outcome = self.fleet.run(config_of(blocked / "run"))
        problems = [] if outcome.codes == [2, 2] else [f"ended with {outcome.codes}: {outcome.text[0][-400:]}"]
        if "a-file" not in outcome.text[0] or "Traceback" in outcome.text[0]:
            problems.append("the folder is not named in one clear line")
        row.trial("output folder", problems)
        return row


CASES: dict[str, Callable[[Suite], Row]] = {
    "F1": Suite.killed,
    "F2": Suite.killed_while_saving,
    "F3": Suite.damaged,
    "F4": Suite.disk_full,
    "F5": Suite.signalled,
    "F6": Suite.other_world,
    "F7": Suite.nonfinite,
    "F9": Suite.malicious,
    "F10": Suite.stalled,
    "F11": Suite.rebuild_fails,
    "F12": Suite.disagreeing,
    "F13": Suite.changed_config,
    "F14": Suite.surroundings,
}


_HELD_OUT = {"efftrain/data/val": "bundled:fashion_mnist/val", "efftrain/data/eval_batch": 125}
_WATCHED: dict[str, Any] = {"efftrain/observe/tensorboard": ..., "efftrain/observe/images_every": ...}
"""Curves and pictures, as without any setting."""
_HEARD = "press again to abort"
"""What a rank writes when it has got a signal."""
_SEARCH = {"stages": 2, "search": {"epochs": 0.012, "probe_samples": 24, "cost": "macs"}}
_INSIDE: dict[str, tuple[str, dict[str, Any]]] = {
    "svite": (
        "mask.update:kill,rank=1,hit=2",
        {"efftrain/methods": {"svite": {"density": 0.5, "update_every": "2st"}}},
    ),
    "search": ("search.measure:kill,rank=1,hit=8", {"efftrain/methods": {"autoprog": _SEARCH}}),
}
"""Kills inside what only some methods do: the fault and the methods."""
_IN_BACKGROUND: list[tuple[bool | str, str]] = [
    (True, "save.rank_file:kill,rank=1,hit=3"),
    (True, "save.rank_file:kill,rank=0,hit=6"),
    (True, "save.before_manifest:kill,hit=2"),
    (True, "save.before_latest:kill,hit=2"),
    ("sync", "save.rank_file:kill,rank=1,hit=3"),
    ("sync", "save.before_sync:kill,rank=1,hit=2"),
    ("sync", "save.before_manifest:kill,hit=2"),
    ("sync", "save.before_latest:kill,hit=2"),
]
"""Kills in the second save of a run that saves beside the training: how, and where."""


def _poisoned(config: dict, what: dict) -> dict:
    config["efftrain"]["plugins"] = ["tests.faults.poison"]
    config["efftrain"]["methods"]["poison"] = what
    return config


def _alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] not in "ZX"
    except OSError:
        return False


def _children(pid: int) -> list[int]:
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rsplit(")", 1)[1].split()
        except OSError:
            continue
        if int(fields[1]) == pid and fields[0] not in "ZX":
            found.append(int(path.parent.name))
    return found


def _flip(folder: Path, name: str) -> bool:
    data = bytearray((folder / name).read_bytes())
    data[len(data) // 2] ^= 1
    (folder / name).write_bytes(data)
    return True


def _cut(folder: Path, name: str) -> bool:
    data = (folder / name).read_bytes()
    (folder / name).write_bytes(data[: len(data) // 2])
    return True


def _empty(folder: Path, name: str) -> bool:
    (folder / name).write_bytes(b"")
    return True


def _missing(folder: Path, name: str) -> bool:
    (folder / name).unlink()
    return True


def _swap(folder: Path, name: str) -> bool:
    if "rank-00000" not in name:
        return False
    first, second = folder / name, folder / name.replace("00000", "00001")
    kept = first.read_bytes()
    first.write_bytes(second.read_bytes())
    second.write_bytes(kept)
    return True


def _no_text(folder: Path, name: str) -> bool:
    (folder / name).write_bytes(b"\xff\xfe\x00")
    return True


_DAMAGE = {"flipped bit": _flip, "cut": _cut, "empty": _empty, "missing": _missing, "swapped": _swap}


def _pickle_bomb(path: Path, canary: Path, *, into_manifest: bool) -> None:
    """A file whose unpickling writes the canary; with a manifest entry that fits it, as an attacker would make it."""
    import hashlib
    import pickle

    class Bomb:
        def __reduce__(self):
            return (os.system, (f"touch {canary}",))

    canary.unlink(missing_ok=True)
    data = pickle.dumps(Bomb())
    path.write_bytes(data)
    if into_manifest:
        manifest = path.parent / "manifest.json"
        document = json.loads(manifest.read_text())
        document["files"][path.name] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        manifest.write_text(json.dumps(document))
