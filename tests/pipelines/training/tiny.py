"""A model small enough to train in milliseconds, and batches made of numbers alone."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace

import torch
from torch import Tensor, nn

from pipelines.batch import Batch
from pipelines.training.config import AdamW, AnyOptimizer, TrainConfig
from pipelines.training.loop import LoopConfig
from pipelines.training.optimizers import build_optimizers
from pipelines.training.schedules import ScheduleConfig
from pipelines.training.state import TrainState

CLASSES = 3
PIXELS = 3 * 4 * 4


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.qkv = nn.Linear(width, 3 * width)
        self.norm = nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm(x)).chunk(3, dim=1)
        return x + torch.tanh(q * k) + v


class TinyModel(nn.Module):
    """The shape of the real one: named blocks, a position embedding, dropout, a head."""

    def __init__(self, dropout: float = 0.1) -> None:
        super().__init__()
        self.patch_embedding = nn.Linear(PIXELS, 8)
        self.position_embedding = nn.Parameter(torch.zeros(1, 8))
        self.blocks = nn.ModuleList(Block(8) for _ in range(2))
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(8, CLASSES)

    def forward(self, images: Tensor, tokens: bool = True) -> SimpleNamespace:
        x = self.patch_embedding(images.flatten(1)) + self.position_embedding
        for block in self.blocks:
            x = block(x)
        return SimpleNamespace(logits=self.head(self.dropout(x)))


def prepare(images: Tensor) -> Tensor:
    return (images.float() - 127.5) / 127.5


def make_batch(step: int, size: int = 8, part: slice = slice(None)) -> Batch:
    """The batch of a step, or this rank's part of it; the last sample is a bad one of weight 0."""
    source = torch.Generator().manual_seed(step)
    images = torch.randint(0, 256, (size, 3, 4, 4), dtype=torch.uint8, generator=source)
    labels = torch.randint(0, CLASSES, (size,), generator=source)
    weights = torch.ones(size)
    weights[-1] = 0.0
    ids = torch.arange(size) + step * size
    return Batch(images[part], labels[part], weights[part], ids[part], step)


def make_batches(start: int, size: int = 8, part: slice = slice(None)) -> Iterator[Batch]:
    step = start
    while True:
        yield make_batch(step, size, part)
        step += 1


def make_state(optimizer: AnyOptimizer | None = None, dropout: float = 0.1) -> TrainState:
    torch.manual_seed(7)
    model = TinyModel(dropout)
    return TrainState(model, build_optimizers(model, optimizer or AdamW(peak_lr=1e-2)))


def make_config(total_steps: int, optimizer: AnyOptimizer | None = None, **options: object) -> LoopConfig:
    values = {"log_every_steps": 4, "seed": 3, **options}
    return LoopConfig(
        train=TrainConfig(batch_size=8, total_steps=total_steps),
        schedule=ScheduleConfig(warmup_steps=2),
        peak_lr=(optimizer or AdamW(peak_lr=1e-2)).peak_lr,
        total_steps=total_steps,
        **values,  # type: ignore[arg-type]
    )
