"""Configuration of masked autoencoder pre-training: the value of ``efftrain.methods.mae``."""

from __future__ import annotations

from pydantic import Field

from ...core.strict import StrictModel

KEY = "efftrain.methods.mae"


class MaeConfig(StrictModel):
    """Masked autoencoder pre-training (MAE, arXiv 2111.06377). The defaults are the published settings.

    ``efftrain.model.name`` is "mae_vit_tiny_patch16" (small, base, large), see docs/mae.md.
    """

    mask_ratio: float = Field(0.75, gt=0, lt=1)
    """Share of the patches that is hidden. The priced plan counts the model's own ratio (0.75, or
    efftrain.model.kwargs.mask_ratio)."""
    norm_pixels: bool = True
    """Predict the pixels of a patch relative to their mean and standard deviation; false predicts them as they are."""
    seed: int | None = Field(None, ge=0)
    """Seed of the masks; null = the run's."""
