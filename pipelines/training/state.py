"""What changes while training: parameters, buffers, optimizer state and the step. All of it as plain named tensors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

__all__ = ["StateError", "TrainState"]


class StateError(ValueError):
    """Stored tensors do not fit this model and optimizer."""


@dataclass(slots=True)
class TrainState:
    model: nn.Module
    optimizers: tuple[torch.optim.Optimizer, ...]
    step: int = 0  # Optimizer updates done.

    def tensors(self) -> dict[str, Tensor]:
        """Copies on the CPU: `model/NAME` and `optimizer/NAME/SLOT`. The copy is the only pause of a checkpoint."""
        names = self._names()
        found = {f"model/{name}": tensor for name, tensor in self.model.state_dict().items()}
        for optimizer in self.optimizers:
            for parameter, slots in optimizer.state.items():
                for slot, value in slots.items():
                    if isinstance(value, Tensor):
                        found[f"optimizer/{names[parameter]}/{slot}"] = value
        return {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in found.items()}

    def load(self, tensors: Mapping[str, Tensor], step: int) -> None:
        """The inverse of `tensors()`. Raises StateError listing every name that is missing, left over or misshapen."""
        own = self.model.state_dict()
        stored = {name.removeprefix("model/"): tensor for name, tensor in tensors.items() if name.startswith("model/")}
        problems = [f"missing {name}" for name in own.keys() - stored.keys()]
        problems += [f"left over {name}" for name in stored.keys() - own.keys()]
        problems += [
            f"{name} is {tuple(stored[name].shape)}, the model has {tuple(own[name].shape)}"
            for name in own.keys() & stored.keys()
            if own[name].shape != stored[name].shape
        ]
        parameters = dict(self.model.named_parameters())
        slots = {name: tensor for name, tensor in tensors.items() if name.startswith("optimizer/")}
        problems += [f"left over {name}" for name in slots if name.split("/")[1] not in parameters]
        if problems:
            raise StateError(f"checkpoint does not fit this model: {'; '.join(sorted(problems))}")
        with torch.no_grad():
            for name, tensor in stored.items():
                own[name].copy_(tensor)
        owners: dict[Tensor, torch.optim.Optimizer] = {}
        for optimizer in self.optimizers:
            optimizer.state.clear()
            owners |= {parameter: optimizer for group in optimizer.param_groups for parameter in group["params"]}
        for name, tensor in slots.items():
            _, owner, slot = name.split("/")
            parameter = parameters[owner]
            owners[parameter].state[parameter][slot] = tensor.to(parameter.device, copy=True)
        self.step = step

    def _names(self) -> dict[Tensor, str]:
        return {parameter: name for name, parameter in self.model.named_parameters()}
