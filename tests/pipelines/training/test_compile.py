"""torch.compile and recomputed blocks, for real, on a CPU: the losses are those of the plain model."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from pipelines.batch import Batch
from pipelines.training.build import build_state
from pipelines.training.config import AdamW, TrainConfig
from pipelines.training.loop import Hooks, LoopConfig, train
from pipelines.training.parallel import Ranks
from pipelines.training.schedules import ScheduleConfig
from vit_model import ViTConfig, build_model

STEPS = 3


def losses(**options: Any) -> list[float]:
    sizes = ViTConfig(resolution=8, patch_size=4, width=16, depth=1, mlp_dim=32, num_heads=2)
    config = TrainConfig(batch_size=4, total_steps=STEPS, **options)
    state = build_state(build_model(sizes, 3, seed=0), config, AdamW(peak_lr=1e-2), Ranks())
    loop = LoopConfig(
        train=config, schedule=ScheduleConfig(decay="constant"), peak_lr=1e-2, total_steps=STEPS, log_every_steps=1
    )
    source = torch.Generator().manual_seed(0)
    batches = [
        Batch(
            torch.randint(0, 256, (4, 3, 8, 8), dtype=torch.uint8, generator=source),
            torch.randint(0, 3, (4,), generator=source),
            torch.ones(4),
            torch.arange(4),
            step,
        )
        for step in range(STEPS)
    ]
    seen: list[float] = []
    hooks = Hooks(window=lambda _, metrics: seen.append(metrics["train/loss"]))
    train(state, batches, loop, Ranks(), lambda images: images.float() / 255, hooks)
    return seen


@pytest.mark.timeout(300)
def test_a_compiled_model_with_recomputed_blocks_learns_as_the_plain_one() -> None:
    assert losses(compile=True, activation_checkpointing=True) == pytest.approx(losses(), rel=1e-5)
