"""Makes timm.json and huggingface.json with timm and transformers. Not a test: run by hand where both import.

pip install timm torchvision transformers && python make_peers.py
"""

import importlib
import json
import sys
import types
from importlib.metadata import version
from pathlib import Path

import torch
from values import images, uniform, weight


def import_torchvision() -> None:
    """The CUDA wheel of torchvision imports on a CPU torch without the fake kernels of its absent operators."""
    try:
        importlib.import_module("torchvision")
    except RuntimeError as error:
        if "torchvision::nms" not in str(error):
            raise
        sys.modules["torchvision._meta_registrations"] = types.ModuleType("torchvision._meta_registrations")
        importlib.import_module("torchvision")


import_torchvision()
import timm  # noqa: E402
import transformers  # noqa: E402
from timm.layers import resample_abs_pos_embed, resample_patch_embed  # noqa: E402

SMALL = {"embed_dim": 64, "depth": 2, "num_heads": 4, "num_classes": 10, "pretrained": False}
# name: (timm model, arguments, image size, hints that our reader needs, fields that it must find)
TIMM = {
    "token": ("vit_base_patch16_224", {**SMALL, "img_size": 64}, (64, 64), {"num_heads": 4}, {"pool": "token"}),
    "not square": (
        "vit_base_patch16_224",
        {**SMALL, "img_size": (64, 96)},
        (64, 96),
        {"num_heads": 4, "resolution": [64, 96]},
        {},
    ),
    "gap, norm after": (
        "vit_base_patch16_224",
        {**SMALL, "img_size": 64, "class_token": False, "global_pool": "avg"},
        (64, 64),
        {"num_heads": 4},
        {"pool": "gap", "pool_norm": "after"},
    ),
    "gap with class token": (
        "vit_base_patch16_224",
        {**SMALL, "img_size": 64, "global_pool": "avg"},
        (64, 64),
        {"num_heads": 4},
        {"pool": "gap", "pool_norm": "after", "class_token": True},
    ),
    "map, tanh": (
        "vit_base_patch16_siglip_224",
        {**SMALL, "img_size": 64, "act_layer": "gelu_tanh"},
        (64, 64),
        {"num_heads": 4, "gelu": "tanh"},
        {"pool": "map"},
    ),
    "registers, QK-norm, LayerScale": (
        "vit_base_patch16_224",
        {**SMALL, "img_size": 64, "reg_tokens": 4, "qk_norm": True, "init_values": 1e-5, "no_embed_class": True},
        (64, 64),
        {},
        {"num_registers": 4, "qk_norm": True, "position_prefix": False},
    ),
    "DeiT, distilled": (
        "deit_base_distilled_patch16_224",
        {**SMALL, "img_size": 64},
        (64, 64),
        {"num_heads": 4},
        {"num_registers": 1, "position_prefix": True},
    ),
    "Ti/16": ("vit_tiny_patch16_224", {"num_classes": 10}, (224, 224), {}, {"num_heads": 3}),
    "R50+B/16": ("vit_base_r50_s16_224", {**SMALL, "img_size": 96}, (96, 96), {"num_heads": 4}, {"stem": [3, 4, 9]}),
    "R26+S/32": (
        "vit_small_r26_s32_224",
        {**SMALL, "img_size": 96},
        (96, 96),
        {"num_heads": 4},
        {"stem": [2, 2, 2, 2]},
    ),
    "R+Ti/16": ("vit_tiny_r_s16_p8_224", {**SMALL, "img_size": 96}, (96, 96), {"num_heads": 4}, {"stem": []}),
    "R50x1": ("resnetv2_50x1_bit", {"num_classes": 10, "pretrained": False}, (96, 64), {}, {"units": [3, 4, 6, 3]}),
}
# name: (width, depth, mlp_dim, heads, patch)
HUGGINGFACE = {
    "Ti/16": (192, 12, 768, 3, 16),
    "S/16": (384, 12, 1536, 6, 16),
    "B/16, 3 blocks": (768, 3, 3072, 12, 16),
    "L/16, 2 blocks": (1024, 2, 4096, 16, 16),
    "H/14, 2 blocks": (1280, 2, 5120, 16, 14),
}


def fill(case: str, model: torch.nn.Module) -> None:
    model.load_state_dict(
        {k: torch.from_numpy(weight(f"{case}:{k}", tuple(v.shape))) for k, v in model.state_dict().items()}
    )
    model.eval()


def rounded(tensor: torch.Tensor) -> list:
    return [[float(f"{value:.8g}") for value in row] for row in tensor.tolist()]


def write(name: str, packages: tuple[str, ...], content: dict) -> None:
    made_with = {package: version(package) for package in (*packages, "torch", "numpy")}
    seed = "Philox with the sha256 of each array's name as key (values.py)"
    text = json.dumps(
        {"made_with": made_with, "seed": seed, "script": Path(__file__).name, **content}, separators=(",", ":")
    )
    Path(__file__).with_name(name).write_text(text + "\n")


@torch.no_grad()
def main() -> None:
    cases = {}
    for case, (name, arguments, size, hints, found) in TIMM.items():
        model = timm.create_model(name, **arguments)
        fill(case, model)
        shapes = {key: list(tensor.shape) for key, tensor in model.state_dict().items()}
        logits = model(torch.from_numpy(images(case, 2, size)))
        cases[case] = {
            "model": name,
            "size": size,
            "hints": hints,
            "config": found,
            "shapes": shapes,
            "logits": rounded(logits),
        }
    table = torch.from_numpy(uniform("table", (1, 17, 4)))
    kernel = torch.from_numpy(uniform("kernel", (3, 2, 8, 8)))
    resized = {
        "position 4x4 to 6x5": rounded(resample_abs_pos_embed(table, [6, 5], [4, 4], num_prefix_tokens=1)[0]),
        "position 4x4 to 3x2": rounded(resample_abs_pos_embed(table, [3, 2], [4, 4], num_prefix_tokens=1)[0]),
        "kernel 8x8 to 12x12": rounded(resample_patch_embed(kernel, [12, 12], "bilinear", True).flatten(1)),
        "kernel 8x8 to 5x6": rounded(resample_patch_embed(kernel, [5, 6], "bilinear", True).flatten(1)),
    }
    write("timm.json", ("timm",), {"cases": cases, "resized": resized})

    cases = {}
    for case, (width, depth, mlp_dim, heads, patch) in HUGGINGFACE.items():
        values = {
            "hidden_size": width,
            "num_hidden_layers": depth,
            "intermediate_size": mlp_dim,
            "num_attention_heads": heads,
        }
        config = transformers.ViTConfig(**values, patch_size=patch, num_labels=10)
        model = transformers.ViTForImageClassification(config)
        fill(case, model)
        shapes = {key: list(tensor.shape) for key, tensor in model.state_dict().items()}
        logits = model(torch.from_numpy(images(case, 2, (224, 224)))).logits
        keep = ("model_type", "patch_size", "image_size", "hidden_act", "layer_norm_eps", "num_attention_heads")
        kept = {key: value for key, value in config.to_dict().items() if key in keep}
        cases[case] = {"config.json": kept, "shapes": shapes, "logits": rounded(logits)}
    write("huggingface.json", ("transformers",), {"cases": cases})


if __name__ == "__main__":
    main()
