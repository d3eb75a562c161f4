"""One model, four formats."""

from __future__ import annotations

import json
from collections.abc import Collection
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from vit_model.build import Model
from vit_model.checkpoints.errors import CheckpointError
from vit_model.checkpoints.google import read_arrays as google_arrays
from vit_model.checkpoints.google import save_npz, write_google
from vit_model.checkpoints.huggingface import labels_of, processor_of, write_huggingface
from vit_model.checkpoints.match import config_differences
from vit_model.checkpoints.native import replace_atomically, write_native
from vit_model.checkpoints.read import Format
from vit_model.checkpoints.timm import read_timm, write_timm
from vit_model.config import ViTConfig
from vit_model.preprocess import InputSpec, OutputSpec


def write_weights(
    model: Model,
    path: Path,
    format: Format,
    input_spec: InputSpec | None,
    output_spec: OutputSpec | None,
    accept: Collection[str],
) -> None:
    check_specs(model, input_spec, output_spec)
    tensors = {name: tensor.detach().cpu() for name, tensor in model.state_dict().items()}
    if format == "native":
        check_suffix(path, ".safetensors", format)
        head = model.head
        write_native(path, tensors, model.config, head.kind, head.num_classes, input_spec, output_spec)
    elif format == "huggingface":
        write_folder(model, path, tensors, input_spec, output_spec)
    elif format in ("google", "timm"):
        if input_spec is not None or output_spec is not None:
            raise ValueError(f"format={format!r} has no place for specs; leave input_spec and output_spec out")
        write_arrays(model, path, format, tensors, accept)
    else:
        raise ValueError(f"format={format!r} is not one of 'native', 'google', 'timm', 'huggingface'")


def write_arrays(model: Model, path: Path, format: Format, tensors: dict[str, Tensor], accept: Collection[str]) -> None:
    """A file of arrays alone: refused where a reader would make another model of it."""
    google = format == "google"
    check_suffix(path, ".npz" if google else ".safetensors", format)
    arrays = write_google(tensors, model) if google else write_timm(tensors, model)
    heads = {} if google or model.config.kind == "resnet" else {"num_heads": model.config.num_heads}
    understood = (google_arrays if google else read_timm)(arrays, heads)
    differences = config_differences(model, understood)
    if (
        isinstance(model.config, ViTConfig)
        and isinstance(understood.config, ViTConfig)
        and model.config.position == "learned"
    ):
        differences += [("grid", understood.config.grid, model.config.grid)] * (
            understood.config.grid != model.config.grid
        )
    if wrong := [item for item in differences if item[0] not in accept]:
        lines = [f"{name}={ours!r} would be read as {theirs!r} (accept={name!r})" for name, theirs, ours in wrong]
        raise CheckpointError(f"a {format} file cannot say all of this model:\n  " + "\n  ".join(lines))
    if google:
        replace_atomically(path, lambda partial: save_npz(partial, arrays))
    else:
        metadata = {name: str(value) for name, value in heads.items()}
        replace_atomically(path, lambda partial: save_tensors(partial, arrays, metadata))


def write_folder(
    model: Model, folder: Path, tensors: dict[str, Tensor], input_spec: InputSpec | None, output_spec: OutputSpec | None
) -> None:
    arrays, values = write_huggingface(tensors, model)
    values |= labels_of(output_spec, model.head.num_classes)
    values["torch_dtype"] = str(next(iter(arrays.values())).dtype).removeprefix("torch.")
    processor = None if input_spec is None else processor_of(input_spec)
    folder.mkdir(parents=True, exist_ok=True)
    replace_atomically(folder / "model.safetensors", lambda partial: save_tensors(partial, arrays, {}))
    write_json(folder / "config.json", values)
    if processor is not None:
        write_json(folder / "preprocessor_config.json", processor)


def save_tensors(path: Path, arrays: dict[str, Tensor], metadata: dict[str, str]) -> None:
    plain = {name: array.contiguous() for name, array in arrays.items()}
    save_file(plain, path, {"format": "pt", **metadata})


def write_json(path: Path, values: object) -> None:
    text = json.dumps(values, indent=2)
    replace_atomically(path, lambda partial: partial.write_text(text))


def check_suffix(path: Path, suffix: str, format: str) -> None:
    if path.suffix != suffix:
        raise ValueError(f"{path} does not end in {suffix}, by which a {format} file is known")


def check_specs(model: Model, input_spec: InputSpec | None, output_spec: OutputSpec | None) -> None:
    if input_spec is not None and input_spec.channels != model.config.channels:
        raise ValueError(f"input_spec has {input_spec.channels} channels; the model takes {model.config.channels}")
    if output_spec is not None and len(output_spec.class_names) != model.head.num_classes:
        names, classes = len(output_spec.class_names), model.head.num_classes
        raise ValueError(f"output_spec names {names} classes; the model has {classes}")
    if any(parameter.is_meta for parameter in model.parameters()):
        raise CheckpointError("the model is on the meta device and has no numbers; build it on another one")
    if any(not torch.isfinite(parameter).all() for parameter in model.parameters()):
        raise CheckpointError("the model has parameters that are not finite; nothing is written")
