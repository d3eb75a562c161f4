"""Reading and writing weights: bit-exact round trips, errors that list every difference, and no code from any file."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.vit_model.reduced import assert_same, randomize, reduced, small
from vit_model import (
    VARIANTS,
    CheckpointError,
    InputSpec,
    OutputSpec,
    ViTConfig,
    build_model,
    load_model,
    load_weights,
    read_specs,
    save_weights,
)
from vit_model.position import resize_patch_kernel

SUFFIX = {
    "native": "weights.safetensors",
    "google": "weights.npz",
    "timm": "weights.safetensors",
    "huggingface": "folder",
}


def as_said_by(format, config):
    """The numerics that the format's readers assume."""
    if isinstance(config, ViTConfig):
        if format == "google":
            config = dataclasses.replace(config, gelu="tanh")
        if format == "timm" and config.stem is not None:
            config = dataclasses.replace(config, stem_numerics="timm")
    elif format == "timm":
        config = dataclasses.replace(config, standardize_eps=1e-8)
    return config


@pytest.mark.parametrize("format", ["native", "google", "timm"])
@pytest.mark.parametrize("name", VARIANTS)
def test_a_round_trip_of_every_variant_is_bit_exact(name, format, tmp_path):
    model = randomize(build_model(as_said_by(format, reduced(name)), 5))
    path = tmp_path / SUFFIX[format]
    save_weights(model, path, format)
    loaded = load_model(path).eval()
    assert_same(model, loaded)
    x = torch.randn(2, 3, *model.config.size)
    assert torch.equal(model(x).logits, loaded(x).logits)
    again = build_model(model.config, 5)
    load_weights(again, path)
    assert_same(model, again)


@pytest.mark.parametrize(
    ("format", "changes", "head"),
    [
        ("huggingface", {}, "linear"),
        ("huggingface", {"gelu": "tanh", "layer_norm_eps": 1e-12}, "linear"),
        ("huggingface", {"resolution": (32, 64), "channels": 1, "qkv_bias": False}, "linear"),
        ("google", {}, "mlp"),
        ("google", {"pool": "gap"}, "mlp"),
        ("google", {"pool": "map"}, "linear"),
        ("google", {"position_prefix": False}, "linear"),
        ("google", {"pool": "gap", "position": "sincos2d"}, "linear"),
        ("timm", {"pool": "gap"}, "linear"),
        ("timm", {"pool": "gap", "pool_norm": "after"}, "linear"),
        ("timm", {"pool": "map"}, "linear"),
        ("timm", {"num_registers": 4, "qk_norm": True, "layer_scale": 1e-5}, "linear"),
        ("timm", {"position_prefix": False, "num_registers": 1}, "linear"),
        ("native", {"num_registers": 4, "qk_norm": True, "layer_scale": 1e-4, "drop_path": 0.2}, "mlp"),
        ("native", {"resolution": (32, 16), "position": "none", "pool": "map", "channels": 1}, "mlp"),
    ],
)
def test_a_round_trip_of_options_is_bit_exact(format, changes, head, tmp_path):
    model = randomize(build_model(as_said_by(format, small(**changes)), 5, head))
    save_weights(model, tmp_path / SUFFIX[format], format)
    loaded = load_model(tmp_path / SUFFIX[format])
    assert_same(model, loaded)
    same = {"resolution": loaded.config.resolution} if model.config.position == "sincos2d" else {}
    expected = dataclasses.replace(model.config, **same)
    if format == "native":
        assert loaded.config == expected
    assert loaded.head.kind == head


@pytest.mark.parametrize(
    ("format", "changes", "head", "words"),
    [
        ("google", {"gelu": "exact"}, "linear", "gelu='exact' would be read as 'tanh'"),
        ("google", {"gelu": "tanh", "layer_norm_eps": 1e-5}, "linear", "layer_norm_eps=1e-05 would be read as 1e-06"),
        ("google", {"gelu": "tanh", "pool": "gap", "pool_norm": "after"}, "linear", "pool_norm='after'"),
        ("google", {"gelu": "tanh", "num_registers": 1}, "linear", "no place for registers"),
        (
            "google",
            {"gelu": "tanh", "resolution": (32, 16)},
            "linear",
            "would be read as",
        ),  # 8 + 1 rows look like 3 x 3
        ("timm", {"gelu": "tanh"}, "linear", "gelu='tanh' would be read as 'exact'"),
        ("timm", {}, "mlp", "timm has no MLP head"),
        ("timm", {"position": "sincos2d"}, "linear", "timm has no position='sincos2d'"),
        ("huggingface", {"pool": "gap"}, "linear", "plain ViT with pool='token'"),
        ("huggingface", {"num_registers": 1}, "linear", "no place for registers"),
        ("huggingface", {}, "mlp", "no hidden layer"),
    ],
)
def test_what_a_format_cannot_say_is_refused_and_leaves_no_file(format, changes, head, words, tmp_path):
    model = randomize(build_model(small(**changes), 5, head))
    with pytest.raises(CheckpointError, match=words):
        save_weights(model, tmp_path / SUFFIX[format], format)
    assert not list(tmp_path.iterdir())


