"""ElasticViT's search space (arXiv 2303.09730): convolution stages, then vision-transformer stages.

A 3 x 3 convolution with stride 2 opens the network; then come stages of inverted-residual blocks and stages of
transformer layers, each of these behind one inverted-residual block that changes the width (and the side, with stride
2). Each stage has its own width and depth, and one expansion and kernel (convolutions) or MLP ratio and value scale
(transformers) for all its layers; widths do not decrease from stage to stage. The side of the images is a dimension,
too: the network resizes what it is given.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from ...core.errors import ConfigError, ModelError
from .fields import check_fields
from .space import Codes, Dimension, Space, Value, strict_int, strict_keys

if TYPE_CHECKING:
    from torch import nn


_STAGE_RULES = {
    "name": "text",
    "stride": "integer",
    **dict.fromkeys(("widths", "depths", "expand", "kernels"), "integers"),
    "se": "flag",
    **dict.fromkeys(("mlp", "v_scale"), "integers"),
}
_SIZES = ("head_dim", "head_width", "head_expand", "first_expand", "num_classes", "in_chans")
_RULES = {"resolutions": "integers", **dict.fromkeys(_SIZES, "integer")}


@dataclass(frozen=True)
class StageSpec:
    """Choices of one stage. A stage with `mlp` is one of transformer layers.

    Attributes:
        name: e.g. "vit1".
        stride: of its first block.
        widths: channels.
        depths: layers (the first block of a transformer stage is not counted).
        expand: expansion of the inverted-residual blocks, by their input; (1,) has no expanding convolution.
        kernels: sides of the depthwise kernels.
        se: squeeze-and-excitation in the convolution blocks.
        mlp: hidden width of the MLP by the stage's width.
        v_scale: width of the values by the stage's width.
    """

    name: str
    stride: int
    widths: tuple[int, ...]
    depths: tuple[int, ...]
    expand: tuple[int, ...] = ()
    kernels: tuple[int, ...] = ()
    se: bool = False
    mlp: tuple[int, ...] = ()
    v_scale: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        check_fields(vars(self), _STAGE_RULES, f"stage {self.name}")
        is_vit = bool(self.mlp)
        if self.stride not in (1, 2) or is_vit != bool(self.v_scale) or is_vit == bool(self.expand and self.kernels):
            raise ModelError(
                f"stage {self.name}: stride 1 or 2 is needed, and either expand and kernels (convolutions) or mlp and "
                "v_scale (transformer layers)"
            )
        if any(kernel % 2 == 0 for kernel in self.kernels):
            raise ModelError(f"stage {self.name}: kernels {list(self.kernels)}; odd ones are needed")

    @property
    def is_vit(self) -> bool:
        """Transformer layers."""
        return bool(self.mlp)


_KINDS = ("width", "depth", "expand", "kernel", "mlp", "v_scale")
_CHOICES = {
    "width": "widths",
    "depth": "depths",
    "expand": "expand",
    "kernel": "kernels",
    "mlp": "mlp",
    "v_scale": "v_scale",
}


@dataclass(frozen=True)
class StageConfig:
    """One stage of a sub-network, see `StageSpec`: expand and kernel of convolutions, or mlp and v_scale."""

    name: str
    width: int
    depth: int
    expand: int | None = None
    kernel: int | None = None
    mlp: int | None = None
    v_scale: int | None = None

    @property
    def is_vit(self) -> bool:
        """Transformer layers."""
        return self.mlp is not None


@dataclass(frozen=True)
class HybridConfig:
    """One sub-network of a `HybridSpace`.

    Attributes:
        resolution: side in pixels to which the network resizes its input.
        stages: in running order.
    """

    resolution: int
    stages: tuple[StageConfig, ...]

    @property
    def widths(self) -> tuple[int, ...]:
        """Channels of each stage."""
        return tuple(stage.width for stage in self.stages)

    @property
    def depths(self) -> tuple[int, ...]:
        """Layers of each stage."""
        return tuple(stage.depth for stage in self.stages)

    def to_dict(self) -> dict[str, Any]:
        """``{"resolution": 128, "stages": {"stem": {"width": 16, ...}, ...}}``."""
        stages = {}
        for stage in self.stages:
            entries = {kind: getattr(stage, kind) for kind in _KINDS}
            stages[stage.name] = {kind: value for kind, value in entries.items() if value is not None}
        return {"resolution": self.resolution, "stages": stages}


@dataclass(frozen=True)
class HybridSpace(Space[HybridConfig]):
    """A search space of the ElasticViT kind; `elasticvit_space` gives the published one.

    Attributes:
        resolutions: sides of the images, in pixels.
        stages: in running order; convolutions first. The first has the width of the opening convolution.
        head_dim: size of queries and keys of a head; a transformer stage of width C has C / head_dim heads.
        head_width: features in front of the classifier.
        head_expand: expansion of the first convolution of the head.
        first_expand: expansion of the first block of a transformer stage.
        num_classes: outputs of the classifier.
        in_chans: channels of the images.
    """

    name: ClassVar[str] = "elasticvit"

    resolutions: tuple[int, ...]
    stages: tuple[StageSpec, ...]
    head_dim: int = 16
    head_width: int = 1984
    head_expand: int = 6
    first_expand: int = 6
    num_classes: int = 1000
    in_chans: int = 3

    def __post_init__(self) -> None:
        check_fields(vars(self), _RULES)
        kinds = [stage.is_vit for stage in self.stages]
        if len(kinds) < 2 or kinds != sorted(kinds) or kinds[0] or not kinds[-1]:
            raise ModelError("stages: one or more of convolutions, then one or more of transformer layers are needed")
        if len({stage.name for stage in self.stages}) < len(kinds):
            raise ModelError(f"stages: names {[stage.name for stage in self.stages]} must differ")
        for stage in self.stages:
            bad = [width for width in stage.widths if stage.is_vit and width % self.head_dim]
            if bad:
                raise ModelError(f"stage {stage.name}: width {bad[0]} is no multiple of the head size {self.head_dim}")

    @cached_property
    def dimensions(self) -> tuple[Dimension, ...]:
        """The resolution, then by stage width, depth, and expand and kernel or mlp and v_scale."""
        found = [Dimension("resolution", "resolution", self.resolutions)]
        for stage in self.stages:
            for kind in _KINDS:
                choices = getattr(stage, _CHOICES[kind])
                if choices:
                    found.append(Dimension(f"{stage.name}.{kind}", kind, choices))
        return tuple(found)

    @cached_property
    def ascending(self) -> tuple[int, ...]:
        """The widths."""
        return self.columns("width")

    @cached_property
    def groups(self) -> Mapping[str, tuple[int, ...]]:
        """Widths and depths of the transformer stages (the convolutions are left alone, heads follow the width)."""
        is_vit = {stage.name for stage in self.stages if stage.is_vit}

        def of(kind: str) -> tuple[int, ...]:
            return tuple(c for c in self.columns(kind) if self.dimensions[c].name.split(".")[0] in is_vit)

        return {"widths": of("width"), "depths": of("depth")}

    def columns(self, kind: str) -> tuple[int, ...]:
        """Columns of all dimensions of one kind."""
        return tuple(c for c, d in enumerate(self.dimensions) if d.kind == kind)

    def values(self, config: HybridConfig) -> list[Value | None]:
        """The value in each dimension.

        Raises:
            ModelError: other stages, or a stage of the other kind.
        """
        names, own = [getattr(s, "name", None) for s in getattr(config, "stages", ())], [s.name for s in self.stages]
        if not isinstance(config, HybridConfig) or names != own:
            raise ModelError(f"{config} is no sub-network of stages {', '.join(own)}")
        row: list[Value | None] = [config.resolution]
        for spec, stage in zip(self.stages, config.stages, strict=True):
            for kind in _KINDS:
                value, has = getattr(stage, kind), bool(getattr(spec, _CHOICES[kind]))
                if has != (value is not None):
                    raise ModelError(f"{spec.name}.{kind} is {value}; {'a value is needed' if has else 'it has none'}")
                if has:
                    row.append(value)
        return row

    def from_values(self, values: Sequence[Value | None]) -> HybridConfig:
        """The configuration with these values."""
        rest = iter(values[1:])
        stages = []
        for spec in self.stages:
            chosen = {kind: next(rest) for kind in _KINDS if getattr(spec, _CHOICES[kind])}
            stages.append(StageConfig(spec.name, **chosen))
        return HybridConfig(values[0], tuple(stages))

    def make(
        self,
        resolution: int,
        widths: Sequence[int],
        depths: Sequence[int],
        *,
        expand: int | Sequence[int] = 3,
        kernel: int | Sequence[int] = 3,
        mlp: int | Sequence[int] = 2,
        v_scale: int | Sequence[int] = 2,
    ) -> HybridConfig:
        """A checked sub-network from lists.

        Args:
            resolution: side of the images in pixels.
            widths: of all stages.
            depths: of all stages.
            expand: of the convolution stages that have a choice, or one for all of them.
            kernel: of all convolution stages, or one for all.
            mlp: of the transformer stages, or one for all.
            v_scale: likewise.

        Raises:
            ModelError: the space has no such sub-network.
        """
        lists = {"width": widths, "depth": depths, "expand": expand, "kernel": kernel, "mlp": mlp, "v_scale": v_scale}
        row: list[dict[str, Any]] = [{} for _ in self.stages]
        for kind, given in lists.items():
            places = [j for j, spec in enumerate(self.stages) if getattr(spec, _CHOICES[kind])]
            if kind == "expand":
                for j in places:
                    row[j][kind] = 1
                places = [j for j in places if self.stages[j].expand != (1,)]
            chosen = [given] * len(places) if isinstance(given, int) else list(given)
            if len(chosen) != len(places):
                raise ModelError(f"{kind}: {len(chosen)} values for {len(places)} stages")
            for j, value in zip(places, chosen, strict=True):
                row[j][kind] = int(value)
        stages = tuple(StageConfig(spec.name, **chosen) for spec, chosen in zip(self.stages, row, strict=True))
        config = HybridConfig(int(resolution), stages)
        self.check(config)
        return config

    def macs_of(self, codes: Codes, formula: str = "exact") -> np.ndarray:
        """MACs of one image of each sub-network, [n] int64; "reference" is the published code's count."""
        from .hybrid_cost import macs

        return macs(self, self.numbers(codes), formula)

    def params_of(self, codes: Codes, position: bool = True) -> np.ndarray:
        """Parameters of each extracted sub-network, [n] int64."""
        from .hybrid_cost import params

        return params(self, self.numbers(codes), position)

    def side(self, resolution: int, stage: int) -> int:
        """Side of the maps behind a stage, in pixels; every stride 2 rounds up."""
        side = -(-resolution // 2)
        for spec in self.stages[: stage + 1]:
            side = -(-side // spec.stride)
        return side

    def supernet(self, *, compat: bool = False, norm: str = "ln", fused_attn: bool = True) -> nn.Module:
        """A supernet with fresh weights (see `hybrid.ElasticViT`)."""
        from .hybrid import ElasticViT

        return ElasticViT(self, compat=compat, norm=norm, fused_attn=fused_attn)

    def extract(self, net: nn.Module, config: HybridConfig) -> nn.Module:
        """A sub-network as a `hybrid.HybridNet` without elastic layers, which can be written as ONNX."""
        from .hybrid import ElasticViT

        self.check(config)
        if not isinstance(net, ElasticViT) or net.space != self:
            raise ModelError(f"{type(net).__name__} is no supernet of this space")
        return net.extract(config)

    def options(self, net: nn.Module) -> dict[str, Any]:
        """Arguments of `supernet` with which an extracted network can be built again."""
        from .norms import TokenGroupNorm

        return {"norm": "gn1" if any(isinstance(m, TokenGroupNorm) for m in net.modules()) else "ln"}

    # -- written forms -----------------------------------------------------------------------------------------------

    def parse(self, data: Any, where: str = "subnet") -> HybridConfig:
        """A configuration from its JSON form, checked.

        Raises:
            ConfigError: names the entry.
        """
        data = strict_keys(data, ("resolution", "stages"), where)
        given = strict_keys(data["stages"], [stage.name for stage in self.stages], f"{where}.stages")
        stages = []
        for spec in self.stages:
            kinds = [kind for kind in _KINDS if getattr(spec, _CHOICES[kind])]
            place = f"{where}.stages.{spec.name}"
            fixed = [kind for kind in kinds if getattr(spec, _CHOICES[kind]) == (1,) and kind == "expand"]
            entry = strict_keys(given[spec.name], kinds, place, optional=fixed)
            chosen = {kind: strict_int(entry.get(kind, 1), f"{place}.{kind}") for kind in kinds}
            stages.append(StageConfig(spec.name, **chosen))
        config = HybridConfig(strict_int(data["resolution"], f"{where}.resolution"), tuple(stages))
        try:
            self.check(config)
        except ModelError as error:
            raise ConfigError(f"{where}: {error}") from error
        return config

    def to_dict(self) -> dict[str, Any]:
        """JSON form of the space."""
        return {"space": self.name, **_plain(dataclasses.asdict(self))}

    def to_reference(self, config: HybridConfig) -> tuple[Any, ...]:
        """The published code's 10-tuple of a sub-network.

        (resolution, widths, depths, expand by convolution layer, kernel likewise, MLP ratio by transformer layer, heads
        likewise, 1, 1, value scale by transformer layer)
        """
        self.check(config)
        conv = [stage for stage in config.stages if not stage.is_vit for _ in range(stage.depth)]
        vit = [stage for stage in config.stages if stage.is_vit for _ in range(stage.depth)]
        return (
            config.resolution,
            list(config.widths),
            list(config.depths),
            [stage.expand for stage in conv],
            [stage.kernel for stage in conv],
            [stage.mlp for stage in vit],
            [stage.width // self.head_dim for stage in vit],
            1,
            1,
            [stage.v_scale for stage in vit],
        )

    def from_reference(self, data: Sequence[Any]) -> HybridConfig:
        """A sub-network from the published code's 10-tuple.

        Raises:
            ModelError: another form, layers of a stage that differ, or no sub-network of this space.
        """
        if len(data) != 10:
            raise ModelError(f"{len(data)} entries; the published form of a sub-network has 10")
        resolution, widths, depths, expand, kernel, mlp, heads, window, qk_scale, v_scale = data
        if len(widths) != len(self.stages) or len(depths) != len(self.stages):
            raise ModelError(f"{len(widths)} widths and {len(depths)} depths; this space has {len(self.stages)} stages")
        if any(one not in (1, None) and set(np.ravel(one)) != {1} for one in (window, qk_scale)):
            raise ModelError("windows and other scales of queries and keys than 1 are not part of this space")
        rows: list[dict[str, int]] = [{} for _ in self.stages]
        for kind, layers in (
            ("expand", expand),
            ("kernel", kernel),
            ("mlp", mlp),
            ("v_scale", v_scale),
            ("heads", heads),
        ):
            stages = [j for j, spec in enumerate(self.stages) if spec.is_vit == (kind in ("mlp", "v_scale", "heads"))]
            rest = list(layers)
            if len(rest) != sum(depths[j] for j in stages):
                raise ModelError(f"{kind}: {len(rest)} layers, the depths say {sum(depths[j] for j in stages)}")
            for j in stages:
                part, rest = rest[: depths[j]], rest[depths[j] :]
                if len(set(part)) != 1:
                    raise ModelError(f"{self.stages[j].name}: {kind} {part}; all layers of a stage have the same")
                rows[j][kind] = int(part[0])
        for j, row in enumerate(rows):
            if row.pop("heads", widths[j] // self.head_dim) != widths[j] // self.head_dim:
                raise ModelError(f"{self.stages[j].name}: the heads do not fit width {widths[j]}")
        config = HybridConfig(
            int(resolution),
            tuple(
                StageConfig(spec.name, int(width), int(depth), **row)
                for spec, width, depth, row in zip(self.stages, widths, depths, rows, strict=True)
            ),
        )
        self.check(config)
        return config


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(part) for key, part in value.items()}
    return [_plain(part) for part in value] if isinstance(value, (list, tuple)) else value


def read_hybrid(data: Mapping[str, Any], where: str) -> HybridSpace:
    """A space from its JSON form.

    Raises:
        ConfigError: names the entry.
    """
    fields = [field.name for field in dataclasses.fields(HybridSpace)]
    data = strict_keys(data, ["space", *fields], where, optional=["space", *fields[2:]])
    data.pop("space", None)
    given = data.pop("stages")
    if not isinstance(given, (list, tuple)):
        raise ConfigError(f"{where}.stages is {json.dumps(given, default=str)}; a list of objects is needed")
    names = [field.name for field in dataclasses.fields(StageSpec)]
    entries = [strict_keys(entry, names, f"{where}.stages[{j}]", optional=names[4:]) for j, entry in enumerate(given)]
    try:
        check_fields(data, _RULES, where)
        for j, entry in enumerate(entries):
            check_fields(entry, _STAGE_RULES, f"{where}.stages[{j}]")
    except ModelError as error:
        raise ConfigError(str(error)) from error
    try:
        stages = [StageSpec(**{k: tuple(v) if isinstance(v, list) else v for k, v in one.items()}) for one in entries]
        data["resolutions"] = tuple(data["resolutions"])
        space = HybridSpace(stages=tuple(stages), **data)
        _ = space.dimensions
    except ModelError as error:
        raise ConfigError(f"{where}: {error}") from error
    return space


def elasticvit_space(*, divisor: int = 1, num_classes: int = 1000, **changes: Any) -> HybridSpace:
    """The published space.

    Args:
        divisor: of all widths and of the head size, for a small copy.
        num_classes: outputs of the classifier.
        **changes: other fields of `HybridSpace`, e.g. ``resolutions=(64, 96)``.

    Raises:
        ModelError: `divisor` is no positive integer that divides the widths, or a change that makes no space.
    """
    check_fields({"divisor": divisor}, {"divisor": "integer"})

    def widths(first: int, last: int, step: int) -> tuple[int, ...]:
        found = range(first, last + 1, step)
        if any(width % divisor for width in found):
            raise ModelError(f"widths {list(found)} cannot be divided by {divisor}; allowed: 1, 2, 4, 8")
        return tuple(width // divisor for width in found)

    conv, vit = {"kernels": (3, 5)}, {"mlp": (2, 3, 4, 5), "v_scale": (2, 3, 4)}
    stages = (
        StageSpec("stem", 1, widths(16, 24, 8), (1, 2), (1,), **conv),
        StageSpec("conv1", 2, widths(16, 32, 8), (2, 3, 4, 5), (3, 4, 5, 6), **conv),
        StageSpec("conv2", 2, widths(16, 48, 8), (2, 3, 4, 5, 6), (3, 4, 5, 6), se=True, **conv),
        StageSpec("vit1", 2, widths(48, 96, 16), (1, 2, 3, 4, 5), **vit),
        StageSpec("vit2", 1, widths(80, 160, 16), (1, 2, 3, 4, 5, 6), **vit),
        StageSpec("vit3", 2, widths(144, 288, 16), (1, 2, 3, 4, 5, 6), **vit),
        StageSpec("vit4", 2, widths(160, 320, 16), (1, 2, 3, 4, 5, 6), **vit),
    )
    given: dict[str, Any] = {
        "resolutions": (128, 160, 176, 192, 224, 256),
        "stages": stages,
        "head_dim": 16 // divisor,
        "head_width": 1984 // divisor,
        "num_classes": num_classes,
    }
    return HybridSpace(**{**given, **changes})


def released_subnets(space: HybridSpace | None = None) -> dict[str, HybridConfig]:
    """The nine sub-networks that the authors released, by name; of the published space.

    Raises:
        ModelError: `space` does not have them.
    """
    make = (space or elasticvit_space()).make
    return {
        "T1": make(128, (16, 24, 32, 64, 96, 176, 272), (1, 2, 3, 1, 1, 1, 1), mlp=(2, 2, 3, 4)),
        "T2": make(160, (16, 24, 40, 48, 96, 176, 256), (1, 2, 3, 1, 1, 2, 2), mlp=(3, 4, 3, 2)),
        "S1": make(192, (16, 24, 40, 64, 96, 192, 272), (1, 3, 3, 2, 2, 2, 2), mlp=(2, 2, 3, 4)),
        "S2": make(224, (16, 24, 48, 64, 96, 192, 256), (1, 3, 3, 2, 2, 2, 2), mlp=(2, 2, 2, 4)),
        "M": make(224, (16, 32, 48, 64, 96, 192, 288), (1, 3, 5, 2, 2, 2, 2), kernel=(5, 3, 3), mlp=(2, 4, 4, 5)),
        "L1": make(
            *(256, (16, 24, 40, 64, 96, 192, 320), (1, 3, 3, 2, 2, 2, 2)),
            expand=(3, 6),
            kernel=(5, 5, 5),
            mlp=(4, 3, 4, 4),
        ),
        "L1.5": make(
            *(256, (16, 24, 48, 64, 96, 256, 320), (2, 4, 4, 2, 2, 2, 2)),
            expand=(3, 4),
            kernel=(3, 3, 5),
            mlp=(4, 5, 3, 5),
        ),
        "L2": make(
            *(256, (16, 24, 40, 80, 128, 256, 304), (1, 3, 4, 2, 2, 2, 2)),
            expand=(6, 6),
            mlp=(3, 2, 3, 5),
            v_scale=(2, 2, 2, 3),
        ),
        "L3": make(
            *(256, (16, 32, 48, 80, 128, 256, 320), (1, 3, 4, 2, 2, 2, 2)),
            expand=(5, 5),
            kernel=(5, 3, 5),
            mlp=(4, 4, 3, 5),
        ),
    }
