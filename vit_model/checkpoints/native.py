"""Our own file: safetensors with config, head and specs as JSON in its metadata; a model by itself, without code."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from vit_model.build import check_head
from vit_model.checkpoints.errors import FAULTS, CheckpointError
from vit_model.checkpoints.loaded import Loaded
from vit_model.config import HeadKind, ModelConfig, config_from_dict, config_to_dict
from vit_model.preprocess import InputSpec, OutputSpec

FORMAT = "vit_model/1"


def write_native(
    path: Path,
    tensors: Mapping[str, Tensor],
    config: ModelConfig,
    head: HeadKind,
    num_classes: int,
    input_spec: InputSpec | None,
    output_spec: OutputSpec | None,
) -> None:
    metadata = describe(config, head, num_classes, input_spec, output_spec)
    plain = {name: tensor.contiguous() for name, tensor in tensors.items()}

    def write(partial: Path) -> None:
        save_file(plain, partial, metadata)
        sort_header(partial)

    replace_atomically(path, write)


def sort_header(path: Path) -> None:
    """safetensors writes its metadata in a random order; sorted, equal weights are equal files and have one sha256."""
    with path.open("r+b") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        assert len(text) <= size, "the same JSON cannot take more room than safetensors gave it"
        file.seek(8)
        file.write(text.ljust(size))


def replace_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Written beside the target and renamed, so that a reader sees the old file or the whole new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        write(partial)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def describe(
    config: ModelConfig, head: HeadKind, num_classes: int, input_spec: InputSpec | None, output_spec: OutputSpec | None
) -> dict[str, str]:
    metadata = {
        "format": FORMAT,
        "config": json.dumps(config_to_dict(config)),
        "head": json.dumps({"kind": head, "num_classes": num_classes}),
    }
    if input_spec is not None:
        metadata["input_spec"] = input_spec.to_json()
    if output_spec is not None:
        metadata["output_spec"] = output_spec.to_json()
    return metadata


def read_native(path: Path) -> Loaded:
    return loaded_from(path, read_metadata(path), load_tensors(path))


def loaded_from(path: Path, metadata: Mapping[str, str], tensors: dict[str, Tensor]) -> Loaded:
    if metadata.get("format") != FORMAT:
        raise CheckpointError(
            f"{path}: format {metadata.get('format')!r} is not {FORMAT!r}; was it written by a newer version?"
        )
    try:
        config = config_from_dict(json.loads(metadata["config"]))
        head: dict[str, Any] = json.loads(metadata["head"])
        input_spec = InputSpec.from_json(metadata["input_spec"]) if "input_spec" in metadata else None
        output_spec = OutputSpec.from_json(metadata["output_spec"]) if "output_spec" in metadata else None
        kind, num_classes = head["kind"], head["num_classes"]
        check_head(config, num_classes, kind)
        if output_spec is not None and len(output_spec.class_names) != num_classes:
            raise ValueError(f"{len(output_spec.class_names)} class names for {num_classes} classes")
        return Loaded("native", tensors, config, kind, num_classes, input_spec, output_spec)
    except FAULTS as error:
        raise CheckpointError(f"{path}: its metadata does not describe a model: {error!r}") from error


def read_metadata(path: Path) -> dict[str, str]:
    try:
        with safe_open(path, framework="pt") as file:
            return dict(file.metadata() or {})
    except SafetensorError as error:
        raise CheckpointError(f"{path}: not a whole safetensors file ({error})") from error


def load_tensors(path: Path) -> dict[str, Tensor]:
    try:
        return dict(load_file(path))
    except SafetensorError as error:
        raise CheckpointError(f"{path}: not a whole safetensors file ({error})") from error


def read_specs(path: str | Path) -> tuple[ModelConfig, InputSpec | None, OutputSpec | None]:
    """What a native file says about itself, without reading a tensor."""
    path = Path(path)
    loaded = loaded_from(path, read_metadata(path), {})
    return loaded.config, loaded.input_spec, loaded.output_spec
