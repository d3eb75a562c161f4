"""Muon: momentum, then the nearest orthogonal matrix by Newton-Schulz (github.com/KellerJordan/Muon, 2024)."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from typing import Any

import torch
from torch import Tensor

__all__ = ["Muon", "orthogonal"]

ITERATIONS = 5
COEFFICIENTS = (
    3.4445,
    -4.7750,
    2.0315,
)  # Steepest at 0 among the quintics that keep singular values in about [0.7, 1.2].


def orthogonal(matrices: Tensor) -> Tensor:
    """(M, rows, columns) with rows <= columns -> the same with all singular values near 1."""
    a, b, c = COEFFICIENTS
    # bf16 is enough for the direction; on a CPU without bf16 units fp32 is faster.
    x = matrices.bfloat16() if matrices.is_cuda else matrices.float()
    x = x / (x.flatten(1).norm(dim=1)[:, None, None] + 1e-7)
    for _ in range(ITERATIONS):
        square = x @ x.mT
        x = a * x + (b * square + c * square @ square) @ x
    result: Tensor = x.to(matrices.dtype)
    return result


class Muon(torch.optim.Optimizer):
    """For the matrices inside the blocks alone; the rest belongs to AdamW."""

    def __init__(
        self,
        groups: Iterable[dict[str, Any]],
        lr: float,
        momentum: float,
        weight_decay: float,
        fused: Collection[Tensor] = (),
    ) -> None:
        """`fused`: those that are q, k and v in one matrix; the paper has three, and so three are orthogonalised."""
        self._fused = {id(parameter) for parameter in fused}
        super().__init__(groups, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        assert closure is None
        for group in self.param_groups:
            by_shape: dict[tuple[int, int], list[tuple[Tensor, Tensor, bool]]] = {}
            for parameter in group["params"]:
                for part, update in self._parts(parameter, group["momentum"]):
                    tall = update.shape[0] > update.shape[1]
                    wide = update.mT if tall else update
                    by_shape.setdefault((wide.shape[0], wide.shape[1]), []).append((part, wide, tall))
            for entries in by_shape.values():
                # All matrices of one shape in one batched product: a small model has dozens of small ones.
                updates = orthogonal(torch.stack([wide for _, wide, _ in entries]))
                for (part, _, tall), update in zip(entries, updates, strict=True):
                    scale = max(1.0, part.shape[0] / part.shape[1]) ** 0.5
                    part.mul_(1.0 - group["lr"] * group["weight_decay"])
                    part.add_(update.mT if tall else update, alpha=-group["lr"] * scale)

    def _parts(self, parameter: Tensor, momentum: float) -> list[tuple[Tensor, Tensor]]:
        """The matrix and its update, or those of the three that are fused in it."""
        assert parameter.grad is not None
        state = self.state[parameter]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(parameter)
        buffer = state["momentum_buffer"].lerp_(parameter.grad, 1.0 - momentum)
        update = parameter.grad.lerp(buffer, momentum)  # Nesterov
        pieces = 3 if id(parameter) in self._fused else 1
        return list(zip(parameter.detach().chunk(pieces), update.chunk(pieces), strict=True))
