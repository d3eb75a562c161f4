"""The named variants: ViT paper table 1 and its successors, hybrids of the paper and of AugReg, BiT ResNets."""

from __future__ import annotations

import dataclasses
import difflib
import re
from typing import Any

from vit_model.config import ModelConfig, ResNetConfig, ViTConfig

# size: (width, depth, mlp_dim, num_heads). arXiv 2010.11929 table 1, 2106.04560 table 2, big_vision models/vit.py.
SIZES = {
    "mu": (32, 1, 128, 2),
    "Ti": (192, 12, 768, 3),
    "S": (384, 12, 1536, 6),
    "M": (512, 12, 2048, 8),
    "B": (768, 12, 3072, 12),
    "L": (1024, 24, 4096, 16),
    "So400m": (1152, 27, 4304, 16),
    "H": (1280, 32, 5120, 16),
    "g": (1408, 40, 6144, 16),
    "g-opt": (1536, 40, 6144, 16),
    "G": (1664, 48, 8192, 16),
    "G-opt": (1536, 48, 8192, 16),
    "e": (1792, 56, 15360, 16),
}

# (ResNet, total stride in the name): (units per stage, patch size on the feature map)
STEMS = {
    ("R50", 16): ((3, 4, 9), 1),  # the three units of stage 4 moved into stage 3: same depth, four times the tokens
    ("R50", 32): ((3, 4, 6, 3), 1),
    ("R26", 32): ((2, 2, 2, 2), 1),
    ("R", 16): ((), 8),  # named /16, but root stride 4 times patch 8 is 32 px
}

BIT_UNITS = {26: (2, 2, 2, 2), 50: (3, 4, 6, 3), 101: (3, 4, 23, 3), 152: (3, 8, 36, 3), 200: (3, 24, 36, 3)}

# Every name with published weights or published numbers; tests run over this list.
VARIANTS = (
    *("Ti/16", "S/32", "S/16", "B/32", "B/16", "B/8", "L/32", "L/16", "L/14", "So400m/14", "H/14", "g/14", "G/14"),
    *("R50+B/16", "R50+L/32", "R26+B/32", "R26+S/32", "R+Ti/16"),
    *("R26x1", "R50x1", "R50x2", "R50x3", "R101x1", "R101x3", "R152x1", "R152x2", "R152x4", "R200x3"),
)


def variant(name: str, **overrides: Any) -> ModelConfig:
    """The config of a named variant; overrides are any of its fields."""
    if bit := re.fullmatch(r"R(\d+)x(\d+)", name):
        depth, factor = int(bit[1]), int(bit[2])
        if depth in BIT_UNITS:
            return override(ResNetConfig(units=BIT_UNITS[depth], width_factor=factor), overrides)
    if vit := re.fullmatch(r"(?:(R\d*)\+)?([A-Za-z0-9-]+)/(\d+)", name):
        stem, size, patch_size = vit[1], vit[2], int(vit[3])
        if size in SIZES and (stem is None or (stem, patch_size) in STEMS):
            fields: dict[str, Any] = dict(zip(("width", "depth", "mlp_dim", "num_heads"), SIZES[size], strict=True))
            fields["patch_size"] = patch_size
            if stem is not None:
                fields["stem"], fields["patch_size"] = STEMS[stem, patch_size]
            fields["resolution"] = default_resolution(patch_size)
            return override(ViTConfig(**fields), overrides)
    near = difflib.get_close_matches(name, VARIANTS, n=3, cutoff=0.0)
    raise ValueError(f"unknown variant {name!r}; nearest: {', '.join(near)}; sizes: {', '.join(SIZES)}")


def default_resolution(patch_size: int) -> int:
    """224 px as in the paper, or the nearest side that a rare patch size divides."""
    return round(224 / patch_size) * patch_size


def override(config: ModelConfig, overrides: dict[str, Any]) -> ModelConfig:
    known = {field.name for field in dataclasses.fields(config)} - {"kind"}
    if unknown := sorted(set(overrides) - known):
        near = {name: difflib.get_close_matches(name, sorted(known), n=1) for name in unknown}
        hint = "; ".join(f"{name}: did you mean {match[0]}?" for name, match in near.items() if match)
        raise ValueError(f"unknown fields {unknown}" + (f"; {hint}" if hint else f"; known: {sorted(known)}"))
    return dataclasses.replace(config, **overrides)
