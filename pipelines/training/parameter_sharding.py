"""FSDP2 and HSDP: weights, gradients and optimizer state cut over ranks along their first dimension.

What the optimizer, the average and the checkpoints see is this rank's rows as plain tensors, which share their memory
with FSDP's own; FSDP gathers them for a block just before it runs. Gradients are summed, as everywhere here.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from pipelines.training.config import ParallelConfig
from pipelines.training.layout import Part, rows_of
from pipelines.training.parallel import Ranks
from pipelines.training.schedule_free import ON_CPU

__all__ = ["ParameterSharding", "group_count"]

SAME_EVERYWHERE = ("step", ON_CPU)  # Slots of an optimizer that count steps: never cut, whatever their shape.


def group_count(config: ParallelConfig, ranks: Ranks, local_size: int) -> int:
    """Groups that each hold all the weights; 1 for fsdp. Raises ValueError if they do not divide the ranks."""
    if config.kind == "fsdp":
        return 1
    replicas = config.replicas or max(1, ranks.world_size // max(1, local_size))
    if ranks.world_size % replicas:
        raise ValueError(
            f"parallel.replicas={replicas} does not divide {ranks.world_size} workers; give the number of nodes"
        )
    return replicas


class ParameterSharding:
    """The sharded counterpart of GradientSum: same interface."""

    def __init__(
        self, model: nn.Module, ranks: Ranks, config: ParallelConfig, *, bf16: bool = False, local_size: int = 1
    ) -> None:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

        if ranks.world_size < 2:
            raise ValueError(f"parallel.kind={config.kind} cuts the weights over workers and there is one; use ddp")
        self.ranks = ranks
        groups = group_count(config, ranks, local_size)
        size = ranks.world_size // groups
        shape, names = ((groups, size), ("replicate", "shard")) if config.kind == "hsdp" else ((size,), ("shard",))
        mesh = init_device_mesh(ranks.device.type, shape, mesh_dim_names=names)
        self._group = mesh["shard"].get_group()
        self.part = Part(dist.get_rank(self._group), size, writes=ranks.rank < size)
        self._shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16 if bf16 else None, reduce_dtype=torch.float32)
        for unit in _units(model):
            fully_shard(unit, mesh=mesh, mp_policy=policy, reshard_after_forward=config.reshard)
        fully_shard(model, mesh=mesh, mp_policy=policy)
        if bf16:
            for buffer in model.buffers():
                buffer.data = buffer.data.bfloat16()  # Else it would lift the tokens of a bf16 model to fp32.
        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.set_gradient_divide_factor(1.0)  # Sums, not means.
                module.set_force_sum_reduction_for_comms(True)  # gloo has no other, and NCCL's gives the same.
        self._parameters: dict[str, Any] = dict(model.named_parameters())
        self.weights = {name: nn.Parameter(value.to_local().detach()) for name, value in self._parameters.items()}
        self.last_piece = self.overlap = True  # Of no meaning here: the blocks talk to each other in any case.

    @property
    def begun(self) -> bool:
        """Always: the ranks talk from the first block on, so one of them cannot begin a step anew by itself."""
        return True

    def zero(self) -> None:
        for parameter in self._parameters.values():
            parameter.grad = None

    def finish(self) -> None:
        """The gradients of this rank's rows, where the optimizer looks for them."""
        for name, weight in self.weights.items():
            gradient = self._parameters[name].grad
            weight.grad = torch.zeros_like(weight) if gradient is None else gradient.to_local()

    def clip(self, max_norm: float | None) -> Tensor:
        """Scale the whole gradient down to `max_norm`; returns its norm before, still on the device."""
        gradients = [weight.grad for weight in self.weights.values() if weight.grad is not None and weight.numel()]
        squares = torch.zeros((), device=self.ranks.device)
        if gradients:
            squares = torch.stack(torch._foreach_norm(gradients)).square().sum()
        dist.all_reduce(squares, op=dist.ReduceOp.SUM, group=self._group)
        norm = squares.sqrt()
        if max_norm is not None and gradients:
            torch._foreach_mul_(gradients, (max_norm / (norm + 1e-6)).clamp(max=1.0))
        return norm

    def updated(self) -> None:
        """Nothing: the rows share their memory with FSDP's."""

    def rows(self, tensors: Mapping[str, Tensor]) -> dict[str, int]:
        """Rows over all parts of those of the given tensors that are cut: `KIND/NAME` and `optimizer/NAME/SLOT`."""
        found: dict[str, int] = {}
        for key in tensors:
            _, name, *slot = key.split("/")
            shape = self._shapes.get(name)
            if shape is not None and (not slot or slot[0] not in SAME_EVERYWHERE):
                found[key] = shape[0] if len(shape) else 1
        return found

    def gather(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Whole tensors on the CPU of rank 0, one after the other; elsewhere empty. Collective in each group."""
        whole: dict[str, Tensor] = {}
        for name, tensor in tensors.items():
            shape = self._shapes[name]
            each = -(-shape[0] // self.part.count)
            padded = torch.zeros((each, *shape[1:]), dtype=tensor.dtype, device=self.ranks.device)
            padded[: tensor.shape[0]].copy_(tensor)
            parts = [torch.empty_like(padded) for _ in range(self.part.count)]
            dist.all_gather(parts, padded, group=self._group)
            if self.ranks.rank == 0:
                whole[name] = torch.cat(parts)[: shape[0]].cpu()
        return whole

    def own_part(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """This rank's rows of tensors that may be whole, as a checkpoint of uncut weights has them."""
        found: dict[str, Tensor] = {}
        for key, tensor in tensors.items():
            _, name, *slot = key.split("/")
            shape = self._shapes.get(name)
            whole = shape is not None and tensor.shape == shape and not (slot and slot[0] in SAME_EVERYWHERE)
            found[key] = tensor[rows_of(self.part, shape[0])] if shape is not None and whole else tensor
        for kind in {key.split("/")[0] for key in tensors} - {"optimizer"}:
            for name, weight in self.weights.items():  # Of a tensor with fewer rows than ranks, the last have none.
                if not weight.numel():
                    found.setdefault(f"{kind}/{name}", weight.detach().clone())
        return found


def _units(model: nn.Module) -> list[nn.Module]:
    """What is gathered as one: the blocks of a ViT, the bottleneck units of a ResNet."""
    for name in ("blocks", "stages"):
        found = getattr(model, name, None)
        if found is not None:
            return [unit for part in found for unit in (part if isinstance(part, nn.Sequential) else [part])]
    return []
