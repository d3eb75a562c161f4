"""What the forward pass promises, over every variant at reduced width."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from tests.vit_model.reduced import randomize, reduced
from vit_model import VARIANTS, ViTConfig, build_model, replace_head

OPTIONS = [
    {},
    {"pool": "gap"},
    {"pool": "gap", "pool_norm": "after"},
    {"pool": "gap", "class_token": True},
    {"pool": "map"},
    {"position": "sincos2d"},
    {"position": "none"},
    {"position_prefix": False},
    {"num_registers": 3},
    {"num_registers": 3, "pool": "gap", "position_prefix": False},
    {"gelu": "tanh"},
    {"qk_norm": True},
    {"qkv_bias": False},
    {"layer_scale": 0.1},
    {"channels": 1},
    {"resolution": (16, 32)},
]
NAMES = ["B/16", "B/8", "H/14", "R50+B/16", "R26+S/32", "R+Ti/16", "R50x1"]


def small(**changes):
    return ViTConfig(
        **{"resolution": 32, "patch_size": 8, "width": 32, "depth": 2, "mlp_dim": 48, "num_heads": 2, **changes}
    )


def ids(options):
    return "-".join(f"{key}={value}" for key, value in options.items()) or "default"


@pytest.mark.parametrize("name", VARIANTS)
def test_every_variant_runs_and_trains(name):
    config = reduced(name)
    model = build_model(config, 5, "mlp")
    features = model(torch.randn(2, 3, *config.size))
    assert features.logits.shape == (2, 5)
    assert features.pre_logits.shape == (2, config.width)
    assert features.tokens.shape[::2] == (2, config.width)
    randomize(model).train()(torch.randn(2, 3, *config.size)).logits.square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() and p.grad.any() for p in model.parameters())


@pytest.mark.parametrize("options", OPTIONS, ids=ids)
def test_every_option_runs_at_its_own_and_at_another_size(options):
    config = small(**options)
    model = randomize(build_model(config, 5))
    h, w = config.grid
    features = model(torch.randn(2, config.channels, *config.size))
    assert features.tokens.shape == (2, config.num_prefix + h * w, 32)
    larger = model(torch.randn(2, config.channels, 48, 40))
    assert larger.tokens.shape == (2, config.num_prefix + 6 * 5, 32)
    assert larger.logits.shape == (2, 5)


@pytest.mark.parametrize("options", OPTIONS, ids=ids)
def test_the_explicit_attention_equals_the_fused_one(options):
    config = small(**options)
    model = randomize(build_model(config, 5))
    x = torch.randn(2, config.channels, *config.size)
    fused, explicit = model(x, blocks=True), model(x, blocks=True, attention=True)
    torch.testing.assert_close(explicit.logits, fused.logits, rtol=1e-5, atol=1e-5)
    assert len(explicit.blocks) == len(explicit.attention) == config.depth
    for ours, theirs in zip(fused.blocks, explicit.blocks, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    for probabilities in explicit.attention:
        torch.testing.assert_close(probabilities.sum(dim=-1), torch.ones(2, 2, config.num_tokens))


@pytest.mark.parametrize("options", OPTIONS, ids=ids)
def test_leaving_out_the_tokens_changes_neither_logits_nor_gradients(options):
    config = small(**options)
    model = randomize(build_model(config, 5))
    x = torch.randn(2, config.channels, *config.size)
    gradients = []
    for tokens in (True, False):
        model.zero_grad()
        features = model(x, tokens=tokens)
        features.logits.square().sum().backward()
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters()})
        assert (features.tokens is None) == (not tokens)
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("options", OPTIONS, ids=ids)
def test_packing_images_of_different_sizes_changes_nothing(options):
    config = small(**options)
    model = randomize(build_model(config, 5))
    sizes = [(32, 32), (16, 48), (32, 32), (8, 8), (16, 48)]
    images = [torch.randn(config.channels, h, w) for h, w in sizes]
    packed = model(images)
    alone = torch.cat([model(image[None]).logits for image in images])
    torch.testing.assert_close(packed.logits, alone, rtol=1e-5, atol=1e-5)
    assert packed.tokens is None


def test_packed_images_give_no_blocks_and_say_so():
    model = build_model(small(), 5)
    for asked in ({"blocks": True}, {"attention": True}):
        with pytest.raises(ValueError, match="gives no blocks and no attention"):
            model([torch.randn(3, 32, 32)], **asked)


@pytest.mark.parametrize("options", OPTIONS, ids=ids)
@pytest.mark.parametrize("tokens", [True, False])
def test_a_batch_without_images_has_logits_without_rows(options, tokens):
    config = small(**options)
    model = build_model(config, 5)
    for model.training in (True, False):
        assert model(torch.randn(0, config.channels, *config.size), tokens=tokens).logits.shape == (0, 5)


def test_explicit_attention_keeps_full_precision_under_autocast():
    model = randomize(build_model(small(qk_norm=True), 5))
    x = torch.randn(2, 3, 32, 32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        probabilities = model(x, attention=True).attention
    for probability in probabilities:
        assert probability.dtype == torch.float32
        torch.testing.assert_close(probability.sum(dim=-1), torch.ones(2, 2, 17), rtol=0, atol=1e-6)


def test_permuting_patches_with_their_position_rows_leaves_the_output():
    config = small()
    model = randomize(build_model(config, 5))
    x = torch.randn(2, 3, 32, 32)
    order = torch.randperm(16)
    patches = x.view(2, 3, 4, 8, 4, 8).permute(0, 2, 4, 1, 3, 5).flatten(1, 2)  # (B, N, C, P, P)
    shuffled = patches[:, order].view(2, 4, 4, 3, 8, 8).permute(0, 3, 1, 4, 2, 5).reshape(2, 3, 32, 32)
    before = model(x).pre_logits
    with torch.no_grad():
        model.position_embedding[:, 1:] = model.position_embedding[:, 1:][:, order].clone()
    torch.testing.assert_close(model(shuffled).pre_logits, before, rtol=1e-5, atol=1e-5)


def test_pre_logits_come_after_the_tanh_of_the_mlp_head_and_logits_from_them():
    model = randomize(build_model(small(), 5, "mlp"))
    features = model(torch.randn(2, 3, 32, 32))
    assert features.pre_logits.abs().max() < 1
    torch.testing.assert_close(features.logits, model.head.out(features.pre_logits))
    torch.testing.assert_close(features.pre_logits, model.head.hidden(features.tokens[:, 0]).tanh())


def test_gap_reads_no_prefix_token():
    model = randomize(build_model(small(pool="gap", class_token=True, num_registers=2), 5))
    features = model(torch.randn(2, 3, 32, 32))
    torch.testing.assert_close(features.pre_logits, features.tokens[:, 3:].mean(dim=1))


def test_a_model_without_classes_has_no_head():
    model = build_model(small(), 0)
    features = model(torch.randn(2, 3, 32, 32))
    assert features.logits is features.pre_logits
    assert not [name for name, _ in model.named_parameters() if name.startswith("head")]


@pytest.mark.parametrize("name", NAMES)
def test_replacing_the_head_drops_both_layers_and_starts_at_zero(name):
    config = reduced(name)
    model = randomize(build_model(config, 5, "mlp"))
    assert replace_head(model, 7) is model
    assert [key for key in model.state_dict() if key.startswith("head")] == ["head.out.weight", "head.out.bias"]
    assert not model(torch.randn(2, 3, *config.size)).logits.any()
    assert not model.head.training


def test_the_head_bias_of_the_sigmoid_loss_is_set():
    model = build_model(small(), 5, "mlp", head_bias=-6.9)
    assert (model(torch.randn(2, 3, 32, 32)).logits == -6.9).all()


@pytest.mark.parametrize(
    ("shape", "words"),
    [
        ((2, 3, 30, 32), "30x32 px is not divisible into patches of 8 px; nearest: 32x32"),
        ((2, 3, 32, 4), "not divisible into patches"),
        ((2, 1, 32, 32), r"this model takes \(batch, 3, height, width\)"),
        ((3, 32, 32), r"this model takes \(batch, 3, height, width\)"),
        ((2, 3, 0, 32), r"this model takes \(batch, 3, height, width\)"),
    ],
)
def test_a_wrong_input_size_names_the_rule(shape, words):
    with pytest.raises(ValueError, match=words):
        build_model(small(), 5)(torch.randn(shape))


@pytest.mark.parametrize("name", ["B/16", "R50x1"])
def test_pixels_that_nobody_normalised_are_refused(name):
    config = reduced(name)
    with pytest.raises(ValueError, match="normalize first"):
        build_model(config, 5)(torch.zeros(1, 3, *config.size, dtype=torch.uint8))


@pytest.mark.parametrize("batch", [3, 40])
def test_drop_path_keeps_the_mean_and_computes_only_what_it_keeps(batch):
    from vit_model.encoder import Block

    torch.manual_seed(0)
    block = Block(small(drop_path=0.25), drop_path=0.25)
    x = torch.zeros(batch, 4, 32)
    seen = []

    def branch(rows):
        seen.append(len(rows))
        return torch.ones_like(rows)

    total = torch.stack([block.dropped(x, branch) for _ in range(600)]).mean(dim=(0, 2, 3))
    assert set(seen) == {batch - int(0.25 * batch)}
    torch.testing.assert_close(total, torch.ones(batch), rtol=0, atol=0.15)


@pytest.mark.parametrize("schedule", ["linear", "constant"])
def test_drop_path_follows_its_schedule_and_rests_in_evaluation(schedule):
    config = small(depth=3, drop_path=0.4, drop_path_schedule=schedule)
    model = randomize(build_model(config, 5))
    rates = [block.drop_path for block in model.blocks]
    assert rates == pytest.approx([0, 0.2, 0.4] if schedule == "linear" else [0.4] * 3)
    x = torch.randn(8, 3, 32, 32)
    assert torch.equal(model(x).logits, model(x).logits)
    model.train()
    assert not torch.equal(model(x).logits, model(x).logits)


@pytest.mark.parametrize("field", ["dropout", "attention_dropout", "patch_dropout"])
def test_every_kind_of_dropout_acts_in_training_alone(field):
    model = randomize(build_model(small(**{field: 0.5}), 5))
    plain = randomize(build_model(small(), 5))
    x = torch.randn(4, 3, 32, 32)
    assert torch.equal(model(x).logits, plain(x).logits)
    model.train()
    torch.manual_seed(1)
    first = model(x)
    assert not torch.equal(first.logits, model(x).logits)
    if field == "patch_dropout":
        assert first.tokens.shape[1] == 1 + 8


def test_activation_checkpointing_gives_the_same_gradients():
    model = randomize(build_model(small(), 5)).train()
    x = torch.randn(2, 3, 32, 32)
    gradients = []
    for model.activation_checkpointing in (False, True):
        model.zero_grad()
        model(x).logits.square().sum().backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_bfloat16_stays_near_float32(name):
    config = reduced(name)
    model = randomize(build_model(config, 5))
    x = torch.randn(2, 3, *config.size)
    exact = model(x).logits
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = model(x).logits
    pure = model.bfloat16()(x.bfloat16()).logits
    assert pure.dtype == torch.bfloat16
    pure.square().sum().backward()
    assert all(p.grad.dtype == torch.bfloat16 and p.grad.isfinite().all() for p in model.parameters())
    for logits in (mixed, pure):
        assert (logits.float() - exact).abs().max() < 0.1 * exact.abs().max()


COMPILE = """
import torch
from torch._dynamo.testing import CompileCounter
from vit_model import build_model, variant, ViTConfig
torch.manual_seed(0)
small = dict(resolution=32, width=32, depth=2, mlp_dim=48, num_heads=2)
cases = [
    (ViTConfig(patch_size=8, drop_path=0.3, dropout=0.1, patch_dropout=0.2, **small), True),
    (ViTConfig(patch_size=8, pool="map", qk_norm=True, position="sincos2d", layer_scale=0.1, **small), False),
    (variant("R50+B/16", stem=(1, 1), stem_width=8, **small), True),
    (variant("R50x1", units=(1,)), False),
]
for config, training in cases:
    model = build_model(config, 5).train(training)
    torch.nn.init.normal_(model.head.out.weight)
    torch.compiler.reset()
    counter = CompileCounter()
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend=counter)
    for batch in (8, 12):
        x = torch.randn(batch, 3, 32, 32)
        logits = compiled(x, tokens=False).logits
        if not training:
            torch.testing.assert_close(logits, model(x).logits, rtol=1e-4, atol=1e-4)
    assert counter.frame_count == 1, counter.frame_count  # one graph, and the second batch size takes it too
    print("ok")
"""


def test_torch_compile_makes_one_graph_for_all_batch_sizes():
    # In a process of its own: the shape checks of these tests would themselves break the graph.
    done = subprocess.run([sys.executable, "-c", COMPILE], capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("ok") == 4
