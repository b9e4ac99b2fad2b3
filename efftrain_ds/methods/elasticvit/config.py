"""Configuration of ``efftrain.methods.elasticvit``. The defaults are the published settings where these are known."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, model_validator

from ...core.durations import parse_duration
from ...core.errors import ConfigError
from ...core.strict import StrictModel
from ...models.elastic import Space, elasticvit_space
from .bank import MemoryBank
from .levels import (
    PUBLISHED_LEVELS,
    PUBLISHED_WINDOW,
    Levels,
    SmallestSubnets,
    build_smallest,
    published_smallest,
    read_smallest,
    spread_levels,
)
from .losses import CAP, TEMPERATURE
from .preference import CANDIDATES, NO_EXPLOITATION, PUBLISHED_RISES, ExploitSchedule

KEY = "efftrain.methods.elasticvit"

Mode = Literal["random", "smallest", "largest"]


def _interval(text: str) -> str:
    if parse_duration(text).seconds is not None or parse_duration(text).value <= 0:
        raise ValueError(f'an interval of steps, epochs or percent is needed ("500st", "1ep", "1%"), found {text!r}')
    return text


Interval = Annotated[str, AfterValidator(_interval)]


class TeacherConfig(StrictModel):
    """A frozen network whose predictions random sub-networks learn. It needs the same classes in the same order."""

    model: str = Field(min_length=1)
    """Name for timm.create_model, e.g. "regnety_160.deit_in1k" (mind the license of its weights)."""
    weights: str | None = None
    """A safetensors file with its weights; null takes timm's pretrained ones."""
    resolution: int | None = Field(None, gt=0)
    """Side to which images are resized for it; null = that of its pretrained settings."""
    kwargs: dict[str, Any] = {}
    """Further arguments of timm.create_model."""


class ExploitConfig(StrictModel):
    """Probability with which a good sub-network is trained again instead of a new one."""

    start: float = Field(0.2, ge=0, le=1)
    """At first."""
    rise: float = Field(0.15, ge=0)
    """Added at each of `at`, up to 1 in all."""
    at: tuple[float, ...] = PUBLISHED_RISES
    """Shares of the run (published: epochs 99, 199, ..., 599 of 610)."""

    @model_validator(mode="after")
    def _ascending(self) -> ExploitConfig:
        if list(self.at) != sorted(self.at):
            raise ValueError(f"at: {list(self.at)}; ascending shares of the run are needed")
        return self


class BankConfig(StrictModel):
    """Memory of good sub-networks, for each level."""

    capacity: int | tuple[int, ...] | None = None
    """Entries of each level; null = 150 in the lower half of the levels and 50 in the upper half."""
    smoothing: float = Field(0.9, ge=0, lt=1)
    """Weight of the earlier scores when all entries of a level are scored again; 0 as published."""
    draw: Literal["softmax", "uniform", "best"] = "softmax"
    """How an entry is drawn."""
    refresh: Interval | None = "1ep"
    """Interval at which the banks of all levels are scored again; null = never."""
    refresh_level: Interval | None = "0.25ep"
    """Same for the bank of the level of that step."""
    images: int = Field(256, ge=1)
    """Fixed training samples, of all ranks together, for scoring again; without a trainer the images of the step."""
    exploit: ExploitConfig = ExploitConfig()
    """When entries are trained again."""


