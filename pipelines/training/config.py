"""What a training run is made of: model, budget, optimizer, validation, checkpoints, workers. No torch in here."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Annotated, Any, Literal

from pipelines.config import BY_KIND, Strict, how

__all__ = [
    "Adam",
    "AdamW",
    "CheckpointConfig",
    "ModelConfig",
    "MuonAdamW",
    "OptimizerConfig",
    "Sgd",
    "TrainConfig",
    "ValidationConfig",
    "WorkerConfig",
]


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelConfig(Strict):
    """A variant of the paper by name, or a size of one's own; a field left out stays as the variant has it."""

    variant: str | None = None  # "B/16", "L/16", ...; without it the five sizes below are required.
    patch_size: int | None = None  # Pixels per side.
    width: int | None = None  # Size of a token.
    depth: int | None = None  # Number of blocks.
    mlp_dim: int | None = None  # Hidden size of a block's MLP.
    num_heads: int | None = None  # Attention heads; divides width.
    pool: Literal["token", "gap", "map"] | None = None  # How tokens become one vector.
    channels: int | None = None  # Colour channels of the input.
    dropout: float | None = None  # The paper's places: after position embedding and dense layers.
    patch_dropout: float | None = None  # Share of each training image's patches left out: faster steps.

    def __post_init__(self) -> None:
        sizes = ("patch_size", "width", "depth", "mlp_dim", "num_heads")
        missing = [name for name in sizes if getattr(self, name) is None]
        if self.variant is None and missing:
            raise ValueError(
                f"model has neither a variant nor {', '.join(missing)}; give variant: B/16, or all five sizes"
            )

    def overrides(self) -> dict[str, Any]:
        """The fields that were given, without the variant's name."""
        given = {field.name: getattr(self, field.name) for field in fields(self) if field.name != "variant"}
        return {name: value for name, value in given.items() if value is not None}


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainConfig(Strict):
    """The budget and the loss."""

    batch_size: int = 256  # Images per update over all workers.
    epochs: float | None = None  # Passes over the training split; give this or total_steps.
    total_steps: int | None = None  # Optimizer updates; give this or epochs.
    loss: Literal["softmax", "sigmoid"] = "softmax"  # Cross-entropy over classes, or one per class.
    label_smoothing: float = 0.0  # Share of the target spread evenly over the classes.
    grad_clip: float | None = 1.0  # Largest L2 norm of the whole gradient; null disables.
    precision: Literal["fp32", "bf16"] = "fp32"  # bf16: autocast, weights and optimizer stay fp32.

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise ValueError(f"batch_size={self.batch_size} is less than one image; give 1 or more")
        if (self.epochs is None) == (self.total_steps is None):
            raise ValueError(f"epochs={self.epochs} and total_steps={self.total_steps}: give exactly one of them")
        if self.epochs is not None and not self.epochs > 0:
            raise ValueError(f"epochs={self.epochs} trains nothing; give a number above 0")
        if self.total_steps is not None and self.total_steps < 1:
            raise ValueError(f"total_steps={self.total_steps} trains nothing; give 1 or more")
        if not 0 <= self.label_smoothing < 1:
            raise ValueError(f"label_smoothing={self.label_smoothing} is outside 0 <= s < 1; 0 disables it")
        if self.grad_clip is not None and not self.grad_clip > 0:
            raise ValueError(
                f"grad_clip={self.grad_clip} would stop all learning; give a norm above 0, or null to disable"
            )

    def steps(self, num_images: int) -> int:
        """Optimizer updates over a split of `num_images`; a started batch counts, training has no last batch."""
        if self.total_steps is not None:
            return self.total_steps
        assert self.epochs is not None
        return max(1, math.ceil(self.epochs * num_images / self.batch_size - 1e-9))


@dataclass(frozen=True, kw_only=True, slots=True)
class AdamW(Strict):
    """Adam with decoupled weight decay, relative to the learning rate (the convention of the paper's tables)."""

    kind: Literal["adamw"] = "adamw"
    peak_lr: float = 1e-3  # Highest learning rate.
    weight_decay: float = 0.1  # big_vision's wd=1e-4 at lr 1e-3 is 0.1 here.
    betas: tuple[float, float] = (0.9, 0.999)  # Decay of the first and second moment.
    eps: float = 1e-8

    def __post_init__(self) -> None:
        _check(self)


@dataclass(frozen=True, kw_only=True, slots=True)
class Adam(Strict):
    """Adam without weight decay."""

    kind: Literal["adam"] = "adam"
    peak_lr: float = 1e-3  # Highest learning rate.
    betas: tuple[float, float] = (0.9, 0.999)  # Decay of the first and second moment.
    eps: float = 1e-8

    def __post_init__(self) -> None:
        _check(self)


