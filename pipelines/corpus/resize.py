"""Large images made smaller on their way into a shard; what is small enough keeps its bytes."""

from __future__ import annotations

import io
from dataclasses import dataclass
from typing import Literal

from pipelines.config import Strict
from pipelines.corpus.images import ImageFacts

__all__ = ["ResizeConfig", "shrink"]


@dataclass(frozen=True, kw_only=True, slots=True)
class ResizeConfig(Strict):
    """JPEG and WebP become JPEG, PNG stays PNG; decoded by the rules of vit_model/decode.py, antialiased bicubic."""

    side: Literal["shortest", "longest"] = "shortest"
    pixels: int  # Length of that side; smaller images are left as they are
    quality: int = 95  # Of JPEG

    def __post_init__(self) -> None:
        if self.pixels < 16:
            raise ValueError(f"resize.pixels={self.pixels} is below 16; 256 and 512 are usual")
        if not 1 <= self.quality <= 100:
            raise ValueError(f"resize.quality={self.quality} is not between 1 and 100; 95 is usual")


def shrink(image: bytes, facts: ImageFacts, config: ResizeConfig) -> tuple[bytes, ImageFacts]:
    """The image with its side at most `pixels` long. Raises vit_model's ImageError."""
    side = min(facts.width, facts.height) if config.side == "shortest" else max(facts.width, facts.height)
    if side <= config.pixels:
        return image, facts
    from PIL import Image

    from vit_model.preprocess import decode_image

    pixels = decode_image(image, 3).permute(1, 2, 0).numpy()
    height, width = pixels.shape[:2]
    size = tuple(max(1, round(length * config.pixels / side)) for length in (width, height))
    small = Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC)  # type: ignore[arg-type]
    file = io.BytesIO()
    if facts.extension == "png":
        small.save(file, "PNG")
    else:
        small.save(file, "JPEG", quality=config.quality, subsampling=0 if config.quality >= 95 else 2)
    extension = "png" if facts.extension == "png" else "jpg"
    return file.getvalue(), ImageFacts(extension, *size, (*facts.notes, "resized"))  # type: ignore[call-arg]
