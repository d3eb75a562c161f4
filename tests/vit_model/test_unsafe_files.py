"""Files that want to run code, are torn or describe nonsense: refused by every reader."""

from __future__ import annotations

import os
import pickle

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

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