def test_an_accepted_loss_is_written(tmp_path):
    model = randomize(build_model(small(layer_norm_eps=1e-5), 5))
    save_weights(model, tmp_path / "w.npz", "google", accept=("gelu", "layer_norm_eps"))
    assert_same(model, load_model(tmp_path / "w.npz", gelu="exact", layer_norm_eps=1e-5))
    with pytest.raises(ValueError, match="one word"):
        load_weights(model, tmp_path / "w.npz", accept="gelu")
    with pytest.raises(ValueError, match=r"unknown words \['gellu'\]"):
        load_weights(model, tmp_path / "w.npz", accept=("gellu",))


def test_a_file_of_another_model_is_refused_with_every_difference_at_once(tmp_path):
    path = tmp_path / "weights.safetensors"
    save_weights(randomize(build_model(small(gelu="tanh", resolution=48), 7, "mlp")), path)
    model = randomize(build_model(small(layer_norm_eps=1e-5), 5))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(CheckpointError) as caught:
        load_weights(model, path)
    text = str(caught.value)
    for words in (
        "gelu is 'tanh' in the file and 'exact' in the model (accept='gelu')",
        "layer_norm_eps is 1e-06 in the file and 1e-05 in the model (accept='layer_norm_eps')",
        "head is mlp with 7 classes in the file and linear with 5 in the model (accept='head'",
        "grid is (6, 6) in the file and (4, 4) in the model (accept='grid' interpolates)",
    ):
        assert words in text
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    load_weights(model, path, accept=("gelu", "layer_norm_eps", "head", "grid"))
    assert torch.equal(model.head.out.weight, before["head.out.weight"])
    assert not torch.equal(model.blocks[0].norm1.weight, before["blocks.0.norm1.weight"])


def test_missing_and_unused_arrays_are_listed_by_name(tmp_path):
    path = tmp_path / "weights.safetensors"
    save_weights(randomize(build_model(small(), 5)), path, "timm")
    arrays = load_file(path)
    arrays["extra.weight"] = arrays.pop("norm.bias")
    arrays["mask_token"] = torch.zeros(1, 32)
    save_file(arrays, path)
    with pytest.raises(
        CheckpointError, match=r"missing in the file: norm\.bias .*\n.*mask_token.*accept='unused'|extra"
    ):
        load_model(path, num_heads=2)
    loaded = load_model(path, num_heads=2, accept=("missing", "unused"))
    assert not loaded.norm.bias.any()


def test_a_shape_that_differs_is_named(tmp_path):
    path = tmp_path / "weights.safetensors"
    save_weights(build_model(small(), 5), path)
    with pytest.raises(CheckpointError, match=r"patch_embedding.weight has shape \(32, 3, 8, 8\); the model's is"):
        load_weights(build_model(small(width=64), 5), path, accept=("width",))


def test_fine_tuning_replaces_the_head_even_for_equally_many_classes_and_resizes_positions(tmp_path):
    path = tmp_path / "weights.safetensors"
    model = randomize(build_model(small(), 5, "mlp"))
    save_weights(model, path)
    loaded = load_model(path, num_classes=5, resolution=(48, 32), dropout=0.1)
    assert loaded.config == small(resolution=(48, 32), dropout=0.1)
    assert loaded.head.kind == "linear"
    assert not loaded.head.out.weight.any()
    assert loaded.position_embedding.shape == (1, 1 + 24, 32)
    assert torch.equal(loaded.position_embedding[:, :1], model.position_embedding[:, :1])
    assert load_model(path, num_classes=3, head="mlp").head.kind == "mlp"
    with pytest.raises(ValueError, match="has no effect without num_classes"):
        load_model(path, head="linear")


def test_specs_live_in_the_file_and_are_read_without_its_tensors(tmp_path):
    path = tmp_path / "weights.safetensors"
    given = InputSpec(height=32, width=32, resize="shorter_side", resize_to=36), OutputSpec(class_names=("a", "b"))
    save_weights(build_model(small(), 2), path, input_spec=given[0], output_spec=given[1])
    assert read_specs(path) == (small(), *given)
    with pytest.raises(ValueError, match="names 2 classes; the model has 3"):
        save_weights(build_model(small(), 3), path, output_spec=given[1])
    with pytest.raises(ValueError, match="no place for specs"):
        save_weights(build_model(small(), 2), path, "timm", input_spec=given[0])


