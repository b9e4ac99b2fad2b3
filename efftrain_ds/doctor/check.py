"""One check and its result. A check that raises becomes a cross with the exception's text and stops no other."""

from __future__ import annotations

import contextlib
import io
import logging
import os
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..core.ranks import local_world

if TYPE_CHECKING:
    from ..config.loader import LoadedConfig
    from ..cost.plan import PricedPlan

OK, WARN, FAIL, NONE = "ok", "warn", "fail", "none"


@dataclass(frozen=True)
class Check:
    """A line of the table.

    Attributes:
        name: what was looked at.
        status: "ok", "warn", "fail", or "none" where there is nothing to check.
        text: what was found.
        fix: what to do about it; given for every "fail".
        data: the numbers behind the text, for bug reports.
    """

    name: str
    status: str
    text: str
    fix: str = ""
    data: dict[str, Any] = field(default_factory=dict)


@dataclass
class Setup:
    """What the checks look at.

    Attributes:
        world: ranks of the run.
        config: the configuration, or None.
        path: its file.
        error: why there is none although a file was named.
        problem: why there is no plan although there is a configuration.
    """

    world: int
    config: LoadedConfig | None = None
    path: str | None = None
    error: Exception | None = None
    problem: Exception | None = None

    @cached_property
    def gpus(self) -> int:
        """GPUs that torch sees."""
        import torch

        return torch.cuda.device_count() if torch.cuda.is_available() else 0

    @cached_property
    def local_ranks(self) -> int:
        """Ranks on this machine."""
        if "LOCAL_WORLD_SIZE" in os.environ or "LOCAL_SIZE" in os.environ:
            return local_world()
        return min(self.world, self.gpus) if self.gpus else self.world

    @cached_property
    def plan(self) -> PricedPlan | None:
        """The priced plan, or None where it cannot be made (then `problem` says why)."""
        if self.config is None:
            return None
        from ..planning import make_plan

        try:
            return make_plan(self.config, world=self.world)
        except Exception as error:
            self.problem = error
            return None

    @cached_property
    def output(self) -> Path:
        """Output folder of the run; the current folder without a configuration."""
        return Path(self.config.efftrain.run.output) if self.config is not None else Path(".")


Function = Callable[[Setup], "Check | Iterable[Check]"]


def run_checks(setup: Setup, functions: Iterable[tuple[str, Function]]) -> Iterator[Check]:
    """Results one after another; what libraries print meanwhile is dropped."""
    for name, function in functions:
        try:
            with quiet():
                found = function(setup)
                results = [found] if isinstance(found, Check) else list(found)
        except Exception as error:
            text = f"{type(error).__name__}: {error}".strip()
            fix = "report this with the output of: efftrain doctor --json"
            results = [Check(name, FAIL, f"the check itself failed: {_short(text)}", fix)]
        yield from results


def _short(text: str, limit: int = 300) -> str:
    text = " ".join(text.split())
    return text if len(text) <= limit else text[: limit - 4] + " ..."


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Drop what libraries print and warn of."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with (
            contextlib.redirect_stdout(io.StringIO()),
            contextlib.redirect_stderr(io.StringIO()),
            warnings.catch_warnings(),
        ):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def verdict(checks: Iterable[Check], what: str) -> tuple[bool, str]:
    """Whether a run can be started, and the last line of the table."""
    checks = list(checks)
    crosses = [c.name for c in checks if c.status == FAIL]
    warned = [c.name for c in checks if c.status == WARN]
    more = f", {len(warned)} warning{'s' if len(warned) != 1 else ''} ({', '.join(warned)})" if warned else ""
    if not crosses:
        return True, f"ready for {what}{more}"
    count = f"{len(crosses)} problem{'s' if len(crosses) != 1 else ''}"
    return False, f"not ready for {what}: {count} ({', '.join(crosses)}){more}"
