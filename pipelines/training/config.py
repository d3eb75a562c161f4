"""What a training run is made of: model, budget, optimizer, validation, checkpoints, workers. No torch in here."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Any, Literal

from pipelines.config import Strict, how, input_
from pipelines.training.optimizer_config import (
    Adam,
    AdamW,
    AnyOptimizer,
    Lamb,
    MuonAdamW,
    OptimizerConfig,
    ScheduleFree,
    Sgd,
)

__all__ = [
    "Adam",
    "AdamW",
    "AnyOptimizer",
    "BestConfig",
    "CheckpointConfig",
    "DistillConfig",
    "EmaConfig",
    "Lamb",
    "MaskedConfig",
    "ModelConfig",
    "MuonAdamW",
    "OptimizerConfig",
    "PackingConfig",
    "ParallelConfig",
    "ProgressiveConfig",
    "ScheduleFree",
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
    attention_dropout: float | None = None  # On attention probabilities.
    drop_path: float | None = None  # Chance that an image skips a residual branch (stochastic depth).
    drop_path_schedule: Literal["linear", "constant"] | None = None  # Over depth: rising from 0, or the same.
    position: Literal["learned", "sincos2d", "none"] | None = None  # Position embedding.
    num_registers: int | None = None  # Extra tokens that no pooling reads.
    qk_norm: bool | None = None  # LayerNorm of q and k.
    layer_scale: float | None = None  # Initial value of a learned scale on each residual branch.
    head_bias: float | None = None  # Initial bias of the last layer; -ln(classes) suits loss: sigmoid.

    def __post_init__(self) -> None:
        sizes = ("patch_size", "width", "depth", "mlp_dim", "num_heads")
        missing = [name for name in sizes if getattr(self, name) is None]
        if self.variant is None and missing:
            raise ValueError(
                f"model has neither a variant nor {', '.join(missing)}; give variant: B/16, or all five sizes"
            )
        for name in ("dropout", "patch_dropout", "attention_dropout", "drop_path"):
            share = getattr(self, name)
            if share is not None and not 0 <= share < 1:
                raise ValueError(f"{name}={share} is outside 0 <= {name} < 1; 0 disables it")

    def overrides(self) -> dict[str, Any]:
        """The fields of the model's config that were given."""
        own = ("variant", "head_bias")
        given = {field.name: getattr(self, field.name) for field in fields(self) if field.name not in own}
        return {name: value for name, value in given.items() if value is not None}


@dataclass(frozen=True, kw_only=True, slots=True)
class EmaConfig(Strict):
    """An exponential moving average of the weights, validated beside them (the paper's Polyak averaging: 0.9999)."""

    decay: float = 0.9999  # Share of the average that stays at each step.
    warmup: bool = True  # In step t at most (1 + t) / (10 + t), so that a short run does not keep its random start.

    def __post_init__(self) -> None:
        if not 0 < self.decay < 1:
            raise ValueError(f"decay={self.decay} is outside 0 < decay < 1; 0.9999 is usual, 0.999 for short runs")


@dataclass(frozen=True, kw_only=True, slots=True)
class DistillConfig(Strict):
    """Learn from a teacher's answers to the very images of each step (arXiv 2106.05237), besides the labels."""

    teacher: str = input_()  # URI or path of weights, models:/NAME/VERSION; its classes are matched by name.
    target: Literal["soft", "hard"] = "soft"  # The teacher's probabilities, or its best class (DeiT).
    weight: float = 0.5  # Share of the teacher in the loss; 1 leaves the labels unread.
    temperature: float = 1.0  # Softens both sides of `soft`; the loss is multiplied by its square.

    def __post_init__(self) -> None:
        if not 0 < self.weight <= 1:
            raise ValueError(
                f"weight={self.weight} is outside 0 < w <= 1; leave distill out to learn from labels alone"
            )
        if not 0 < self.temperature < math.inf:
            raise ValueError(f"temperature={self.temperature} is not above 0; 1 leaves the probabilities as they are")
        if self.target == "hard" and self.temperature != 1.0:
            raise ValueError(f"temperature={self.temperature} has no effect with target: hard; remove it")


