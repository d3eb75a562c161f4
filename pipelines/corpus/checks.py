"""How far an image is looked at before it becomes a sample: its header, or its pixels too."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from pipelines.corpus.images import ImageFacts, ImageRejected, inspect_image

__all__ = ["check_image", "is_named_as", "is_whole_jpeg", "rejected_by"]

DECODER_REASONS = {"too_many_bytes": "bomb", "too_many_pixels": "bomb", "unsupported_mode": "unsupported_format"}


def check_image(data: bytes, *, decode: bool) -> ImageFacts:
    """Raises ImageRejected."""
    facts = inspect_image(data)
    if decode:
        from vit_model.preprocess import decode_image

        with rejected_by():
            if not (facts.is_plain and is_whole_jpeg(data)):
                decode_image(data, 3)
    return facts


def is_whole_jpeg(data: bytes) -> bool:
    """Decodes all coefficients, and of the pixels an eighth in grey: 70 % of the cost, and what is broken shows."""
    import simplejpeg

    try:
        simplejpeg.decode_jpeg(data, "GRAY", min_height=1, min_width=1, strict=True)
    except ValueError:
        return False
    return True


@contextmanager
def rejected_by() -> Iterator[None]:
    """What the decoder refuses is rejected, with a reason of the quarantine."""
    from vit_model.preprocess import ImageError

    try:
        yield
    except ImageError as error:
        raise ImageRejected(DECODER_REASONS.get(error.reason, "corrupt"), str(error)) from None


def is_named_as(path: str, extension: str) -> bool:
    named = path.lower().rpartition(".")[2]
    return ("jpg" if named == "jpeg" else named) == extension
