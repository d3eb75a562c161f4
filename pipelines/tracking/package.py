"""Builds the folder of one model version: our pyfunc file, `vit_model` as it is now, and the weights as safetensors.

Loading it needs `mlflow` and the requirements written into it (torch, numpy, safetensors, Pillow, simplejpeg), and no
pickle.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import logging
import shutil
import struct
import tempfile
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mlflow.models import ModelSignature

__all__ = ["WEIGHTS", "build_package", "check_safetensors", "sha256_of", "signature"]

WEIGHTS = "weights.safetensors"
REQUIREMENTS = ("torch", "numpy", "pandas", "safetensors", "pillow", "simplejpeg")
MAX_HEADER_BYTES = 100_000_000  # The format's own limit.


def signature() -> ModelSignature:
    """Image bytes in; best class, its probability, the best `top_k`, and an error text for an unreadable image out."""
    from mlflow.models import ModelSignature
    from mlflow.types import ColSpec, DataType, ParamSchema, ParamSpec, Schema
    from mlflow.types.schema import Array

    return ModelSignature(
        inputs=Schema([ColSpec(DataType.binary, "image")]),
        outputs=Schema(
            [
                ColSpec(DataType.string, "prediction"),
                ColSpec(DataType.double, "probability"),
                ColSpec(Array(DataType.string), "top_classes"),
                ColSpec(Array(DataType.double), "top_probabilities"),
                ColSpec(DataType.string, "error"),
            ]
        ),
        params=ParamSchema([ParamSpec("top_k", DataType.long, 5)]),
    )


def build_package(weights: Path, folder: Path, *, model_id: str, run_id: str) -> Path:
    """Write the MLflow model folder `folder` and return it. The weights must carry their input and output spec."""
    import mlflow.pyfunc
    from mlflow.models import Model

    import vit_model
    from vit_model import read_specs

    check_safetensors(weights)
    _, input_spec, output_spec = read_specs(weights)
    if input_spec is None or output_spec is None:
        missing = "input spec" if input_spec is None else "output spec"
        raise ValueError(f"{weights.name} has no {missing}; write it with save_weights(..., input_spec=, output_spec=)")
    with tempfile.TemporaryDirectory(prefix="vit-package-") as temporary, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # MLflow asks for type hints, which do not fit bytes.
        code = Path(temporary) / "vit_model"
        shutil.copytree(
            Path(vit_model.__file__ or "").parent, code, ignore=shutil.ignore_patterns("__pycache__", "*.so")
        )
        named = Path(temporary) / WEIGHTS
        shutil.copyfile(weights, named)  # Not a link: MLflow refuses one as a path out of the folder.
        level = logging.getLogger("mlflow").level
        logging.getLogger("mlflow").setLevel(logging.ERROR)
        try:
            mlflow.pyfunc.save_model(
                str(folder),
                python_model=str(Path(__file__).with_name("pyfunc_model.py")),
                artifacts={"weights": str(named)},
                code_paths=[str(code)],
                signature=signature(),
                pip_requirements=_requirements(),
                mlflow_model=Model(model_id=model_id, run_id=run_id),
                metadata={"input_spec": input_spec.to_json(), "format": "vit-safetensors/1"},
            )
        finally:
            logging.getLogger("mlflow").setLevel(level)
    return folder


def _requirements() -> list[str]:
    """Exact releases that made the version, without local build tags such as `+cpu`, which no index serves."""
    return [f"{name}=={importlib.metadata.version(name).split('+')[0]}" for name in ("mlflow", *REQUIREMENTS)]


def check_safetensors(path: Path) -> None:
    """Refuse what is not a safetensors file, a pickle above all, by its header alone."""
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
        head = file.read(length) if 2 <= length <= min(MAX_HEADER_BYTES, size - 8) else b""
    try:
        header = json.loads(head)
    except ValueError:
        header = None
    if not isinstance(header, dict):
        raise ValueError(
            f"{path.name} is not a safetensors file; only safetensors are read as weights (a pickle can run code), "
            "convert it with vit_model.save_weights"
        )


def sha256_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
