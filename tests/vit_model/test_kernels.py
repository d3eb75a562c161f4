"""Fast ways of computing equal the plain ones: products, attention of one query, weight standardisation, pooling."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from tests.vit_model.reduced import randomize
from vit_model import ViTConfig, build_model, linear
from vit_model.encoder import attend_without_keys
from vit_model.std_conv import DivideByStd
from vit_model.stem import root_pool

WIDE = {"resolution": 32, "patch_size": 4, "width": 128, "depth": 2, "mlp_dim": 512, "num_heads": 2}
has_onednn = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
needs_onednn = pytest.mark.skipif(not has_onednn, reason="this torch is built without oneDNN")


@pytest.fixture(params=[False, True], ids=["as everywhere", "as on AMD"])
def amd(request, monkeypatch):
    if request.param and not has_onednn:
        pytest.skip("this torch is built without oneDNN")
    monkeypatch.setattr(linear, "prefers_onednn", lambda: request.param)
    return request.param


def reference(x, weight, bias):
    return x.double() @ weight.double().T + (0 if bias is None else bias.double())


@pytest.mark.parametrize("has_bias", [True, False])
def test_a_product_and_all_its_gradients_equal_those_in_double_precision(amd, has_bias):
    x = torch.randn(3, 70, 256, requires_grad=True)
    weight = torch.randn(192, 256, requires_grad=True)
    bias = torch.randn(192, requires_grad=True) if has_bias else None
    assert linear.onednn_suits(x, weight) is amd
    inputs = [tensor for tensor in (x, weight, bias) if tensor is not None]
    upstream = torch.randn(3, 70, 192)
    y = linear.linear(x, weight, bias)
    exact = reference(x, weight, bias)
    torch.testing.assert_close(y.double(), exact, rtol=0, atol=1e-4)
    for ours, theirs in zip(
        torch.autograd.grad(y, inputs, upstream), torch.autograd.grad(exact, inputs, upstream.double()), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-3)


@needs_onednn
def test_gradients_of_gradients_exist(monkeypatch):
    monkeypatch.setattr(linear, "prefers_onednn", lambda: True)
    x, weight = torch.randn(200, 256, requires_grad=True), torch.randn(192, 256, requires_grad=True)
    second = []
    for product in (linear.linear, F.linear):
        (first,) = torch.autograd.grad(product(x, weight, None).square().sum(), x, create_graph=True)
        second.append(torch.autograd.grad(first.square().sum(), weight)[0])
    assert (second[0] - second[1]).abs().max() <= 1e-5 * second[1].abs().max()


@needs_onednn
def test_whoever_must_see_the_usual_operator_sees_it(monkeypatch):
    monkeypatch.setattr(linear, "prefers_onednn", lambda: True)
    x, weight = torch.randn(200, 256), torch.randn(192, 256)
    assert linear.onednn_suits(x, weight)
    with FlopCounterMode(display=False) as counter:
        linear.linear(x, weight, None)
    assert counter.get_total_flops() == 2 * 200 * 256 * 192
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert linear.linear(x, weight, None).dtype == torch.bfloat16
    each = torch.func.vmap(lambda row: linear.linear(row, weight, None))(x.view(2, 100, 256))
    torch.testing.assert_close(each.flatten(0, 1), F.linear(x, weight), rtol=1e-4, atol=1e-4)
    _, tangent = torch.func.jvp(lambda rows: linear.linear(rows, weight, None), (x,), (torch.ones_like(x),))
    torch.testing.assert_close(tangent[0], weight.sum(dim=1), rtol=1e-3, atol=1e-3)
    for other in (x.double(), x.bfloat16(), x[:4], x.to("meta")):
        assert not linear.onednn_suits(other, weight.to(other.device, other.dtype))


@needs_onednn
def test_a_model_computes_the_same_with_either_product(monkeypatch):
    model = randomize(build_model(ViTConfig(**WIDE), 5)).train()
    x = torch.randn(16, 3, 32, 32)
    results = []
    for choice in (False, True):
        monkeypatch.setattr(linear, "prefers_onednn", lambda choice=choice: choice)
        model.zero_grad()
        logits = model(x).logits
        logits.square().sum().backward()
        results.append([logits, *(p.grad for p in model.parameters())])
    for plain, fast in zip(*results, strict=True):
        assert (fast - plain).abs().max() <= 1e-4 * plain.abs().max() + 1e-5


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("has_bias", [True, False])
def test_attention_of_one_query_equals_the_one_with_keys_and_values(shared, has_bias):
    x = torch.randn(3, 17, 32, dtype=torch.double)
    q = torch.randn(1 if shared else 3, 1, 4, 8, dtype=torch.double)
    weight, bias = torch.randn(64, 32, dtype=torch.double), torch.randn(64, dtype=torch.double) if has_bias else None
    k, v = F.linear(x, weight, bias).view(3, 17, 2, 4, 8).transpose(1, 3).unbind(2)
    expected = F.scaled_dot_product_attention(q.expand(3, -1, -1, -1).transpose(1, 2), k, v).reshape(3, 1, 32)
    torch.testing.assert_close(attend_without_keys(q, x, weight, bias), expected)


@pytest.mark.parametrize("pool", ["token", "map"])
def test_half_precision_takes_the_fused_kernel_for_one_query_too(pool, monkeypatch):
    config = ViTConfig(**{**WIDE, "pool": pool})
    model = randomize(build_model(config, 5))
    x = torch.randn(2, 3, 32, 32)
    exact = model(x, tokens=False).logits
    for module in ("encoder", "heads"):
        monkeypatch.setattr(f"vit_model.{module}.attend_without_keys", None)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = model(x, tokens=False).logits
    assert (mixed.float() - exact).abs().max() < 0.1 * exact.abs().max()


def test_weight_standardisation_and_its_gradient_follow_the_definition():
    weight = (torch.randn(5, 7, dtype=torch.double) * 1e-4 + 0.3).requires_grad_()
    expected = (weight - weight.mean(1, keepdim=True)) / (weight.std(1, correction=0, keepdim=True) + 1e-5)
    torch.testing.assert_close(DivideByStd.apply(weight, 1e-5), expected, rtol=1e-8, atol=1e-8)
    upstream = torch.randn_like(expected)
    ours, theirs = (torch.autograd.grad(y, weight, upstream) for y in (DivideByStd.apply(weight, 1e-5), expected))
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)


def test_a_constant_kernel_becomes_zero_with_finite_gradients():
    weight = torch.full((3, 4), 0.3, requires_grad=True)
    y = DivideByStd.apply(weight, 1e-5)
    y.sum().backward()
    assert not y.any()
    assert weight.grad.isfinite().all()


@pytest.mark.parametrize("size", [(8, 8), (6, 10), (7, 8), (9, 9)])
def test_the_root_pool_is_tensorflows_same_pool_with_and_without_gradients(size):
    x = torch.randn(2, 5, *size).relu()
    before = [side % 2 for side in size]  # SAME: an odd side gets one on each side, an even one only after
    padded = F.pad(x, (before[1], 1, before[0], 1), value=-torch.inf)
    expected = F.max_pool2d(padded, 3, 2)
    assert torch.equal(root_pool(x), expected)
    with torch.no_grad():
        assert torch.equal(root_pool(x), expected)