def test_deits_distillation_token_and_second_head_are_read_and_written(tmp_path):
    path = tmp_path / "deit.safetensors"
    model = randomize(build_model(small(num_registers=1), 5, "distilled"))
    save_weights(model, path, "timm")
    names = load_file(path).keys()
    assert {"dist_token", "head_dist.weight", "head_dist.bias"} <= names and "reg_token" not in names
    loaded = load_model(path)
    assert_same(model, loaded)
    assert loaded.head.kind == "distilled"
    x = torch.randn(2, 3, 32, 32)
    features = loaded.eval()(x)
    heads = [layer(features.tokens[:, i]) for i, layer in enumerate((model.head.out, model.head.distilled))]
    torch.testing.assert_close(features.logits, (heads[0] + heads[1]) / 2)
    torch.testing.assert_close(loaded(x, tokens=False).logits, features.logits)
    fine_tuned = load_model(path, num_classes=3)  # the token stays as a register, both heads go
    assert (fine_tuned.head.kind, fine_tuned.head.distilled) == ("linear", None)
    assert torch.equal(fine_tuned.registers, model.registers)
    save_weights(model, tmp_path / "native.safetensors")
    assert_same(model, load_model(tmp_path / "native.safetensors"))
    for config in (small(), small(num_registers=1, pool="gap"), reduced("R50x1")):
        with pytest.raises(ValueError, match="reads the class token and the first register"):
            build_model(config, 5, "distilled")
    with pytest.raises(ValueError, match="num_classes=0"):
        build_model(small(num_registers=1), 0, "distilled")


def test_another_patch_size_resizes_the_kernel_as_flexivit_does(tmp_path):
    path = tmp_path / "weights.safetensors"
    model = randomize(build_model(small(), 5))
    save_weights(model, path)
    flexible = load_model(path, patch_size=16, resolution=64)  # the same grid of patches twice as large
    expected = resize_patch_kernel(model.patch_embedding.weight.detach(), (16, 16))
    assert torch.equal(flexible.patch_embedding.weight, expected)
    assert torch.equal(flexible.position_embedding, model.position_embedding)
    with pytest.raises(
        CheckpointError, match=r"patch_size is 8 in the file and 16 in the model \(accept='patch_size'\)"
    ):
        load_weights(flexible, path)
    load_weights(flexible, path, accept=("patch_size",))


def test_fused_weights_of_an_unknown_size_need_their_heads_told(tmp_path):
    path = tmp_path / "weights.safetensors"
    save_weights(randomize(build_model(small(), 5)), path, "timm")
    save_file(load_file(path), path)
    with pytest.raises(CheckpointError, match="give num_heads="):
        load_model(path)
    assert load_model(path, num_heads=2).config.num_heads == 2


def test_half_precision_arrays_of_numpy_are_read(tmp_path):
    model = randomize(build_model(small(gelu="tanh"), 5))
    save_weights(model, tmp_path / "a.npz", "google")
    halves = {}
    with np.load(tmp_path / "a.npz") as file:
        for name in file.files:
            half = torch.from_numpy(file[name]).bfloat16()
            halves[name] = half.contiguous().view(torch.int16).numpy().view("V2")  # as numpy stores bfloat16
    np.savez(tmp_path / "b.npz", **halves)
    loaded = load_model(tmp_path / "b.npz")
    assert torch.equal(loaded.norm.weight, model.norm.weight.bfloat16().float())


def test_numbers_that_are_not_finite_are_not_written(tmp_path):
    model = build_model(small(), 5)
    with torch.no_grad():
        model.norm.bias[0] = torch.nan
    with pytest.raises(CheckpointError, match="not finite"):
        save_weights(model, tmp_path / "w.safetensors")


def test_the_file_name_must_say_the_format(tmp_path):
    with pytest.raises(ValueError, match=r"does not end in \.safetensors"):
        save_weights(build_model(small(), 5), tmp_path / "weights.bin")


def test_equal_weights_are_equal_files(tmp_path: Path) -> None:
    model = build_model(reduced("Ti/16"), num_classes=3)
    for number in range(6):
        save_weights(model, tmp_path / f"{number}.safetensors", output_spec=OutputSpec(class_names=("ä", "b", "c")))
    assert len({path.read_bytes() for path in tmp_path.iterdir()}) == 1
