"""TensorBoard files of a run, written by rank 0."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np


class TensorBoard:
    """Thin layer over torch's ``SummaryWriter``; does nothing where it is switched off or the rank is not 0.

    Args:
        folder: where the event files go.
        enabled: False switches it off.
        rank: data-parallel rank.
        purge_step: first step of this process after a resume; what an earlier process wrote from there on is hidden.
    """

    def __init__(self, folder: str | Path, enabled: bool = True, rank: int = 0, purge_step: int | None = None):
        self.folder = Path(folder)
        self._writer: Any = None
        if enabled and rank == 0:
            from torch.utils.tensorboard import SummaryWriter  # imports slowly, and not needed when off

            self._writer = SummaryWriter(str(self.folder), purge_step=purge_step)

    @property
    def enabled(self) -> bool:
        """Whether anything is written."""
        return self._writer is not None

    @property
    def command(self) -> str:
        """Command line that shows these files."""
        return f"tensorboard --logdir {self.folder}"

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        """Write numbers by tag, e.g. ``{"loss/train": 4.8, "speed/img_s": 2914}``."""
        if self._writer is not None:
            for tag, value in values.items():
                self._writer.add_scalar(tag, float(value), step)

    def image(self, tag: str, picture: np.ndarray, step: int) -> None:
        """Write a picture, uint8 [H, W, 3]."""
        if self._writer is not None:
            self._writer.add_image(tag, picture, step, dataformats="HWC")

    def figure(self, tag: str, figure: Any, step: int) -> None:
        """Write a matplotlib figure."""
        if self._writer is not None:
            self._writer.add_figure(tag, figure, step)

    def text(self, tag: str, text: str, step: int = 0, *, fixed: bool = True) -> None:
        """Write text; `fixed` keeps its line breaks and columns."""
        if self._writer is not None:
            body = "\n".join("    " + line for line in text.splitlines()) if fixed else text
            self._writer.add_text(tag, body, step)

    def flush(self) -> None:
        """Put everything on disk."""
        if self._writer is not None:
            self._writer.flush()

    def close(self) -> None:
        """Flush and close; further writes do nothing."""
        if self._writer is not None:
            self._writer.close()
            self._writer = None
