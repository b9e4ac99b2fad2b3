"""What is unlike DeepSpeed's own update: gradients are clipped by unit, and blocks that took no part stay."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ...core.errors import ConfigError
from ...models.elastic import Space
from ...models.elastic.named import unused_parts
from ...zero import access
from ...zero.agc import UnitClip
from ...zero.hold import Hold
from .config import KEY


class Update:
    """The optimizer's steps of a supernet.

    Args:
        space: of the supernet.
        names: of its parameters.
        agc: as configured.
        decay_unused: as configured.
    """

    def __init__(self, space: Space[Any], names: Sequence[str], agc: float | None, decay_unused: bool) -> None:
        self.space, self.agc, self.decay_unused = space, agc, decay_unused
        self._names = names
        self._inside: dict[str, list[str]] = {}
        self._layout: access.Layout | None = None
        self._clip: UnitClip | None = None
        self._hook: Any = None

    def attach(self, engine: Any) -> None:
        """Begin with an engine: the first one, or one that was made anew. Collective.

        Raises:
            ConfigError: its gradients cannot be clipped by unit, or its optimizer is offloaded.
        """
        if access.offloaded(engine, "optimizer"):
            raise ConfigError(
                f"{KEY}: zero_optimization.offload_optimizer is set, and DeepSpeed then loses the gradients of blocks "
                "that the last sub-network of a step does not run; remove it"
            )
        if self._clip is not None:
            self._clip.remove()
            self._clip = None
        self._layout = None
        if self.agc is not None:
            try:
                self._clip = UnitClip(engine, self.agc)
            except ConfigError as error:
                raise ConfigError(f"{KEY}.agc: {error}") from error

    def before(self, engine: Any, configs: Sequence[Any]) -> None:
        """Keep the blocks as they are that none of some sub-networks runs: masters and moments come back right after
        the update."""
        names = [name for part in unused_parts(self.space, configs) for name in self._of(part)]
        if not names:
            return
        access.zero_skipped_gradients(engine, names)
        if self.decay_unused:
            return
        if self._layout is None:
            self._layout = access.layout_of(engine)
        hold = Hold(self._layout, names)
        # in the optimizer's step, before DeepSpeed sends the new weights around
        self._hook = self._layout.base.register_step_post_hook(lambda *_: hold.put_back())

    def after(self) -> None:
        """The step is over, whether it was applied or not."""
        if self._hook is not None:
            self._hook.remove()
            self._hook = None

    def _of(self, part: str) -> list[str]:
        """Parameters inside of a module, by its name; [] where there is none of that name."""
        if part not in self._inside:
            self._inside[part] = [name for name in self._names if name.startswith(f"{part}.")]
        return self._inside[part]
