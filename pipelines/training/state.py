"""What changes while training: weights, optimizer state, averages and the step. All of it as plain named tensors."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from pipelines.training.ema import Ema
from pipelines.training.optimizers import slots_of
from pipelines.training.schedule_free import ON_CPU, ScheduleFreeAdamW

if TYPE_CHECKING:
    from pipelines.training.parallel import Gradients

__all__ = ["StateError", "TrainState"]


MOST_WITHOUT_STATE = 5  # Steps; as many as may be left out of a run.
KINDS = ("model/", "optimizer/", "ema/", "best/")  # What the name of a stored tensor begins with.
MOST_SAID = 20  # Names of one message.


class StateError(ValueError):
    """Stored tensors do not fit this model and optimizer."""


@dataclass(slots=True)
class TrainState:
    model: nn.Module
    optimizers: tuple[torch.optim.Optimizer, ...]
    step: int = 0  # Optimizer updates done.
    gradients: Gradients | None = None  # Who sums them, and whose `weights` are updated; None: the model's own.
    ema: Ema | None = None
    grad_norm: Tensor | None = None  # Of the last update, on the device: not finite once the weights are not.
    best: dict[str, Tensor] = field(default_factory=dict)  # On the CPU: the weights of the best validation so far.

    def weights(self) -> dict[str, Tensor]:
        """What a run is about, by the model's names: fp32 copies where the model computes in bf16, or a rank's part."""
        found = {name: tensor.detach() for name, tensor in self.model.state_dict().items()}
        if self.gradients is not None:
            found |= {name: parameter.detach() for name, parameter in self.gradients.weights.items()}
        return found

    def evaluated(self) -> dict[str, Tensor]:
        """What is validated and handed on: the weights, or the average that Schedule-Free keeps of them."""
        found = self.weights()
        for optimizer in self.optimizers:
            if isinstance(optimizer, ScheduleFreeAdamW):
                names = self._names()
                found |= {names[parameter]: average for parameter, average in optimizer.averages().items()}
        return found

    @property
    def averages_itself(self) -> bool:
        return any(isinstance(optimizer, ScheduleFreeAdamW) for optimizer in self.optimizers)

    def tensors(self) -> dict[str, Tensor]:
        """Copies on the CPU: `model/NAME`, `optimizer/NAME/SLOT`, `ema/NAME`, `best/NAME`. The only pause of a save."""
        names = self._names()
        found = {f"model/{name}": tensor for name, tensor in self.weights().items()}
        for optimizer in self.optimizers:
            for parameter, slots in optimizer.state.items():
                for slot, value in slots.items():
                    if isinstance(value, Tensor):
                        found[f"optimizer/{names[parameter]}/{slot}"] = value
        if self.ema is not None:
            found |= {f"ema/{name}": tensor for name, tensor in self.ema.tensors.items()}
        copies = {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in found.items()}
        return copies | {f"best/{name}": tensor for name, tensor in self.best.items()}

    def check(self, tensors: Mapping[str, Tensor], step: int) -> None:
        """Raises StateError listing every name that is missing, left over or misshapen, of optimizer slots too."""
        foreign = [name for name in tensors if not name.startswith(KINDS)]
        if foreign:
            raise StateError(f"checkpoint does not fit this model: left over {', '.join(sorted(foreign)[:MOST_SAID])}")
        own = self.weights()
        tensors = tensors if self.gradients is None else self.gradients.own_part(tensors)
        stored, slots, ema, best = (_under(tensors, kind) for kind in KINDS)
        problems = _misfits(stored, own)
        if self.ema is not None:
            problems += _misfits(ema, self.ema.tensors)
        elif ema:
            problems.append(f"left over ema/{next(iter(ema))}")
        problems += _misfits(best, own) if best else []
        names, wanted = self._names(), {}
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                for parameter in group["params"]:
                    for slot, shape in slots_of(optimizer, parameter).items():
                        wanted[f"{names[parameter]}/{slot}"] = shape
        slots = self._not_bare(slots)
        # The first steps of a run may all have been left out; then no optimizer has anything yet.
        if slots or step > MOST_WITHOUT_STATE:
            problems += [f"missing optimizer/{name}" for name in wanted.keys() - slots.keys()]
        problems += [f"left over optimizer/{name}" for name in slots.keys() - wanted.keys()]
        problems += [
            f"optimizer/{name} is {tuple(slots[name].shape)} of {slots[name].dtype}, not {tuple(wanted[name])}"
            for name in slots.keys() & wanted.keys()
            if slots[name].shape != wanted[name] or not slots[name].is_floating_point()
        ]
        if problems:
            raise StateError(f"checkpoint does not fit this model: {'; '.join(sorted(problems)[:MOST_SAID])}")

    def _not_bare(self, slots: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Without those of parameters of which this rank has no rows: not even counters are kept of them."""
        bare = {name for name, parameter in self._parameters().items() if not parameter.numel()}
        return {key: tensor for key, tensor in slots.items() if key.split("/")[0] not in bare}

    def load(self, tensors: Mapping[str, Tensor], step: int) -> None:
        """The inverse of `tensors()`. Raises StateError, with nothing changed, if they do not fit."""
        self.check(tensors, step)
        own, parameters = self.weights(), self._parameters()
        tensors = tensors if self.gradients is None else self.gradients.own_part(tensors)
        stored, slots, ema, best = (_under(tensors, kind) for kind in KINDS)
        slots = self._not_bare(slots)
        with torch.no_grad():
            for name, tensor in stored.items():
                own[name].copy_(tensor)
            if self.ema is not None:
                for name, tensor in ema.items():
                    self.ema.tensors[name].copy_(tensor)
        self.best = {name: tensor.clone() for name, tensor in best.items()}
        self.grad_norm = None  # Of an update that these weights know nothing of.
        if self.gradients is not None:
            self.gradients.updated()
        owners: dict[Tensor, torch.optim.Optimizer] = {}
        for optimizer in self.optimizers:
            optimizer.state.clear()
            owners |= {parameter: optimizer for group in optimizer.param_groups for parameter in group["params"]}
        for name, tensor in slots.items():
            owner, slot = name.split("/")
            parameter = parameters[owner]
            device = torch.device("cpu") if slot == ON_CPU else parameter.device
            owners[parameter].state[parameter][slot] = tensor.to(device, copy=True)
        self.step = step

    @contextmanager
    def using(self, weights: Mapping[str, Tensor]) -> Iterator[None]:
        """The model computes with these weights for a block, and with its own again, to the bit, after it."""
        own = self.weights()
        kept = {name: own[name].clone() for name in weights}
        try:
            self._put(own, weights)
            yield
        finally:
            self._put(own, kept)

    @torch.no_grad()
    def _put(self, own: Mapping[str, Tensor], weights: Mapping[str, Tensor]) -> None:
        for name, tensor in weights.items():
            own[name].copy_(tensor)
        if self.gradients is not None:
            self.gradients.updated()

    def _parameters(self) -> dict[str, nn.Parameter]:
        return dict(self.model.named_parameters()) if self.gradients is None else self.gradients.weights

    def _names(self) -> dict[Tensor, str]:
        return {parameter: name for name, parameter in self._parameters().items()}


def _under(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def _misfits(stored: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> list[str]:
    problems = [f"missing {name}" for name in own.keys() - stored.keys()]
    problems += [f"left over {name}" for name in stored.keys() - own.keys()]
    return problems + [
        f"{name} is {tuple(stored[name].shape)} of {stored[name].dtype}, the model has {tuple(own[name].shape)} of"
        f" {own[name].dtype}"
        for name in own.keys() & stored.keys()
        if own[name].shape != stored[name].shape or own[name].dtype != stored[name].dtype
    ]
