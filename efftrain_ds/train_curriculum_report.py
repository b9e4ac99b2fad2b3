"""What a curriculum search shows, and the small files that it keeps."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .core.errors import CheckpointError
from .core.text import align
from .methods.efficienttrain.search import CurriculumSearch, Outcome


def _percent(value: float | None) -> str:
    return "diverged" if value is None else f"{100 * value:.2f}%"


def outcome_text(outcome: Outcome, full: int) -> str:
    """The schedule in words."""
    if outcome.sizes is None:
        return f"the plain baseline, {full} px throughout"
    text = f"stages of {', '.join(map(str, outcome.sizes))} px"
    accuracies = f" (baseline {_percent(outcome.baseline)})" if outcome.baseline is not None else ""
    return text + (f", top1 {_percent(outcome.accuracy)}{accuracies}" if outcome.accuracy is not None else "")


def decision_line(decision: Mapping[str, Any]) -> str:
    """A decision as one line of the screen; "" for those that another line says."""
    event = decision["event"]
    if event == "baseline":
        return f"decide   baseline {_percent(decision['accuracy'])}, needed {_percent(decision['needed'])}"
    if event == "candidate":
        verdict = "" if "accepted" not in decision else ", accepted" if decision["accepted"] else ", refused"
        found = _percent(decision["accuracy"])
        return f"decide   stage {decision['stage']} at {decision['bandwidth']} px: {found}{verdict}"
    if event == "stage":
        return f"decide   stage {decision['stage']} takes {decision['bandwidth']} px"
    if event == "limit":
        return f"decide   the next training ({decision['cost']:.3g} times the baseline) is beyond the limit"
    if event == "check":
        verdict = "accepted" if decision["accepted"] else "refused"
        return f"decide   the whole schedule: {_percent(decision['accuracy'])}, {verdict}"
    return ""


def decision_table(decisions: list[dict[str, Any]]) -> list[str]:
    """All candidates with what was decided."""
    rows = [["stage", "px", "top1", "cost", "decision"]]
    taken = {d["stage"]: d["bandwidth"] for d in decisions if d["event"] == "stage"}
    for d in decisions:
        if d["event"] == "candidate":
            accepted = d.get("accepted")
            mark = "taken" if accepted is None and taken.get(d["stage"]) == d["bandwidth"] else ""
            mark = mark if accepted is None else "accepted" if accepted else "refused"
            rows.append([str(d["stage"]), str(d["bandwidth"]), _percent(d["accuracy"]), f"{d['cost']:.3f}", mark])
        elif d["event"] in ("baseline", "check"):
            cost = f"{d.get('cost', 1.0):.3f}"
            mark = "" if d["event"] == "baseline" else "accepted" if d["accepted"] else "refused"
            rows.append([d["event"], "", _percent(d["accuracy"]), cost, mark])
    return align(rows, left=(0, 4))


def report_of(search: CurriculumSearch, outcome: Outcome, **facts: float) -> dict[str, Any]:
    """Result, costs, all measurements and decisions, for JSON.

    Args:
        search: at its end.
        outcome: of it.
        facts: counts and costs by name.
    """
    return {
        "algorithm": search.config.algorithm,
        "schedule": outcome.sizes,
        "top1": outcome.accuracy,
        "baseline_top1": outcome.baseline,
        "why": outcome.why,
        "complete": outcome.complete,
        **facts,
        "results": search.results,
        "decisions": search.decisions,
    }


def read_state(path: Path) -> dict[str, Any] | None:
    """State of a search; None where there is none.

    Raises:
        CheckpointError: it cannot be read.
    """
    if not path.is_file():
        return None
    try:
        state = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: {error}; remove the folder, or name another one") from error
    if not isinstance(state, dict) or not {"origin", "data", "search"} <= state.keys():
        raise CheckpointError(f"{path}: not the state of a curriculum search; remove it, or name another folder")
    return state
