"""Which format is this file or folder? Decided by its content. Nothing that is read can run code."""

from __future__ import annotations

import json
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from vit_model.checkpoints.errors import FAULTS, CheckpointError
from vit_model.checkpoints.google import read_google
from vit_model.checkpoints.huggingface import read_huggingface
from vit_model.checkpoints.loaded import Loaded
from vit_model.checkpoints.native import FORMAT, load_tensors, loaded_from, read_metadata
from vit_model.checkpoints.timm import is_timm, read_timm
from vit_model.config import ResNetConfig

TIMM_POOLS = {"token": "token", "avg": "gap", "map": "map"}
Format = Literal["native", "google", "timm", "huggingface"]


def read_weights(path: Path, hints: Mapping[str, Any]) -> Loaded:
    """hints are config fields that the file may not tell, such as num_heads."""
    if not path.exists():
        raise FileNotFoundError(f"no weights at {path}")
    try:
        loaded = read_known(path, hints)
    except CheckpointError:
        raise
    except FAULTS as error:
        raise CheckpointError(f"{path} cannot be read as a model: {type(error).__name__}: {error}") from error
    check_plain(path, loaded)
    return loaded


def check_plain(path: Path, loaded: Loaded) -> None:
    """Before anything is built: no more parts than the file has arrays, and nothing but floating point in these."""
    config = loaded.config
    parts = sum(config.units) if isinstance(config, ResNetConfig) else config.depth + sum(config.stem or ())
    if parts > len(loaded.tensors):
        raise CheckpointError(f"{path} tells of {parts} blocks and has {len(loaded.tensors)} arrays for them")
    for name, tensor in loaded.tensors.items():
        if not tensor.is_floating_point() or tensor.layout != torch.strided or tensor.is_meta:
            kind = "without numbers" if tensor.is_meta else f"{tensor.layout}, {tensor.dtype}"
            raise CheckpointError(f"{path}: {name} is {kind}; only plain floating point is read: convert it first")


def read_known(path: Path, hints: Mapping[str, Any]) -> Loaded:
    if path.is_dir():
        return read_folder(path, hints)
    if path.suffix == ".npz":
        return read_google(path, hints)
    if path.suffix == ".safetensors":
        metadata = read_metadata(path)
        if metadata.get("format", "").startswith(FORMAT.split("/")[0]):
            return loaded_from(path, metadata, load_tensors(path))
        heads = {"num_heads": int(metadata["num_heads"])} if metadata.get("num_heads", "").isdigit() else {}
        return read_arrays(path, load_tensors(path), {**heads, **hints})  # our own timm files tell the heads
    return read_arrays(path, load_torch(path), hints)


def read_folder(folder: Path, hints: Mapping[str, Any]) -> Loaded:
    """A folder in the way of the Hugging Face hub, of transformers or of timm."""
    path = folder / "config.json"
    if not path.exists():
        raise CheckpointError(f"{folder}: no config.json; give the file of weights itself")
    try:
        values = json.loads(path.read_text())
    except ValueError as error:
        raise CheckpointError(f"{path}: not JSON ({error})") from error
    arrays = load_folder(folder)
    if "architecture" in values:  # timm's
        return read_timm(arrays, {**timm_hints(folder, values, arrays), **hints})
    return read_huggingface(folder, arrays, values, hints)


def load_folder(folder: Path) -> dict[str, Tensor]:
    index = folder / "model.safetensors.index.json"
    if index.exists():
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        if bad := [name for name in names if Path(name).name != name or name in ("", "..")]:
            raise CheckpointError(f"{index}: file names with a path: {bad}")
        if absent := [name for name in names if not (folder / name).is_file()]:
            raise CheckpointError(f"{index} names files that are not there: {absent}; was the folder copied whole?")
        parts = [load_tensors(folder / name) for name in names]
        return {name: tensor for part in parts for name, tensor in part.items()}
    if (folder / "model.safetensors").exists():
        return load_tensors(folder / "model.safetensors")
    if (folder / "pytorch_model.bin").exists():
        return load_torch(folder / "pytorch_model.bin")
    raise CheckpointError(f"{folder}: no model.safetensors and no pytorch_model.bin")


def timm_hints(folder: Path, values: Mapping[str, Any], arrays: Mapping[str, Tensor]) -> dict[str, Any]:
    arguments = values.get("model_args", {})
    hints: dict[str, Any] = {}
    pool = values.get("global_pool", "")
    if pool and "patch_embed.proj.weight" in arrays:  # arrays alone do not tell the mean beside a class token
        if pool not in TIMM_POOLS:
            raise CheckpointError(f"{folder}: global_pool {pool!r} is not one of {sorted(TIMM_POOLS)}")
        hints["pool"] = TIMM_POOLS[pool]
    if "num_heads" in arguments:
        hints["num_heads"] = arguments["num_heads"]
    if "gelu_tanh" in str(arguments.get("act_layer", "")):
        hints["gelu"] = "tanh"
    return hints


def read_arrays(path: Path, arrays: Mapping[str, Tensor], hints: Mapping[str, Any]) -> Loaded:
    if is_timm(arrays.keys()):
        return read_timm(arrays, hints)
    if any(name.endswith("embeddings.cls_token") for name in arrays):
        raise CheckpointError(
            f"{path}: Hugging Face names; give the folder, whose config.json tells heads, eps and GELU"
        )
    some = ", ".join(sorted(arrays)[:5])
    raise CheckpointError(
        f"{path}: names of no known format ({some}, ...); known are our own safetensors, timm's names, Google's .npz"
        " and Hugging Face folders"
    )


def load_torch(path: Path) -> dict[str, Tensor]:
    """A torch.save file of tensors; what its pickle may do is limited by weights_only."""
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (*FAULTS, pickle.UnpicklingError, EOFError, AssertionError) as error:
        raise CheckpointError(f"{path}: not a torch file of tensors alone, so it is not read ({error})") from error
    for key in ("model", "state_dict", "module"):  # DeiT, lightning, DeepSpeed
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
    if not isinstance(content, dict) or not all(isinstance(tensor, Tensor) for tensor in content.values()):
        raise CheckpointError(f"{path}: not a dictionary of tensors; save model.state_dict() alone")
    return {str(name): tensor for name, tensor in content.items()}
