"""A rank's part of a batch, cut into pieces that fit the device.

Losses are summed and divided by the global batch size, so the gradients of the pieces add up to the gradient of the
part: the number of pieces changes the order of rounding and nothing else (and which dropout masks are drawn).
"""

from __future__ import annotations

import logging
from itertools import pairwise
from typing import Literal

import torch

from pipelines.training.names import TrainingError

__all__ = ["DoesNotFit", "OutOfMemory", "Pieces", "is_out_of_memory"]

log = logging.getLogger(__name__)


class DoesNotFit(TrainingError):
    """The device cannot hold what the recipe asks for, however often it is tried."""


class OutOfMemory(RuntimeError):
    """The device could not hold a piece of `images`, and it was too late to halve it; the next start does."""

    def __init__(self, message: str, images: int) -> None:
        super().__init__(message)
        self.images = images


def is_out_of_memory(error: BaseException) -> bool:
    """A GPU's own error, or that of torch's CPU allocator."""
    return isinstance(error, torch.OutOfMemoryError) or (
        isinstance(error, RuntimeError) and "can't allocate memory" in str(error)
    )


class Pieces:
    """The size of a piece in images. `auto` starts with the whole part and halves until a step fits."""

    def __init__(self, wanted: int | Literal["auto"] | None, size: int | None = None) -> None:
        """`size`: what `auto` has found before."""
        self.auto = wanted == "auto"
        self.size: int | None = size if self.auto else wanted  # type: ignore[assignment]
        self.proven = not self.auto  # Whether a whole step of this size has fitted.

    def cut(self, images: int) -> list[slice]:
        """As few pieces as possible, as equal as possible, so that a device sees at most two shapes."""
        count = 1 if self.size is None else max(1, -(-images // self.size))
        bounds = [images * piece // count for piece in range(count + 1)]
        return [slice(start, stop) for start, stop in pairwise(bounds)]

    def too_late(self, images: int, error: BaseException) -> RuntimeError:
        """Of a step that other ranks have already seen a part of."""
        current = min(self.size or images, images)
        if not self.auto or current <= 1:
            return self._final(current, error)
        return OutOfMemory(f"{current} images at once do not fit ({error}); the next start takes half", current)

    def halve(self, images: int, error: BaseException) -> None:
        """Make them smaller; raises DoesNotFit where that is not allowed or not possible."""
        current = min(self.size or images, images)
        if not self.auto or current <= 1:
            raise self._final(current, error) from error
        self.size, self.proven = current // 2, False
        log.warning("%d images at once do not fit; going on with %d", current, self.size)

    def _final(self, current: int, error: BaseException) -> DoesNotFit:
        if current <= 1:
            return DoesNotFit(
                f"not even one image fits ({error}); set train.activation_checkpointing: true, parallel.kind: fsdp, or"
                " take a smaller model"
            )
        return DoesNotFit(
            f"{current} images at once do not fit ({error}); set train.per_device_batch_size to less, or to auto"
        )
