"""Ranks, and gradients summed over them. The same code runs on gloo and NCCL, and on one process without either."""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn

from pipelines.training.layout import WHOLE, Part

__all__ = ["GradientSum", "Gradients", "Ranks", "pick_device", "seed_step"]

BUCKET_BYTES = 25 << 20  # Large enough for NCCL's bandwidth, small enough to overlap with backward; as torch's DDP.


@dataclass(frozen=True, slots=True)
class Ranks:
    """Where this process stands among those that train together."""

    rank: int = 0
    world_size: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    @classmethod
    def current(cls, device: torch.device) -> Ranks:
        """From the process group, if there is one."""
        if dist.is_available() and dist.is_initialized():
            return cls(dist.get_rank(), dist.get_world_size(), device)
        return cls(device=device)

    def sum(self, values: Tensor) -> Tensor:
        """Sum over ranks, in place. Every rank must call it."""
        if self.world_size > 1:
            dist.all_reduce(values, op=dist.ReduceOp.SUM)
        return values

    def of_all(self, value: int) -> list[int]:
        """Every rank's integer, by rank. Every rank must call it."""
        values = torch.zeros(self.world_size, dtype=torch.int64, device=self.device)
        values[self.rank] = value
        return [int(each) for each in self.sum(values).tolist()]

    def from_rank_zero(self, values: Iterable[int]) -> list[int]:
        """Rank 0's integers, on every rank."""
        shared = torch.tensor(list(values), dtype=torch.int64, device=self.device)
        if self.world_size > 1:
            dist.broadcast(shared, src=0)
        return [int(value) for value in shared.tolist()]


