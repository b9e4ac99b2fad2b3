"""Parameter groups by name: which parameter belongs where, before and after a change of parameters."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from ..core.errors import ModelError

_NUMBER = re.compile(r"\d+")
BIRTH = "@"
"""Separates the name of a group from the step at which a part of it was born."""


@dataclass(frozen=True)
class GroupPlan:
    """Groups of trainable parameters in order.

    Attributes:
        hypers: initial hyper-parameters of each original group, by its name (what the user gave, without "params").
        members: parameter names of each group that exists now, by group name, in order.
        home: original group of every parameter of the model before any method changed it, frozen ones included.
    """

    hypers: Mapping[str, Mapping[str, Any]]
    members: Mapping[str, tuple[str, ...]]
    home: Mapping[str, str]

    @classmethod
    def of(cls, model: nn.Module, given: Any) -> GroupPlan:
        """From what the user passes as ``model_parameters`` (None, parameters, or group dictionaries).

        Raises:
            ModelError: a parameter that is not in the model, or two groups of one name.
        """
        names = {id(p): name for name, p in model.named_parameters()}
        items = list(model.parameters()) if given is None else list(given)
        groups = items if items and isinstance(items[0], dict) else [{"params": items}]
        hypers: dict[str, dict[str, Any]] = {}
        home: dict[str, str] = {}
        for number, group in enumerate(groups):
            label = str(group.get("name", f"group{number}" if len(groups) > 1 else "all"))
            if label in hypers:
                raise ModelError(f'model_parameters: two groups have the name "{label}"')
            if BIRTH in label:
                raise ModelError(f'model_parameters: the group name "{label}" must not contain "{BIRTH}"')
            hypers[label] = {k: v for k, v in group.items() if k not in ("params", "name")}
            for parameter in group["params"]:
                if id(parameter) not in names:
                    raise ModelError(f'model_parameters: group "{label}" holds a parameter that is not in the model')
                home[names[id(parameter)]] = label
        left = [name for name, p in model.named_parameters() if p.requires_grad and name not in home]
        if left:
            raise ModelError(f"model_parameters: {', '.join(left[:3])} is trainable but in no group; freeze or add it")
        return cls(hypers, {}, home)

    def first(self, model: nn.Module) -> GroupPlan:
        """The plan for `model` (its trainable parameters) at the start of a run."""
        return self.changed(model, {}, {}, step=0)

    def changed(
        self, model: nn.Module, sources: Mapping[str, str | None], new: Mapping[str, bool], *, step: int
    ) -> GroupPlan:
        """The plan after a change.

        Args:
            model: the module (or blueprint) after it.
            sources: old parameter that a new one takes its values from; names not in it keep theirs.
            new: True for parameters whose optimizer state starts at zero; they form groups ``name@step``, because the
                parameters of one group share a step count. At step 0 nothing is older than they are.
            step: optimizer step of the change.
        """
        old = {name: label for label, members in self.members.items() for name in members}
        members: dict[str, list[str]] = {}
        order = {name: i for i, (name, _) in enumerate(model.named_parameters())}
        trainable = {name for name, p in model.named_parameters() if p.requires_grad}
        if set(old) == trainable and not sources and not any(new.values()):
            return self  # the user's own order stays
        for name in sorted(trainable, key=order.__getitem__):
            source = sources.get(name) or name
            label = old.get(source)
            if label is None or new.get(name):
                parent = self.home.get(name) or self.home.get(source)
                parent = parent or (self._parent(old[source]) if source in old else self._alike(name))
                fresh = bool(self.members) and step > 0
                label = f"{parent}{BIRTH}{step}" if fresh else parent
            members.setdefault(label, []).append(name)
        known = [label for label in (*self.hypers, *self.members) if label in members]
        ordered = dict.fromkeys([*known, *members])
        return GroupPlan(self.hypers, {label: tuple(members[label]) for label in ordered}, self.home)

    def _parent(self, label: str | None) -> str:
        if label is None:
            return next(iter(self.hypers))
        return label.split(BIRTH)[0]

    def _alike(self, name: str) -> str:
        """Group of a tensor without a past: that of the first one of the same name up to numbers, else the first."""
        pattern = _NUMBER.sub("#", name)
        return next((g for n, g in self.home.items() if _NUMBER.sub("#", n) == pattern), next(iter(self.hypers)))

    def parents(self) -> dict[str, str]:
        """Original group of each group."""
        return {label: self._parent(label) for label in self.members}

    def for_optimizer(self, model: nn.Module) -> list[dict[str, Any]]:
        """Group dictionaries with "name" and "params", as ``deepspeed.initialize`` takes them."""
        named = dict(model.named_parameters())
        return [
            {**self.hypers[self._parent(label)], "name": label, "params": [named[n] for n in members]}
            for label, members in self.members.items()
        ]

    def to_plain(self) -> list[list[Any]]:
        """For a checkpoint: [group, [parameter names]]."""
        return [[label, list(members)] for label, members in self.members.items()]

    def with_members(self, plain: Iterable[Iterable[Any]]) -> GroupPlan:
        """The plan whose groups are what `to_plain` returned."""
        return GroupPlan(self.hypers, {str(label): tuple(names) for label, names in plain}, self.home)
