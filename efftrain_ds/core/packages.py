"""Packages that are only needed for some things: asked for early, with the way to get them."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec

from .errors import ConfigError

ONNX = ("onnx", "onnxscript", "onnxruntime")
"""Writing a network as ONNX and running it; they come with the extra "export"."""


def require(what: str, names: Sequence[str], extra: str) -> None:
    """Refuse before any work is done where a package is missing; none is imported.

    Args:
        what: needs them, first words of the message.
        names: of the packages, as they are imported.
        extra: of this package that installs them.

    Raises:
        ConfigError: names what is missing and how to get it.
    """
    missing = [name for name in names if find_spec(name) is None]
    if missing:
        raise ConfigError(f'{what} needs {", ".join(missing)}; install with: pip install "efftrain-ds[{extra}]"')
