"""Makes google.json with Google's own JAX code. Not a test: run by hand where jax, flax and the two checkouts are.

pip install jax flax einops ml_collections scipy
PYTHONPATH=VISION_TRANSFORMER_CHECKOUT:BIG_VISION_CHECKOUT python make_google.py
"""

import json
import sys
import types
from importlib.metadata import version
from pathlib import Path

import flax.io  # noqa: F401  before tensorflow is replaced, for which it looks
import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from ml_collections import ConfigDict
from values import images, weight

for name in ("tensorflow", "tensorflow.io", "tensorflow.io.gfile"):  # big_vision.utils imports it, its models do not
    sys.modules.setdefault(name, types.ModuleType(name))
sys.modules["tensorflow.io"].gfile = sys.modules["tensorflow.io.gfile"]
from big_vision.models import bit_paper, vit  # noqa: E402
from vit_jax import models_vit  # noqa: E402

jax.config.update("jax_default_matmul_precision", "highest")
SEED = "Philox with the sha256 of each array's name as key (values.py)"
COMMITS = {
    "vision_transformer": "c6de1e5378c9831a8477feb30994971bdc409e46",
    "big_vision": "0127fb6b337ee2a27bf4e54dea79cff176527356",
}


def original(classifier="token", representation=None, resnet=None, patch=8, width=64, layers=2):
    transformer = {
        "mlp_dim": 128,
        "num_heads": 4,
        "num_layers": layers,
        "dropout_rate": 0.0,
        "attention_dropout_rate": 0.0,
    }
    return models_vit.VisionTransformer(
        num_classes=10,
        patches=ConfigDict({"size": (patch, patch)}),
        transformer=transformer,
        hidden_size=width,
        classifier=classifier,
        representation_size=representation,
        resnet=None if resnet is None else ConfigDict({"num_layers": resnet, "width_factor": 1}),
    )


def big_vision(**changes):
    fields = {"num_classes": 10, "patch_size": (8, 8), "width": 64, "depth": 2, "mlp_dim": 128, "num_heads": 4}
    return vit.Model(**{**fields, **changes})


# name: (model, image size, fields of our config that the file must be read as)
CASES = {
    "token": (original(), (32, 32), {"pool": "token"}),
    "token, not square": (original(), (32, 64), {"pool": "token"}),
    "token, MLP head": (original(representation=64), (32, 32), {"pool": "token"}),
    "gap": (original("gap"), (32, 32), {"pool": "gap"}),
    "hybrid, stride 16": (original(resnet=(1, 2, 1), patch=1, layers=1), (64, 64), {"stem": [1, 2, 1]}),
    "hybrid, stride 32": (original(resnet=(1, 1, 1, 1), patch=1, layers=1), (96, 64), {"stem": [1, 1, 1, 1]}),
    "hybrid, stem alone": (original(resnet=(), patch=8, layers=1), (64, 64), {"stem": []}),
    "big_vision token": (big_vision(pool_type="tok"), (32, 32), {"pool": "token", "position_prefix": False}),
    "big_vision gap, MLP head": (big_vision(pool_type="gap", rep_size=True), (32, 32), {"pool": "gap"}),
    "big_vision gap, sincos2d": (big_vision(pool_type="gap", posemb="sincos2d"), (32, 48), {"position": "sincos2d"}),
    "big_vision map": (big_vision(pool_type="map"), (32, 32), {"pool": "map"}),
    "big_vision map, scanned": (big_vision(pool_type="map", scan=True), (32, 32), {"pool": "map"}),
    "big_vision BiT": (bit_paper.Model(num_classes=10, depth=(1, 2, 1, 1)), (64, 48), {"root_pool": "infinity"}),
}


def main() -> None:
    results = {}
    for name, (model, size, config) in CASES.items():
        x = jnp.asarray(images(name, 2, size).transpose(0, 2, 3, 1))
        keywords = {"train": False} if isinstance(model, models_vit.VisionTransformer) else {}
        shapes = flatten_dict(
            jax.eval_shape(lambda m=model, x=x, k=keywords: m.init(jax.random.PRNGKey(0), x, **k))["params"], sep="/"
        )
        arrays = {key: weight(f"{name}:{key}", leaf.shape) for key, leaf in shapes.items()}
        params = unflatten_dict({tuple(key.split("/")): array for key, array in arrays.items()})
        out = jax.jit(lambda p, x, m=model, k=keywords: m.apply({"params": p}, x, **k))(params, x)
        logits = np.asarray(out[0] if isinstance(out, tuple) else out)
        print(name, flush=True)
        results[name] = {
            "size": size,
            "config": config,
            "shapes": {key: leaf.shape for key, leaf in shapes.items()},
            "logits": [[float(f"{value:.8g}") for value in row] for row in logits],
        }
    versions = {package: version(package) for package in ("jax", "flax", "numpy")}
    content = {"made_with": versions | COMMITS, "seed": SEED, "script": Path(__file__).name, "cases": results}
    Path(__file__).with_name("google.json").write_text(json.dumps(content, separators=(",", ":")) + "\n")


if __name__ == "__main__":
    main()