@dataclass(frozen=True, kw_only=True, slots=True)
class MaskedConfig(Strict):
    """Masked patch prediction (arXiv 2010.11929, appendix B.1.2): no label is read."""

    share: float = 0.5  # Of the patch embeddings of each image that are corrupted; the paper also tried 0.15.
    # What each corrupted patch is asked: its mean colour in 3 bits a channel; that of each cell of a 4x4 grid; pixels.
    target: Literal["mean_colour", "colours", "pixels"] = "mean_colour"

    def __post_init__(self) -> None:
        if not 0 < self.share <= 1:
            raise ValueError(f"share={self.share} is outside 0 < share <= 1; the paper corrupts 0.5")


@dataclass(frozen=True, kw_only=True, slots=True)
class ProgressiveConfig(Strict):
    """Small images first: every step takes one size, from `smallest` evenly up to whole images."""

    smallest: float = 0.5  # Side of the first steps' images over the whole side; to whole patches.
    until: float = 0.6  # Share of the steps after which images are whole.

    def __post_init__(self) -> None:
        if not 0 < self.smallest < 1 or not 0 < self.until <= 1:
            raise ValueError(
                f"smallest={self.smallest}, until={self.until}: give 0 < smallest < 1 and 0 < until <= 1; 0.5 and 0.6"
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class PackingConfig(Strict):
    """Images of many sizes in one row of tokens (NaViT, arXiv 2307.06304); each image draws its own scale."""

    smallest: float = 0.5  # Scales are uniform from here to 1.

    def __post_init__(self) -> None:
        if not 0 < self.smallest < 1:
            raise ValueError(f"smallest={self.smallest} is outside 0 < s < 1; 0.5 takes a third of the tokens away")


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainConfig(Strict):
    """The budget and the loss."""

    batch_size: int = 256  # Images per update over all workers.
    epochs: float | None = None  # Passes over the training split; give this or total_steps.
    total_steps: int | None = None  # Optimizer updates; give this or epochs.
    loss: Literal["softmax", "sigmoid"] = "softmax"  # Cross-entropy over classes, or one per class.
    label_smoothing: float = 0.0  # Share of the target spread evenly over the classes.
    grad_clip: float | None = 1.0  # Largest L2 norm of the whole gradient; null disables.
    # bf16: autocast over fp32 weights. bf16_pure: the model is bf16, the optimizer updates an fp32 copy.
    precision: Literal["fp32", "bf16", "bf16_pure"] = "fp32"
    class_weights: dict[str, float] | None = None  # Weight of a class in the loss, by its name; all others 1.
    masked: MaskedConfig | None = None  # pretrain: predict masked patches in place of the labels.
    progressive: ProgressiveConfig | None = None  # Smaller images first: cheaper steps.
    packing: PackingConfig | None = None  # Each image at its own smaller size: cheaper steps.
    ema: EmaConfig | None = None  # Average of the weights over the steps.
    export: Literal["last", "best", "ema"] = "last"  # Which weights the stage hands on; the others lie beside them.
    # Images that one device takes at once; more are cut into pieces and their gradients added. auto: as many as fit.
    per_device_batch_size: int | Literal["auto"] | None = how(default=None)
    compile: bool = how(default=False)  # torch.compile: faster steps after a minute of compiling.
    activation_checkpointing: bool = how(default=False)  # Recompute blocks in backward: less memory, a third more time.
    non_finite: Literal["stop", "rollback"] = how(
        default="stop"
    )  # rollback: leave out the step whose loss is not finite.

    def __post_init__(self) -> None:
        if isinstance(self.per_device_batch_size, int) and self.per_device_batch_size < 1:
            raise ValueError(
                f"per_device_batch_size={self.per_device_batch_size} is less than one image; give 1 or more, or auto"
            )
        for name, weight in (self.class_weights or {}).items():
            if not 0 <= weight < math.inf:
                raise ValueError(f"class_weights.{name}={weight} is no weight; give a number of 0 or more")
        if self.masked is not None and (self.loss != "softmax" or self.label_smoothing or self.class_weights):
            raise ValueError("loss, label_smoothing and class_weights have no effect with masked; remove them")
        if sum(option is not None for option in (self.masked, self.progressive, self.packing)) > 1:
            raise ValueError("masked, progressive and packing exclude each other; keep one of them")
        if self.export == "ema" and self.ema is None:
            raise ValueError("export: ema needs an average; add ema: {decay: 0.9999}, or export: last")
        if self.batch_size < 1:
            raise ValueError(f"batch_size={self.batch_size} is less than one image; give 1 or more")
        if (self.epochs is None) == (self.total_steps is None):
            raise ValueError(f"epochs={self.epochs} and total_steps={self.total_steps}: give exactly one of them")
        if self.epochs is not None and not 0 < self.epochs < math.inf:
            raise ValueError(f"epochs={self.epochs} is no number of epochs to train for; give a number above 0")
        if self.total_steps is not None and self.total_steps < 1:
            raise ValueError(f"total_steps={self.total_steps} trains nothing; give 1 or more")
        if not 0 <= self.label_smoothing < 1:
            raise ValueError(f"label_smoothing={self.label_smoothing} is outside 0 <= s < 1; 0 disables it")
        if self.grad_clip is not None and not 0 < self.grad_clip < math.inf:
            raise ValueError(f"grad_clip={self.grad_clip} is no norm above 0; 1 is usual, null disables it")

    def steps(self, num_images: int) -> int:
        """Optimizer updates over a split of `num_images`; a started batch counts, training has no last batch."""
        if self.total_steps is not None:
            return self.total_steps
        assert self.epochs is not None
        return max(1, math.ceil(self.epochs * num_images / self.batch_size - 1e-9))


@dataclass(frozen=True, kw_only=True, slots=True)
class BestConfig(Strict):
    """Keep the weights of the best validation beside the last ones; stop when nothing gets better."""

    metric: Literal["val/top1", "val/loss", "ema/top1", "ema/loss"] = "val/top1"  # Higher top1, lower loss is better.
    every_epochs: float = 1.0  # How often is measured; it decides what can be best, unlike validation.every_epochs.
    patience: int | None = None  # Stop after so many measurements without a new best; null: train to the end.

    def __post_init__(self) -> None:
        if not self.every_epochs > 0:
            raise ValueError(f"every_epochs={self.every_epochs} is not above 0; 1 measures once per epoch")
        if self.patience is not None and self.patience < 1:
            raise ValueError(f"patience={self.patience} would stop at the first measurement; give 1 or more, or null")


@dataclass(frozen=True, kw_only=True, slots=True)
class ValidationConfig(Strict):
    """Accuracy and loss on a held-out split while training, and always after the last step."""

    split: str | None = "val"  # Split to measure on; null: no validation.
    test_split: str | None = None  # Split that is measured once, after the last step, as test/top1.
    every_epochs: float | None = how(default=1.0)  # How often while training; null: only at the end.
    batch_size: int = how(default=500)  # Images per forward over all workers.
    best: BestConfig | None = None  # Keep the best weights too, and when to stop early.

    def __post_init__(self) -> None:
        if self.every_epochs is not None and not self.every_epochs > 0:
            raise ValueError(f"every_epochs={self.every_epochs} is not above 0; null validates only at the end")
        if self.batch_size < 1:
            raise ValueError(f"batch_size={self.batch_size} is less than one image; 500 is usual")
        if self.best is not None and self.split is None:
            raise ValueError("best needs a split to measure on; set split, or leave best out")
        if self.best is not None and self.every_epochs not in (None, 1.0):
            raise ValueError(f"every_epochs={self.every_epochs} has no effect beside best.every_epochs; remove it")

    def every_steps(self, num_images: int, batch_size: int) -> int | None:
        every = self.every_epochs if self.best is None else self.best.every_epochs
        if self.split is None or every is None:
            return None
        return max(1, round(every * num_images / batch_size))


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
                f"keep={self.keep} would leave nothing to resume from; give 1 or more (2 survives a torn one)"
            )
        if not self.every_seconds > 0:
            raise ValueError(f"every_seconds={self.every_seconds} is not above 0; 60 is usual")
        if self.every_steps is not None and self.every_steps < 1:
            raise ValueError(f"every_steps={self.every_steps} is less than one step; null leaves it to the clock")


