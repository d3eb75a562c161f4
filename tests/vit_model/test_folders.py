"""Folders in the way of Hugging Face and timm, and the relatives of their files: what they tell beside the arrays."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.vit_model.reduced import assert_same, randomize, small
from vit_model import (
    CheckpointError,
    InputSpec,
    OutputSpec,
    build_model,
    load_model,
    save_weights,
)
from vit_model.checkpoints.read import read_weights


def test_a_hugging_face_folder_carries_classes_and_preprocessing(tmp_path):
    spec, output = InputSpec(height=32, width=32, interpolation="bicubic"), OutputSpec(class_names=("cat", "dog"))
    save_weights(build_model(small(), 2), tmp_path / "folder", "huggingface", input_spec=spec, output_spec=output)
    loaded = read_weights(tmp_path / "folder", {})
    assert (loaded.input_spec, loaded.output_spec) == (spec, output)
    assert json.loads((tmp_path / "folder" / "config.json").read_text())["label2id"] == {"cat": 0, "dog": 1}


@pytest.mark.parametrize(
    "changes",
    [
        {"do_normalize": False},
        {"do_rescale": False},
        {"rescale_factor": 1 / 127.5},
        {"do_center_crop": True, "crop_size": 20},
        {"size": {"shortest_edge": 40}},
    ],
)
def test_a_processor_that_a_spec_cannot_say_is_no_spec(changes, tmp_path):
    model = build_model(small(), 5)
    save_weights(model, tmp_path / "hf", "huggingface", input_spec=InputSpec(height=32, width=32))
    assert read_weights(tmp_path / "hf", {}).input_spec == InputSpec(height=32, width=32)
    path = tmp_path / "hf" / "preprocessor_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    assert read_weights(tmp_path / "hf", {}).input_spec is None


@pytest.mark.parametrize("told", ["token", "avg", "", None])
def test_a_timm_folder_tells_the_pool_that_its_arrays_do_not(told, tmp_path):
    pool = "gap" if told == "avg" else "token"
    model = randomize(build_model(small(pool=pool, class_token=True), 5))
    save_weights(model, tmp_path / "model.safetensors", "timm", accept=("pool",))
    config = {"architecture": "vit_base_patch16_224", "model_args": {"num_heads": 2}, "global_pool": told}
    (tmp_path / "config.json").write_text(json.dumps(config))
    x = torch.randn(2, 3, 32, 32)
    assert torch.equal(load_model(tmp_path).eval()(x).logits, model(x).logits)
    (tmp_path / "config.json").write_text(json.dumps({**config, "global_pool": "avgmax"}))
    with pytest.raises(CheckpointError, match="global_pool 'avgmax' is not one of"):
        load_model(tmp_path)


def test_another_pooler_of_hugging_face_is_refused(tmp_path):
    save_weights(build_model(small(), 0, "mlp"), tmp_path / "hf", "huggingface")
    assert load_model(tmp_path / "hf").head.kind == "mlp"
    path = tmp_path / "hf" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "pooler_act": "relu"}))
    with pytest.raises(CheckpointError, match="pooler_act 'relu' is not 'tanh'"):
        load_model(tmp_path / "hf")


def test_names_of_transformers_5_are_read_as_those_of_4(tmp_path):
    model = randomize(build_model(small(), 5))
    save_weights(model, tmp_path, "huggingface")
    renames = (
        ("encoder.layer.", "layers."),
        ("attention.attention.query", "attention.q_proj"),
        ("attention.attention.key", "attention.k_proj"),
        ("attention.attention.value", "attention.v_proj"),
        ("attention.output.dense", "attention.o_proj"),
        ("intermediate.dense", "mlp.fc1"),
        ("output.dense", "mlp.fc2"),
    )
    arrays = {}
    for name, tensor in load_file(tmp_path / "model.safetensors").items():
        for old, new in renames:
            name = name.replace(old, new)
        arrays[name] = tensor
    save_file(arrays, tmp_path / "model.safetensors")
    assert_same(model, load_model(tmp_path))


def test_a_sharded_folder_and_a_torch_file_are_read_too(tmp_path):
    model = randomize(build_model(small(), 5))
    save_weights(model, tmp_path, "huggingface")
    arrays = load_file(tmp_path / "model.safetensors")
    names = sorted(arrays)
    (tmp_path / "model.safetensors").unlink()
    torch.save(arrays, tmp_path / "pytorch_model.bin")
    assert_same(model, load_model(tmp_path))
    (tmp_path / "pytorch_model.bin").unlink()
    parts = {"model-1.safetensors": names[:9], "model-2.safetensors": names[9:]}
    for file, part in parts.items():
        save_file({name: arrays[name] for name in part}, tmp_path / file)
    weight_map = {name: file for file, part in parts.items() for name in part}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert_same(model, load_model(tmp_path))
    weight_map[names[0]] = "../outside.safetensors"
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(CheckpointError, match="file names with a path"):
        load_model(tmp_path)


def test_relatives_of_timm_are_understood(tmp_path):
    """DeiT III's gamma_1; DINOv2's register_tokens, of which only the class token has a position row."""
    model = randomize(build_model(small(layer_scale=1e-5, num_registers=2, position_prefix=False), 5))
    path = tmp_path / "weights.safetensors"
    save_weights(model, path, "timm")
    arrays = {}
    for name, tensor in load_file(path).items():
        name = name.replace("ls1.gamma", "gamma_1").replace("ls2.gamma", "gamma_2")
        arrays["register_tokens" if name == "reg_token" else name] = tensor
    row = torch.randn(1, 1, 32)
    arrays["cls_token"] = arrays["cls_token"] - row
    arrays["pos_embed"] = torch.cat([row, arrays["pos_embed"]], dim=1)
    torch.save({"model": arrays}, tmp_path / "deit.pth")
    loaded = load_model(tmp_path / "deit.pth", num_heads=2).eval()
    x = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(loaded(x).logits, model(x).logits, rtol=1e-5, atol=1e-5)
