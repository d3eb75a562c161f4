"""Hugging Face ViT folders: config.json, model.safetensors, preprocessor_config.json; names of v4 and of v5."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from vit_model.build import Model
from vit_model.checkpoints.errors import CheckpointError
from vit_model.checkpoints.infer import Clues, vit_config
from vit_model.checkpoints.loaded import Loaded
from vit_model.checkpoints.table import FUSED, SAME, Row, norms, read_table, rows, write_table
from vit_model.checkpoints.timm import refuse_left
from vit_model.config import HeadKind, ViTConfig
from vit_model.preprocess import InputSpec, OutputSpec

GELU = {"gelu": "exact", "gelu_python": "exact", "gelu_new": "tanh", "gelu_pytorch_tanh": "tanh", "gelu_fast": "tanh"}
RESAMPLE = {2: "bilinear", 3: "bicubic"}  # Pillow's numbers


def table_of(layer: str, query: tuple[str, str, str], out: str, dense1: str, dense2: str) -> tuple[Row, ...]:
    parts = ("weight", "bias")
    return (
        *rows(
            SAME,
            ("class_token", "embeddings.cls_token"),
            ("position_embedding", "embeddings.position_embeddings"),
            *((f"patch_embedding.{part}", f"embeddings.patch_embeddings.projection.{part}") for part in parts),
            *((f"blocks.{{0}}.attention.out.{part}", f"{layer}.{out}.{part}") for part in parts),
            *((f"blocks.{{0}}.mlp.dense1.{part}", f"{layer}.{dense1}.{part}") for part in parts),
            *((f"blocks.{{0}}.mlp.dense2.{part}", f"{layer}.{dense2}.{part}") for part in parts),
            *((f"head.hidden.{part}", f"pooler.dense.{part}") for part in parts),
            *((f"head.out.{part}", f"classifier.{part}") for part in parts),
        ),
        *rows(
            FUSED,
            *(
                (f"blocks.{{0}}.attention.qkv.{part}", tuple(f"{layer}.{name}.{part}" for name in query))
                for part in parts
            ),
        ),
        *norms(
            ("blocks.{0}.norm1", f"{layer}.layernorm_before"),
            ("blocks.{0}.norm2", f"{layer}.layernorm_after"),
            ("norm", "layernorm"),
        ),
    )


V4 = table_of(
    "encoder.layer.{0}",
    ("attention.attention.query", "attention.attention.key", "attention.attention.value"),
    "attention.output.dense",
    "intermediate.dense",
    "output.dense",
)
V5 = table_of(
    "layers.{0}", ("attention.q_proj", "attention.k_proj", "attention.v_proj"), "attention.o_proj", "mlp.fc1", "mlp.fc2"
)


def read_huggingface(
    folder: Path, arrays: Mapping[str, Tensor], values: Mapping[str, Any], hints: Mapping[str, Any]
) -> Loaded:
    kind = values.get("model_type")
    if kind != "vit":
        raise CheckpointError(
            f"{folder}: model_type {kind!r} is not 'vit', the one Hugging Face model that is read; for others"
            " (DeiT, DINOv2) take the original or timm's file"
        )
    arrays = {name.removeprefix("vit."): array for name, array in arrays.items()}
    tensors, unused = read_table(V5 if any(name.startswith("layers.") for name in arrays) else V4, arrays)
    has_head = "head.out.weight" in tensors
    head: HeadKind = "mlp" if "head.hidden.weight" in tensors else "linear"
    if has_head and head == "mlp":
        raise CheckpointError(
            f"{folder}: a pooler and a classifier together; Hugging Face's classifier does not read the pooler"
        )
    if head == "mlp" and values.get("pooler_act", "tanh") != "tanh":
        raise CheckpointError(
            f"{folder}: pooler_act {values['pooler_act']!r} is not 'tanh', the hidden layer of head='mlp'"
        )
    action = values.get("hidden_act", "gelu")
    if action not in GELU:
        raise CheckpointError(f"{folder}: hidden_act {action!r} is not one of {sorted(GELU)}")
    size = values.get("image_size", 224)
    fields = {
        "num_heads": values.get("num_attention_heads", 12),
        "layer_norm_eps": values.get("layer_norm_eps", 1e-12),
        "gelu": GELU[action],
        "dropout": values.get("hidden_dropout_prob", 0.0),
        "attention_dropout": values.get("attention_probs_dropout_prob", 0.0),
        "resolution": tuple(size) if isinstance(size, list) else size,
    }
    config, num_classes = vit_config(tensors, Clues({**fields, **hints}))
    labels = {int(i): str(name) for i, name in values.get("id2label", {}).items()}
    named = has_head and sorted(labels) == list(range(num_classes))
    output_spec = OutputSpec(class_names=tuple(labels[i] for i in range(num_classes))) if named else None
    return Loaded(
        "huggingface", tensors, config, head, num_classes, read_input_spec(folder, config), output_spec, unused
    )


def read_input_spec(folder: Path, config: ViTConfig) -> InputSpec | None:
    path = folder / "preprocessor_config.json"
    if not path.exists():
        return None
    values = json.loads(path.read_text())
    size = values.get("size", config.size[0])
    height, width = (size["height"], size["width"]) if isinstance(size, dict) and "height" in size else (size, size)
    steps = ("do_resize", "do_rescale", "do_normalize")
    usual = all(values.get(step, True) for step in steps) and not values.get("do_center_crop", False)
    usual = usual and abs(values.get("rescale_factor", 1 / 255) * 255 - 1) < 1e-6
    if not usual or not isinstance(height, int) or values.get("resample", 2) not in RESAMPLE:
        return None  # a processor that does more or less than an InputSpec can say
    return InputSpec(
        channels=config.channels,
        height=height,
        width=width,
        interpolation="bilinear" if values.get("resample", 2) == 2 else "bicubic",
        mean=tuple(values.get("image_mean", (0.5,) * config.channels)),
        std=tuple(values.get("image_std", (0.5,) * config.channels)),
    )


def write_huggingface(tensors: Mapping[str, Tensor], model: Model) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """v4 names, which v5 reads as well, and config.json."""
    config = model.config
    if not isinstance(config, ViTConfig) or config.pool != "token":
        raise CheckpointError("Hugging Face's ViT is a plain ViT with pool='token'; use format='native'")
    if config.position != "learned" or not config.position_prefix:
        raise CheckpointError("Hugging Face's ViT has a learned position for every token; use format='native'")
    num_classes, head = model.head.num_classes, model.head.kind
    if head == "mlp" and num_classes:
        raise CheckpointError(
            "Hugging Face's classifier has no hidden layer; call replace_head(model, num_classes) first"
        )
    arrays, left = write_table(V4, tensors, config.num_heads)
    refuse_left("huggingface", left)
    if num_classes:
        arrays = {name if name.startswith("classifier.") else f"vit.{name}": array for name, array in arrays.items()}
    values = {
        "architectures": ["ViTForImageClassification" if num_classes else "ViTModel"],
        "model_type": "vit",
        "hidden_size": config.width,
        "num_hidden_layers": config.depth,
        "num_attention_heads": config.num_heads,
        "intermediate_size": config.mlp_dim,
        "hidden_act": "gelu" if config.gelu == "exact" else "gelu_pytorch_tanh",
        "hidden_dropout_prob": config.dropout,
        "attention_probs_dropout_prob": config.attention_dropout,
        "initializer_range": 0.02,
        "layer_norm_eps": config.layer_norm_eps,
        "image_size": config.resolution if isinstance(config.resolution, int) else list(config.resolution),
        "patch_size": config.patch_size,
        "num_channels": config.channels,
        "qkv_bias": config.qkv_bias,
    }
    return arrays, values


def labels_of(output_spec: OutputSpec | None, num_classes: int) -> dict[str, Any]:
    names = output_spec.class_names if output_spec else tuple(f"LABEL_{i}" for i in range(num_classes))
    return {
        "id2label": {str(i): name for i, name in enumerate(names)},
        "label2id": {name: i for i, name in enumerate(names)},
    }


def processor_of(spec: InputSpec) -> dict[str, Any]:
    if spec.resize != "square" or not spec.antialias:
        raise CheckpointError(
            "Hugging Face's ViT processor only resizes square with antialiasing; leave input_spec out"
        )
    return {
        "image_processor_type": "ViTImageProcessor",
        "do_resize": True,
        "size": {"height": spec.height, "width": spec.width},
        "resample": 2 if spec.interpolation == "bilinear" else 3,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(spec.mean),
        "image_std": list(spec.std),
    }
