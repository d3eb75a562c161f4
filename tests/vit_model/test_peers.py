"""What we write, read by timm and transformers themselves; runs where the `bench` extra is installed."""

from __future__ import annotations

import importlib
import sys
import types

import pytest
import torch

from tests.vit_model.reduced import randomize
from vit_model import build_model, load_model, save_weights, variant

pytestmark = pytest.mark.peers


def peer(name):
    """The second attempt is for the CUDA wheel of torchvision on a CPU torch, which both import."""
    try:
        importlib.import_module("torchvision")
    except ImportError:
        pass
    except RuntimeError as error:
        if "torchvision::nms" not in str(error):
            raise
        sys.modules["torchvision._meta_registrations"] = types.ModuleType("torchvision._meta_registrations")
        importlib.import_module("torchvision")
    return pytest.importorskip(name)


def assert_near(ours, theirs, tolerance):
    assert (ours - theirs).abs().max() / theirs.abs().max() <= tolerance


@torch.no_grad()
@pytest.mark.parametrize(
    ("name", "changes"),
    [("Ti/16", {}), ("S/16", {}), ("B/16", {}), ("L/16", {}), ("H/14", {"depth": 4})],
)
def test_transformers_reads_our_folder_with_our_logits_and_we_read_theirs(name, changes, tmp_path):
    transformers = peer("transformers")
    model = randomize(build_model(variant(name, layer_norm_eps=1e-12, **changes), 10))
    save_weights(model, tmp_path / "ours", "huggingface")
    theirs, report = transformers.ViTForImageClassification.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    x = torch.randn(1, 3, 224, 224)
    logits = theirs.eval()(x).logits
    assert_near(model(x).logits, logits, 1e-5)
    assert_near(model(x, tokens=False).logits, logits, 1e-5)
    if name == "L/16":
        return  # another 2.4 GB on the disk would show nothing new
    theirs.save_pretrained(tmp_path / "theirs")
    back = load_model(tmp_path / "theirs").eval()
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), back.parameters(), strict=True))


@torch.no_grad()
@pytest.mark.parametrize(
    ("name", "theirs", "changes"),
    [
        ("S/16", "vit_small_patch16_224", {}),
        ("S/16", "deit_small_distilled_patch16_224", {"num_registers": 1, "depth": 2}),
        ("R50+B/16", "vit_base_r50_s16_224", {"stem_numerics": "timm", "depth": 2}),
        ("R26+S/32", "vit_small_r26_s32_224", {"stem_numerics": "timm", "depth": 2}),
        ("R+Ti/16", "vit_tiny_r_s16_p8_224", {"stem_numerics": "timm", "depth": 2}),
        ("R50x1", "resnetv2_50x1_bit", {"standardize_eps": 1e-8}),
    ],
)
def test_timm_reads_our_file_with_our_logits(name, theirs, changes, tmp_path):
    timm = peer("timm")
    model = randomize(build_model(variant(name, **changes), 10, "distilled" if "distilled" in theirs else "linear"))
    save_weights(model, tmp_path / "w.safetensors", "timm")
    other = timm.create_model(theirs, num_classes=10, **depth_of(changes))
    from safetensors.torch import load_file

    other.load_state_dict(load_file(tmp_path / "w.safetensors"))
    x = torch.randn(2, 3, 224, 224)
    assert_near(model(x).logits, other.eval()(x), 1e-4)


def depth_of(changes):
    return {"depth": changes["depth"]} if "depth" in changes else {}


@torch.no_grad()
@pytest.mark.parametrize(
    ("name", "theirs", "changes"),
    [("S/16", "vit_small_patch16_224", {}), ("R50+B/16", "vit_base_r50_s16_224", {"depth": 2})],
)
def test_timm_reads_our_google_file(name, theirs, changes, tmp_path):
    """The .npz that we write, through timm's own reader of Google's files."""
    timm = peer("timm")
    model = randomize(build_model(variant(name, gelu="tanh", **changes), 10))
    save_weights(model, tmp_path / "w.npz", "google")
    other = timm.create_model(theirs, num_classes=10, act_layer="gelu_tanh", **depth_of(changes))
    other.load_pretrained(str(tmp_path / "w.npz"))
    x = torch.randn(2, 3, 224, 224)
    # timm's hybrids keep other epsilons than Google's.
    assert_near(model(x).logits, other.eval()(x), 1e-5 if name == "S/16" else 2e-3)
