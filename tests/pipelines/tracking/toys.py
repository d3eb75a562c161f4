"""A small model with its specs, images to try it on, and a stage attempt to register it from."""

from __future__ import annotations

import io
import os
import time
import uuid
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
import torch

import vit_model
from pipelines import config, identity, store
from vit_model import InputSpec, OutputSpec, ViTConfig

CLASSES = ("cat", "dog $x$", "<b>newt</b>")
INPUT = InputSpec(channels=3, height=16, width=16)


@dataclass(frozen=True, kw_only=True, slots=True)
class ToyRecipe(config.Strict):
    name: str = "toy"
    rates: dict[str, float] = field(default_factory=lambda: {"a$b": 0.5, "plain": 1.0})
    text: str = "x"
    workers: int = config.how(default=1)


@dataclass(frozen=True)
class ToyCorpus:
    uri: str = "s3://vit/corpora/toy"
    digest: str = "ab" * 32
    splits: dict[str, int] = field(default_factory=lambda: {"train": 8, "test": 2})
    class_names: tuple[str, ...] = CLASSES


def attempt(digest: str, number: int = 1, stage: str = "toystage", first: int = 1) -> identity.Attempt:
    """An attempt that holds its lease, as run_stage gives it."""
    root = store.join(identity.runs(), stage, digest)
    store.write_json(store.join(root, "lease.json"), {"token": f"token {number}"})
    return identity.Attempt(stage, digest, number, root, f"token {number}", first)


def digest_named(text: str) -> str:
    """A digest that no earlier test run has used: the MLflow server outlives a test."""
    return identity.digest_of("toystage", 1, ToyRecipe(), {"x": f"{text} {time.time_ns()}"})


def save_toy(path: Path, seed: int = 0, classes: tuple[str, ...] = CLASSES, scale: float = 1.0) -> Path:
    """A tiny ViT with a head that is not zero, so that its answers differ from image to image."""
    path.parent.mkdir(parents=True, exist_ok=True)
    small = ViTConfig(resolution=16, patch_size=8, width=16, depth=1, mlp_dim=32, num_heads=2)
    model = vit_model.build_model(small, num_classes=len(classes), seed=seed)
    with torch.no_grad():
        generator = torch.Generator().manual_seed(seed)
        for parameter in model.head.parameters():
            parameter.copy_(scale * torch.randn(parameter.shape, generator=generator))
    vit_model.save_weights(model, path, input_spec=INPUT, output_spec=OutputSpec(class_names=classes))
    return path


def picture(seed: int, size: int = 24, format: str = "PNG") -> bytes:
    from PIL import Image

    pixels = np.random.default_rng(seed).integers(0, 255, (size, size, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format)
    return buffer.getvalue()


def own_root(monkeypatch: pytest.MonkeyPatch) -> str:
    """A root of this test's own in the stack's object store: runs, corpora and leases of other tests are not there."""
    root = f"{os.environ['VIT_ROOT']}/test-{uuid.uuid4().hex[:8]}"
    monkeypatch.setenv("VIT_ROOT", root)
    return root
