"""Spaces of plain vision transformers: width, depth, and by layer the number of heads and the MLP ratio.

AutoFormer's spaces (arXiv 2107.00651) are of this kind: heads of 64 whatever their number and the width, and the first
layers of the deepest network. A depth can instead pick the layers that growth by interpolation from a smaller depth
gives (AutoProg, arXiv 2203.14509): then sub-networks are nested, but no prefixes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from ...core.errors import ConfigError, ModelError
from .fields import check_fields
from .space import FORMULAS, Codes, Dimension, Space, Value, strict_int, strict_keys

if TYPE_CHECKING:
    from torch import nn


_RULES = {
    **dict.fromkeys(("widths", "depths", "heads"), "integers"),
    "mlp": "numbers",
    "head_dim": "integer",
    "resolutions": "integers",
    "patch": "integer",
    "base": "integer or none",
    **dict.fromkeys(("num_classes", "in_chans"), "integer"),
    **dict.fromkeys(("class_token", "qkv_bias", "layer_scale", "qk_norm"), "flag"),
}


@dataclass(frozen=True)
class PlainConfig:
    """One sub-network of a `PlainSpace`.

    Attributes:
        resolution: side in pixels to which the network resizes its input.
        width: of the embedding.
        layers: blocks of the supernet that run, ascending.
        heads: of each of them.
        mlp: hidden width of the MLP by `width`, of each of them.
    """

    resolution: int
    width: int
    layers: tuple[int, ...]
    heads: tuple[int, ...]
    mlp: tuple[float, ...]

    @property
    def depth(self) -> int:
        """Number of blocks."""
        return len(self.layers)

    def to_dict(self) -> dict[str, Any]:
        """``{"resolution": 224, "width": 192, "layers": [...], "heads": [...], "mlp": [...]}``."""
        return {key: list(v) if isinstance(v, tuple) else v for key, v in dataclasses.asdict(self).items()}


@dataclass(frozen=True)
class PlainSpace(Space[PlainConfig]):
    """Sub-networks of one plain vision transformer.

    Attributes:
        widths: of the embedding.
        depths: numbers of blocks.
        heads: of a layer.
        mlp: hidden width of the MLP of a layer, by the width of the embedding.
        head_dim: size of a head.
        resolutions: sides of the images, in pixels.
        patch: side of a patch, in pixels.
        base: depth from which the deepest network is grown by interpolation; None takes the first blocks for a depth.
        num_classes: outputs of the classifier.
        in_chans: channels of the images.
        class_token: one more token, which the classifier reads; otherwise it reads the mean.
        qkv_bias: bias of queries, keys and values.
        layer_scale: a learned scale of each channel behind attention and MLP.
        qk_norm: normalisation of queries and keys of each head.
    """

    name: ClassVar[str] = "plain_vit"

    widths: tuple[int, ...]
    depths: tuple[int, ...]
    heads: tuple[int, ...]
    mlp: tuple[float, ...]
    head_dim: int = 64
    resolutions: tuple[int, ...] = (224,)
    patch: int = 16
    base: int | None = None
    num_classes: int = 1000
    in_chans: int = 3
    class_token: bool = True
    qkv_bias: bool = True
    layer_scale: bool = False
    qk_norm: bool = False

    def __post_init__(self) -> None:
        check_fields(vars(self), _RULES)
        if not self.depths:
            raise ModelError("depths is []; at least one is needed")
        bad = [side for side in self.resolutions if side % self.patch]
        if bad:
            raise ModelError(f"resolution {bad[0]} is no multiple of the patch {self.patch}")
        if self.base is not None:
            self.layers_of(self.base)

    @property
    def top(self) -> int:
        """Blocks of the supernet."""
        return max(self.depths)

    def layers_of(self, depth: int) -> tuple[int, ...]:
        """Blocks that a sub-network of this depth runs.

        Raises:
            ModelError: the supernet has no such depth.
        """
        from .depth import path_of

        if not 1 <= depth <= self.top:
            raise ModelError(f"depth {depth}; allowed: 1 to {self.top}")
        return tuple(range(depth)) if self.base is None else tuple(path_of(self.base, self.top, depth))

    @cached_property
    def dimensions(self) -> tuple[Dimension, ...]:
        """Resolution, width, depth, then by block heads and MLP ratio."""
        found = [
            Dimension("resolution", "resolution", self.resolutions),
            Dimension("width", "width", self.widths),
            Dimension("depth", "depth", self.depths),
        ]
        sets = {depth: self.layers_of(depth) for depth in self.depths}
        for block in range(self.top):
            least = min(depth for depth, layers in sets.items() if block in layers)
            for kind, choices in (("heads", self.heads), ("mlp", tuple(float(m) for m in self.mlp))):
                found.append(Dimension(f"blocks.{block}.{kind}", kind, choices, (2, least)))
        return tuple(found)

    @property
    def groups(self) -> Mapping[str, tuple[int, ...]]:
        """The width with the heads, which are the width of attention; and the depth."""
        heads = tuple(c for c, d in enumerate(self.dimensions) if d.kind == "heads")
        return {"widths": (1, *heads), "depths": (2,)}

    def values(self, config: PlainConfig) -> list[Value | None]:
        """The value in each dimension, None for blocks that do not run.

        Raises:
            ModelError: lists of different lengths, or other blocks than a depth of this space has.
        """
        if not isinstance(config, PlainConfig) or not len(config.layers) == len(config.heads) == len(config.mlp):
            raise ModelError(f"{config}: a plain sub-network with as many heads and mlp entries as layers is needed")
        if not 1 <= config.depth <= self.top or config.layers != self.layers_of(config.depth):
            known = ", ".join(str(d) for d in self.depths)
            raise ModelError(f"layers {list(config.layers)} are not those of a depth of this space ({known})")
        row: list[Value | None] = [config.resolution, config.width, config.depth, *[None] * (2 * self.top)]
        for block, heads, mlp in zip(config.layers, config.heads, config.mlp, strict=True):
            row[3 + 2 * block], row[4 + 2 * block] = heads, mlp
        return row

    def from_values(self, values: Sequence[Value | None]) -> PlainConfig:
        """The configuration with these values."""
        layers = self.layers_of(values[2])
        heads, mlp = (tuple(values[first + 2 * block] for block in layers) for first in (3, 4))
        return PlainConfig(values[0], values[1], layers, heads, mlp)

    def make(
        self,
        width: int,
        depth: int,
        heads: int | Sequence[int],
        mlp: float | Sequence[float],
        resolution: int | None = None,
    ) -> PlainConfig:
        """A checked sub-network; one number of heads or one ratio serves all layers.

        Raises:
            ModelError: the space has no such sub-network.
        """
        heads = (heads,) * depth if isinstance(heads, int) else tuple(heads)
        mlp = (float(mlp),) * depth if isinstance(mlp, (int, float)) else tuple(float(m) for m in mlp)
        config = PlainConfig(resolution or max(self.resolutions), width, self.layers_of(depth), heads, mlp)
        self.check(config)
        return config

    # -- prices ------------------------------------------------------------------------------------------------------

    def _parts(self, codes: Codes) -> tuple[np.ndarray, ...]:
        """(tokens without the class token [n], width [n], used [n, L], heads * head_dim [n, L], hidden [n, L])."""
        numbers = self.numbers(codes)
        width = numbers[1].astype(np.int64)
        heads, ratio = numbers[3::2], numbers[4::2]
        used = (codes[:, 3::2] >= 0).T.astype(np.int64)
        tokens = (numbers[0].astype(np.int64) // self.patch) ** 2
        return tokens, width, used, heads.astype(np.int64) * self.head_dim, (width * ratio).astype(np.int64)

    def macs_of(self, codes: Codes, formula: str = "exact") -> np.ndarray:
        """MACs of one image of each sub-network, [n] int64; there is one formula."""
        if formula not in FORMULAS:
            raise ModelError(f'no MAC formula "{formula}"; allowed: {", ".join(FORMULAS)}')
        patches, width, used, inner, hidden = self._parts(codes)
        n = patches + int(self.class_token)
        layers = 4 * n * width * inner + 2 * n * n * inner + 2 * n * width * hidden
        stem = patches * self.in_chans * self.patch**2 * width
        return stem + (layers * used).sum(0) + width * self.num_classes

    def params_of(self, codes: Codes, position: bool = True) -> np.ndarray:
        """Parameters of each extracted sub-network, [n] int64."""
        patches, width, used, inner, hidden = self._parts(codes)
        layers = 4 * width * inner + 3 * inner * int(self.qkv_bias) + width
        layers += 2 * width * hidden + hidden + width + (6 if self.layer_scale else 4) * width
        layers += 4 * self.head_dim * int(self.qk_norm)
        total = (self.in_chans * self.patch**2 + 1) * width + (layers * used).sum(0)
        total += (2 + int(self.class_token)) * width + (width + 1) * self.num_classes
        return total + ((patches + int(self.class_token)) * width if position else 0)

    # -- networks ----------------------------------------------------------------------------------------------------

    def supernet(self, **kwargs: Any) -> nn.Module:
        """A supernet with fresh weights: a timm ``VisionTransformer`` of the largest size, made elastic.

        Args:
            **kwargs: further arguments of timm's class, e.g. ``drop_path_rate=0.1``.
        """
        from .plain import build_plain

        return build_plain(self, **kwargs)

    def extract(self, net: nn.Module, config: PlainConfig) -> nn.Module:
        """A sub-network as a plain timm ``VisionTransformer``, with copies of the weights."""
        from .plain import ElasticVisionTransformer

        self.check(config)
        if not isinstance(net, ElasticVisionTransformer) or net.space != self:
            raise ModelError(f"{type(net).__name__} is no supernet of this space")
        return net.extract(config)

    def options(self, net: nn.Module) -> dict[str, Any]:
        """Arguments of `supernet` with which an extracted network can be built again."""
        from .plain import plain_options

        return plain_options(net)

    # -- written forms -----------------------------------------------------------------------------------------------

    def parse(self, data: Any, where: str = "subnet") -> PlainConfig:
        """A configuration from its JSON form, checked. "layers" may be left out: it follows from the others' length.

        Raises:
            ConfigError: names the entry.
        """
        keys = ("resolution", "width", "layers", "heads", "mlp")
        data = strict_keys(data, keys, where, optional=("layers",))
        lists = {}
        for key in ("layers", "heads", "mlp"):
            given = data.get(key, [])
            if not isinstance(given, (list, tuple)):
                raise ConfigError(f"{where}.{key}: a list with one entry a layer is needed")
            for j, value in enumerate(given):
                if key != "mlp":
                    strict_int(value, f"{where}.{key}[{j}]")
                elif isinstance(value, bool) or not isinstance(value, (int, float)):
                    raise ConfigError(f"{where}.mlp[{j}] is {value!r}; a number is needed")
            lists[key] = tuple(float(v) for v in given) if key == "mlp" else tuple(given)
        try:
            layers = lists["layers"] if "layers" in data else self.layers_of(len(lists["heads"]))
            config = PlainConfig(
                strict_int(data["resolution"], f"{where}.resolution"),
                strict_int(data["width"], f"{where}.width"),
                layers,
                lists["heads"],
                lists["mlp"],
            )
            self.check(config)
        except ModelError as error:
            raise ConfigError(f"{where}: {error}") from error
        return config

    def to_dict(self) -> dict[str, Any]:
        """JSON form of the space."""
        fields = {key: list(v) if isinstance(v, tuple) else v for key, v in dataclasses.asdict(self).items()}
        return {"space": self.name, **fields}


def read_plain(data: Mapping[str, Any], where: str) -> PlainSpace:
    """A space from its JSON form.

    Raises:
        ConfigError: names the entry.
    """
    fields = [field.name for field in dataclasses.fields(PlainSpace)]
    data = strict_keys(data, ["space", *fields], where, optional=["space", *fields[4:]])
    data.pop("space", None)
    try:
        check_fields(data, _RULES, where)
    except ModelError as error:
        raise ConfigError(str(error)) from error
    try:
        space = PlainSpace(**{key: tuple(v) if isinstance(v, list) else v for key, v in data.items()})
        _ = space.dimensions
    except ModelError as error:
        raise ConfigError(f"{where}: {error}") from error
    return space


_AUTOFORMER = {
    "tiny": {"widths": (192, 216, 240), "heads": (3, 4), "mlp": (3.5, 4.0), "depths": (12, 13, 14)},
    "small": {"widths": (320, 384, 448), "heads": (5, 6, 7), "mlp": (3.0, 3.5, 4.0), "depths": (12, 13, 14)},
    "base": {"widths": (528, 576, 624), "heads": (9, 10), "mlp": (3.0, 3.5, 4.0), "depths": (14, 15, 16)},
}


def autoformer_space(size: str, **changes: Any) -> PlainSpace:
    """AutoFormer's space of a size, without the relative positions that its authors add.

    Args:
        size: "tiny", "small" or "base".
        **changes: other fields of `PlainSpace`, e.g. ``num_classes=10``.

    Raises:
        ModelError: another size.
    """
    if size not in _AUTOFORMER:
        raise ModelError(f'no AutoFormer space "{size}"; allowed: {", ".join(_AUTOFORMER)}')
    return PlainSpace(**{**_AUTOFORMER[size], **changes})
