"""From a model to a training state: the one place that says in which order a model is made ready.

1  precision     the model itself becomes bf16, fp32 copies are kept       (bf16_pure)
2  checkpointing blocks are recomputed in backward                         (activation_checkpointing)
3  compile       the whole model, or block by block where they are gathered (compile)
4  parameters    cut over the ranks, block by block                        (fsdp, hsdp)
5  gradients     summed over ranks
6  optimizer     over fp32 weights: the model's own, the copies, or this rank's rows
7  average       of those same weights                                     (ema)
"""

from __future__ import annotations

from torch import nn

from pipelines.training.config import AnyOptimizer, ParallelConfig, TrainConfig
from pipelines.training.ema import Ema
from pipelines.training.optimizers import build_optimizers
from pipelines.training.parallel import Gradients, GradientSum, Ranks
from pipelines.training.parameter_sharding import ParameterSharding
from pipelines.training.precision import to_bf16
from pipelines.training.state import TrainState

__all__ = ["build_state"]


def build_state(
    model: nn.Module,
    train: TrainConfig,
    optimizer: AnyOptimizer,
    ranks: Ranks,
    parallel: ParallelConfig | None = None,
    local_size: int = 1,
) -> TrainState:
    """`model` is initialised and on its device; it is changed in place. `local_size`: workers of this node."""
    parallel = parallel or ParallelConfig()
    sharded = parallel.kind != "ddp"
    masters = to_bf16(model) if train.precision == "bf16_pure" and not sharded else None
    if train.activation_checkpointing:
        if not hasattr(model, "activation_checkpointing"):
            raise ValueError(f"activation_checkpointing has no effect on a {type(model).__name__}; remove it")
        model.activation_checkpointing = True  # type: ignore[assignment]
    if train.compile:
        blocks = getattr(model, "blocks", None)
        for part in blocks if sharded and blocks is not None else [model]:
            part.compile()
    gradients: Gradients
    if sharded:
        gradients = ParameterSharding(model, ranks, parallel, bf16=train.precision != "fp32", local_size=local_size)
    else:
        gradients = GradientSum(model, ranks, masters=masters)
    state = TrainState(model, build_optimizers(model, optimizer, gradients.weights), gradients=gradients)
    if train.ema is not None:
        state.ema = Ema(gradients.weights, train.ema)
    return state
