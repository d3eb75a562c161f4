from __future__ import annotations

import hashlib
from collections.abc import Iterator

import pytest
import torch

from pipelines.batch import Batch
from pipelines.training.config import AdamW, AnyOptimizer, Lamb, MuonAdamW, ScheduleFree, Sgd
from pipelines.training.loop import Hooks, NotFinite, train
from pipelines.training.names import TrainingError
from pipelines.training.parallel import GradientSum, Ranks, seed_step
from pipelines.training.state import StateError, TrainState
from tests.pipelines.training.tiny import TinyModel, make_batch, make_batches, make_config, make_state, prepare

ALONE = Ranks()


def digests(state: TrainState) -> dict[str, str]:
    return {name: hashlib.sha256(tensor.numpy().tobytes()).hexdigest() for name, tensor in state.tensors().items()}


def test_it_learns_a_batch_by_heart() -> None:
    seen: list[float] = []
    state, config = make_state(dropout=0.0), make_config(60)
    same = (make_batch(0) for _ in range(60))
    for batch in (batches := list(same)):
        batch.step = None
    train(state, batches, config, ALONE, prepare, Hooks(window=lambda _, metrics: seen.append(metrics["train/loss"])))
    assert seen[-1] < 0.3 * seen[0]


@pytest.mark.parametrize(
    "optimizer", [AdamW(peak_lr=1e-2), Sgd(), MuonAdamW(), ScheduleFree(), Lamb()], ids=lambda config: config.kind
)
@pytest.mark.parametrize("stop", [1, 4, 9])
def test_stopped_and_resumed_is_bit_for_bit_the_same_as_uninterrupted(optimizer: AnyOptimizer, stop: int) -> None:
    whole = make_state(optimizer)
    train(whole, make_batches(0), make_config(12, optimizer), ALONE, prepare, Hooks())

    first = make_state(optimizer)
    kept: dict[int, dict[str, torch.Tensor]] = {}
    hooks = Hooks(after_step=lambda state: kept.update({state.step: state.tensors()}))
    train(first, make_batches(0), make_config(12, optimizer), ALONE, prepare, hooks)
    torch.manual_seed(999)  # Whatever randomness another process has must not matter.
    second = make_state(optimizer)
    second.load(kept[stop], stop)
    train(second, make_batches(stop), make_config(12, optimizer), ALONE, prepare, Hooks())
    assert digests(second) == digests(whole)


def test_a_wish_to_stop_ends_the_run_at_the_next_window_and_not_before() -> None:
    state = make_state()
    assert not train(state, make_batches(0), make_config(50), ALONE, prepare, Hooks(wants_stop=lambda: True))
    assert state.step == 4


def test_a_batch_of_another_step_is_refused() -> None:
    with pytest.raises(TrainingError, match="gave step 3 where step 0 is due"):
        train(make_state(), make_batches(3), make_config(5), ALONE, prepare, Hooks())


def test_batches_that_end_early_are_an_error_that_names_the_step() -> None:
    with pytest.raises(TrainingError, match="ended at step 2 of 5"):
        train(make_state(), [make_batch(0), make_batch(1)], make_config(5), ALONE, prepare, Hooks())


def spoiled(step: int) -> Iterator[Batch]:
    """Batches of which one holds a weight that no sum survives."""
    for batch in make_batches(0):
        if batch.step == step:
            batch.weights = batch.weights * float("nan")
        yield batch


def test_a_loss_that_is_not_finite_stops_and_names_the_step() -> None:
    with pytest.raises(NotFinite, match="loss or gradient of step 6 is not finite") as error:
        train(make_state(), spoiled(6), make_config(12), ALONE, prepare, Hooks())
    assert error.value.step == 6


def test_a_step_that_is_left_out_changes_no_weight() -> None:
    kept: dict[int, dict[str, torch.Tensor]] = {}
    hooks = Hooks(after_step=lambda state: kept.update({state.step: state.tensors()}))
    state = make_state()
    train(state, spoiled(6), make_config(12), ALONE, prepare, hooks, left_out={6})
    assert all(torch.equal(kept[6][name], tensor) for name, tensor in kept[7].items())
    assert all(tensor.isfinite().all() for tensor in kept[12].values())
    assert not torch.equal(kept[7]["model/head.bias"], kept[8]["model/head.bias"])


def test_validation_comes_at_its_steps_and_after_the_last() -> None:
    steps: list[int] = []
    config = make_config(10, validate_every_steps=4)
    train(make_state(), make_batches(0), config, ALONE, prepare, Hooks(validate=steps.append))
    assert steps == [4, 8, 10]


def test_time_between_steps_is_not_in_images_per_second() -> None:
    import time

    seen: list[dict[str, float]] = []
    hooks = Hooks(window=lambda _, metrics: seen.append(metrics), validate=lambda _: time.sleep(1.0))
    train(make_state(), make_batches(0), make_config(8, validate_every_steps=4), ALONE, prepare, hooks)
    assert all(metrics["time/step"] < 0.5 for metrics in seen)


def test_bad_samples_are_counted() -> None:
    seen: list[dict[str, float]] = []
    train(
        make_state(),
        make_batches(0),
        make_config(4),
        ALONE,
        prepare,
        Hooks(window=lambda _, metrics: seen.append(metrics)),
    )
    assert seen[0]["train/bad_samples"] == 4


def test_gradients_live_in_one_buffer_and_are_clipped_together() -> None:
    model = TinyModel()
    sums = GradientSum(model, ALONE)
    sums.zero()
    model(torch.ones(2, 3, 4, 4)).logits.sum().mul(100).backward()
    before = torch.cat([parameter.grad.flatten() for parameter in sums.parameters])  # type: ignore[union-attr]
    norm = sums.clip(1.0)
    assert norm == pytest.approx(float(before.norm()))
    after = torch.cat([parameter.grad.flatten() for parameter in sums.parameters])  # type: ignore[union-attr]
    assert float(after.norm()) == pytest.approx(1.0, abs=1e-4)
    torch.testing.assert_close(after, before / norm, atol=1e-5, rtol=1e-4)


def test_each_step_and_rank_draws_its_own_numbers_and_always_the_same() -> None:
    drawn = {}
    for step in range(3):
        for rank in range(3):
            seed_step(5, step, rank)
            drawn[step, rank] = torch.rand(1).item()
    assert len(set(drawn.values())) == 9
    seed_step(5, 1, 2)
    assert torch.rand(1).item() == drawn[1, 2]


def test_a_state_that_does_not_fit_lists_every_name() -> None:
    tensors = make_state().tensors()
    tensors["model/extra"] = torch.zeros(1)
    del tensors["model/head.bias"]
    with pytest.raises(StateError, match=r"left over model/extra|left over extra.*missing head\.bias"):
        make_state().load(tensors, 1)