class SearchConfig(StrictModel):
    """Search for the best sub-network within a budget, see "efftrain search subnet". All limits hold together."""

    macs: int | tuple[int, int] | None = None
    """MACs of one image: at most, or from and to."""
    params: int | tuple[int, int] | None = None
    """Parameters: at most, or from and to."""
    latency: float | tuple[float, float] | None = None
    """Latency in the unit of `latency_from`: at most, or from and to."""
    latency_from: str = "onnxruntime"
    """"onnxruntime" measures blocks on this machine's processor with one thread and adds them up, in a search on one
    rank; else the JSON file of a latency table ("efftrain search subnet FILE --measure_latency TABLE" writes that of a
    whole space), or "package.module:function", which gets the space and returns a provider of one's own."""
    algorithm: Literal["evolution", "random"] = "evolution"
    """Evolution, or random sub-networks within the limits."""
    evaluations: int = Field(1000, ge=1)
    """Sub-networks to evaluate."""
    population: int | None = Field(None, ge=2)
    """Of the first generation; null = 512, at most a sixth of the evaluations."""
    score: Literal["top1", "loss"] = "top1"
    """What is compared; the loss tells more where the images are few."""
    images: int = Field(10000, ge=1)
    """Images on which sub-networks are compared: fixed ones of `data`, evenly spaced."""
    calibrate: int = Field(4096, ge=0)
    """Training images for batch normalisation of each sub-network, others than those that compare (published: 64
    batches); 0 only for a supernet without batch normalisation."""
    data: str | None = None
    """Folder of shards that were not trained on; null takes what efftrain.data.hold_out holds out of the training
    shards, or without that training images, which flatter all candidates alike."""
    seeds: bool = True
    """Begin with the entries of the memory bank that keep the limits (evolution only)."""
    average: bool | None = None
    """Search with the average of the weights; null = where the checkpoint has one."""
    seed: int = Field(0, ge=0)
    """Seed of the search."""

    @model_validator(mode="after")
    def _limited(self) -> SearchConfig:
        if self.macs is None and self.params is None and self.latency is None:
            raise ValueError("a limit is needed: macs, params or latency")
        return self


class ElasticViTConfig(StrictModel):
    """Supernet training with several sub-networks in each step (ElasticViT, arXiv 2303.09730).

    The search space is that of the model: ``efftrain.model.name`` is "elasticvit", "elastic_autoformer_tiny" (small,
    base) or "elastic_vit", see docs/models.md; in a loop of your own the module is a supernet of models.elastic.
    """

    modes: tuple[Mode, ...] = ("random", "random", "random", "smallest")
    """Sub-networks of a step, a forward and backward pass each; gradients are summed. "largest" comes first and
    teaches all others, "smallest" last: it learns the mean prediction of the ones before it."""
    levels: int | tuple[int, ...] | None = None
    """Levels of complexity in MACs of one image; a number spreads so many over the space. null = the published ones
    (100 M to 1.2 G) in the published space, 8 in others."""
    window: int | None = Field(None, ge=0)
    """Width of a level in MACs; null = 20 M for the published levels; levels that are spread have their own."""
    formula: Literal["exact", "reference"] = "exact"
    """Count of MACs: what the network computes, or the published code's own."""
    walk: Literal["adjacent", "random", "cyclic"] = "adjacent"
    """Level of a step: the one before or a neighbour, any one (for each sub-network), or downwards."""
    smallest: int | list[dict[str, Any]] = 3
    """Smallest sub-networks, each for some of the levels: how many (3 are the published ones where they exist; 1 is the
    smallest of the space), or a list of {"up_to": MACs or null, "config": {...}}."""
    preference: Literal["wide_shallow", "uniform"] = "wide_shallow"
    """Of new sub-networks train the widest and shallowest of a few candidates, or any."""
    candidates: int = Field(CANDIDATES, ge=1)
    """How many candidates."""
    rows: int = Field(5000, ge=1)
    """Sub-networks in the table of each level, from which new ones are drawn."""
    tables: str | None = None
    """Folder of the tables: those that are there are read, they must be of this space, seed and number of rows (or
    more); missing ones are made and written. null makes all of them at each start."""
    bank: BankConfig | None = BankConfig()
    """Memory bank; null = none, every sub-network is new."""
    teachers: tuple[TeacherConfig, ...] = ()
    """None: labels alone. One: half labels, half its predictions. Two and more: their mean prediction alone. There is
    none by default, as a teacher must know the classes of the run."""
    temperature: float = Field(TEMPERATURE, gt=0)
    """Divides the teachers' logits; below 1 it sharpens."""
    label_smoothing: float = Field(0.1, ge=0, lt=1)
    """Of the labels, here instead of efftrain.optim.label_smoothing."""
    alpha_cap: float = Field(CAP, gt=0)
    """Largest ratio of probabilities that counts in the alpha-divergence."""
    agc: float | None = Field(0.1, gt=0)
    """Adaptive clipping: longest gradient of each row of a weight, as a share of the norm of that row. It takes the
    place of DeepSpeed's gradient_clipping, which must be 0 then; null = none."""
    decay_unused: bool = False
    """Let weight decay and momentum act on blocks that no sub-network of the step runs; otherwise they stay as they
    are."""
    evaluate: tuple[Literal["smallest", "largest"] | int, ...] = ("smallest",)
    """Sub-networks of an evaluation, the first is the main one: the smallest or largest of the space, or the index of a
    level: its best in the bank, else its smallest."""
    calibrate: int = Field(2048, ge=0)
    """Fixed training samples, of all ranks together, from which batch normalisation is estimated for a sub-network
    before its evaluation (published: 129 batches of 96); 0 = not at all."""
    search: SearchConfig | None = None
    """Search after the training ("efftrain search subnet"); the training itself does not read it."""
    seed: int | None = Field(None, ge=0)
    """Seed of the sampling; null = the run's."""

    @model_validator(mode="after")
    def _order(self) -> ElasticViTConfig:
        order = {"largest": 0, "random": 1, "smallest": 2}
        places = [order[mode] for mode in self.modes]
        if not places or places != sorted(places) or self.modes.count("largest") > 1:
            raise ValueError(
                f'modes: {list(self.modes)}; needed: at most one "largest", then "random" ones, then "smallest" ones'
            )
        if isinstance(self.levels, tuple) and self.window is None and self.levels != PUBLISHED_LEVELS:
            raise ValueError("window: missing; levels in MACs need the width of a level")
        if not isinstance(self.levels, tuple) and self.window is not None and self.levels is not None:
            raise ValueError("window: levels that are spread over the space have their own; give levels in MACs")
        if not self.evaluate or len(set(self.evaluate)) < len(self.evaluate):
            raise ValueError(f"evaluate: {list(self.evaluate)}; at least one, each once")
        return self


