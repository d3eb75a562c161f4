"""The paper's initialisation: no parameter forgotten, every one with the deviation that the JAX code gives it."""

from __future__ import annotations

import math

import pytest
import torch

from tests.vit_model.reduced import reduced
from vit_model import VARIANTS, ViTConfig, build_model, initialize


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize(
    "changes", [{}, {"pool": "map", "num_registers": 2, "layer_scale": 0.1, "position": "sincos2d"}]
)
def test_no_parameter_or_buffer_is_forgotten(name, changes):
    config = reduced(name)
    if isinstance(config, ViTConfig):
        config = reduced(name, **changes)
    model = build_model(config, 5, "mlp")
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.fill_(math.nan)
    initialize(model)
    assert all(tensor.isfinite().all() for tensor in (*model.parameters(), *model.buffers()))


def test_every_tensor_has_the_spread_of_the_papers_code():
    config = ViTConfig(resolution=64, width=192, depth=2, mlp_dim=768, num_heads=3)
    model = build_model(config, 10, "mlp", seed=0)
    block = model.blocks[1]
    xavier = math.sqrt(2 / (192 + 192))
    for projection in block.attention.qkv.weight.chunk(3):
        assert projection.std().item() == pytest.approx(xavier, rel=0.02)
        assert projection.abs().max().item() <= math.sqrt(3) * xavier
    assert block.attention.out.weight.std().item() == pytest.approx(xavier, rel=0.02)
    assert block.mlp.dense1.weight.std().item() == pytest.approx(math.sqrt(2 / (192 + 768)), rel=0.02)
    assert block.mlp.dense2.bias.std().item() == pytest.approx(1e-6, rel=0.2)
    assert not block.attention.qkv.bias.any()
    assert not block.attention.out.bias.any()
    assert model.patch_embedding.weight.std().item() == pytest.approx(math.sqrt(1 / 768), rel=0.02)
    assert not model.patch_embedding.bias.any()
    assert model.position_embedding.std().item() == pytest.approx(0.02, rel=0.05)
    assert not model.class_token.any()
    assert model.head.hidden.weight.std().item() == pytest.approx(math.sqrt(1 / 192), rel=0.02)
    assert not model.head.out.weight.any()
    assert not model.head.out.bias.any()
    assert (block.norm1.weight == 1).all()


def test_hybrid_units_start_as_their_shortcut():
    model = build_model(reduced("R50+B/16"), 5)
    assert all(not unit.norm3.weight.any() for stage in model.stem.stages for unit in stage)


def test_a_seed_decides_all_weights_and_leaves_the_global_generator_alone():
    config = reduced("R50+B/16")
    torch.manual_seed(3)
    expected = torch.randn(2)
    torch.manual_seed(3)
    first, second = build_model(config, 5, seed=1), build_model(config, 5, seed=1)
    assert torch.equal(torch.randn(2), expected)
    other = build_model(config, 5, seed=2)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    assert not torch.equal(first.patch_embedding.weight, other.patch_embedding.weight)


def test_the_meta_device_holds_no_numbers_and_can_be_filled_later():
    model = build_model(reduced("B/16"), 5, device="meta")
    assert all(p.is_meta for p in model.parameters())
    model.to_empty(device="cpu")
    initialize(model)
    assert model(torch.zeros(1, 3, 32, 32)).logits.shape == (1, 5)
