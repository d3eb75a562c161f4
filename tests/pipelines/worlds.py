"""A corpus of grey levels and real models that tell dark from light at a chosen level: right and wrong are known."""

from __future__ import annotations

import io
from collections.abc import Iterable
from pathlib import Path

import torch
from PIL import Image

import vit_model
from pipelines.corpus.manifest import Corpus
from pipelines.corpus.small import write_corpus
from pipelines.tracking import registry
from pipelines.tracking.run import track
from tests.pipelines.tracking.toys import ToyRecipe, attempt, digest_named
from vit_model import InputSpec, OutputSpec, ViTConfig

CLASSES = ("dark", "light")
LIGHT_FROM = 128
SPEC = InputSpec(channels=3, height=16, width=16)


def grey(level: int, size: int = 20) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (size, size), (level, level, level)).save(buffer, "PNG")
    return buffer.getvalue()


def levels_corpus(name: str, levels: Iterable[int], classes: tuple[str, ...] = CLASSES) -> Corpus:
    """Split `test`: one picture a level, "light" from LIGHT_FROM on; split `train`: two pictures."""
    rows = [
        ("test", CLASSES[level >= LIGHT_FROM], f"test/{place:05d}.png", grey(level))
        for place, level in enumerate(levels)
    ]
    rows += [("train", "dark", "train/0.png", grey(3)), ("train", "light", "train/1.png", grey(250))]
    return write_corpus(name, rows, class_names=classes)


def threshold_weights(path: Path, threshold: float, classes: tuple[str, ...] = CLASSES) -> Path:
    """A ViT that says "light" exactly above `threshold`: one channel carries the level, the norm keeps its sign."""
    config = ViTConfig(
        resolution=16, patch_size=16, width=16, depth=1, mlp_dim=16, num_heads=1, pool="gap", position="none"
    )
    model = vit_model.build_model(config, num_classes=len(classes), seed=0)
    state = {name: torch.zeros_like(value) for name, value in model.state_dict().items()}
    state["patch_embedding.weight"][0] = 1 / state["patch_embedding.weight"][0].numel()
    state["patch_embedding.bias"][0] = 1 - 2 * threshold / 255  # Pixels come as -1 to 1.
    state["norm.weight"][:] = 1
    state["head.out.weight"][classes.index("dark"), 0] = -1
    state["head.out.weight"][classes.index("light"), 0] = 1
    model.load_state_dict(state)
    path.parent.mkdir(parents=True, exist_ok=True)
    vit_model.save_weights(model, path, input_spec=SPEC, output_spec=OutputSpec(class_names=classes))
    return path


def register_threshold(folder: Path, name: str, threshold: float, corpus: Corpus) -> str:
    """Register such a model as the next version of `name`."""
    own = attempt(digest_named(f"{name} {threshold}"))
    with track(own, ToyRecipe(), corpus=corpus) as run:
        return registry.register_version(
            run,
            name=name,
            weights=threshold_weights(folder / f"{name}-{threshold}.safetensors", threshold),
            corpus=corpus,
            metrics={"val/top1": 0.5},
            tags={"vit.pretrain_run_id": "pretrain-run", "vit.pretrain_digest": "cd" * 32},
            attempt=own,
        )
