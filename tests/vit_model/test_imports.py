"""The library needs torch, numpy and safetensors alone; the rest of what is installed here is taken away to see it."""

from __future__ import annotations

import subprocess
import sys

BLOCKED = """
import sys

class Refuse:
    names = {"jaxtyping", "beartype", "PIL", "simplejpeg", "scipy", "pydantic", "ray", "mlflow", "boto3"}

    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in self.names:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Refuse())
import torch, vit_model
model = vit_model.build_model(vit_model.variant("Ti/16", depth=1), 3)
print(model(torch.zeros(1, 3, 224, 224)).logits.shape, vit_model.normalize.__doc__ is not None)
"""


def test_the_package_imports_and_runs_with_torch_numpy_and_safetensors_alone():
    done = subprocess.run([sys.executable, "-c", BLOCKED], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "torch.Size([1, 3])" in done.stdout


def test_every_public_name_exists():
    import vit_model

    assert vit_model.__all__ == sorted(
        vit_model.__all__, key=lambda name: (not name.isupper(), not name[0].isupper(), name)
    )
    assert all(hasattr(vit_model, name) for name in vit_model.__all__)
