"""Renditions: the same samples with smaller pictures, for the part of training that never sees more pixels.

Resampling with Pillow's Lanczos filter (antialiased), then baseline JPEG with 4:2:0 chroma. Pictures whose short side
is not larger keep their bytes, so a rendition never enlarges and never encodes twice without need.
"""

from __future__ import annotations

import io
from dataclasses import replace

import numpy as np
import PIL
from PIL import Image, features

from ..core.errors import ShardError
from .checks import CheckedImage, SampleRejected
from .decode import decode
from .manifest import Rendition

DEFAULT_QUALITY = 92
_CHROMA_420 = 2


def make_rendition(short_side: int, quality: int = DEFAULT_QUALITY) -> Rendition:
    """The rendition that this installation makes.

    Args:
        short_side: pixels.
        quality: JPEG quality, 1 to 100.

    Raises:
        ShardError: a value out of range.
    """
    if not 8 <= short_side <= 4096 or not 1 <= quality <= 100:
        raise ShardError(
            f"rendition: short side {short_side} (allowed: 8 to 4096), JPEG quality {quality} (allowed: 1 to 100)"
        )
    turbo = features.version_feature("libjpeg_turbo")
    library = f"libjpeg-turbo {turbo}" if turbo else f"libjpeg {features.version_codec('jpg')}"
    return Rendition(short_side, quality, f"Pillow {PIL.__version__} lanczos, {library} 4:2:0")


def rendition_size(width: int, height: int, short_side: int) -> tuple[int, int]:
    """(width, height) of the resized picture: the short side exactly, the long one rounded."""
    short, long = min(width, height), max(width, height)
    scaled = max(short_side, (2 * long * short_side + short) // (2 * short))
    return (short_side, scaled) if width <= height else (scaled, short_side)


def render(image: CheckedImage, rendition: Rendition) -> CheckedImage:
    """The image as the rendition holds it: unchanged where it is small enough, else resized and stored as JPEG.

    Colours become RGB and alpha is dropped, as the training loader does; grey stays grey.

    Raises:
        SampleRejected: the picture cannot be decoded to RGB.
    """
    if min(image.width, image.height) <= rendition.short_side:
        return image
    try:
        pixels = decode(image.payload)
    except ShardError as error:
        raise SampleRejected("decode", str(error)) from error
    grey = pixels.shape[2] == 1 or image.kind.startswith("jpg gray")
    picture = Image.fromarray(np.ascontiguousarray(pixels[:, :, 0]) if grey else pixels)
    width, height = rendition_size(image.width, image.height, rendition.short_side)
    picture = picture.resize((width, height), Image.Resampling.LANCZOS)
    with io.BytesIO() as buffer:
        picture.save(buffer, "JPEG", quality=rendition.quality, subsampling=_CHROMA_420)
        return replace(image, payload=buffer.getvalue(), suffix="jpg", width=width, height=height, resized=True)
