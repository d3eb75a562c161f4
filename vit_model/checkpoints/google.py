"""Google's .npz files: ViT and hybrids of vision_transformer, ViTs of big_vision, BiT ResNets. Read without pickle."""

from __future__ import annotations

import re
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from tokenize import TokenError  # numpy reads the header of an array as a Python literal
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vit_model.build import Model
from vit_model.checkpoints.errors import FAULTS, CheckpointError
from vit_model.checkpoints.infer import Clues, resnet_clues, vit_config
from vit_model.checkpoints.loaded import Loaded
from vit_model.checkpoints.table import (
    CONV,
    CONV_DENSE,
    DENSE,
    HEADS_BIAS,
    HEADS_KERNEL,
    HEADS_OUT,
    SAME,
    VECTOR,
    Row,
    norms,
    read_table,
    rows,
    write_table,
)
from vit_model.checkpoints.timm import refuse_left
from vit_model.config import HeadKind, ResNetConfig

BLOCK = "Transformer/encoderblock_{0}"
ATTENTION = f"{BLOCK}/MultiHeadDotProductAttention_1"
MAP = "MAPHead_0"
MAP_ATTENTION = f"{MAP}/MultiHeadDotProductAttention_0"


def triple(prefix: str, part: str, *names: str) -> tuple[str, ...]:
    return tuple(f"{prefix}/{name}/{part}" for name in names)


VIT: tuple[Row, ...] = (
    *rows(SAME, ("class_token", "cls"), ("pool.probe", f"{MAP}/probe")),
    *rows(SAME, ("position_embedding", "Transformer/posembed_input/pos_embedding")),
    *rows(
        CONV,
        ("patch_embedding.weight", "embedding/kernel"),
        ("stem.conv.weight", "conv_root/kernel"),
        ("stem.stages.{0}.{0}.conv1.weight", "block{1}/unit{1}/conv1/kernel"),
        ("stem.stages.{0}.{0}.conv2.weight", "block{1}/unit{1}/conv2/kernel"),
        ("stem.stages.{0}.{0}.conv3.weight", "block{1}/unit{1}/conv3/kernel"),
        ("stem.stages.{0}.{0}.shortcut_conv.weight", "block{1}/unit{1}/conv_proj/kernel"),
    ),
    *norms(
        ("stem.norm", "gn_root"),
        ("stem.stages.{0}.{0}.norm1", "block{1}/unit{1}/gn1"),
        ("stem.stages.{0}.{0}.norm2", "block{1}/unit{1}/gn2"),
        ("stem.stages.{0}.{0}.norm3", "block{1}/unit{1}/gn3"),
        ("stem.stages.{0}.{0}.shortcut_norm", "block{1}/unit{1}/gn_proj"),
        ("blocks.{0}.norm1", f"{BLOCK}/LayerNorm_0"),
        ("blocks.{0}.norm2", f"{BLOCK}/LayerNorm_2"),
        ("norm", "Transformer/encoder_norm"),
        ("pool.norm", f"{MAP}/LayerNorm_0"),
        weight="scale",
        separator="/",
    ),
    *rows(
        HEADS_KERNEL,
        ("blocks.{0}.attention.qkv.weight", triple(ATTENTION, "kernel", "query", "key", "value")),
        ("pool.query.weight", f"{MAP_ATTENTION}/query/kernel"),
        ("pool.key_value.weight", triple(MAP_ATTENTION, "kernel", "key", "value")),
    ),
    *rows(
        HEADS_BIAS,
        ("blocks.{0}.attention.qkv.bias", triple(ATTENTION, "bias", "query", "key", "value")),
        ("pool.query.bias", f"{MAP_ATTENTION}/query/bias"),
        ("pool.key_value.bias", triple(MAP_ATTENTION, "bias", "key", "value")),
    ),
    *rows(
        HEADS_OUT,
        ("blocks.{0}.attention.out.weight", f"{ATTENTION}/out/kernel"),
        ("pool.out.weight", f"{MAP_ATTENTION}/out/kernel"),
    ),
    *rows(
        DENSE,
        ("blocks.{0}.mlp.dense1.weight", f"{BLOCK}/MlpBlock_3/Dense_0/kernel"),
        ("blocks.{0}.mlp.dense2.weight", f"{BLOCK}/MlpBlock_3/Dense_1/kernel"),
        ("pool.mlp.dense1.weight", f"{MAP}/MlpBlock_0/Dense_0/kernel"),
        ("pool.mlp.dense2.weight", f"{MAP}/MlpBlock_0/Dense_1/kernel"),
        ("head.hidden.weight", "pre_logits/kernel"),
        ("head.out.weight", "head/kernel"),
    ),
    *rows(
        VECTOR,
        ("patch_embedding.bias", "embedding/bias"),
        ("blocks.{0}.attention.out.bias", f"{ATTENTION}/out/bias"),
        ("blocks.{0}.mlp.dense1.bias", f"{BLOCK}/MlpBlock_3/Dense_0/bias"),
        ("blocks.{0}.mlp.dense2.bias", f"{BLOCK}/MlpBlock_3/Dense_1/bias"),
        ("pool.out.bias", f"{MAP_ATTENTION}/out/bias"),
        ("pool.mlp.dense1.bias", f"{MAP}/MlpBlock_0/Dense_0/bias"),
        ("pool.mlp.dense2.bias", f"{MAP}/MlpBlock_0/Dense_1/bias"),
        ("head.hidden.bias", "pre_logits/bias"),
        ("head.out.bias", "head/bias"),
    ),
)

