"""Configuration of SViTE: the value of ``efftrain.methods.svite``."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, model_validator

from ...core.strict import StrictModel
from ...core.timeline import PlanSpec
from .block import BlockRule
from .nm import NMRule
from .presets import PRESETS, Preset, TopKastRule
from .rules import ElementRule, Rule
from .schedule import check_interval, interval_steps

KEY = "efftrain.methods.svite"
OWN_INTERVAL = ("svite", "svite_reference")
"""Presets whose interval is a share of the run, `SHARE`: the paper's number of updates at any length."""
SHARE = "1%"
_FORMS = ("svite", "svite_reference", "rigl", "set", "itop", "granet")
"""Presets that are a schedule around a plain exchange, so that blocks and N:M can take it over."""
_OF_FORM = {"block": ("block",), "nm": ("n", "m", "two_way")}


class SViTEConfig(StrictModel):
    """Sparse training from the first step to the last at a fixed number of live weights."""

    density: float | None = Field(None, gt=0, le=1)
    """Kept share of the maskable weights; null = 0.5, for N:M it is always N / M."""
    form: Literal["element", "block", "nm"] = "element"
    """What lives or dies together: single entries, square blocks, or entries of which N of M neighbours live."""
    block: Literal[16, 32, 64] = 64
    """Form "block": side of a block."""
    n: int = Field(2, gt=0)
    """Form "nm": live entries of a group."""
    m: int = Field(4, gt=1)
    """Form "nm": neighbours along the input that make a group."""
    two_way: bool = False
    """Form "nm": 4 x 4 tiles with 2 live entries in every row and column, so that the transposed weight is 2:4 too."""
    scope: Literal["all", "encoder"] | None = None
    """"all" weights of linear layers and 2-D convolutions, classifier and patch embedding included, or the four
    matrices of every block; null = "all" for entries, "encoder" for blocks and N:M."""
    exclude: list[str] = []
    """Names of modules or weights that stay dense, e.g. ["head"]."""
    distribution: Literal["erk", "uniform", "er", "custom"] = "erk"
    """How the density is spread over the layers."""
    densities: str | None = None
    """Distribution "custom": JSON file with the density of every layer that takes a mask, e.g.
    {"blocks.0.attn.qkv": 0.5, "head": 1}; 1 leaves a layer dense."""
    rule: Literal["svite", "svite_reference", "rigl", "set", "itop", "granet", "srigl", "topkast", "mest"] = "svite"
    """Which method's rule and schedule; the keys below that are null are its own."""
    start_density: float | None = Field(None, gt=0, le=1)
    """Rule "granet": density at the first step; null = 0.5, or `density` where that is more."""
    growth: Literal["gradient", "random", "mixed"] | None = None
    """What new entries are chosen by: the dense gradient of the step, chance, or part of each."""
    random_share: float = Field(0.5, ge=0, le=1)
    """Growth "mixed": the random part."""
    exclude_just_dropped: bool = False
    """Do not grow what the same update dropped (otherwise such an entry keeps its value)."""
    update_every: Annotated[str, AfterValidator(check_interval)] | None = None
    """Interval of the updates, e.g. "20000st", "2ep", "1%"; null = 1 % of the run for SViTE, else the rule's own."""
    end: float | None = Field(None, gt=0, le=1)
    """Share of the run after which the masks stay; null = 0.8 for SViTE."""
    alpha: Literal["paper", "reference", "constant"] | None = None
    """Course of the exchanged share: to 0 at the end of the updates, to 0.005 at the end of the run, or constant."""
    initial: float | None = Field(None, ge=0, le=1)
    """Exchanged share of a layer's live entries at step 0; null = 0.5 for SViTE."""
    moments: Literal["reset", "dense"] | None = None
    """Optimizer state of dead entries: zero, or that of the dense gradient (as the SViTE code leaves it)."""
    rescale_init: bool = False
    """Divide the first weights of each layer by the root of its density."""
    seed: int | None = None
    """Seed of the masks; null = that of the run."""

    @model_validator(mode="after")
    def _fits(self) -> SViTEConfig:
        given = self.model_fields_set
        for form, keys in _OF_FORM.items():
            for key in keys:
                if form != self.form and key in given and getattr(self, key) != type(self).model_fields[key].default:
                    raise ValueError(f'"{key}" belongs to form "{form}", found form "{self.form}"')
        if self.form != "element" and self.rule not in _FORMS:
            raise ValueError(
                f'rule "{self.rule}" is defined on single entries; form "{self.form}" takes {", ".join(_FORMS)}'
            )
        if self.form == "nm":
            self._check_nm()
        self._check_custom()
        if self.start_density is not None and self.rule != "granet":
            raise ValueError(f'"start_density" belongs to rule "granet", found rule "{self.rule}"')
        if self.rule in ("srigl", "topkast"):
            for key in ("growth", "exclude_just_dropped"):
                if getattr(self, key):
                    raise ValueError(f'"{key}" does not apply to rule "{self.rule}", which has its own')
        if self.rule == "topkast" and self.moments is not None:
            raise ValueError('"moments" does not apply to rule "topkast": its dead entries keep their weights')
        if self.random_share != 0.5 and self.growth != "mixed":
            raise ValueError(f'"random_share" belongs to growth "mixed", found {self.growth!r}')
        preset_of(self).density(self.target, 100)  # refuses a start below the target
        return self

    def _check_nm(self) -> None:
        if self.n >= self.m:
            raise ValueError(f"N:M is {self.n}:{self.m}, allowed: N below M")
        if self.two_way and (self.n, self.m) != (2, 4):
            raise ValueError(f'"two_way" is for 2:4, found {self.n}:{self.m}')
        if self.density is not None and abs(self.density - self.n / self.m) > 1e-9:
            raise ValueError(
                f"{self.n}:{self.m} keeps {self.n / self.m:g}, found density {self.density:g}; leave it out"
            )
        if self.rule == "granet":
            raise ValueError('rule "granet" changes the density, which N:M cannot')
        if self.distribution != "erk":
            raise ValueError(f'N:M is equal in every layer: leave "distribution" out, found "{self.distribution}"')
        if self.growth == "mixed" or self.exclude_just_dropped:
            raise ValueError('"growth" of N:M is "gradient" or "random", and it never grows what it drops')

    def _check_custom(self) -> None:
        if (self.distribution == "custom") != (self.densities is not None):
            raise ValueError(
                'distribution "custom" and "densities" (a JSON file) belong together, found distribution '
                f'"{self.distribution}" and densities {self.densities!r}'
            )
        if self.densities is None:
            return
        if self.density is not None:
            raise ValueError(f'"densities" has that of every layer; leave "density" out, found {self.density:g}')
        if self.rule == "granet":
            raise ValueError('rule "granet" changes the density, which "densities" fixes')

    @property
    def target(self) -> float:
        """Density at the end of the run; 1 for "custom", where a file has those of the layers."""
        if self.distribution == "custom":
            return 1.0
        if self.form == "nm":
            return self.n / self.m
        return 0.5 if self.density is None else self.density

    @property
    def masked_scope(self) -> str:
        """The scope in force."""
        return self.scope or ("all" if self.form == "element" else "encoder")


