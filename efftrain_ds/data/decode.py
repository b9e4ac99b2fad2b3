"""Image bytes to RGB pixels. The format is told by its first bytes, never by a file name.

EXIF orientation is never applied: the pixels are those every decoder of the reference recipes trains on.
"""

from __future__ import annotations

import io
import warnings

import numpy as np
import simplejpeg
from PIL import Image

from ..core.errors import ShardError

_JPEG = b"\xff\xd8\xff"
_FORMATS = ((b"\x89PNG", ("PNG",)), (b"GIF8", ("GIF",)), (b"RIFF", ("WEBP",)), (b"BM", ("BMP",)))


def decode(payload: bytes) -> np.ndarray:
    """Decode one image.

    Baseline and progressive JPEG go through libjpeg-turbo in strict mode; every other format, CMYK JPEG, and every
    JPEG that strict mode refuses go through Pillow, whose verdict is final.

    Args:
        payload: bytes of the image file.

    Returns:
        [H, W, 3] uint8, C-contiguous; [H, W, 1] for a grey image, whose one channel stands for all three.

    Raises:
        ShardError: the bytes are not an image that Pillow reads completely.
    """
    if payload[:3] == _JPEG:
        try:
            return simplejpeg.decode_jpeg(payload, colorspace="RGB")
        except ValueError:
            pass  # CMYK, or damage on which the referee decides
    try:
        return _pillow_pixels(payload)
    except Exception as error:  # Pillow's plugins raise many types on damaged files
        raise ShardError(f"image cannot be decoded: {type(error).__name__}: {error}") from error


def decode_pil(payload: bytes) -> Image.Image:
    """Decode one image with Pillow to mode RGB (used for evaluation, for parity with published numbers).

    Raises:
        ShardError: the bytes are not an image that Pillow reads completely.
    """
    try:
        return _to_rgb(_open(payload))
    except Exception as error:
        raise ShardError(f"image cannot be decoded: {type(error).__name__}: {error}") from error


def _open(payload: bytes) -> Image.Image:
    if payload[:3] == _JPEG:
        formats: tuple[str, ...] | None = ("JPEG", "MPO")
    else:
        formats = next((names for magic, names in _FORMATS if payload.startswith(magic)), None)
    return Image.open(io.BytesIO(payload), formats=formats)


def _pillow_pixels(payload: bytes) -> np.ndarray:
    image = _open(payload)
    if image.mode == "L" and "transparency" not in image.info:
        return np.array(image)[:, :, None]
    return np.array(_to_rgb(image))


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):
        # 16-bit grey: Pillow's conversion would clip to 255 instead of scaling.
        image = Image.fromarray((np.asarray(image).astype(np.int64) >> 8).clip(0, 255).astype(np.uint8))
    if image.mode != "P":
        return image.convert("RGB")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # "Palette images with Transparency": alpha is dropped on purpose
        return image.convert("RGB")
