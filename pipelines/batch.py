"""The unit that the reader hands to training and evaluation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Batch"]


@dataclass(slots=True)
class Batch:
    """B samples of one step. A row of weight 0 is padding or an unreadable image and counts for nothing."""

    images: Tensor  # uint8 (B, C, H, W)
    # int64 (B,); float32 (B, K), shares of classes or multi-hot; with several labels an image the reader's streams give
    # int64 (B, W), class numbers and then -1, which DeviceBatches makes multi-hot on the device.
    labels: Tensor
    weights: Tensor  # float32 (B,)
    sample_ids: Tensor  # int64 (B,), row number in manifest order; -1 = padding
    step: int | None = None  # The optimizer update these rows belong to; None in evaluation.
    epochs: Tensor | None = None  # int64 (B,), the pass over the corpus that each row belongs to
    lanes: Tensor | None = None  # int64 (B,), the lane that each row comes from

    def __len__(self) -> int:
        return len(self.sample_ids)
