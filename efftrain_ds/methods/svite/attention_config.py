"""Configuration of attention sparsity: the value of ``efftrain.methods.svite_attention``."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AfterValidator, Field, model_validator

from ...core.strict import StrictModel
from .schedule import check_interval

KEY = "efftrain.methods.svite_attention"
_OF_PATTERN = {
    "learned": (
        *("density", "protect", "growth", "exclude_just_dropped", "update_every", "end", "alpha", "initial", "seed"),
    ),
    "random": ("density", "protect", "seed"),
    "window": ("window",),
    "strided": ("stride", "local"),
}


class AttentionConfig(StrictModel):
    """Compute only a part of the attention, in blocks of queries and keys; learned per head, or a fixed pattern."""

    pattern: Literal["learned", "window", "strided", "random"] = "learned"
    """"learned": blocks are dropped and grown while training, as many in every head, always. The others stay:
    "window" around each patch, a band with every `stride`-th block, or blocks drawn once. Fixed patterns keep the
    blocks of class and register tokens, and fit themselves to stages with fewer tokens."""
    density: float | None = Field(None, gt=0, le=1)
    """Patterns "learned" and "random": live share of the blocks of every head; null = 0.5."""
    block: Literal[16, 32, 64, 128] = 64
    """Side of a block in tokens. Kernels skip blocks of 64 and more at full speed; smaller ones are for experiments."""
    protect: list[Literal["prefix", "diagonal"]] = ["prefix"]
    """Patterns "learned" and "random": blocks that always live. "prefix" are all with a class or register token among
    their queries or keys, "diagonal" those that a block of tokens has with itself."""
    window: int = Field(9, ge=1)
    """Pattern "window": odd side of the square of patches that a patch sees; rounded out to whole blocks."""
    stride: int = Field(4, ge=1)
    """Pattern "strided": distance of the seen blocks; heads begin at different ones."""
    local: int = Field(1, ge=0)
    """Pattern "strided": half width of the band along the diagonal in blocks, the own block included."""
    growth: Literal["gradient", "random"] = "gradient"
    """Pattern "learned": what new blocks are chosen by: the gradient that they would get, or chance."""
    exclude_just_dropped: bool = False
    """Pattern "learned": do not grow what the same update dropped."""
    update_every: Annotated[str, AfterValidator(check_interval)] = "1%"
    """Pattern "learned": interval of the updates, e.g. "20000st", "2ep", "1%"."""
    end: float = Field(0.8, gt=0, le=1)
    """Pattern "learned": share of the run after which the masks stay."""
    alpha: Literal["paper", "reference", "constant"] = "paper"
    """Pattern "learned": course of the exchanged share: to 0 at the end of the updates, to 0.005 at the end of the run,
    or constant."""
    initial: float = Field(0.5, ge=0, le=1)
    """Pattern "learned": exchanged share of a head's live blocks at step 0."""
    exclude: list[str] = []
    """Names of attention layers, or of modules around them, that see everything, e.g. ["blocks.0"]."""
    allow_short: bool = False
    """Take sequences of 256 tokens and fewer, where the kernels save no time by a mask."""
    seed: int | None = None
    """Patterns "learned" and "random": seed of the first blocks; null = that of the run."""

    @model_validator(mode="after")
    def _fits(self) -> AttentionConfig:
        own = _OF_PATTERN[self.pattern]
        for keys in _OF_PATTERN.values():
            for key in keys:
                if key not in own and getattr(self, key) != type(self).model_fields[key].default:
                    patterns = " or ".join(f'"{p}"' for p, names in _OF_PATTERN.items() if key in names)
                    raise ValueError(f'"{key}" belongs to pattern {patterns}, found pattern "{self.pattern}"')
        if self.window % 2 == 0:
            raise ValueError(f'"window" is odd, found {self.window}')
        return self

    @property
    def target(self) -> float:
        """Live share of the blocks of a head for "learned" and "random"."""
        return 0.5 if self.density is None else self.density
