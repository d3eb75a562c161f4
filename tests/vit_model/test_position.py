"""Position embeddings and their resizing, against scipy and against the definition."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.ndimage import zoom

from tests.vit_model.reduced import randomize
from vit_model import ViTConfig, build_model
from vit_model.position import resize_matrix, resize_patch_kernel, resize_position, sincos2d

GRIDS = [
    ((14, 14), (24, 24)),
    ((7, 7), (12, 12)),
    ((24, 24), (14, 14)),
    ((14, 14), (13, 13)),
    ((5, 3), (4, 8)),
    ((2, 2), (1, 3)),
]


@pytest.mark.parametrize(("old", "new"), GRIDS)
@pytest.mark.parametrize("num_prefix", [0, 1, 5])
def test_resizing_equals_googles_scipy_zoom(old, new, num_prefix):
    table = torch.randn(1, num_prefix + old[0] * old[1], 6)
    resized = resize_position(table, old, new, num_prefix)
    grid = table[0, num_prefix:].view(*old, 6).numpy()
    expected = zoom(grid, (new[0] / old[0], new[1] / old[1], 1), order=1)
    assert torch.equal(resized[:, :num_prefix], table[:, :num_prefix])
    np.testing.assert_allclose(resized[0, num_prefix:].view(*new, 6).numpy(), expected, atol=2e-6)


@pytest.mark.parametrize("method", ["google", "timm"])
def test_the_same_grid_is_the_identity(method):
    table = torch.randn(1, 17, 6)
    assert resize_position(table, (4, 4), (4, 4), 1, method) is table


def test_half_precision_is_rounded_once_after_resizing():
    table = torch.randn(1, 16, 6)
    half = resize_position(table.bfloat16(), (4, 4), (7, 7), 0)
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half, resize_position(table.bfloat16().float(), (4, 4), (7, 7), 0).bfloat16())


def test_a_table_of_another_length_is_an_error_that_says_what_it_needs():
    with pytest.raises(ValueError, match="has 17 rows; a 4x5 grid plus 1 prefix tokens needs 21"):
        resize_position(torch.randn(1, 17, 6), (4, 5), (4, 4), 1)


def test_a_model_fed_another_size_interpolates_as_resizing_its_weights_does():
    config = ViTConfig(resolution=32, patch_size=8, width=32, depth=2, mlp_dim=48, num_heads=2, num_registers=2)
    model = randomize(build_model(config, 5))
    larger = build_model(
        ViTConfig(**{**{f: getattr(config, f) for f in config.__slots__}, "resolution": (48, 64)}), 5
    ).eval()
    state = model.state_dict()
    state["position_embedding"] = resize_position(state["position_embedding"], (4, 4), (6, 8), 3)
    larger.load_state_dict(state)
    x = torch.randn(2, 3, 48, 64)
    torch.testing.assert_close(model(x).logits, larger(x).logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("grid", [(4, 4), (3, 5), (1, 1)])
def test_the_sine_cosine_grid_follows_its_definition(grid):
    table = sincos2d(grid, 16)
    assert table.shape == (1, grid[0] * grid[1], 16)
    for row in range(grid[0]):
        for column in range(grid[1]):
            omega = 10000.0 ** -(np.arange(4) / 3)
            expected = np.concatenate([f(p * omega) for p in (column, row) for f in (np.sin, np.cos)])
            np.testing.assert_allclose(table[0, row * grid[1] + column].numpy(), expected, atol=1e-6)


@pytest.mark.parametrize(("old", "new"), [((8, 8), (16, 16)), ((8, 8), (12, 20))])
def test_a_larger_patch_kernel_gives_the_same_tokens_on_enlarged_patches(old, new):
    kernel, patch = torch.randn(3, 2, *old), torch.randn(2, *old)
    resized = resize_patch_kernel(kernel, new)
    enlarged = (resize_matrix(old, new) @ patch.double().flatten(1).T).T.float().view(2, *new)
    torch.testing.assert_close(
        (resized * enlarged).sum((1, 2, 3)), (kernel * patch).sum((1, 2, 3)), rtol=1e-4, atol=1e-4
    )


def test_a_patch_kernel_of_the_same_size_is_itself():
    kernel = torch.randn(3, 2, 8, 8)
    assert resize_patch_kernel(kernel, (8, 8)) is kernel
