"""The arrays behind the figures, against hand computation and against the known values of uniform attention."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.vit_model.reduced import randomize
from vit_model import ViTConfig, build_model, introspect

SMALL = {"resolution": 32, "patch_size": 8, "width": 32, "depth": 3, "mlp_dim": 48, "num_heads": 2}


def uniform(grid, num_prefix):
    tokens = num_prefix + grid[0] * grid[1]
    return torch.full((2, 3, tokens, tokens), 1 / tokens)


@pytest.mark.parametrize(
    ("grid", "stride", "mean"),
    [((14, 14), 16, 116.49), ((7, 7), 32, 115.50), ((16, 16), 14, 116.57), ((24, 24), 16, 200.05)],
)
def test_uniform_attention_has_the_mean_distance_of_the_grid(grid, stride, mean):
    distance = introspect.attention_distance([uniform(grid, 1)] * 2, grid, stride, 1)
    assert distance.shape == (2, 3)
    np.testing.assert_allclose(distance.numpy(), mean, atol=0.005)


def test_without_renormalising_attention_to_the_class_token_lowers_the_distance():
    attention = [uniform((14, 14), 1)]
    plain = introspect.attention_distance(attention, (14, 14), 16, 1, renormalize=False)
    np.testing.assert_allclose(plain.numpy(), 116.49 * 196 / 197, atol=0.01)


def test_attention_to_oneself_has_no_distance():
    assert not introspect.attention_distance([torch.eye(17).expand(1, 2, 17, 17)], (4, 4), 8, 1).any()


def test_the_largest_distance_is_the_diagonal():
    distances = introspect.patch_distances((14, 14), 16)
    assert distances.max().item() == pytest.approx(294.16, abs=0.005)
    assert distances[0].mean().item() == pytest.approx(161.0, abs=0.05)


def test_rollout_multiplies_the_layers_with_their_skip_connections():
    attention = [torch.rand(2, 2, 17, 17).softmax(dim=-1) for _ in range(3)]
    rollout = introspect.attention_rollout(attention, (4, 4), 1)
    expected = np.eye(17)
    for layer in attention:
        step = layer[0].mean(dim=0).double().numpy() + np.eye(17)
        expected = step / step.sum(axis=-1, keepdims=True) @ expected
    patches = expected[0, 1:].reshape(4, 4)
    np.testing.assert_allclose(rollout[0].numpy(), patches / patches.max(), rtol=1e-5)
    assert rollout.amax(dim=(1, 2)).tolist() == [1, 1]
    gap = introspect.attention_rollout(attention, (4, 4), 1, has_class_token=False)
    patches = expected[1:, 1:].mean(axis=0).reshape(4, 4)
    np.testing.assert_allclose(gap[0].numpy(), patches / patches.max(), rtol=1e-5)


def test_cka_is_one_under_rotation_and_scale_and_symmetric_and_lower_for_strangers():
    x = torch.randn(40, 6)
    rotation, _ = torch.linalg.qr(torch.randn(6, 6))
    assert introspect.linear_cka(x, 3 * x @ rotation + 1) == pytest.approx(1)
    y = torch.randn(40, 5)
    assert introspect.linear_cka(x, y) == pytest.approx(introspect.linear_cka(y, x))
    assert introspect.linear_cka(x, y) < 0.5
    few = torch.randn(4, 6)
    wide = introspect.linear_cka(few, few[:, :5])
    centred, other = few - few.mean(dim=0), few[:, :5] - few[:, :5].mean(dim=0)
    expected = (centred.T @ other).square().sum() / ((centred.T @ centred).norm() * (other.T @ other).norm())
    assert wide == pytest.approx(expected.item(), rel=1e-5)


def test_the_arrays_of_a_model_have_their_shapes_and_ranges():
    model = randomize(build_model(ViTConfig(**SMALL), 5))
    features = model(torch.randn(6, 3, 32, 32), blocks=True, attention=True)
    filters = introspect.patch_filters(model, 28)
    assert filters.shape == (28, 3, 8, 8)
    assert filters.amin() == 0
    assert filters.amax() == 1
    similarity = introspect.position_similarity(model)
    assert similarity.shape == (4, 4, 4, 4)
    np.testing.assert_allclose(similarity.view(16, 16).diagonal().numpy(), 1, atol=1e-6)
    matrix = introspect.cka_matrix(features.blocks)
    assert matrix.shape == (3, 3)
    assert torch.equal(matrix, matrix.T)
    assert introspect.cka_matrix(features.blocks, token=0).shape == (3, 3)
    entropy = introspect.attention_entropy(features.attention)
    assert entropy.shape == (3, 2)
    assert (entropy > 0).all()
    assert (entropy <= np.log(17)).all()
    colours = introspect.token_components(features.tokens, (4, 4), 1)
    assert colours.shape == (6, 4, 4, 3)


def test_filters_are_the_principal_components_in_order():
    model = build_model(ViTConfig(**SMALL), 5)
    direction = torch.randn(3, 8, 8)
    with torch.no_grad():
        model.patch_embedding.weight.normal_(std=0.01).add_(torch.randn(32, 1, 1, 1) * direction)
    first = introspect.patch_filters(model)[0].flatten()
    correlation = torch.corrcoef(torch.stack([first, direction.flatten()]))[0, 1]
    assert abs(correlation) > 0.99


def test_uniform_attention_has_the_entropy_of_its_length():
    np.testing.assert_allclose(introspect.attention_entropy([uniform((4, 4), 1)]).numpy(), np.log(17), rtol=1e-5)


def test_a_model_without_positions_has_no_similarity():
    with pytest.raises(ValueError, match="no position embedding"):
        introspect.position_similarity(build_model(ViTConfig(**SMALL, position="none"), 5))
