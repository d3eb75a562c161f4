"""Every variant at a width that runs in milliseconds, and weights that make every part of it count."""

from __future__ import annotations

from typing import Any

import torch

from vit_model import Model, ModelConfig, ViTConfig, variant

REDUCED = {"width": 32, "depth": 2, "mlp_dim": 48, "num_heads": 2}


def reduced(name: str, **changes: Any) -> ModelConfig:
    config = variant(name)
    if isinstance(config, ViTConfig):
        stem = {} if config.stem is None else {"stem": tuple(1 for _ in config.stem), "stem_width": 8}
        return variant(name, **{**REDUCED, **stem, "resolution": 2 * config.stride, **changes})
    return variant(name, **{"units": (1, 1), "width_factor": 1, "resolution": 32, **changes})


@torch.no_grad()
def randomize(model: Model) -> Model:
    """Zero heads and unit norms hide faults: fill everything with numbers of moderate size."""
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        scale = 0.2 if parameter.ndim == 1 else parameter[0].numel() ** -0.5
        noise = torch.randn(parameter.shape, generator=generator) * scale
        parameter.copy_(noise + (parameter.ndim == 1))
    return model.eval()


def small(**changes: Any) -> ViTConfig:
    return ViTConfig(
        **{"resolution": 32, "patch_size": 8, "width": 32, "depth": 2, "mlp_dim": 48, "num_heads": 2, **changes}
    )


def assert_same(one: Model, other: Model) -> None:
    assert one.state_dict().keys() == other.state_dict().keys()
    for name, tensor in one.state_dict().items():
        assert torch.equal(tensor, other.state_dict()[name]), name