@dataclass(frozen=True, kw_only=True, slots=True)
class Sgd(Strict):
    """SGD with momentum: the paper's fine-tuning (Table 4)."""

    kind: Literal["sgd"] = "sgd"
    peak_lr: float = 0.03  # Highest learning rate.
    momentum: float = 0.9
    nesterov: bool = False
    weight_decay: float = 0.0  # L2, added to the gradient before the momentum.

    def __post_init__(self) -> None:
        _check(self)


@dataclass(frozen=True, kw_only=True, slots=True)
class MuonAdamW(Strict):
    """Muon for the matrices inside the blocks, AdamW for everything else."""

    kind: Literal["muon"] = "muon"
    peak_lr: float = 0.02  # Highest learning rate of Muon.
    momentum: float = 0.95
    weight_decay: float = 0.05  # Decoupled, relative to the learning rate; for both.
    adamw_lr: float = 2e-3  # Highest learning rate of AdamW; follows the same schedule.
    betas: tuple[float, float] = (0.9, 0.999)  # AdamW's decay of the first and second moment.
    eps: float = 1e-8

    def __post_init__(self) -> None:
        _check(self)
        if not self.adamw_lr > 0:
            raise ValueError(f"adamw_lr={self.adamw_lr} is not above 0; 2e-3 is usual for small models")


OptimizerConfig = Annotated[AdamW | Adam | Sgd | MuonAdamW, BY_KIND]


def _check(config: AdamW | Adam | Sgd | MuonAdamW) -> None:
    if not config.peak_lr > 0:
        raise ValueError(f"peak_lr={config.peak_lr} is not above 0; nothing would be learned")
    if getattr(config, "weight_decay", 0.0) < 0:
        raise ValueError(f"weight_decay={config.weight_decay} is negative; 0 disables it")  # type: ignore[union-attr]
    for name in ("momentum", "betas"):
        values = getattr(config, name, ())
        for value in values if isinstance(values, tuple) else (values,):
            if not 0 <= value < 1:
                raise ValueError(f"{name}={values} is outside 0 <= {name} < 1; the usual values are the defaults")


@dataclass(frozen=True, kw_only=True, slots=True)
class ValidationConfig(Strict):
    """Accuracy and loss on a held-out split while training, and always after the last step."""

    split: str | None = "val"  # Split to measure on; null: no validation.
    test_split: str | None = None  # Split that is measured once, after the last step, as test/top1.
    every_epochs: float | None = how(default=1.0)  # How often while training; null: only at the end.
    batch_size: int = how(default=500)  # Images per forward over all workers.

    def __post_init__(self) -> None:
        if self.every_epochs is not None and not self.every_epochs > 0:
            raise ValueError(f"every_epochs={self.every_epochs} is not above 0; null validates only at the end")

    def every_steps(self, num_images: int, batch_size: int) -> int | None:
        if self.split is None or self.every_epochs is None:
            return None
        return max(1, round(self.every_epochs * num_images / batch_size))


@dataclass(frozen=True, kw_only=True, slots=True)
class CheckpointConfig(Strict):
    """How often all that is needed to resume is stored, and how much of it stays."""

    every_seconds: float = how(
        default=60.0
    )  # Time between checkpoints; work since the last one is redone after a crash.
    every_steps: int | None = how(default=None)  # Besides the clock, at every so many steps.
    keep: int = how(default=2)  # Newest complete checkpoints that stay.

    def __post_init__(self) -> None:
        if self.keep < 1:
            raise ValueError(
                f"keep={self.keep} would delete the only good checkpoint; give 1 or more (2 survives a torn one)"
            )
        if not self.every_seconds > 0:
            raise ValueError(f"every_seconds={self.every_seconds} is not above 0; 60 is usual")
        if self.every_steps is not None and self.every_steps < 1:
            raise ValueError(f"every_steps={self.every_steps} is less than one step; null leaves it to the clock")


@dataclass(frozen=True, kw_only=True, slots=True)
class WorkerConfig(Strict):
    """The processes that train. None of it decides the result beyond the order of rounding."""

    count: int | None = how(default=None)  # Train workers; null: one per GPU, or two on CPUs (one on a single core).
    # auto: GPUs if the cluster shows any, else CPUs. cuda: a GPU each; on a cluster that grows they are waited for.
    device: Literal["auto", "cpu", "cuda"] = how(default="auto")
    cpus: float = how(default=0.05)  # Logical CPUs each reserves; small on a laptop, so that reading gets the rest.
    max_failures: int = how(default=8)  # Restarts of the worker group before the run counts as failed.
    log_every_steps: int = how(default=20)  # Steps between two points in the curves.

    def __post_init__(self) -> None:
        if self.count is not None and self.count < 1:
            raise ValueError(f"count={self.count} workers cannot train; give 1 or more, or null to choose")
        if self.log_every_steps < 1:
            raise ValueError(f"log_every_steps={self.log_every_steps} is less than one step; 20 is usual")
