"""Which sub-network a supernet runs: given with the call, or set beforehand for callers that pass only images."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ...core.errors import ModelError

if TYPE_CHECKING:
    from .space import Space


class Choosable:
    """Mixin of supernets.

    Attributes:
        space: sub-networks of the supernet.
        config: what runs where the call names none; None for the largest.
    """

    space: Space
    config: Any = None

    def set_config(self, config: Any) -> None:
        """Set what runs where the call names no sub-network; None for the largest.

        The forward pass reads it once, at its beginning: a change before the backward pass does no harm.

        Raises:
            ModelError: the space does not have it.
        """
        if config is not None:
            self.space.check(config)
        self.config = config

    def chosen(self, config: Any = None) -> Any:
        """The sub-network of a call."""
        if config is None:
            config = self.config
        if config is None:
            return self.space.max()
        if not hasattr(config, "resolution"):
            raise ModelError(f"a sub-network of this space is needed, not {type(config).__name__}")
        return config
