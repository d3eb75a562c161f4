"""LAMB (You et al., arXiv 1904.00962, algorithm 2): Adam's direction, scaled to the length of the tensor it moves.

As NVIDIA's fused LAMB, with which DeiT III was trained: the moments are corrected for their start, and the length is
set only where weight decay acts (kernels); biases, norms and embeddings take Adam's step. The gradient's clipping is
the loop's. All state is tensors, so that a stored run goes on to the bit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

__all__ = ["Lamb"]


class Lamb(torch.optim.Optimizer):
    """Groups carry `weight_decay`. Tensors must be whole: a part would have another length."""

    def __init__(self, groups: Iterable[dict[str, Any]], lr: float, betas: tuple[float, float], eps: float) -> None:
        super().__init__(groups, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": 0.0})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        assert closure is None
        for group in self.param_groups:
            weights = [parameter for parameter in group["params"] if parameter.grad is not None]
            if not weights:
                continue
            decay1, decay2 = group["betas"]
            states = [self._state(parameter) for parameter in weights]
            steps = [state["step"] for state in states]
            firsts, seconds = [state["exp_avg"] for state in states], [state["exp_avg_sq"] for state in states]
            gradients = [parameter.grad for parameter in weights]
            torch._foreach_add_(steps, 1.0)
            torch._foreach_lerp_(firsts, gradients, 1.0 - decay1)
            torch._foreach_mul_(seconds, decay2)
            torch._foreach_addcmul_(seconds, gradients, gradients, value=1.0 - decay2)
            # On the device: reading the step would make the host wait.
            root = torch._foreach_sqrt(
                [second / (1.0 - decay2**step) for second, step in zip(seconds, steps, strict=True)]
            )
            torch._foreach_add_(root, group["eps"])
            updates = [first / (1.0 - decay1**step) for first, step in zip(firsts, steps, strict=True)]
            torch._foreach_div_(updates, root)
            if group["weight_decay"]:
                torch._foreach_add_(updates, weights, alpha=group["weight_decay"])
                torch._foreach_mul_(updates, self._ratios(weights, updates))
            torch._foreach_add_(weights, updates, alpha=-group["lr"])

    @staticmethod
    def _ratios(weights: list[Tensor], updates: list[Tensor]) -> list[Tensor]:
        """Length of the weight over that of its update; 1 where either is zero, as a zero head is at its start."""
        pairs = zip(torch._foreach_norm(weights), torch._foreach_norm(updates), strict=True)
        return [torch.where((w > 0) & (u > 0), w / u, torch.ones_like(w)) for w, u in pairs]

    def _state(self, parameter: Tensor) -> dict[str, Tensor]:
        state: dict[str, Tensor] = self.state[parameter]
        if not state:
            state["step"] = torch.zeros((), device=parameter.device)
            state["exp_avg"] = torch.zeros_like(parameter)
            state["exp_avg_sq"] = torch.zeros_like(parameter)
        return state