UNIT = "resnet/block{1}/unit{01}"
BIT: tuple[Row, ...] = (
    *rows(
        CONV,
        ("conv.weight", "resnet/root_block/standardized_conv2d/kernel"),
        ("stages.{0}.{0}.conv1.weight", f"{UNIT}/a/standardized_conv2d/kernel"),
        ("stages.{0}.{0}.conv2.weight", f"{UNIT}/b/standardized_conv2d/kernel"),
        ("stages.{0}.{0}.conv3.weight", f"{UNIT}/c/standardized_conv2d/kernel"),
        ("stages.{0}.{0}.shortcut.weight", f"{UNIT}/a/proj/standardized_conv2d/kernel"),
    ),
    *norms(
        ("stages.{0}.{0}.norm1", f"{UNIT}/a/group_norm"),
        ("stages.{0}.{0}.norm2", f"{UNIT}/b/group_norm"),
        ("stages.{0}.{0}.norm3", f"{UNIT}/c/group_norm"),
        ("norm", "resnet/group_norm"),
        weight="gamma",
        separator="/",
    ),
    *rows(CONV_DENSE, ("head.out.weight", "resnet/head/conv2d/kernel")),
    *rows(VECTOR, ("head.out.bias", "resnet/head/conv2d/bias")),
)

VIT_DEFAULTS: dict[str, Any] = {
    "gelu": "tanh",
    "layer_norm_eps": 1e-6,
    "stem_numerics": "google",
    "pool_norm": "before",
}
BIT_DEFAULTS: dict[str, Any] = {"group_norm_eps": 1e-5, "standardize_eps": 1e-10, "root_pool": "zero"}


def read_google(path: Path, hints: Mapping[str, Any]) -> Loaded:
    return read_arrays(load_npz(path), hints)


def read_arrays(arrays: Mapping[str, Tensor], hints: Mapping[str, Any]) -> Loaded:
    is_big_vision_bit = any(name.endswith("root_block/conv_root/kernel") for name in arrays)
    arrays = plain_names(arrays)
    if is_big_vision_bit:
        arrays = {legacy_bit_name(name): array for name, array in arrays.items()}
        hints = {"root_pool": "infinity", **hints}
    if any(name.startswith("resnet/") for name in arrays):
        tensors, unused = read_table(BIT, arrays)
        config, num_classes = resnet_clues(tensors, {**BIT_DEFAULTS, **hints})
        return Loaded("google", tensors, config, "linear", num_classes, unused=unused)
    tensors, unused = read_table(VIT, arrays)
    fields = dict(VIT_DEFAULTS)
    query = arrays.get(f"{ATTENTION}/query/kernel".replace("{0}", "0"))
    if query is not None:
        fields["num_heads"] = query.shape[1]
    head: HeadKind = "mlp" if "head.hidden.weight" in tensors else "linear"
    vit, num_classes = vit_config(tensors, Clues({**fields, **hints}))
    return Loaded("google", tensors, vit, head, num_classes, unused=unused)


