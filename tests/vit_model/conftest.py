"""Every test of this folder also checks the shapes in the signatures of vit_model, where it was not imported before."""

from __future__ import annotations

import sys

import pytest
import torch
from jaxtyping import install_import_hook

if "vit_model" not in sys.modules:
    install_import_hook("vit_model", "beartype.beartype")


torch.set_num_threads(1)  # The tensors here are small; threads would mostly wait for each other.


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)