@dataclass(frozen=True, kw_only=True, slots=True)
class ParallelConfig(Strict):
    """How the ranks share one step. None of it decides the result beyond the order of rounding."""

    # ddp: every rank holds all. fsdp: weights, gradients and optimizer are cut over the ranks. hsdp: cut over the ranks
    # of a group, and each group holds all.
    kind: Literal["ddp", "fsdp", "hsdp"] = how(default="ddp")
    replicas: int | None = how(default=None)  # hsdp: groups; null: one per node.
    reshard: bool = how(
        default=True
    )  # Free the gathered weights between forward and backward: less memory, more traffic.

    def __post_init__(self) -> None:
        if self.replicas is not None and self.kind != "hsdp":
            raise ValueError(f"replicas={self.replicas} has no effect with kind: {self.kind}; it belongs to hsdp")
        if self.replicas is not None and self.replicas < 1:
            raise ValueError(f"replicas={self.replicas} is less than one; give the number of nodes, or null")
        if not self.reshard and self.kind == "ddp":
            raise ValueError("reshard=False has no effect with kind: ddp; it belongs to fsdp and hsdp")


@dataclass(frozen=True, kw_only=True, slots=True)
class WorkerConfig(Strict):
    """The processes that train. None of it decides the result beyond the order of rounding."""

    # Train workers; null: one per GPU, or two on CPUs (one on a single core). [FEWEST, MOST]: as many as there is room
    # for, fewer after a node is lost and more when it comes back.
    count: int | tuple[int, int] | None = how(default=None)
    # auto: GPUs if the cluster shows any, else CPUs. cuda: a GPU each; on a cluster that grows they are waited for.
    device: Literal["auto", "cpu", "cuda"] = how(default="auto")
    cpus: float = how(default=0.05)  # Logical CPUs each reserves; small on a laptop, so that reading gets the rest.
    max_failures: int = how(default=8)  # Restarts of the worker group before the run counts as failed.
    resize_seconds: float = how(default=60.0)  # Of a range: a group works for so long before it makes way for a larger.
    log_every_steps: int = how(default=20)  # Steps between two points in the curves.
    hang_seconds: float | None = how(default=900.0)  # A worker without a step for so long writes its stacks and ends.
    node_load_seconds: float | None = how(default=10.0)  # Between two points of each node's load; null: none.
    dollars_per_hour: float | None = how(default=None)  # Of one worker; null: a known GPU's list price, else no cost.
    peak_tflops: float | None = how(default=None)  # Of a device, for mfu; null: a known GPU's data sheet, else no mfu.

    def __post_init__(self) -> None:
        if self.hang_seconds is not None and not self.hang_seconds > 0:
            raise ValueError(f"hang_seconds={self.hang_seconds} is not above 0; null disables the watchdog")
        if isinstance(self.count, tuple) and not 1 <= self.count[0] <= self.count[1]:
            raise ValueError(f"count={list(self.count)} is no range of workers; give [fewest, most], as in [1, 8]")
        if isinstance(self.count, int) and self.count < 1:
            raise ValueError(f"count={self.count} workers cannot train; give 1 or more, or null to choose")
        if self.max_failures < 0:
            raise ValueError(f"max_failures={self.max_failures} is negative; 0 starts the workers once")
        if not 0 <= self.cpus < math.inf:
            raise ValueError(f"cpus={self.cpus} is no number of CPUs; 0.05 is usual on one machine")
        if not self.resize_seconds >= 0:
            raise ValueError(f"resize_seconds={self.resize_seconds} is below 0; 60 is usual")
        for name in ("node_load_seconds", "dollars_per_hour", "peak_tflops"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise ValueError(f"{name}={value} is not above 0 and finite; null leaves it out")
        if self.log_every_steps < 1:
            raise ValueError(f"log_every_steps={self.log_every_steps} is less than one step; 20 is usual")

    @property
    def most(self) -> int | None:
        """The largest number of workers that the recipe names."""
        return self.count[1] if isinstance(self.count, tuple) else self.count
