"""Every test of this folder also checks the shapes in the signatures of vit_model, where it was not imported before."""

from __future__ import annotations

import sys
from collections.abc import Iterator

import pytest
import torch
from jaxtyping import install_import_hook

if "vit_model" not in sys.modules:
    install_import_hook("vit_model", "beartype.beartype")


@pytest.fixture(autouse=True)
def _seeded_and_alone() -> Iterator[None]:
    """One thread: the tensors here are small, and threads would mostly wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)