def pick_device(local_rank: int = 0) -> torch.device:
    """The GPU of this local rank, or the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda", local_rank % torch.cuda.device_count())
    return torch.device("cpu")


def seed_step(seed: int, step: int, rank: int) -> None:
    """Every random number of a step follows from (seed, step, rank): nothing about randomness needs storing."""
    digest = hashlib.blake2b(struct.pack("<qqq", seed, step, rank), digest_size=8).digest()
    torch.manual_seed(int.from_bytes(digest, "little") >> 1)


class Gradients(Protocol):
    """How the gradients of one step come together over pieces and ranks, and what they update."""

    weights: dict[str, nn.Parameter]  # fp32, by the model's names: whole tensors, or this rank's rows of them.
    part: Part  # What this rank holds of the tensors that are cut.
    last_piece: bool  # Set before each backward of a step.
    overlap: bool  # False: nothing leaves this rank before `finish`, where that is possible.

    @property
    def begun(self) -> bool: ...
    def zero(self) -> None: ...
    def finish(self) -> None: ...
    def clip(self, max_norm: float | None) -> Tensor: ...
    def updated(self) -> None: ...
    def rows(self, tensors: Mapping[str, Tensor]) -> dict[str, int]: ...
    def own_part(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]: ...
    def gather(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]: ...


class GradientSum:
    """All gradients in one flat buffer, summed over ranks bucket by bucket while backward is still running.

    The layout of the buckets never changes, so a sum over ranks is taken in the same order in every run: torch's DDP
    rearranges its buckets after the first step, which moves the last bit of a resumed run at three ranks and more.
    Gradients are summed, not averaged: each rank's loss is already divided by the global batch size.
    """

    def __init__(
        self,
        model: nn.Module,
        ranks: Ranks,
        bucket_bytes: int = BUCKET_BYTES,
        masters: Mapping[str, nn.Parameter] | None = None,
    ) -> None:
        """`masters`: fp32 copies by name, where the model itself is bf16; they take the gradients and the updates."""
        self.ranks = ranks
        named = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
        self.weights: dict[str, nn.Parameter] = dict(named if masters is None else masters)  # What is updated.
        # Reverse order: backward finishes the last layers first.
        self.parameters = list(self.weights.values())[::-1]
        self._computing = [named[name] for name in self.weights][::-1]  # The model's own, which backward fills.
        if not self.parameters:
            raise ValueError("the model has no parameter that requires a gradient; nothing to train")
        first = self.parameters[0]
        total = sum(parameter.numel() for parameter in self.parameters)
        self.flat = torch.zeros(total, dtype=first.dtype, device=first.device)
        self.part = WHOLE
        self.last_piece = True  # Of this step: only then is a bucket complete when backward has passed it.
        self.overlap = True  # False: buckets wait for `finish`, so that a step can be begun anew until then.
        self._bounds: list[tuple[int, int]] = []
        self._waiting: list[int] = []  # Parameters of each bucket that have no gradient yet in this step.
        self._sizes: list[int] = []
        self._works: list[dist.Work] = []
        self._launched = 0
        self._build(bucket_bytes)

    def _build(self, bucket_bytes: int) -> None:
        start = end = count = 0
        for parameter, computing in zip(self.parameters, self._computing, strict=True):
            parameter.grad = self.flat[end : end + parameter.numel()].view_as(parameter)
            if computing is not parameter:
                computing.register_post_accumulate_grad_hook(  # type: ignore[no-untyped-call]
                    lambda computing, into=parameter.grad: _move_gradient(computing, into)
                )
            if self.ranks.world_size > 1:
                bucket = len(self._bounds)
                computing.register_post_accumulate_grad_hook(  # type: ignore[no-untyped-call]
                    lambda _, bucket=bucket: self._ready(bucket)
                )
            end += parameter.numel()
            count += 1
            if (end - start) * self.flat.element_size() >= bucket_bytes:
                self._bounds.append((start, end))
                self._sizes.append(count)
                start, count = end, 0
        if count:
            self._bounds.append((start, end))
            self._sizes.append(count)
        self._waiting = list(self._sizes)

    def zero(self) -> None:
        """Before each backward."""
        self.flat.zero_()
        self._waiting = list(self._sizes)
        self._launched = 0

    @property
    def begun(self) -> bool:
        """Whether other ranks have seen a part of this step's gradient: from then on it cannot be begun anew."""
        return self._launched > 0

    def _ready(self, bucket: int) -> None:
        if not (self.last_piece and self.overlap):
            return
        self._waiting[bucket] -= 1
        # In bucket order on every rank, or the collectives would not match.
        while self._launched < len(self._waiting) and self._waiting[self._launched] <= 0:
            self._launch()

    def _launch(self) -> None:
        start, end = self._bounds[self._launched]
        work = dist.all_reduce(self.flat[start:end], op=dist.ReduceOp.SUM, async_op=True)
        assert work is not None
        self._works.append(work)
        self._launched += 1

    def finish(self) -> None:
        """After backward: the buffer holds the sum over ranks. A parameter that took no part counts as zero."""
        if self.ranks.world_size > 1:
            while self._launched < len(self._bounds):
                self._launch()
            for work in self._works:
                work.wait()
            self._works.clear()

    def clip(self, max_norm: float | None) -> Tensor:
        """Scale the whole gradient down to `max_norm`; returns its norm before, still on the device."""
        norm: Tensor = torch.linalg.vector_norm(self.flat)
        if max_norm is not None:
            self.flat.mul_((max_norm / (norm + 1e-6)).clamp(max=1.0))
        return norm

    @torch.no_grad()
    def updated(self) -> None:
        """After an update: the model computes with the new weights."""
        if self._computing[0] is not self.parameters[0]:
            torch._foreach_copy_(list[Tensor](self._computing), list[Tensor](self.parameters))

    def rows(self, tensors: Mapping[str, Tensor]) -> dict[str, int]:
        """None: every rank holds every tensor whole."""
        return {}

    def own_part(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return dict(tensors)

    def gather(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Whole tensors on the CPU of rank 0; elsewhere empty."""
        return {name: tensor.cpu() for name, tensor in tensors.items()} if self.ranks.rank == 0 else {}


@torch.no_grad()
def _move_gradient(computing: Tensor, into: Tensor) -> None:
    """Pieces of a step add up in fp32, and bf16 gradients live no longer than their layer's backward."""
    assert computing.grad is not None
    into.add_(computing.grad)
    computing.grad = None
