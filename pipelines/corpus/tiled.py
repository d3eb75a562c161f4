"""`jpeg: tiled`: the same JPEG, entropy-coded in pieces, of which the reader passes over those outside a crop.

Lossless: the coefficients are the same, compared one by one after writing, and every marker is kept. A tiled file is a
plain baseline JPEG that any decoder reads; a progressive file becomes a baseline one.
"""

from __future__ import annotations

from typing import Literal

from pipelines.corpus.errors import CorpusError
from pipelines.corpus.images import ImageFacts

__all__ = ["Jpeg", "check_tiling", "tile_jpeg"]

Jpeg = Literal["keep", "tiled"]  # What `vit shard` does with JPEG files.
TILE_PIXELS = 96  # Width of a piece: narrower ones cost more bytes than their precision saves.
LEAST_PIXELS = 1 << 15  # A smaller image is one or two crops' worth; it is left alone.
MAX_PIXELS = 1 << 26  # The reader decodes larger images in another way.


def check_tiling() -> None:
    """Raises CorpusError where the extension was not built."""
    try:
        from pipelines.corpus.native import _tiled  # noqa: F401
    except ImportError as error:
        raise CorpusError(
            f"jpeg=tiled needs the C extension, which was not built here ({error}); install a C compiler and "
            "libjpeg-turbo's headers (Debian: gcc libjpeg-dev), then install this package again; or set jpeg=keep"
        ) from None


def tile_jpeg(data: bytes, facts: ImageFacts) -> bytes:
    """The tiled file, or the file itself where tiling gives nothing (no JPEG, small, CMYK) or libjpeg finds fault."""
    from pipelines.corpus.native import _tiled

    if facts.extension != "jpg" or facts.width * facts.height < LEAST_PIXELS:
        return data
    try:
        return _tiled.tile(data, TILE_PIXELS, MAX_PIXELS)
    except ValueError:  # Whether the image can be used at all is for others to say.
        return data
