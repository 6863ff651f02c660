"""Uploaded pictures: their size, format, pixels, scans and chunks are checked before anything is decoded."""

import functools
import io
import struct
from pathlib import Path

from PIL import Image

from ov_decidiffusion.web.limits import MAX_PIXELS, MAX_UPLOAD, PICTURE_FORMATS

MAX_SCANS = 100  # of a progressive JPEG; each is a pass over all pixels, and cameras and editors write ten
MAX_PASSED = 1_500_000_000  # pixels times scans of a JPEG; it bounds the time that one core needs to decode it
MAX_CHUNKS = 20_000  # of a PNG; one of 30 MB in chunks of 8 kB has 4,000
PNG_BEGINNING = b"\x89PNG\r\n\x1a\n"


class UploadError(ValueError):
    """A picture is refused; the message says why, and begins with a verb."""


def open_picture(data: bytes, most: int | None = MAX_UPLOAD) -> Image.Image:
    """Open a picture without decoding it.

    Args:
        data: the file's bytes.
        most: the largest number of bytes; None for a file of the user's own.

    Raises:
        UploadError: it is too large, not in one of ``PICTURE_FORMATS``, or made to keep its reader busy.
    """
    if most is not None and len(data) > most:
        raise UploadError(f"has {len(data) / 1e6:.0f} MB; at most {most // 10**6} MB are read")
    scans = data.count(b"\xff\xda") if data.startswith(b"\xff\xd8") else 0
    if scans > MAX_SCANS:
        raise UploadError(f"is a JPEG of {scans} scans; at most {MAX_SCANS} are read")
    if data.startswith(PNG_BEGINNING) and _has_too_many_chunks(data):
        raise UploadError(f"is a PNG of more than {MAX_CHUNKS} chunks")
    try:
        picture = Image.open(io.BytesIO(data), formats=readers())
    except Image.DecompressionBombError as error:
        raise UploadError(f"has more pixels than can be read; at most {MAX_PIXELS // 10**6} million are") from error
    except Exception as error:  # PIL's readers raise a dozen kinds of errors for damaged files
        raise UploadError(f"is damaged, or in another format than {', '.join(PICTURE_FORMATS)}") from error
    pixels, size = picture.width * picture.height, f"{picture.width}x{picture.height}"
    if pixels > MAX_PIXELS:
        raise UploadError(f"has {size} pixels; at most {MAX_PIXELS // 10**6} million are read")
    if pixels * scans > MAX_PASSED:
        raise UploadError(
            f"is a JPEG of {scans} scans of {size} pixels; at most {MAX_PASSED // pixels} of these are read"
        )
    return picture


def open_own_file(file: Path) -> Image.Image:
    """Open a picture file of the user's own, of any number of bytes, without decoding it.

    Raises:
        ValueError: it is not there, not a file, or not accepted; the message names it.
    """
    if not file.exists():
        raise ValueError(f"there is no file {file}.")
    if not file.is_file():  # reading a pipe could block forever
        raise ValueError(f"{file} is not a file.")
    try:
        return open_picture(file.read_bytes(), most=None)
    except UploadError as error:
        raise ValueError(f"{file} {error}.") from error


@functools.cache
def readers(formats: tuple[str, ...] = PICTURE_FORMATS) -> list[str]:
    """PIL's readers for the given formats, as far as this PIL has them; the one for JPEG reads MPO too."""
    Image.init()
    return [name for name in formats if name in Image.OPEN]


def keep_only_these_readers() -> None:
    """Remove PIL's other readers from a process that serves others, so that nothing in it reads another format.

    Do not use it in the user's own process, such as a notebook's, where other code may need these readers.
    """
    kept = readers()
    for name in [name for name in Image.OPEN if name not in kept]:
        del Image.OPEN[name]
    Image.ID[:] = [name for name in Image.ID if name in kept]


def _has_too_many_chunks(data: bytes) -> bool:
    """Whether a PNG has more than ``MAX_CHUNKS`` chunks; each has a length, a name, the content and a checksum."""
    place = len(PNG_BEGINNING)
    for _ in range(MAX_CHUNKS):
        if place + 12 > len(data) or data[place + 4 : place + 8] == b"IEND":
            return False
        place += 12 + struct.unpack(">I", data[place : place + 4])[0]
    return place + 12 <= len(data)
