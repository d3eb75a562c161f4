"""The optimizers of a recipe. No torch in here."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, Literal

from pipelines.config import BY_KIND, Strict

__all__ = ["Adam", "AdamW", "AnyOptimizer", "Lamb", "MuonAdamW", "OptimizerConfig", "ScheduleFree", "Sgd"]


@dataclass(frozen=True, kw_only=True, slots=True)
class AdamW(Strict):
    """Adam with decoupled weight decay, relative to the learning rate (the convention of the paper's tables)."""

    kind: Literal["adamw"] = "adamw"
    peak_lr: float = 1e-3  # Highest learning rate.
    weight_decay: float = 0.1  # big_vision's wd=1e-4 at lr 1e-3 is 0.1 here.
    betas: tuple[float, float] = (0.9, 0.999)  # Decay of the first and second moment.
    eps: float = 1e-8
    layer_decay: float | None = None  # Rate of each block relative to the next; 0.65 to 0.9 is usual in fine-tuning.

    def __post_init__(self) -> None:
        _check(self)


@dataclass(frozen=True, kw_only=True, slots=True)
class Adam(Strict):
    """Adam without weight decay."""

    kind: Literal["adam"] = "adam"
    peak_lr: float = 1e-3  # Highest learning rate.
    betas: tuple[float, float] = (0.9, 0.999)  # Decay of the first and second moment.
    eps: float = 1e-8
    layer_decay: float | None = None  # Rate of each block relative to the next; null: all the same.

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
    layer_decay: float | None = None  # Rate of each block relative to the next; null: all the same.

    def __post_init__(self) -> None:
        _check(self)
        if self.nesterov and not self.momentum:
            raise ValueError("nesterov=True has no effect with momentum=0; give a momentum, 0.9 is usual")


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
        if not 0 < self.adamw_lr < math.inf:
            raise ValueError(f"adamw_lr={self.adamw_lr} is no rate above 0; 2e-3 is usual for small models")


@dataclass(frozen=True, kw_only=True, slots=True)
class ScheduleFree(Strict):
    """Schedule-Free AdamW (arXiv 2405.15682): an average of the iterates takes the place of a decaying rate.

    It wants `schedule: {decay: constant}` with warm-up. The average is what is validated and exported.
    """

    kind: Literal["schedule_free"] = "schedule_free"
    peak_lr: float = 2.5e-3  # Learning rate after warm-up; higher than AdamW's, as its authors advise.
    weight_decay: float = 0.1  # Decoupled, relative to the learning rate, taken at the point of the gradient.
    betas: tuple[float, float] = (0.9, 0.999)  # Share of the average at the gradient's point; decay of second moment.
    eps: float = 1e-8

    def __post_init__(self) -> None:
        _check(self)
        if not self.betas[0] > 0:
            raise ValueError(f"betas={self.betas}: the first must be above 0, the average is computed from it; try 0.9")


@dataclass(frozen=True, kw_only=True, slots=True)
class Lamb(Strict):
    """LAMB (arXiv 1904.00962): AdamW whose step of each tensor is as long as the tensor; large batches, DeiT III."""

    kind: Literal["lamb"] = "lamb"
    peak_lr: float = 3e-3  # Highest learning rate.
    weight_decay: float = 0.05  # Decoupled, inside the step whose length is set.
    betas: tuple[float, float] = (0.9, 0.999)  # Decay of the first and second moment.
    eps: float = 1e-8
    layer_decay: float | None = None  # Rate of each block relative to the next; null: all the same.

    def __post_init__(self) -> None:
        _check(self)
        if not self.weight_decay:
            raise ValueError(
                "weight_decay=0 turns LAMB into Adam: the length of a step is set only where weight decay acts; give a"
                " weight decay, 0.05 is usual, or take kind: adam"
            )


AnyOptimizer = AdamW | Adam | Sgd | MuonAdamW | ScheduleFree | Lamb
OptimizerConfig = Annotated[AnyOptimizer, BY_KIND]


def _check(config: AnyOptimizer) -> None:
    if not 0 < config.peak_lr < math.inf:
        raise ValueError(f"peak_lr={config.peak_lr} is no rate above 0; nothing would be learned")
    weight_decay, eps = getattr(config, "weight_decay", 0.0), getattr(config, "eps", 1e-8)
    if not 0 <= weight_decay < math.inf:
        raise ValueError(f"weight_decay={weight_decay} is not 0 or more (negative, or no number); 0 disables it")
    if not 0 < eps < 1:
        raise ValueError(f"eps={eps} is outside 0 < eps < 1; 1e-8 is usual")
    for name in ("momentum", "betas"):
        values = getattr(config, name, ())
        for value in values if isinstance(values, tuple) else (values,):
            if not 0 <= value < 1:
                raise ValueError(f"{name}={values} is outside 0 <= {name} < 1; the usual values are the defaults")
    layer_decay = getattr(config, "layer_decay", None)
    if layer_decay is not None and not 0 < layer_decay < 1:
        raise ValueError(f"layer_decay={layer_decay} is outside 0 < d < 1; null disables it, 0.75 is usual")
