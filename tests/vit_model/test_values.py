"""Values of the wrong kind or word are refused by the configs and specs themselves, with nobody checking types."""

from __future__ import annotations

import json
import subprocess
import sys

CASES = [
    ("ViTConfig", {"gelu": "thanh"}, "gelu='thanh' is not one of 'exact', 'tanh'"),
    ("ViTConfig", {"pool": "cls"}, "pool='cls' is not one of 'token', 'gap', 'map'"),
    ("ViTConfig", {"position": "rope"}, "position='rope' is not one of 'learned', 'sincos2d', 'none'"),
    ("ViTConfig", {"drop_path_schedule": "cosine"}, "is not one of 'linear', 'constant'"),
    ("ViTConfig", {"kind": "resnet"}, "kind='resnet' is not one of 'vit'"),
    ("ViTConfig", {"qkv_bias": "false"}, "qkv_bias='false' is not one of True, False"),
    ("ViTConfig", {"class_token": "no"}, "class_token='no' is not one of True, False, None"),
    ("ViTConfig", {"depth": 2.0}, "depth=2.0 is not a positive whole number"),
    ("ViTConfig", {"resolution": [224, 224]}, "neither a positive whole number of px nor (height, width)"),
    ("ViTConfig", {"resolution": 224.0}, "neither a positive whole number of px nor (height, width)"),
    ("ViTConfig", {"stem": [3, 4, 9]}, "is not a tuple of whole numbers"),
    ("ResNetConfig", {"root_pool": "zeros"}, "root_pool='zeros' is not one of 'zero', 'infinity'"),
    ("ResNetConfig", {"units": [3, 4, 6, 3]}, "is not a tuple of whole numbers"),
    ("InputSpec", {"resize": "centre"}, "resize='centre' is not one of 'square', 'shorter_side'"),
    ("InputSpec", {"interpolation": "nearest"}, "interpolation='nearest' is not one of 'bilinear', 'bicubic'"),
    ("InputSpec", {"antialias": "no"}, "antialias='no' is not one of True, False"),
    ("InputSpec", {"version": 2}, "version=2 is not one of 1"),
    ("InputSpec", {"height": 22.4}, "not positive whole numbers of px"),
    ("OutputSpec", {"class_names": "cat"}, "class_names is not a tuple of strings"),
    ("OutputSpec", {"class_names": [1, 2]}, "class_names is not a tuple of strings"),
    ("run_resnet", {}, "images are a list; this model takes one tensor"),
]
TRY = """
import json, sys
import torch, vit_model
def run_resnet():
    return vit_model.build_model(vit_model.ResNetConfig(units=(1,)), 1)([torch.zeros(3, 32, 32)])
kinds = {**vars(vit_model), "run_resnet": run_resnet}
texts = []
for kind, values in json.load(sys.stdin):
    try:
        texts.append(repr(kinds[kind](**values)))
    except ValueError as error:
        texts.append(str(error))
print(json.dumps(texts))
"""


def test_a_misspelt_word_or_wrong_kind_does_not_pass_for_another_value():
    # In a process of its own: here the signatures are checked, and would refuse most of these first.
    asked = json.dumps([case[:2] for case in CASES])
    done = subprocess.run([sys.executable, "-c", TRY], input=asked, capture_output=True, text=True, check=True)
    texts = json.loads(done.stdout)
    assert [text for text, (_, _, words) in zip(texts, CASES, strict=True) if words not in text] == []
