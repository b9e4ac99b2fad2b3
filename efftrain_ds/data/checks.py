"""What a single image must satisfy before it is packed, and the lossless removal of EXIF blocks.

JPEG goes through simplejpeg in strict mode (a file cut in half is an error there, not a half-grey picture);
every other format goes through Pillow. The format is decided by magic bytes, never by the file name.
"""

from __future__ import annotations

import io
from dataclasses import dataclass

import simplejpeg
from PIL import Image

from ..core.errors import ShardError

FORMATS = {
    "jpg": "jpg",
    "jpeg": "jpg",
    "png": "png",
    "webp": "webp",
    "bmp": "bmp",
    "tif": "tif",
    "tiff": "tif",
    "ppm": "ppm",
    "pgm": "ppm",
}
"""Format of each file name suffix that is taken for an image."""

_PILLOW = {"png": "PNG", "webp": "WEBP", "bmp": "BMP", "tif": "TIFF", "ppm": "PPM"}
_MAX_SIDE = 65535  # the index keeps sides in 16 bits
_EXIF = b"Exif\x00"
_STANDALONE = {0x01, *range(0xD0, 0xD8)}  # markers without a length (TEM, RSTn)
_PROGRESSIVE = {0xC2, 0xC6, 0xCA, 0xCE}


class SampleRejected(ShardError):
    """One sample cannot be packed.

    Attributes:
        reason: short name for counting ("empty", "format", "suffix", "decode", "side" or "label").
        detail: the finding in words.
    """

    def __init__(self, reason: str, detail: str):
        super().__init__(f"{reason}: {detail}")
        self.reason = reason
        self.detail = detail


@dataclass(frozen=True)
class CheckedImage:
    """A payload that decodes.

    Attributes:
        payload: the source bytes, without EXIF blocks.
        suffix: member suffix, one of the values of `FORMATS`.
        width: pixels.
        height: pixels.
        kind: format and colour mode in words, e.g. "jpg ycbcr progressive".
        exif: an EXIF block was removed.
        resized: the picture was made smaller and encoded again.
    """

    payload: bytes
    suffix: str
    width: int
    height: int
    kind: str
    exif: bool = False
    resized: bool = False


def image_format(payload: bytes) -> str | None:
    """Format by magic bytes: one of the values of `FORMATS`, or None."""
    if payload[:3] == b"\xff\xd8\xff":
        return "jpg"
    if payload[:8] == b"\x89PNG\r\n\x1a\n":
        return "png"
    if payload[:4] == b"RIFF" and payload[8:12] == b"WEBP":
        return "webp"
    if payload[:4] in (b"II*\x00", b"MM\x00*"):
        return "tif"
    if payload[:2] == b"BM":
        return "bmp"
    if payload[:2] in (b"P5", b"P6"):
        return "ppm"
    return None


def strip_exif(payload: bytes) -> tuple[bytes, bool]:
    """Remove every EXIF block (APP1) of a JPEG without touching the coded picture; returns (bytes, progressive).

    The orientation flag goes with it and is not applied: some decoders honour it and others do not, so a data set
    that keeps it looks different from one decoder to the next. A header that cannot be walked is returned as it is;
    the decoder judges it.
    """
    kept = [payload[:2]]
    at, progressive = 2, False
    while at + 4 <= len(payload) and payload[at] == 0xFF:
        marker = payload[at + 1]
        if marker == 0xFF:  # fill byte
            at += 1
            continue
        if marker in _STANDALONE:
            kept.append(payload[at : at + 2])
            at += 2
            continue
        if marker in (0xDA, 0xD9):  # coded data begins (or the file ends)
            break
        end = at + 2 + int.from_bytes(payload[at + 2 : at + 4], "big")
        if end > len(payload):
            break
        progressive |= marker in _PROGRESSIVE
        if not (marker == 0xE1 and payload[at + 4 : at + 9] == _EXIF):
            kept.append(payload[at:end])
        at = end
    kept.append(payload[at:])
    return b"".join(kept), progressive


def image_size(payload: bytes) -> tuple[int, int]:
    """(width, height) from the header alone.

    Raises:
        SampleRejected: no known image header.
    """
    kind = image_format(payload)
    try:
        if kind == "jpg":
            height, width, _, _ = simplejpeg.decode_jpeg_header(payload)
            return width, height
        if kind is not None:
            with Image.open(io.BytesIO(payload), formats=[_PILLOW[kind]]) as image:
                return image.size
    except Exception as error:  # decoders raise anything from ValueError to SyntaxError on damaged input
        raise SampleRejected("decode", f"{kind} header: {error}") from error
    raise SampleRejected("format", f"first bytes {payload[:8]!r} are no known image")


def check_image(payload: bytes, suffix: str, min_side: int = 1) -> CheckedImage:
    """Decode the whole image and return what is to be packed.

    Args:
        payload: bytes of the file.
        suffix: suffix of the file's name, with or without the dot, in any case.
        min_side: smallest allowed side in pixels.

    Raises:
        SampleRejected: empty, of unknown format, of another format than its name says, not decodable, or with a side
            outside ``min_side .. 65535``.
    """
    if not payload:
        raise SampleRejected("empty", "0 bytes")
    kind = image_format(payload)
    if kind is None:
        raise SampleRejected("format", f"first bytes {payload[:8]!r} are no known image")
    suffix = suffix.lower().lstrip(".")
    named = FORMATS.get(suffix)
    if named != kind:
        raise SampleRejected("suffix", f"named .{suffix}, the content is {kind}")
    try:
        if kind == "jpg":
            packed, width, height, words = _check_jpeg(payload)
        else:
            packed = payload
            with Image.open(io.BytesIO(payload), formats=[_PILLOW[kind]]) as image:
                image.load()
                width, height = image.size
                words = f"{kind} {image.mode}"
    except Exception as error:  # see image_size
        raise SampleRejected("decode", f"{kind}, {len(payload)} bytes: {error}") from error
    if min(width, height) < min_side or max(width, height) > _MAX_SIDE:
        raise SampleRejected("side", f"{width}x{height} px, sides must be {min_side} to {_MAX_SIDE}")
    return CheckedImage(packed, kind, width, height, words, len(packed) != len(payload))


def _check_jpeg(payload: bytes) -> tuple[bytes, int, int, str]:
    packed, progressive = strip_exif(payload)
    _, _, space, _ = simplejpeg.decode_jpeg_header(packed)
    # four-channel files cannot be converted by libjpeg; decoding them as they are checks them all the same
    pixels = simplejpeg.decode_jpeg(packed, colorspace="CMYK" if space.upper() in ("CMYK", "YCCK") else "RGB")
    words = f"jpg {space.lower()}" + (" progressive" if progressive else "")
    return packed, pixels.shape[1], pixels.shape[0], words
