"""A model as `predict` needs it: prepared pixels in, class names and probabilities out."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    import torch

__all__ = ["Classifier", "decode"]

TOP = 5


class Classifier:
    """Weights on a device, ready to answer."""

    def __init__(self, weights: Path, device: torch.device) -> None:
        import vit_model

        _, spec, output_spec = vit_model.read_specs(weights)
        if spec is None or output_spec is None:
            raise ValueError(
                f"{weights.name} does not say how its images are prepared and what its classes are; "
                "write it with vit_model.save_weights(..., input_spec=, output_spec=)"
            )
        self.spec, self.output_spec, self.device = spec, output_spec, device
        self.model = vit_model.load_model(weights).eval().to(device)

    def probabilities(self, images: NDArray[np.uint8]) -> NDArray[np.float32]:
        """uint8 (B, C, H, W) -> (B, classes)."""
        import torch

        import vit_model

        with torch.inference_mode():
            batch = torch.from_numpy(np.ascontiguousarray(images)).to(self.device)
            logits = self.model(vit_model.normalize(batch, self.spec)).logits
            result: NDArray[np.float32] = self.output_spec.probabilities(logits).cpu().numpy()
        if not np.isfinite(result).all():
            raise ValueError("the model's answers are not finite; its weights are broken")
        return result

    def answer(self, images: NDArray[np.uint8], readable: NDArray[np.bool_]) -> dict[str, list[Any]]:
        """Columns prediction, probability, top_classes, top_probabilities; rows that are not readable are empty."""
        names = self.output_spec.class_names
        columns: dict[str, list[Any]] = {
            "prediction": [None] * len(images),
            "probability": [None] * len(images),
            "top_classes": [[] for _ in range(len(images))],
            "top_probabilities": [[] for _ in range(len(images))],
        }
        places = np.flatnonzero(readable)
        if len(places):
            chances = self.probabilities(images[places])
            order = np.argsort(-chances, axis=1, kind="stable")[:, :TOP]
            for place, row, best in zip(places.tolist(), chances, order, strict=True):
                columns["prediction"][place] = names[best[0]]
                columns["probability"][place] = float(row[best[0]])
                columns["top_classes"][place] = [names[index] for index in best]
                columns["top_probabilities"][place] = [float(row[index]) for index in best]
        return columns


def decode(data: bytes, spec: Any, out: NDArray[np.uint8]) -> str:
    """Decode one image file into `out` (C, H, W); returns what is wrong with it, or nothing."""
    import vit_model

    try:
        out[:] = vit_model.load_image(data, spec).numpy()
    except vit_model.ImageError as error:
        out[:] = 0
        return f"{error.reason}: {error}"
    return ""
