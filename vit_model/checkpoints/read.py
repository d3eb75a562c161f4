"""Which format is this file? Decided by its content."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from vit_model.checkpoints.errors import CheckpointError
from vit_model.checkpoints.loaded import Loaded
from vit_model.checkpoints.native import FORMAT, load_tensors, loaded_from, read_metadata

Format = Literal["native", "google", "timm", "huggingface"]


def read_weights(path: Path, hints: dict[str, Any]) -> Loaded:
    """hints are config fields that the file may not tell, such as num_heads."""
    if not path.exists():
        raise FileNotFoundError(f"no weights at {path}")
    if path.suffix == ".safetensors":
        metadata = read_metadata(path)
        if metadata.get("format", "").startswith(FORMAT.split("/")[0]):
            return loaded_from(path, metadata, load_tensors(path))
    raise CheckpointError(f"{path}: format not recognised")
