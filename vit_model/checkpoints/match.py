"""Does this file fit this model? All differences in one error, each with the word that accepts it."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping
from pathlib import Path

import torch
from torch import Tensor

from vit_model.build import Model
from vit_model.checkpoints.errors import CheckpointError
from vit_model.checkpoints.loaded import Loaded
from vit_model.config import ViTConfig
from vit_model.position import Method, resize_patch_kernel, resize_position

# Fields that change how a model is trained but not what its weights compute; resolution is judged as a grid.
FREE_FIELDS = {
    "dropout",
    "attention_dropout",
    "drop_path",
    "drop_path_schedule",
    "patch_dropout",
    "resolution",
    "class_token",
}
HEAD_PREFIX = "head."


def fit(
    model: Model, loaded: Loaded, path: str | Path, *, accept: Collection[str], position_method: Method
) -> dict[str, Tensor]:
    """The tensors for `fill`, in the model's shapes, or CheckpointError with every difference. It may be on meta."""
    check_accept(model, accept)
    state = model.state_dict()
    tensors = dict(loaded.tensors)
    problems: list[str] = []
    changed = [(name, theirs, ours) for name, theirs, ours in config_differences(model, loaded) if name not in accept]
    for name, theirs, ours in changed:
        problems.append(f"{name} is {theirs!r} in the file and {ours!r} in the model (accept={name!r})")
    if (problem := head_difference(model, loaded)) is not None:
        if "head" in accept:
            tensors = {name: tensor for name, tensor in tensors.items() if not name.startswith(HEAD_PREFIX)}
        else:
            problems.append(f"{problem} (accept='head' keeps the model's own)")
    if (problem := fit_position(model, loaded, tensors, position_method, "grid" in accept)) is not None:
        problems.append(problem)
    fit_patches(model, loaded, tensors, accept)
    keeps_head = "head" in accept and not any(name.startswith(HEAD_PREFIX) for name in tensors)
    wanted = {name for name in state if not (keeps_head and name.startswith(HEAD_PREFIX))}
    if (missing := sorted(wanted - tensors.keys())) and "missing" not in accept:
        problems.append(f"missing in the file: {listed(missing)} (accept='missing' keeps the model's own)")
    if (unused := sorted({*loaded.unused, *(tensors.keys() - wanted)})) and "unused" not in accept:
        problems.append(f"in the file without a place in the model: {listed(unused)} (accept='unused')")
    for name in sorted(wanted & tensors.keys()):
        if tensors[name].shape != state[name].shape:
            problems.append(f"{name} has shape {tuple(tensors[name].shape)}; the model's is {tuple(state[name].shape)}")
    if problems:
        raise CheckpointError(f"{path} ({loaded.format}) does not fit the model:\n  " + "\n  ".join(problems))
    return {name: tensors[name] for name in wanted & tensors.keys()}


@torch.no_grad()
def fill(model: Model, tensors: Mapping[str, Tensor]) -> None:
    state = model.state_dict()
    for name, tensor in tensors.items():
        state[name].copy_(tensor)


def check_accept(model: Model, accept: Collection[str]) -> None:
    known = {"head", "grid", "missing", "unused", *(field.name for field in dataclasses.fields(model.config))}
    if isinstance(accept, str):
        raise ValueError(f"accept={accept!r} is one word; give a collection, such as ({accept!r},)")
    if unknown := sorted(set(accept) - known):
        raise ValueError(f"accept has unknown words {unknown}; known: {sorted(known)}")


def config_differences(model: Model, loaded: Loaded) -> list[tuple[str, object, object]]:
    if type(model.config) is not type(loaded.config):
        return [("kind", loaded.config.kind, model.config.kind)]
    differences = []
    for field in dataclasses.fields(model.config):
        theirs, ours = getattr(loaded.config, field.name), getattr(model.config, field.name)
        if field.name == "layer_scale":  # the initial value; what is learned is in the tensors
            theirs, ours = theirs is not None, ours is not None
        if field.name not in FREE_FIELDS and theirs != ours:
            differences.append((field.name, theirs, ours))
    return differences


def head_difference(model: Model, loaded: Loaded) -> str | None:
    head = model.head
    if (loaded.head, loaded.num_classes) == (head.kind, head.num_classes):
        return None
    theirs, ours = f"{loaded.head} with {loaded.num_classes}", f"{head.kind} with {head.num_classes}"
    return f"head is {theirs} classes in the file and {ours} in the model"


def fit_position(
    model: Model, loaded: Loaded, tensors: dict[str, Tensor], method: Method, accepted: bool
) -> str | None:
    ours, theirs = model.config, loaded.config
    name = "position_embedding"
    if (
        not isinstance(ours, ViTConfig)
        or not isinstance(theirs, ViTConfig)
        or name not in tensors
        or ours.grid == theirs.grid
    ):
        return None
    if not accepted:
        return f"grid is {theirs.grid} in the file and {ours.grid} in the model (accept='grid' interpolates)"
    prefix = theirs.num_prefix if theirs.position_prefix else 0
    tensors[name] = resize_position(tensors[name], theirs.grid, ours.grid, prefix, method)
    return None


def fit_patches(model: Model, loaded: Loaded, tensors: dict[str, Tensor], accept: Collection[str]) -> None:
    """FlexiViT's resize of the patch kernel where another patch size is accepted; a feature map has no finer grid."""
    ours, name = model.config, "patch_embedding.weight"
    if isinstance(ours, ViTConfig) and ours.stem is None and "patch_size" in accept and name in tensors:
        tensors[name] = resize_patch_kernel(tensors[name], (ours.patch_size, ours.patch_size))


def listed(names: list[str], most: int = 12) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
