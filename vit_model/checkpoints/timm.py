"""timm's names, for ViT, hybrids and BiT ResNets; also files of DeiT, DeiT III and DINOv2, which differ in a few."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import Any

from torch import Tensor

from vit_model.build import Model
from vit_model.checkpoints.errors import CheckpointError
from vit_model.checkpoints.infer import Clues, resnet_clues, vit_config
from vit_model.checkpoints.loaded import Loaded
from vit_model.checkpoints.table import DENSE_CONV, SAME, norms, read_table, rows, write_table
from vit_model.config import HeadKind, ResNetConfig

VIT = (
    *rows(
        SAME,
        ("class_token", "cls_token"),
        ("registers", "reg_token"),
        ("position_embedding", "pos_embed"),
        ("patch_embedding.weight", "patch_embed.proj.weight"),
        ("patch_embedding.bias", "patch_embed.proj.bias"),
        ("stem.conv.weight", "patch_embed.backbone.stem.conv.weight"),
        ("stem.stages.{0}.{0}.conv1.weight", "patch_embed.backbone.stages.{0}.blocks.{0}.conv1.weight"),
        ("stem.stages.{0}.{0}.conv2.weight", "patch_embed.backbone.stages.{0}.blocks.{0}.conv2.weight"),
        ("stem.stages.{0}.{0}.conv3.weight", "patch_embed.backbone.stages.{0}.blocks.{0}.conv3.weight"),
        (
            "stem.stages.{0}.{0}.shortcut_conv.weight",
            "patch_embed.backbone.stages.{0}.blocks.{0}.downsample.conv.weight",
        ),
        ("blocks.{0}.layer_scale1", "blocks.{0}.ls1.gamma"),
        ("blocks.{0}.layer_scale2", "blocks.{0}.ls2.gamma"),
        ("pool.probe", "attn_pool.latent"),
    ),
    *norms(
        ("stem.norm", "patch_embed.backbone.stem.norm"),
        ("stem.stages.{0}.{0}.norm1", "patch_embed.backbone.stages.{0}.blocks.{0}.norm1"),
        ("stem.stages.{0}.{0}.norm2", "patch_embed.backbone.stages.{0}.blocks.{0}.norm2"),
        ("stem.stages.{0}.{0}.norm3", "patch_embed.backbone.stages.{0}.blocks.{0}.norm3"),
        ("stem.stages.{0}.{0}.shortcut_norm", "patch_embed.backbone.stages.{0}.blocks.{0}.downsample.norm"),
        ("blocks.{0}.norm1", "blocks.{0}.norm1"),
        ("blocks.{0}.norm2", "blocks.{0}.norm2"),
        ("blocks.{0}.attention.q_norm", "blocks.{0}.attn.q_norm"),
        ("blocks.{0}.attention.k_norm", "blocks.{0}.attn.k_norm"),
        ("pool.norm", "attn_pool.norm"),
    ),
    *(
        row
        for part in ("weight", "bias")
        for row in rows(
            SAME,
            (f"blocks.{{0}}.attention.qkv.{part}", f"blocks.{{0}}.attn.qkv.{part}"),
            (f"blocks.{{0}}.attention.out.{part}", f"blocks.{{0}}.attn.proj.{part}"),
            (f"blocks.{{0}}.mlp.dense1.{part}", f"blocks.{{0}}.mlp.fc1.{part}"),
            (f"blocks.{{0}}.mlp.dense2.{part}", f"blocks.{{0}}.mlp.fc2.{part}"),
            (f"pool.query.{part}", f"attn_pool.q.{part}"),
            (f"pool.key_value.{part}", f"attn_pool.kv.{part}"),
            (f"pool.out.{part}", f"attn_pool.proj.{part}"),
            (f"pool.mlp.dense1.{part}", f"attn_pool.mlp.fc1.{part}"),
            (f"pool.mlp.dense2.{part}", f"attn_pool.mlp.fc2.{part}"),
            (f"head.out.{part}", f"head.{part}"),
            (f"head.distilled.{part}", f"head_dist.{part}"),
        )
    ),
)
NORM = {"before": norms(("norm", "norm")), "after": norms(("norm", "fc_norm"))}

RESNET = (
    *rows(
        SAME,
        ("conv.weight", "stem.conv.weight"),
        ("stages.{0}.{0}.conv1.weight", "stages.{0}.blocks.{0}.conv1.weight"),
        ("stages.{0}.{0}.conv2.weight", "stages.{0}.blocks.{0}.conv2.weight"),
        ("stages.{0}.{0}.conv3.weight", "stages.{0}.blocks.{0}.conv3.weight"),
        ("stages.{0}.{0}.shortcut.weight", "stages.{0}.blocks.{0}.downsample.conv.weight"),
        ("head.out.bias", "head.fc.bias"),
    ),
    *norms(
        ("stages.{0}.{0}.norm1", "stages.{0}.blocks.{0}.norm1"),
        ("stages.{0}.{0}.norm2", "stages.{0}.blocks.{0}.norm2"),
        ("stages.{0}.{0}.norm3", "stages.{0}.blocks.{0}.norm3"),
        ("norm", "norm"),
    ),
    *rows(DENSE_CONV, ("head.out.weight", "head.fc.weight")),
)

# What timm does where a file of weights does not say.
VIT_DEFAULTS: dict[str, Any] = {"gelu": "exact", "layer_norm_eps": 1e-6}
RESNET_DEFAULTS: dict[str, Any] = {"group_norm_eps": 1e-5, "standardize_eps": 1e-8, "root_pool": "zero"}


def is_timm(names: Collection[str]) -> bool:
    return "patch_embed.proj.weight" in names or "stem.conv.weight" in names


def read_timm(arrays: Mapping[str, Tensor], hints: Mapping[str, Any]) -> Loaded:
    arrays = {rename_relatives(name): tensor for name, tensor in arrays.items()}
    if "stem.conv.weight" in arrays:
        tensors, unused = read_table(RESNET, arrays)
        config, num_classes = resnet_clues(tensors, {**RESNET_DEFAULTS, **hints})
        return Loaded("timm", tensors, config, "linear", num_classes, unused=unused)
    pool_norm = "after" if "fc_norm.weight" in arrays else "before"
    tensors, unused = read_table((*VIT, *NORM[pool_norm]), arrays)
    defaults = {**VIT_DEFAULTS, "pool_norm": pool_norm}
    if any(name.startswith("stem.") for name in tensors):
        defaults["stem_numerics"] = "timm"
    vit, num_classes = vit_config(tensors, Clues({**defaults, **hints}))
    head: HeadKind = "distilled" if "head.distilled.weight" in tensors else "linear"
    return Loaded("timm", tensors, vit, head, num_classes, unused=unused)


def rename_relatives(name: str) -> str:
    name = re.sub(
        r"^patch_embed\.backbone\.(conv|norm)\.", r"patch_embed.backbone.stem.\1.", name
    )  # a stem alone: R+Ti/16
    name = re.sub(r"\.gamma_([12])$", r".ls\1.gamma", name)  # DeiT III
    # DINOv2; DeiT's distillation token is a register with a head of its own.
    return "reg_token" if name in ("register_tokens", "dist_token") else name


def write_timm(tensors: Mapping[str, Tensor], model: Model) -> dict[str, Tensor]:
    if model.head.kind == "mlp":
        raise CheckpointError(
            "timm has no MLP head; call replace_head(model, num_classes) first, or use format='native'"
        )
    config = model.config
    if isinstance(config, ResNetConfig):
        arrays, left = write_table(RESNET, tensors, 1)
    else:
        if config.position != "learned":
            raise CheckpointError(f"timm has no position={config.position!r}; use format='native'")
        arrays, left = write_table((*VIT, *NORM[config.pool_norm]), tensors, config.num_heads)
        if config.stem == ():
            arrays = {name.replace("backbone.stem.", "backbone."): array for name, array in arrays.items()}
        if model.head.kind == "distilled":
            if config.num_registers > 1:
                raise CheckpointError("timm's distilled DeiT has no more registers than its distillation token")
            arrays = {"dist_token" if name == "reg_token" else name: array for name, array in arrays.items()}
    refuse_left("timm", left)
    return arrays


def refuse_left(format: str, left: tuple[str, ...]) -> None:
    if left:
        raise CheckpointError(f"the {format} format has no place for {', '.join(left[:12])}; use format='native'")
