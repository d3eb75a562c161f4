"""A checkpoint's tensors must be those of this model and optimizer, slot by slot, before any of them is taken."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from pipelines import identity, store
from pipelines.training.build import build_state
from pipelines.training.checkpoint import Checkpoints
from pipelines.training.config import Adam, AdamW, AnyOptimizer, CheckpointConfig, Lamb, MuonAdamW, ScheduleFree, Sgd
from pipelines.training.loop import Hooks, train
from pipelines.training.parallel import Ranks
from pipelines.training.saves import Saves
from pipelines.training.state import StateError, TrainState
from tests.pipelines.training.tiny import TinyModel, make_batches, make_config, prepare

OPTIMIZERS: list[AnyOptimizer] = [AdamW(), Adam(), Sgd(), Sgd(momentum=0.0), MuonAdamW(), ScheduleFree(), Lamb()]


def build(optimizer: AnyOptimizer) -> TrainState:
    torch.manual_seed(7)
    return build_state(TinyModel(), make_config(6).train, optimizer, Ranks())


def trained(optimizer: AnyOptimizer) -> dict[str, Tensor]:
    state = build(optimizer)
    train(state, make_batches(0), make_config(6), Ranks(), prepare, Hooks())
    return state.tensors()


@pytest.mark.parametrize("name", ["weights", "other/head.weight", "optimizer/head.weight/a/b"])
def test_what_no_state_has_is_refused_by_its_name(name: str) -> None:
    with pytest.raises(StateError, match=f"left over {name}"):
        build(AdamW()).load({**trained(AdamW()), name: torch.zeros(1)}, 6)


def test_weights_of_another_type_are_refused() -> None:
    tensors = trained(AdamW())
    tensors["model/head.weight"] = tensors["model/head.weight"].long()
    with pytest.raises(StateError, match=r"head.weight is \(3, 8\) of torch.int64"):
        build(AdamW()).load(tensors, 6)


@pytest.mark.parametrize("optimizer", OPTIMIZERS, ids=lambda config: f"{config.kind} {getattr(config, 'momentum', '')}")
def test_what_every_optimizer_keeps_is_known_by_name_and_shape(optimizer: AnyOptimizer) -> None:
    tensors = trained(optimizer)
    again = build(optimizer)
    again.load(tensors, 6)
    assert again.step == 6 and again.tensors().keys() == tensors.keys()


CHANGES: dict[str, Callable[[dict[str, Tensor]], dict[str, Tensor]]] = {
    "is (1,)": lambda all: {**all, "optimizer/head.weight/exp_avg": torch.zeros(1)},
    "of torch.int64": lambda all: {**all, "optimizer/head.weight/exp_avg": torch.zeros(3, 8, dtype=torch.int64)},
    "missing optimizer/head.weight/exp_avg": lambda all: {
        name: tensor for name, tensor in all.items() if name != "optimizer/head.weight/exp_avg"
    },
    "missing optimizer/": lambda all: {name: tensor for name, tensor in all.items() if name.startswith("model/")},
    "left over optimizer/head.weight/other": lambda all: {**all, "optimizer/head.weight/other": torch.zeros(3, 8)},
    "left over optimizer/head.weight/a/b": lambda all: {**all, "optimizer/head.weight/a/b": torch.zeros(1)},
    "left over optimizer/nobody/step": lambda all: {**all, "optimizer/nobody/step": torch.zeros(())},
}


@pytest.mark.parametrize("told", CHANGES)
def test_slots_that_do_not_fit_are_refused_and_nothing_is_changed(told: str) -> None:
    """A fused kernel does not look: it would write past the end of a slot that is too small."""
    changed = CHANGES[told](trained(AdamW()))
    state = build(AdamW())
    before = {name: tensor.clone() for name, tensor in state.tensors().items()}
    with pytest.raises(StateError) as caught:
        state.load(changed, 6)
    assert told in str(caught.value)
    assert all(torch.equal(before[name], tensor) for name, tensor in state.tensors().items())


def test_before_the_first_update_there_is_nothing_to_keep() -> None:
    fresh = build(AdamW())
    build(AdamW()).load(fresh.tensors(), 0)


def test_a_gradient_that_was_not_finite_is_forgotten_with_its_weights() -> None:
    tensors = trained(AdamW())
    state = build(AdamW())
    state.grad_norm = torch.tensor(float("nan"))
    state.load(tensors, 6)
    assert state.grad_norm is None, "else no checkpoint would be stored until the next update"


def test_a_checkpoint_of_another_model_is_passed_over(tmp_path: Path) -> None:
    """Whole by its hashes, and yet not what this run can go on with: the one before is."""
    root = str(tmp_path / "run")
    store.write_json(store.join(root, "lease.json"), {"token": "t1"})
    attempt = identity.Attempt("pretrain", "d" * 64, 1, root, "t1", 1)
    tensors = trained(AdamW())
    Checkpoints(attempt).save(6, tensors, {"order": {}})
    Checkpoints(attempt).save(7, CHANGES["is (1,)"](tensors), {"order": {}})
    state = build(AdamW())
    assert state.gradients is not None
    saves = Saves(attempt, CheckpointConfig(), state, state.gradients, Ranks(), None, dict)
    loaded = saves.load_together()
    assert loaded is not None and loaded.found.step == 6
