"""Names, parameter counts and multiply-accumulates against the published numbers."""

from __future__ import annotations

import pytest

from vit_model import (
    VARIANTS,
    ResNetConfig,
    ViTConfig,
    build_model,
    config_from_dict,
    config_to_dict,
    count_parameters,
    forward_macs,
    training_flops,
    variant,
)

# 1000 classes, 224 px: parameters with head, and GMACs. google-research/vision_transformer's tests and timm agree.
COUNTS = {
    "Ti/16": (5_717_416, 1.25),
    "S/32": (22_878_952, 1.14),
    "S/16": (22_050_664, 4.60),
    "B/32": (88_224_232, 4.41),
    "B/16": (86_567_656, 17.56),
    "B/8": (86_576_872, 78.15),
    "L/32": (306_535_400, 15.38),
    "L/16": (304_326_632, 61.55),
    "L/14": (304_203_752, 81.01),
    "So400m/14": (413_597_656, 109.9),
    "H/14": (632_045_800, 167.3),
    "g/14": (1_012_611_432, 267.0),
    "G/14": (1_844_440_680, 483.8),
    "R50+B/16": (98_659_112, None),
    "R50+L/32": (328_994_856, None),
    "R26+B/32": (101_383_976, None),
    "R26+S/32": (36_431_912, None),
    "R+Ti/16": (6_337_704, None),
    "R26x1": (15_987_496, None),
    "R50x1": (25_549_352, None),
    "R50x2": (97_988_712, None),
    "R50x3": (217_319_080, None),
    "R101x1": (44_541_480, None),
    "R101x3": (387_934_888, None),
    "R152x1": (60_185_128, None),
    "R152x2": (236_335_208, None),
    "R152x4": (936_533_224, None),
    "R200x3": (568_633_000, None),
}

# GMACs at the resolution of fine-tuning.
LARGER = {
    ("Ti/16", 384): 4.68,
    ("S/32", 384): 3.44,
    ("S/16", 384): 15.49,
    ("B/32", 384): 13.04,
    ("B/16", 384): 55.48,
    ("B/8", 384): 294.0,
    ("L/32", 384): 45.28,
    ("L/16", 384): 191.1,
    ("L/14", 336): 191.0,
    ("So400m/14", 336): 258.3,
    ("H/14", 336): 390.7,
    ("g/14", 336): 620.3,
    ("G/14", 336): 1115.6,
}

# timm's result tables for models with convolutions: GMACs by fvcore's rules, which also count norms (name, px): value.
WITH_NORMS = {
    ("R50+B/16", 224): 21.7,
    ("R26+B/32", 224): 6.8,
    ("R26+S/32", 224): 3.56,
    ("R50+L/32", 224): 19.6,
    ("R+Ti/16", 224): 0.44,
    ("R50x1", 224): 4.23,
    ("R50x1", 448): 16.62,
    ("R50x3", 224): 37.06,
    ("R50x3", 448): 145.7,
    ("R101x1", 224): 8.04,
    ("R101x1", 448): 31.65,
    ("R101x3", 224): 71.23,
    ("R101x3", 448): 280.3,
    ("R152x2", 224): 46.95,
    ("R152x2", 448): 185.0,
    ("R152x4", 224): 186.9,
    ("R152x4", 480): 844.8,
}


@pytest.mark.parametrize("name", VARIANTS)
def test_parameter_counts_equal_the_published_ones(name):
    config = variant(name)
    assert count_parameters(build_model(config, 1000, device="meta")) == COUNTS[name][0]
    assert count_parameters(build_model(config, 0, device="meta")) == COUNTS[name][0] - 1000 * (config.width + 1)


@pytest.mark.parametrize("name", [name for name, (_, macs) in COUNTS.items() if macs])
def test_macs_equal_the_published_ones(name):
    assert forward_macs(variant(name)) / 1e9 == pytest.approx(COUNTS[name][1], rel=0.005)


@pytest.mark.parametrize(("name", "resolution"), LARGER)
def test_macs_at_another_resolution_equal_the_published_ones(name, resolution):
    assert forward_macs(variant(name), resolution=resolution) / 1e9 == pytest.approx(
        LARGER[name, resolution], rel=0.005
    )


@pytest.mark.parametrize(("name", "resolution"), WITH_NORMS)
def test_macs_of_convolutions_equal_the_published_ones_once_norms_are_counted_as_there(name, resolution):
    config = variant(name, resolution=resolution)
    counted = forward_macs(config) + norm_operations(config)
    # The published values have three digits, so small ones are only that exact.
    assert counted / 1e9 == pytest.approx(WITH_NORMS[name, resolution], rel=0.005, abs=0.006)


def norm_operations(config) -> int:
    """fvcore counts 4 or 5 operations per element of a norm, and timm standardises weights through a batch norm."""
    import torch
    from torch import nn

    from vit_model.std_conv import StdConv2d

    total = 0

    def count(module, inputs, output):
        nonlocal total
        if isinstance(module, StdConv2d):
            total += 4 * module.weight.numel()
        elif isinstance(module, nn.GroupNorm | nn.LayerNorm):
            total += (4 if isinstance(module, nn.GroupNorm) else 5) * inputs[0].numel()

    model = build_model(config, 1000, device="meta")
    for module in model.modules():
        module.register_forward_hook(count)
    model(torch.empty(1, 3, *config.size, device="meta"))
    return total


