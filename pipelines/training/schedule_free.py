"""Schedule-Free AdamW (Defazio et al., arXiv 2405.15682, algorithm 1 with their weighting by the squared rate).

Three sequences: z takes the steps, x averages z, and the gradient is taken at y between them. The parameter holds y; x
follows from y and z. All state is tensors, so that a stored run goes on to the bit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

__all__ = ["ON_CPU", "ScheduleFreeAdamW"]

ON_CPU = "schedule"  # The slot that is read by the host at every step: on a GPU it would make the step wait.


class ScheduleFreeAdamW(torch.optim.Optimizer):
    """`lr` is set before each step, warm-up included; a step weighs in the average by the highest rate so far."""

    def __init__(
        self, groups: Iterable[dict[str, Any]], lr: float, betas: tuple[float, float], eps: float, weight_decay: float
    ) -> None:
        super().__init__(groups, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        assert closure is None
        for group in self.param_groups:
            (mix, decay2), lr = group["betas"], group["lr"]
            ys = [parameter for parameter in group["params"] if parameter.grad is not None]
            if not ys:
                continue
            states = [self._state(parameter) for parameter in ys]
            # Each float64 (3,) on the CPU: steps, highest rate, sum of weights.
            clocks = [state[ON_CPU] for state in states]
            # After a resume that of a parameter of which this rank has no rows is a new one.
            clock = max(clocks, key=lambda each: float(each[0]))
            clock[0] += 1
            clock[1] = max(float(clock[1]), lr)
            clock[2] += clock[1] ** 2
            for other in clocks:
                other.copy_(clock)
            share = float(clock[1] ** 2 / clock[2]) if clock[2] else 1.0  # Of this step in the average.
            zs, seconds = [state["z"] for state in states], [state["exp_avg_sq"] for state in states]
            gradients = [parameter.grad for parameter in ys]
            torch._foreach_mul_(seconds, decay2)
            torch._foreach_addcmul_(seconds, gradients, gradients, value=1.0 - decay2)
            scale = torch._foreach_div(seconds, 1.0 - decay2 ** float(clock[0]))
            torch._foreach_sqrt_(scale)
            torch._foreach_add_(scale, group["eps"])
            updates = torch._foreach_div(gradients, scale)
            if group["weight_decay"]:
                torch._foreach_add_(updates, ys, alpha=group["weight_decay"])
            # y' = mix x' + (1 - mix) z', written without x: x' = (1 - share) x + share z', and x from y and z.
            torch._foreach_lerp_(ys, zs, share)
            torch._foreach_add_(ys, updates, alpha=lr * (mix * (1.0 - share) - 1.0))
            torch._foreach_add_(zs, updates, alpha=-lr)

    def _state(self, parameter: Tensor) -> dict[str, Tensor]:
        state: dict[str, Tensor] = self.state[parameter]
        if "z" not in state:
            state["z"] = parameter.detach().clone()
            state["exp_avg_sq"] = torch.zeros_like(parameter)
            state[ON_CPU] = torch.zeros(3, dtype=torch.float64)
        return state

    @torch.no_grad()
    def averages(self) -> dict[Tensor, Tensor]:
        """x of each parameter: what the method hands on. Before the first step it is the parameter."""
        found: dict[Tensor, Tensor] = {}
        for group in self.param_groups:
            for parameter in group["params"]:
                z: Tensor | None = self.state[parameter].get("z")
                x = parameter.detach().clone() if z is None else torch.lerp(z, parameter, 1.0 / group["betas"][0])
                found[parameter] = x
        return found