def load_npz(path: Path) -> dict[str, Tensor]:
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
            if others := [name for name, array in arrays.items() if not isinstance(array, np.ndarray)]:
                raise ValueError(f"{others[0]} is not an array")
            return {name: to_tensor(array) for name, array in arrays.items()}
    except (*FAULTS, EOFError, SyntaxError, TokenError, zipfile.BadZipFile, zlib.error) as error:
        raise CheckpointError(f"{path}: not a plain .npz of arrays ({error})") from error


def to_tensor(array: NDArray[np.generic]) -> Tensor:
    if array.dtype == np.dtype("V2"):  # bfloat16 as numpy stores what it does not know
        return torch.from_numpy(array.view(np.int16).copy()).view(torch.bfloat16).float()
    return torch.from_numpy(np.ascontiguousarray(array))


def plain_names(arrays: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """All dialects as vision_transformer's names: big_vision's prefixes, numbers and stacked blocks, BiT's suffixes."""
    plain: dict[str, Tensor] = {}
    for name, array in arrays.items():
        name = re.sub(r"^(opt/target/|params/img/|params/|img/)", "", name)
        name = re.sub(r"standardized_conv2d_\d+/", "standardized_conv2d/", name)
        name = "Transformer/posembed_input/pos_embedding" if name == "pos_embedding" else name
        if match := re.match(r"Transformer/encoderblock(_\d+)?/", name):
            rest = name[match.end() :]
            rest = rest.replace("MultiHeadDotProductAttention_0/", "MultiHeadDotProductAttention_1/")
            rest = rest.replace("MlpBlock_0/", "MlpBlock_3/").replace("LayerNorm_1/", "LayerNorm_2/")
            if match[1] is None:  # scanned: all blocks in one array
                plain.update({f"Transformer/encoderblock_{i}/{rest}": part for i, part in enumerate(array)})
                continue
            name = match[0] + rest
        plain[name] = array
    return plain


def legacy_bit_name(name: str) -> str:
    """big_vision's names of a BiT ResNet as those of the files that BiT released."""
    name = name.replace("root_block/conv_root/", "resnet/root_block/standardized_conv2d/")
    name = name.replace("norm-pre-head/", "resnet/group_norm/")
    name = re.sub(r"^head/", "resnet/head/conv2d/", name)
    name = re.sub(r"^(block\d+/unit\d+)/conv_proj/", r"resnet/\1/a/proj/standardized_conv2d/", name)
    if match := re.match(r"(block\d+/unit\d+)/(conv|gn)([123])/", name):
        part = "standardized_conv2d" if match[2] == "conv" else "group_norm"
        name = f"resnet/{match[1]}/{'abc'[int(match[3]) - 1]}/{part}/{name[match.end() :]}"
    if "group_norm/" in name:
        name = name.replace("/scale", "/gamma").replace("/bias", "/beta")
    return name


def write_google(tensors: Mapping[str, Tensor], model: Model) -> dict[str, Tensor]:
    """vision_transformer's names; big_vision's where only it has the model (MAP, positions of patches alone)."""
    config = model.config
    if isinstance(config, ResNetConfig):
        if model.head.kind == "mlp":
            raise CheckpointError("BiT files have no MLP head; call replace_head first, or use format='native'")
        arrays, left = write_table(BIT, tensors, 1)
        refuse_left("google", left)
        return arrays
    arrays, left = write_table(VIT, tensors, config.num_heads)
    refuse_left("google", left)
    if config.pool == "map" or not config.position_prefix or config.position == "sincos2d":
        arrays = {f"params/{big_vision_name(name)}": array for name, array in arrays.items()}
    return arrays


def big_vision_name(name: str) -> str:
    if name.startswith("Transformer/encoderblock"):
        name = name.replace("MultiHeadDotProductAttention_1/", "MultiHeadDotProductAttention_0/")
        name = name.replace("MlpBlock_3/", "MlpBlock_0/").replace("LayerNorm_2/", "LayerNorm_1/")
    return "pos_embedding" if name == "Transformer/posembed_input/pos_embedding" else name


def save_npz(path: Path, arrays: Mapping[str, Tensor]) -> None:
    if odd := sorted(
        name for name, array in arrays.items() if array.dtype not in (torch.float32, torch.float16, torch.float64)
    ):
        raise CheckpointError(f"numpy has no type for {arrays[odd[0]].dtype} ({odd[0]}); call model.float() first")
    plain: dict[str, Any] = {name: array.cpu().contiguous().numpy() for name, array in arrays.items()}
    with path.open("wb") as file:
        np.savez(file, **plain)
