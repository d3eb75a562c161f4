"""Files that want to run code, are torn or describe nonsense: refused by every reader."""

from __future__ import annotations

import dataclasses
import json
import os
import pickle
import shutil
import struct
import zipfile

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from vit_model import CheckpointError, ViTConfig, build_model, load_model, load_weights, save_weights

SMALL = ViTConfig(resolution=32, patch_size=8, width=32, depth=2, mlp_dim=48, num_heads=2)


class Payload:
    """A pickle with a visible side effect."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.mark.parametrize(
    "name",
    [
        "w.pth",
        "w.pt",
        "w.bin",
        "w.ckpt",
        "w.npz",
        "w.safetensors",
        "w",
        "folder/pytorch_model.bin",
        "folder/model.safetensors",
    ],
)
@pytest.mark.parametrize("kind", ["pickle", "torch", "object array"])
def test_a_pickle_is_refused_by_every_reader_and_never_run(name, kind, tmp_path):
    mark = tmp_path / "the-payload-ran"
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    if path.parent != tmp_path:
        (path.parent / "config.json").write_text('{"model_type": "vit"}')
    with path.open("wb") as file:
        if kind == "pickle":
            pickle.dump({"cls_token": Payload(mark)}, file)
        elif kind == "torch":
            torch.save({"cls_token": Payload(mark)}, file)
        else:
            np.savez(file, cls=np.array([Payload(mark)], dtype=object))
    target = path.parent if path.parent != tmp_path else path
    for read in (load_model, lambda p: load_weights(build_model(SMALL, 5), p)):
        with pytest.raises(CheckpointError):
            read(target)
    assert not mark.exists()


@pytest.mark.parametrize("keep", [0, 7, 100, -1])
def test_a_torn_file_is_an_error_that_names_it(keep, tmp_path):
    path = tmp_path / "weights.safetensors"
    save_weights(build_model(SMALL, 5), path)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(CheckpointError, match="not a whole safetensors file"):
        load_model(path)


def test_metadata_of_a_newer_version_or_of_nonsense_is_an_error(tmp_path):
    path = tmp_path / "weights.safetensors"
    save_file({"x": torch.zeros(1)}, path, {"format": "vit_model/2", "config": "{}"})
    with pytest.raises(CheckpointError, match="newer version"):
        load_model(path)
    save_file({"x": torch.zeros(1)}, path, {"format": "vit_model/1", "config": '{"kind": "vit", "depth": "x"}'})
    with pytest.raises(CheckpointError, match="does not describe a model"):
        load_model(path)
    with pytest.raises(FileNotFoundError, match="no weights at"):
        load_model(tmp_path / "absent.safetensors")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"width": 10**7}, "has shape"),
        ({"depth": 10**7}, "tells of 10000000 blocks and has"),
    ],
)
def test_a_file_cannot_make_us_build_what_it_does_not_hold(changes, words, tmp_path):
    path = native_with(tmp_path, "config", lambda config: {**config, **changes})
    with pytest.raises(CheckpointError, match=words):
        load_model(path)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("config", [1]),
        ("head", []),
        ("head", {"kind": "linear", "num_classes": "5"}),
        ("head", {"kind": ["linear"], "num_classes": 5}),
        ("head", {"kind": "linear", "num_classes": 10**12}),
        ("input_spec", {"version": 2}),
        ("input_spec", []),
        ("output_spec", {"class_names": ["a"]}),
        ("output_spec", {"class_names": 5}),
    ],
)
def test_metadata_of_any_shape_is_refused(key, value, tmp_path):
    with pytest.raises(CheckpointError):
        load_model(native_with(tmp_path, key, lambda _: value))


def test_a_grid_that_no_memory_holds_is_refused(tmp_path):
    config = dataclasses.replace(SMALL, position="sincos2d")  # no array of the file tells its size
    path = native_with(tmp_path, "config", lambda config: {**config, "resolution": 8 * 10**7}, config)
    with pytest.raises(CheckpointError, match="cannot be built"):
        load_model(path)


def native_with(folder, key, change, config=SMALL):
    path = folder / "weights.safetensors"
    save_weights(build_model(config, 5), path)
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    save_file(load_file(path), path, {**metadata, key: json.dumps(change(json.loads(metadata.get(key, "null"))))})
    return path


@pytest.mark.parametrize(
    "header",
    [
        struct.pack("<Q", 2**60) + b"{}",
        struct.pack("<Q", 71) + b'{"a":{"dtype":"F32","shape":[1099511627776],"data_offsets":[0,4398046]}}',
    ],
)
def test_a_header_that_promises_too_much_is_refused(header, tmp_path):
    path = tmp_path / "weights.safetensors"
    path.write_bytes(header)
    with pytest.raises(CheckpointError):
        load_model(path)


def npy(shape, tail=b""):
    text = f"{{'descr': '<f4', 'fortran_order': False, 'shape': {shape}, }}".ljust(117) + "\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text.encode() + tail


@pytest.mark.parametrize(
    "member",
    [
        npy("(1125899906842624,)"),
        npy("(-1,)"),
        npy("(2,)"),
        b"\x93NUMPY\x01\x00" + struct.pack("<H", 24) + b"__import__('os').getpid(",
        b"no array",
    ],
)
def test_an_npz_of_nonsense_is_refused(member, tmp_path):
    path = tmp_path / "w.npz"
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("cls.npy", member)
    with pytest.raises(CheckpointError):
        load_model(path)


@pytest.mark.parametrize(
    "odd",
    [
        {"norm.weight": torch.ones(32, dtype=torch.int64)},
        {"norm.weight": torch.ones(32, dtype=torch.complex64)},
        {"norm.weight": torch.ones(32).to_sparse()},
        {"norm.weight": torch.ones(32, device="meta")},
        {"patch_embed.proj.weight": torch.ones(32, 192)},
        {"blocks.0.mlp.fc1.weight": torch.ones(32)},
        {"blocks.1000000.mlp.fc1.weight": torch.ones(48, 32)},
        {f"blocks.{'9' * 5000}.norm1.weight": torch.ones(32)},
    ],
    ids=["int", "complex", "sparse", "meta", "flat kernel", "flat layer", "far block", "long number"],
)
def test_tensors_of_another_kind_are_refused_before_the_model_changes(odd, tmp_path):
    path = tmp_path / "w.safetensors"
    model = build_model(SMALL, 5)
    save_weights(model, path, "timm")
    torch.save({**load_file(path), **odd}, tmp_path / "w.pth")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for read in (lambda p: load_model(p, num_heads=2), lambda p: load_weights(model, p, num_heads=2)):
        with pytest.raises(CheckpointError):
            read(tmp_path / "w.pth")
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("text", ["[]", "null", '"vit"', "{", "[" * 100_000])
@pytest.mark.parametrize("name", ["config.json", "preprocessor_config.json", "model.safetensors.index.json"])
def test_json_of_another_shape_in_a_folder_is_refused(name, text, tmp_path):
    save_weights(build_model(SMALL, 5), tmp_path / "hf", "huggingface")
    (tmp_path / "hf" / name).write_text(text)
    with pytest.raises(CheckpointError):
        load_model(tmp_path / "hf")


@pytest.mark.parametrize(
    "changes",
    [
        {"hidden_act": ["gelu"]},
        {"num_attention_heads": None},
        {"num_attention_heads": 7},
        {"layer_norm_eps": "1e-12"},
        {"image_size": {"height": 32}},
        {"id2label": []},
        {"architecture": "vit", "model_args": 5},
    ],
)
def test_values_of_another_type_in_a_config_are_refused(changes, tmp_path):
    save_weights(build_model(SMALL, 5), tmp_path / "hf", "huggingface")
    path = tmp_path / "hf" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    with pytest.raises(CheckpointError):
        load_model(tmp_path / "hf")


@pytest.mark.parametrize(
    "name", ["../outside.safetensors", "/outside.safetensors", "..", ".", "", "absent.safetensors"]
)
def test_an_index_leads_to_no_file_outside_its_folder(name, tmp_path):
    folder = tmp_path / "hf"
    save_weights(build_model(SMALL, 5), folder, "huggingface")
    shutil.move(folder / "model.safetensors", tmp_path / "outside.safetensors")
    name = name.replace("/outside", f"{tmp_path}/outside", 1) if name.startswith("/") else name
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"norm": name}}))
    with pytest.raises(CheckpointError, match=r"file names with a path|files that are not there"):
        load_model(folder)


def test_an_override_that_no_config_has_is_an_error(tmp_path):
    path = tmp_path / "weights.safetensors"
    save_weights(build_model(SMALL, 5), path)
    for read in (load_model, lambda p, **given: load_weights(build_model(SMALL, 5), p, **given)):
        with pytest.raises(ValueError, match=r"unknown config fields \['num_head'\]"):
            read(path, num_head=2)


def test_a_model_without_numbers_is_not_written(tmp_path):
    with pytest.raises(CheckpointError, match="meta device"):
        save_weights(build_model(SMALL, 5, device="meta"), tmp_path / "weights.safetensors")
