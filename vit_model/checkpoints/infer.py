"""The config of a file that only has arrays, from their names and shapes; what shapes cannot tell comes from hints."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from vit_model.checkpoints.errors import CheckpointError
from vit_model.config import ResNetConfig, Resolution, ViTConfig, pair
from vit_model.variants import SIZES


@dataclass(frozen=True, slots=True)
class Clues:
    """fields of ViTConfig that the reader knows; resolution is used where rows of positions make no square."""

    fields: Mapping[str, Any]


def vit_config(tensors: dict[str, Tensor], clues: Clues) -> tuple[ViTConfig, int]:
    """The config and the number of classes; where registers have no position rows, the class token's is folded."""
    need(tensors, "patch_embedding.weight", "norm.weight", "blocks.0.mlp.dense1.weight")
    fields = dict(clues.fields)
    resolution: Resolution | None = fields.pop("resolution", None)
    kernel = tensors["patch_embedding.weight"]
    mlp_dim, width = tensors["blocks.0.mlp.dense1.weight"].shape
    depth = count_indexed(tensors, "blocks")
    q_norm = tensors.get("blocks.0.attention.q_norm.weight")
    if "num_heads" not in fields:
        fields["num_heads"] = guess_heads(width, depth, mlp_dim) if q_norm is None else width // q_norm.numel()
    stem = stem_units(tensors)
    if stem is not None:
        fields |= {"stem": stem, "stem_width": tensors["stem.conv.weight"].shape[0]}
    has_class_token = "class_token" in tensors
    default_pool = "map" if "pool.probe" in tensors else "token" if has_class_token else "gap"
    if fields.get("pool_norm") == "after":
        default_pool = "gap"
    pool = fields.setdefault("pool", default_pool)
    if has_class_token != (pool == "token"):
        fields["class_token"] = has_class_token
    num_registers = tensors["registers"].shape[1] if "registers" in tensors else 0
    fields |= {
        "patch_size": kernel.shape[2],
        "channels": tensors["stem.conv.weight" if stem is not None else "patch_embedding.weight"].shape[1],
        "width": width,
        "depth": depth,
        "mlp_dim": mlp_dim,
        "num_registers": num_registers,
        "qkv_bias": "blocks.0.attention.qkv.bias" in tensors,
        "qk_norm": q_norm is not None,
        "layer_scale": 1e-5 if "blocks.0.layer_scale1" in tensors else None,  # the initial value is not in a file
    }
    num_classes = tensors["head.out.weight"].shape[0] if "head.out.weight" in tensors else 0
    stride = kernel.shape[2] * (1 if stem is None else 4 << max(len(stem) - 1, 0))
    if "position_embedding" not in tensors:
        fields.setdefault("position", "sincos2d")
        fields["resolution"] = resolution or round(224 / stride) * stride
        return ViTConfig(**fields), num_classes
    has_prefix, grid = grid_of_rows(tensors, int(has_class_token), num_registers, resolution, stride)
    fields["position_prefix"] = has_prefix or not (has_class_token or num_registers)
    fields["resolution"] = grid[0] * stride if grid[0] == grid[1] else (grid[0] * stride, grid[1] * stride)
    return ViTConfig(**fields), num_classes


def grid_of_rows(
    tensors: dict[str, Tensor], num_class: int, num_registers: int, resolution: Resolution | None, stride: int
) -> tuple[bool, tuple[int, int]]:
    """Whether the table has rows for the prefix, and its grid."""
    rows = tensors["position_embedding"].shape[1]
    told = None if resolution is None else (pair(resolution)[0] // stride, pair(resolution)[1] // stride)
    prefixes = tuple(dict.fromkeys((num_class + num_registers, num_class, 0)))
    for is_told in (True, False):  # 9 rows are 3x3, or a class token and 4x2: what is told comes first
        for prefix in prefixes:
            side = math.isqrt(max(rows - prefix, 0))
            grid = told if is_told else (side, side)
            if grid is None or not rows - prefix or grid[0] * grid[1] != rows - prefix:
                continue
            if prefix and prefix < num_class + num_registers:
                # The class token has a row and the registers have none: added to the token, the row is not needed.
                table = tensors["position_embedding"]
                tensors["class_token"] = tensors["class_token"] + table[:, :1]
                tensors["position_embedding"] = table[:, 1:]
                return False, grid
            return prefix > 0, grid
    raise CheckpointError(
        f"{rows} position rows make no square grid, with or without prefix tokens; give resolution=(h, w)"
    )


def resnet_clues(tensors: Mapping[str, Tensor], fields: Mapping[str, Any]) -> tuple[ResNetConfig, int]:
    need(tensors, "conv.weight", "norm.weight")
    root = tensors["conv.weight"]
    stages = count_indexed(tensors, "stages")
    units = tuple(count_indexed(tensors, f"stages.{i}") for i in range(stages))
    num_classes = tensors["head.out.weight"].shape[0] if "head.out.weight" in tensors else 0
    config = ResNetConfig(**{"units": units, "width_factor": root.shape[0] // 64, "channels": root.shape[1], **fields})
    return config, num_classes


def stem_units(tensors: Mapping[str, Tensor]) -> tuple[int, ...] | None:
    if "stem.conv.weight" not in tensors:
        return None
    stages = count_indexed(tensors, "stem.stages")
    return tuple(count_indexed(tensors, f"stem.stages.{i}") for i in range(stages))


def count_indexed(tensors: Mapping[str, Tensor], prefix: str) -> int:
    """How many of prefix.0, prefix.1, ... there are."""
    pattern = re.compile(re.escape(prefix) + r"\.(\d+)\.")
    count = 1 + max((int(match[1]) for name in tensors if (match := pattern.match(name))), default=-1)
    if count > len(tensors):
        raise CheckpointError(f"an array is named after {prefix}.{count - 1}, and there are only {len(tensors)} arrays")
    return count


def guess_heads(width: int, depth: int, mlp_dim: int) -> int:
    """Fused weights do not tell their heads: only a named size does."""
    heads = {size[3] for size in SIZES.values() if size[:3] == (width, depth, mlp_dim)}
    if len(heads) != 1:
        raise CheckpointError(
            f"width {width}, depth {depth}, mlp_dim {mlp_dim} is no named size and the file does not tell its attention"
            " heads; give num_heads="
        )
    return heads.pop()


def need(tensors: Mapping[str, Tensor], *names: str) -> None:
    if missing := [name for name in names if name not in tensors]:
        raise CheckpointError(f"not a model of this package: no array for {', '.join(missing)}")
