"""The file that MLflow runs when somebody loads a registered version: image bytes in, classes and probabilities out.

It is copied into every version together with the `vit_model` of that day, so a version needs nothing of ours installed
and keeps its behaviour. Our own stages read the safetensors instead and never run a version's code.
"""

from __future__ import annotations

from typing import Any

import mlflow
import numpy as np
import pandas as pd
import torch
from mlflow.pyfunc import PythonModel

import vit_model

CHUNK = 64  # Images decoded and run at once.


class ImageClassifier(PythonModel):
    """Column `image`: the bytes of a JPEG, PNG, WebP ... file (base64 in JSON). One row out for each row in."""

    def load_context(self, context: Any) -> None:
        path = context.artifacts["weights"]
        _, input_spec, output_spec = vit_model.read_specs(path)
        if input_spec is None or output_spec is None:  # Never written so by pipelines.tracking.package.
            raise ValueError(f"{path} says neither how images are prepared nor what its classes are")
        self.input_spec, self.output_spec = input_spec, output_spec
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.model = vit_model.load_model(path).eval().to(self.device)

    def probabilities(self, images: torch.Tensor) -> np.ndarray:
        """uint8 (B, C, H, W) as `vit_model.load_image` gives them -> float32 (B, classes)."""
        with torch.inference_mode():
            logits = self.model(vit_model.normalize(images.to(self.device), self.input_spec)).logits
            chances: np.ndarray = self.output_spec.probabilities(logits).cpu().numpy()
            return chances

    def predict(self, context: Any, model_input: pd.DataFrame, params: dict[str, Any] | None = None) -> pd.DataFrame:
        top_k = min(int((params or {}).get("top_k", 5)), len(self.output_spec.class_names))
        if top_k < 1:
            raise ValueError(f"top_k={top_k}: at least 1")
        files = list(model_input["image"])
        return pd.DataFrame(
            [row for start in range(0, len(files), CHUNK) for row in self._rows(files[start : start + CHUNK], top_k)]
        )

    def _rows(self, files: list[bytes], top_k: int) -> list[dict[str, Any]]:
        names = self.output_spec.class_names
        # An unreadable image is a row with an error, not an error for the whole request. No None and no NaN: MLflow's
        # server would write NaN, which is no JSON.
        empty: dict[str, Any] = {"prediction": "", "probability": 0.0, "top_classes": [], "top_probabilities": []}
        rows: list[dict[str, Any]] = [{**empty, "error": ""} for _ in files]
        images: list[torch.Tensor] = []
        places: list[int] = []
        for place, data in enumerate(files):
            try:
                images.append(torch.as_tensor(vit_model.load_image(bytes(data), self.input_spec)))
                places.append(place)
            except vit_model.ImageError as error:
                rows[place]["error"] = str(error)
        if images:
            table = self.probabilities(torch.stack(images))
            order = np.argsort(-table, axis=1, kind="stable")[:, :top_k]
            for place, chances, best in zip(places, table, order, strict=True):
                rows[place] |= {
                    "prediction": names[best[0]],
                    "probability": float(chances[best[0]]),
                    "top_classes": [names[index] for index in best],
                    "top_probabilities": [float(chances[index]) for index in best],
                }
        return rows


mlflow.models.set_model(ImageClassifier())
