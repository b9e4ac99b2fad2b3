"""The ranks of a run: how many there are, and how they tell each other small things.

No rank may leave the others waiting in a collective, so what can fail on one rank alone is tried there, and `agree`
then raises on all of them.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any, TypeVar

import torch.distributed as dist

from .errors import DesyncError, EffTrainError

T = TypeVar("T")


def local_world() -> int:
    """Ranks on this node: torchrun's LOCAL_WORLD_SIZE, DeepSpeed's LOCAL_SIZE, else the whole world on one node."""
    for name in ("LOCAL_WORLD_SIZE", "LOCAL_SIZE", "WORLD_SIZE"):
        value = os.environ.get(name)
        if value:
            return max(1, int(value))
    return 1


def rank() -> int:
    """This process's rank; 0 without a process group."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """Number of ranks; 1 without a process group."""
    return dist.get_world_size() if dist.is_initialized() else 1


def gather(value: T) -> list[T]:
    """The value of every rank, on all ranks. Collective; for small picklable things."""
    if world_size() == 1:
        return [value]
    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


def from_first(action: Callable[[], T]) -> T:
    """What `action` returns on rank 0, on all ranks; what it raises there is raised on all. Collective.

    Raises:
        Exception: whatever `action` raised.
    """
    answer: list[Any] = [None, None]
    if rank() == 0:
        try:
            answer[0] = action()
        except Exception as error:  # whatever it is, the other ranks wait for an answer
            answer[1] = error
    if world_size() > 1:
        dist.broadcast_object_list(answer, src=0)
    if answer[1] is not None:
        raise answer[1]
    return answer[0]


def from_first_only(make: Callable[[], T]) -> T | None:
    """What `make` returns on rank 0, None on the others; an error there is raised on all. Collective."""
    made: list[T] = []
    from_first(lambda: made.append(make()))
    return made[0] if made else None


def text_of(error: Exception) -> str:
    """An error in words; the class is named where the text alone may not say enough."""
    return str(error) if isinstance(error, EffTrainError) else f"{type(error).__name__}: {error}"


def problem_of(action: Callable[[], Any]) -> str | None:
    """Run `action`; what went wrong in it, in words, to be agreed on, or None."""
    try:
        action()
    except Exception as error:
        return text_of(error)
    return None


def problems(problem: str | None) -> list[str]:
    """What went wrong on any rank, each with its rank's number where there are several. Collective."""
    found = gather(problem)
    if len(found) == 1:
        return [text for text in found if text]
    return [f"rank {i}: {text}" for i, text in enumerate(found) if text]


def agree(problem: str | None, error: type[EffTrainError], what: str = "") -> None:
    """Raise on all ranks if any rank has a problem; a text that all of them have is said once. Collective.

    Args:
        problem: this rank's, or None.
        error: class of what is raised.
        what: what was tried, comes first in the text.

    Raises:
        EffTrainError: of class `error`, with the texts and, unless all ranks have one, the numbers of the ranks.
    """
    found = gather(problem)
    texts = list(dict.fromkeys(text for text in found if text))
    if texts:
        where = [str(i) for i, text in enumerate(found) if text]
        ranks = "" if len(where) == len(found) else f"(rank {', '.join(where)} of {len(found)})"
        head = " ".join(part for part in (what, ranks) if part)
        raise error(f"{head}: {'; '.join(texts)}" if head else "; ".join(texts))


def on_every_rank(action: Callable[[], T]) -> T:
    """What `action` returns on this rank; what it raises on any rank is raised on all. Collective.

    Raises:
        Exception: what `action` raised here; elsewhere the same error of the package, else an `EffTrainError`.
    """
    made: list[T] = []
    own: Exception | None = None
    try:
        made.append(action())
    except Exception as error:  # whatever it is, the other ranks wait for this one
        own = error
    found = gather(None if own is None else (type(own), text_of(own)))
    if own is not None:
        raise own
    for number, problem in enumerate(found):
        if problem is not None:
            kind, text = problem
            raise (kind if issubclass(kind, EffTrainError) else EffTrainError)(f"rank {number}: {text}")
    return made[0]


def same_on_all(decision: str, what: str) -> str:
    """The ranks' common decision. Collective.

    Args:
        decision: of this rank, in a few words or as a digest.
        what: subject of the error, e.g. "efftrain.methods.svite: the masks differ ... at step 5".

    Raises:
        DesyncError: on all ranks, with what each has decided.
    """
    found = gather(decision)
    if len(set(found)) > 1:
        raise DesyncError(f"{what}: {found}")
    return decision
