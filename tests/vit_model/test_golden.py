"""Outputs of Google's JAX code, timm and transformers, made by the scripts in golden/ with the versions in each file.

The weights are computed from their names, so each case also checks that their files are read name by name.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from tests.vit_model.golden.values import images, uniform, weight
from vit_model import load_model
from vit_model.position import resize_patch_kernel, resize_position

GOLDEN = Path(__file__).parent / "golden"
GOOGLE, TIMM, HUGGINGFACE = (
    json.loads((GOLDEN / f"{name}.json").read_text()) for name in ("google", "timm", "huggingface")
)


def arrays_of(name, case):
    return {key: weight(f"{name}:{key}", tuple(shape)) for key, shape in case["shapes"].items()}


def assert_equals(model, name, case, size, tolerance):
    expected = torch.tensor(case["logits"])
    with torch.no_grad():
        logits = model.eval()(torch.from_numpy(images(name, len(expected), tuple(size)))).logits
    difference = (logits - expected).abs().max() / expected.abs().max()
    assert difference <= tolerance
    for field, value in case.get("config", {}).items():
        found = getattr(model.config, field)
        assert (list(found) if isinstance(found, tuple) else found) == value


@pytest.mark.parametrize(
    ("name", "prefix"),
    [
        *((name, "") for name in GOOGLE["cases"]),
        *(("big_vision map", p) for p in ("params/", "params/img/", "opt/target/")),
    ],
)
def test_google_weights_give_the_logits_of_googles_code(name, prefix, tmp_path):
    case = GOOGLE["cases"][name]
    np.savez(tmp_path / "weights.npz", **{prefix + key: array for key, array in arrays_of(name, case).items()})
    size = tuple(case["size"])
    told = {} if size[0] == size[1] or case["config"].get("root_pool") else {"resolution": size}
    assert_equals(load_model(tmp_path / "weights.npz", **told), name, case, size, 1e-5)


@pytest.mark.parametrize("name", TIMM["cases"])
def test_timm_weights_give_the_logits_of_timm(name, tmp_path):
    case = TIMM["cases"][name]
    save_file(
        {key: torch.from_numpy(array) for key, array in arrays_of(name, case).items()}, tmp_path / "model.safetensors"
    )
    hints = {key: tuple(value) if isinstance(value, list) else value for key, value in case["hints"].items()}
    assert_equals(load_model(tmp_path / "model.safetensors", **hints), name, case, case["size"], 1e-4)


@pytest.mark.parametrize("name", HUGGINGFACE["cases"])
def test_hugging_face_weights_give_the_logits_of_transformers(name, tmp_path):
    case = HUGGINGFACE["cases"][name]
    save_file(
        {key: torch.from_numpy(array) for key, array in arrays_of(name, case).items()}, tmp_path / "model.safetensors"
    )
    (tmp_path / "config.json").write_text(json.dumps(case["config.json"]))
    assert_equals(load_model(tmp_path), name, case, (224, 224), 1e-5)


@pytest.mark.parametrize("name", [name for name in TIMM["resized"] if name.startswith("position")])
def test_positions_resize_as_in_timm(name):
    expected = torch.tensor(TIMM["resized"][name])
    table = torch.from_numpy(uniform("table", (1, 17, 4)))
    grid = (6, 5) if "6x5" in name else (3, 2)
    resized = resize_position(table, (4, 4), grid, 1, "timm")[0]
    torch.testing.assert_close(resized, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", [name for name in TIMM["resized"] if name.startswith("kernel")])
def test_patch_kernels_resize_as_in_timm(name):
    expected = torch.tensor(TIMM["resized"][name])
    kernel = torch.from_numpy(uniform("kernel", (3, 2, 8, 8)))
    resized = resize_patch_kernel(kernel, (12, 12) if "12x12" in name else (5, 6)).flatten(1)
    torch.testing.assert_close(resized, expected, rtol=1e-4, atol=1e-4)


def test_golden_files_are_small_and_say_what_made_them():
    files = list(GOLDEN.glob("*.json"))
    assert len(files) == 3
    assert sum(file.stat().st_size for file in files) < 300_000
    for content in (GOOGLE, TIMM, HUGGINGFACE):
        assert content["made_with"]
        assert "Philox" in content["seed"]
        assert (GOLDEN / content["script"]).exists()