def preset_of(config: SViTEConfig) -> Preset:
    """The rule's preset with what the configuration says otherwise.

    Raises:
        ConfigError: values that the rule refuses.
    """
    kwargs: dict[str, Any] = {}
    if config.rule == "granet":
        start = max(0.5, config.target) if config.start_density is None else config.start_density
        kwargs = {"start_density": start}
    preset = PRESETS[config.rule](**kwargs)
    changes: dict[str, Any] = {"rule": _rule(config, preset.rule)}
    for key, field in (("end", "end_share"), ("alpha", "alpha"), ("initial", "initial"), ("moments", "moments")):
        if getattr(config, key) is not None:
            changes[field] = getattr(config, key)
    return replace(preset, **changes)


def interval_of(config: SViTEConfig, preset: Preset, total: int, spec: PlanSpec) -> int:
    """Steps between two updates.

    Args:
        config: of the method.
        preset: of `preset_of`.
        total: optimizer steps of the run.
        spec: of the run.
    """
    text = config.update_every
    if text is None and config.rule in OWN_INTERVAL:
        text = SHARE
    if text is not None:
        return interval_steps(text, spec, total)
    if preset.every is not None:
        return preset.every
    per_epoch = spec.samples / spec.batch if spec.samples else float(total)
    return max(1, math.floor((preset.every_epochs or 1.0) * per_epoch + 0.5))


def _rule(config: SViTEConfig, rule: Rule) -> Rule:
    if not isinstance(rule, ElementRule):
        return rule
    grow = config.growth or rule.grow
    if config.form == "nm":
        return NMRule(config.n, config.m, config.two_way, grow)
    changes = {"grow": grow, "random_share": config.random_share, "exclude_just_dropped": config.exclude_just_dropped}
    if config.form == "block":
        return BlockRule(config.block, **changes)  # type: ignore[arg-type]
    return replace(rule, **changes)  # type: ignore[arg-type]


def keeps_dead_weights(rule: Rule) -> bool:
    """True where weights outside of the mask stay as they are."""
    return isinstance(rule, TopKastRule)