@pytest.mark.parametrize(
    ("name", "changes", "head", "expected"),
    [
        ("B/16", {"resolution": 384}, "linear", 86_859_496),
        ("L/16", {"resolution": 384}, "linear", 304_715_752),
        ("Ti/16", {"resolution": 384}, "linear", 5_790_376),
        ("R50+B/16", {"resolution": 384}, "linear", 98_950_952),
        ("S/16", {"pool": "gap"}, "linear", 22_049_896),
        ("B/16", {"pool": "gap"}, "linear", 86_566_120),
        ("B/32", {"pool": "gap"}, "linear", 88_222_696),
        ("B/16", {}, "mlp", 86_567_656 + 590_592),
        ("H/14", {}, "mlp", 632_045_800 + 1_639_680),
    ],
)
def test_options_change_the_count_as_published(name, changes, head, expected):
    assert count_parameters(build_model(variant(name, **changes), 1000, head, device="meta")) == expected


@pytest.mark.parametrize(
    ("name", "pool", "expected"),
    [("B/16", "map", 92_884_224), ("So400m/14", "map", 427_680_704), ("So400m/14", "gap", 412_442_352)],
)
def test_models_without_a_class_token_and_head_have_the_published_counts(name, pool, expected):
    assert count_parameters(build_model(variant(name, pool=pool), 0, device="meta")) == expected


@pytest.mark.parametrize(
    ("name", "epochs", "exaflops"),
    [
        *(
            ("B/32", 7, 55),
            ("B/16", 7, 224),
            ("L/32", 7, 196),
            ("L/16", 7, 783),
            ("L/16", 14, 1567),
            ("H/14", 14, 4262),
        ),
        *(("R50+B/16", 7, 274), ("R50+L/32", 7, 246)),
    ],
)
def test_training_compute_equals_table_6_of_the_paper(name, epochs, exaflops):
    flops = training_flops(forward_macs(variant(name)), 303e6 * epochs)
    assert flops / 1e18 == pytest.approx(exaflops, rel=0.025)


@pytest.mark.parametrize("name", VARIANTS)
def test_a_config_survives_json(name):
    import json

    config = variant(name)
    assert config_from_dict(json.loads(json.dumps(config_to_dict(config)))) == config


def test_macs_agree_with_torchs_own_counter():
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    for name in ("Ti/16", "R26+S/32", "R50x1"):
        config = variant(name)
        model = build_model(config, 10, device="meta")
        with FlopCounterMode(display=False) as counter:
            model(torch.empty(1, 3, 224, 224, device="meta"))
        # The counter may miss the fused attention on the meta device; convolutions and linear layers it counts exactly.
        macs = forward_macs(config, num_classes=10)
        attention = 2 * config.num_tokens**2 * config.width * config.depth if isinstance(config, ViTConfig) else 0
        assert counter.get_total_flops() / 2 in (macs, macs - attention)


@pytest.mark.parametrize("name", ["B/17x", "X/16", "R50+B/14", "R49x1", "b16", ""])
def test_an_unknown_name_is_an_error_that_offers_near_ones(name):
    with pytest.raises(ValueError, match="nearest: "):
        variant(name)


def test_an_unknown_field_is_an_error_that_offers_the_near_one():
    with pytest.raises(ValueError, match="did you mean mlp_dim"):
        variant("B/16", mlp_dims=5)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"num_heads": 7}, "width=768 is not divisible by num_heads=7"),
        ({"resolution": 225}, "nearest: 224x224"),
        ({"resolution": (224, 30)}, "not divisible into patches of 16 px"),
        ({"dropout": 1.0}, r"dropout=1.0 is not in \[0, 1\)"),
        ({"class_token": False}, "reads a class token"),
        ({"pool_norm": "after"}, "has no effect with pool='token'"),
        ({"stem_numerics": "timm"}, "has no effect without a stem"),
        ({"pool": "gap", "position_prefix": False}, "has no effect without prefix tokens"),
        ({"kind": "resnet"}, "unknown fields"),
        ({"layer_norm_eps": float("nan")}, "layer_norm_eps=nan is not positive"),
        ({"stem": (3, 0)}, "at least one unit in every stage"),
        ({"stem": (1,), "stem_width": 40}, "32 groups do not divide"),
    ],
)
def test_a_config_that_makes_no_sense_is_refused(changes, words):
    with pytest.raises(ValueError, match=words):
        variant("B/16", **changes)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"group_norm_eps": 0.0}, "group_norm_eps=0.0 is not positive"),
        ({"units": ()}, "without stages"),
        ({"units": (3, 0)}, "at least one unit in every stage"),
        ({"resolution": 0}, "neither a positive whole number of px nor"),
    ],
)
def test_a_resnet_that_makes_no_sense_is_refused(changes, words):
    with pytest.raises(ValueError, match=words):
        variant("R50x1", **changes)


def test_unknown_fields_of_a_stored_config_are_an_error():
    with pytest.raises(ValueError, match="unknown fields"):
        config_from_dict({"kind": "resnet", "unit": (1,)})
    assert isinstance(config_from_dict({"kind": "resnet", "units": [1]}), ResNetConfig)