def levels_of(config: ElasticViTConfig, space: Space[Any]) -> Levels:
    """The levels of a run.

    Raises:
        ConfigError: levels that the space cannot fill.
    """
    published = space == elasticvit_space(num_classes=space.num_classes)
    try:
        if isinstance(config.levels, tuple) or (config.levels is None and published):
            macs = config.levels if isinstance(config.levels, tuple) else PUBLISHED_LEVELS
            window = PUBLISHED_WINDOW if config.window is None else config.window
            found = Levels(macs, window, config.formula)
        else:
            found = spread_levels(space, config.levels or 8, config.formula)
        found.check(space)
    except ConfigError as error:
        raise ConfigError(f"{KEY}.levels: {error}") from error
    bad = [one for one in config.evaluate if isinstance(one, int) and not 0 <= one < len(found)]
    if bad:
        raise ConfigError(f"{KEY}.evaluate: level {bad[0]}; there are levels 0 to {len(found) - 1}")
    return found


def smallest_of(config: ElasticViTConfig, space: Space[Any], levels: Levels) -> SmallestSubnets:
    """The smallest sub-networks of a run.

    Raises:
        ConfigError: they do not fit the space or the levels.
    """
    if not isinstance(config.smallest, int):
        return read_smallest(config.smallest, space, levels, f"{KEY}.smallest")
    try:
        published = space == elasticvit_space(num_classes=space.num_classes) and levels.macs == PUBLISHED_LEVELS
        if config.smallest == 3 and published:
            return published_smallest(space, levels)
        return build_smallest(space, levels, min(config.smallest, len(levels)))
    except ConfigError as error:
        raise ConfigError(f"{KEY}.smallest: {error}") from error


def bank_of(config: ElasticViTConfig, space: Space[Any], levels: Levels) -> MemoryBank | None:
    """The empty memory bank of a run.

    Raises:
        ConfigError: capacities that do not fit the levels.
    """
    if config.bank is None:
        return None
    try:
        return MemoryBank(space, levels, config.bank.capacity, config.bank.smoothing)
    except ConfigError as error:
        raise ConfigError(f"{KEY}.{error}") from error


def exploit_of(config: ElasticViTConfig) -> ExploitSchedule:
    """When entries of the bank are trained again."""
    if config.bank is None:
        return NO_EXPLOITATION
    given = config.bank.exploit
    return ExploitSchedule(given.start, given.rise, given.at)
