"""Reading and writing weights: our own safetensors, Google .npz, timm and Hugging Face. Never a pickle."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from vit_model.build import Model, build_empty, replace_head
from vit_model.checkpoints.errors import CheckpointError
from vit_model.checkpoints.match import fill, fit
from vit_model.checkpoints.native import read_specs
from vit_model.checkpoints.read import Format, read_weights
from vit_model.checkpoints.write import write_weights
from vit_model.config import HeadKind, ResNetConfig, Resolution, ViTConfig
from vit_model.initialize import initialize
from vit_model.position import Method
from vit_model.preprocess import InputSpec, OutputSpec
from vit_model.variants import override

__all__ = ["CheckpointError", "Format", "load_model", "load_weights", "read_specs", "save_weights"]


def load_model(
    path: str | Path,
    num_classes: int | None = None,
    resolution: Resolution | None = None,
    head: HeadKind | None = None,
    *,
    position_method: Method = "google",
    accept: Collection[str] = (),
    **overrides: Any,
) -> Model:
    """The model that a file (or Hugging Face folder) of weights describes, on the CPU, in training mode as it is built.

    num_classes drops the file's head, whatever it is, and attaches a new zero head (fine-tuning); without it
    the file's head stays. resolution interpolates the position embedding, and position_method says how: "google"
    (bilinear) or "timm" (bicubic). overrides are config fields, such as dropout=0.1; patch_size resizes the patch
    kernel as FlexiViT does. accept is as in load_weights. Raises CheckpointError with every difference that remains.
    """
    if head is not None and num_classes is None:
        raise ValueError(f"head={head!r} has no effect without num_classes; give the number of classes of the new head")
    check_overrides(overrides)
    # A file of arrays alone may tell only the number of its patches; the resolution asked for is then the best guess.
    told = {} if resolution is None else {"resolution": resolution}
    loaded = read_weights(Path(path), {**told, **overrides})
    changes = dict(overrides) if resolution is None else {**overrides, "resolution": resolution}
    config = override(loaded.config, changes)
    accept = {*accept, *overrides, "grid"}
    try:  # the shapes are compared before memory is taken for them
        model = build_empty(config, loaded.num_classes, loaded.head)
        tensors = fit(model, loaded, path, accept=accept, position_method=position_method)
        model.to_empty(device="cpu")
    except (MemoryError, RuntimeError) as error:
        raise CheckpointError(f"{path}: the model that it describes cannot be built: {error}") from error
    initialize(model)
    fill(model, tensors)
    return model if num_classes is None else replace_head(model, num_classes, head or "linear")


def load_weights(
    model: Model,
    path: str | Path,
    *,
    accept: Collection[str] = (),
    position_method: Method = "google",
    **overrides: Any,
) -> None:
    """Fill a model from a file that must describe the same model.

    accept names the differences that are wanted: "head" (keep the model's own), "grid" (interpolate positions),
    "missing", "unused", or a config field such as "gelu", "layer_norm_eps" or "patch_size" (the kernel is resized).
    overrides tell what a file does not, such as num_heads. Raises CheckpointError with every difference that is not
    accepted; the model is then unchanged.
    """
    check_overrides(overrides)
    loaded = read_weights(Path(path), overrides)
    fill(model, fit(model, loaded, path, accept=accept, position_method=position_method))


def check_overrides(overrides: Mapping[str, Any]) -> None:
    known = {field.name for kind in (ViTConfig, ResNetConfig) for field in dataclasses.fields(kind)}
    if unknown := sorted(set(overrides) - known):
        raise ValueError(f"unknown config fields {unknown}; known: {sorted(known)}")


def save_weights(
    model: Model,
    path: str | Path,
    format: Format = "native",
    *,
    input_spec: InputSpec | None = None,
    output_spec: OutputSpec | None = None,
    accept: Collection[str] = (),
) -> None:
    """native and timm are safetensors files, google is an .npz, huggingface a folder.

    accept names config fields that the format cannot say and whose loss is wanted, such as "gelu" for google.
    """
    write_weights(model, Path(path), format, input_spec, output_spec, accept)
