"""What a step can be told to do otherwise: pieces, precision, averages, teachers, weights of classes."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from pipelines.training.build import build_state
from pipelines.training.config import AdamW, DistillConfig, EmaConfig, MuonAdamW, ScheduleFree, Sgd, TrainConfig
from pipelines.training.distill import Teacher, match_classes, teacher_loss
from pipelines.training.ema import Ema
from pipelines.training.loop import Hooks, LoopConfig, train
from pipelines.training.losses import loss_sum
from pipelines.training.objective import Objective, class_weight_tensor
from pipelines.training.parallel import Ranks
from pipelines.training.pieces import DoesNotFit, Pieces
from pipelines.training.state import StateError, TrainState
from tests.pipelines.training.tiny import CLASSES, TinyModel, make_batch, make_batches, make_config, make_state, prepare

ALONE = Ranks()


def config(steps: int, **options: Any) -> LoopConfig:
    made = make_config(steps)
    return dataclasses.replace(made, train=TrainConfig(batch_size=8, total_steps=steps, **options))


def run(steps: int, *, dropout: float = 0.0, state: TrainState | None = None, **options: Any) -> TrainState:
    state = state or make_state(dropout=dropout)
    train(state, make_batches(state.step), config(steps, **options), ALONE, prepare, Hooks())
    return state


def built(optimizer: Any = None, dropout: float = 0.0, **options: Any) -> TrainState:
    torch.manual_seed(7)
    return build_state(
        TinyModel(dropout), TrainConfig(batch_size=8, total_steps=9, **options), optimizer or AdamW(peak_lr=1e-2), ALONE
    )


# Pieces -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 3, 4, 7, 8, 100])
def test_pieces_make_the_update_of_the_whole(size: int) -> None:
    whole, cut = run(6), run(6, per_device_batch_size=size)
    for name, tensor in whole.tensors().items():
        torch.testing.assert_close(cut.tensors()[name], tensor, rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize(
    ("images", "size", "lengths"), [(8, None, [8]), (8, 3, [2, 3, 3]), (7, 4, [3, 4]), (2, 9, [2])]
)
def test_pieces_are_few_and_nearly_equal(images: int, size: int | None, lengths: list[int]) -> None:
    cuts = Pieces(size).cut(images)
    assert [cut.stop - cut.start for cut in cuts] == lengths
    assert cuts[0].start == 0 and cuts[-1].stop == images


class SmallDevice(TinyModel):
    """Runs out of memory as a GPU does: in the middle of a forward, whenever a piece is too large."""

    def __init__(self, holds: int) -> None:
        super().__init__(dropout=0.0)
        self.holds, self.failures = holds, 0

    def forward(self, images: torch.Tensor, tokens: bool = True) -> Any:
        if len(images) > self.holds:
            self.failures += 1
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB")
        return super().forward(images, tokens)


def small_device(holds: int) -> TrainState:
    torch.manual_seed(7)
    return build_state(SmallDevice(holds), TrainConfig(total_steps=9), AdamW(peak_lr=1e-2), ALONE)


def test_auto_halves_until_a_step_fits_and_changes_nothing_else() -> None:
    state, pieces, asked = small_device(3), Pieces("auto"), config(6, per_device_batch_size="auto")
    train(state, make_batches(0), asked, ALONE, prepare, Hooks(), pieces=pieces)
    assert pieces.size == 2 and state.model.failures == 2  # 8 and 4 images did not fit.
    for name, tensor in run(6, per_device_batch_size=2).tensors().items():
        assert torch.equal(state.tensors()[name], tensor), name


def test_a_size_that_was_found_before_is_not_searched_again() -> None:
    state = small_device(3)
    train(state, make_batches(0), config(2), ALONE, prepare, Hooks(), pieces=Pieces("auto", 2))
    assert state.model.failures == 0


def test_a_given_size_that_does_not_fit_is_an_error_with_the_remedy() -> None:
    with pytest.raises(DoesNotFit, match=r"4 images at once do not fit .* or to auto"):
        run(2, state=small_device(3), per_device_batch_size=4)
    with pytest.raises(DoesNotFit, match="not even one image fits"):
        run(2, state=small_device(0), per_device_batch_size="auto")


def test_another_error_is_not_taken_for_a_full_device() -> None:
    state = make_state()
    state.model.head = nn.Linear(5, CLASSES)
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        run(2, state=state, per_device_batch_size="auto")


# Precision ----------------------------------------------------------------------------------------------------------


def test_pure_bf16_keeps_updates_that_bf16_would_lose() -> None:
    """At a rate of 1e-5 no update of a bf16 weight near 1 survives rounding; the fp32 copies collect them."""
    state = built(Sgd(peak_lr=1e-5, momentum=0.0), precision="bf16_pure")
    before = state.weights()["head.weight"].clone()
    assert state.model.head.weight.dtype == torch.bfloat16 and before.dtype == torch.float32
    train(state, make_batches(0), config(9, precision="bf16_pure"), ALONE, prepare, Hooks())
    moved = state.weights()["head.weight"] - before
    assert moved.abs().max() > 0
    assert torch.equal(state.model.head.weight.detach(), state.weights()["head.weight"].bfloat16())


@pytest.mark.parametrize("size", [None, 3])
def test_pure_bf16_is_near_fp32_and_its_pieces_add_up_in_fp32(size: int | None) -> None:
    pure = built(precision="bf16_pure")
    asked = config(9, precision="bf16_pure", per_device_batch_size=size)
    train(pure, make_batches(0), asked, ALONE, prepare, Hooks())
    exact = built()
    train(exact, make_batches(0), config(9), ALONE, prepare, Hooks())
    for name, tensor in exact.weights().items():
        torch.testing.assert_close(pure.weights()[name], tensor, rtol=0.1, atol=0.03, msg=name)


# Averages -----------------------------------------------------------------------------------------------------------


def test_the_average_is_the_sum_of_the_past_by_its_decay() -> None:
    state = built(ema=EmaConfig(decay=0.8, warmup=False))
    expected = {name: tensor.double().clone() for name, tensor in state.weights().items()}

    def follow(state: TrainState) -> None:
        for name, tensor in state.weights().items():
            expected[name] = 0.8 * expected[name] + 0.2 * tensor.double()

    train(state, make_batches(0), config(9), ALONE, prepare, Hooks(after_step=follow))
    assert state.ema is not None
    for name, tensor in state.ema.tensors.items():
        torch.testing.assert_close(tensor.double(), expected[name], rtol=1e-5, atol=1e-7)


def test_a_young_average_forgets_faster() -> None:
    ema = Ema({}, EmaConfig(decay=0.9999))
    assert ema.decay(1) == pytest.approx(2 / 11)
    assert ema.decay(10**9) == 0.9999


@pytest.mark.parametrize(
    "options",
    [
        {"ema": EmaConfig(decay=0.9)},
        {"precision": "bf16_pure"},
        {"precision": "bf16_pure", "ema": EmaConfig(decay=0.9), "optimizer": MuonAdamW()},
        {"optimizer": ScheduleFree(peak_lr=1e-2), "precision": "bf16"},
    ],
    ids=str,
)
def test_whatever_is_kept_a_resumed_run_is_the_same_to_the_bit(options: dict[str, Any]) -> None:
    optimizer = options.pop("optimizer", AdamW(peak_lr=1e-2))
    kept: dict[int, dict[str, torch.Tensor]] = {}
    hooks = Hooks(after_step=lambda state: kept.update({state.step: state.tensors()}))
    whole = built(optimizer, dropout=0.1, **options)
    train(whole, make_batches(0), config(9, **options), ALONE, prepare, hooks)
    torch.manual_seed(99)
    second = build_state(TinyModel(0.1), TrainConfig(total_steps=9, **options), optimizer, ALONE)
    second.load(kept[4], 4)
    train(second, make_batches(4), config(9, **options), ALONE, prepare, Hooks())
    ours, theirs = second.tensors(), whole.tensors()
    assert ours.keys() == theirs.keys() and ("ema/head.bias" in ours) == ("ema" in options)
    for name, tensor in theirs.items():
        assert torch.equal(ours[name], tensor), name


def test_a_checkpoint_of_one_precision_goes_on_in_another() -> None:
    state = run(4)
    pure = built(precision="bf16_pure")
    pure.load(state.tensors(), 4)
    assert torch.equal(pure.weights()["head.weight"], state.weights()["head.weight"])
    assert torch.equal(pure.model.head.weight.detach(), state.weights()["head.weight"].bfloat16())


def test_a_checkpoint_with_an_average_is_refused_by_a_run_without() -> None:
    state = built(ema=EmaConfig(decay=0.9))
    with pytest.raises(StateError, match="left over ema/"):
        built().load(state.tensors(), 1)
    with pytest.raises(StateError, match=r"missing head\.bias"):
        state.load(built().tensors(), 1)


@pytest.mark.parametrize("precision", ["fp32", "bf16_pure"])
def test_the_model_computes_with_other_weights_for_a_block_alone(precision: str) -> None:
    state = built(precision=precision, ema=EmaConfig(decay=0.5))
    train(state, make_batches(0), config(5, precision=precision), ALONE, prepare, Hooks())
    assert state.ema is not None
    images = prepare(make_batch(0).images).to(next(state.model.parameters()).dtype)
    state.model.eval()
    before, tensors = state.model(images).logits, state.tensors()
    with state.using(state.ema.tensors):
        assert not torch.equal(state.model(images).logits, before)
        assert torch.equal(state.weights()["head.weight"], state.ema.tensors["head.weight"])
    assert torch.equal(state.model(images).logits, before)
    assert all(torch.equal(tensor, state.tensors()[name]) for name, tensor in tensors.items())


def test_what_schedule_free_hands_on_is_its_average() -> None:
    state = built(ScheduleFree(peak_lr=1e-2))
    train(state, make_batches(0), config(9), ALONE, prepare, Hooks())
    weights, handed_on = state.weights(), state.evaluated()
    assert state.averages_itself and weights.keys() == handed_on.keys()
    assert not torch.equal(weights["head.weight"], handed_on["head.weight"])
    assert all(torch.equal(tensor, built().evaluated()[name]) for name, tensor in built().weights().items())


# Losses -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["softmax", "sigmoid"])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_weights_of_classes_are_those_of_torch_and_the_same_for_soft_labels(kind: Any, smoothing: float) -> None:
    torch.manual_seed(0)
    logits, labels = torch.randn(6, CLASSES), torch.randint(0, CLASSES, (6,))
    given = class_weight_tensor({"b": 3.0, "c": 0.0}, ["a", "b", "c"])
    assert given is not None and given.tolist() == [1.0, 3.0, 0.0]
    loss = loss_sum(logits, labels, torch.ones(6), kind, smoothing, given)
    hot = F.one_hot(labels, CLASSES).float()
    torch.testing.assert_close(loss_sum(logits, hot, torch.ones(6), kind, smoothing, given), loss)
    if kind == "softmax":
        expected = nn.CrossEntropyLoss(weight=given, reduction="sum", label_smoothing=smoothing)(logits, labels)
        torch.testing.assert_close(loss, expected)


def test_an_unknown_class_is_named() -> None:
    with pytest.raises(ValueError, match="class_weights names d, which the corpus has not; it has a, b"):
        class_weight_tensor({"d": 1.0}, ["a", "b"])


@pytest.mark.parametrize("kind", ["softmax", "sigmoid"])
def test_a_student_that_agrees_with_its_teacher_has_nothing_to_learn(kind: Any) -> None:
    torch.manual_seed(0)
    answers = torch.randn(5, CLASSES)
    student = answers.clone().requires_grad_()
    loss = teacher_loss(student, answers, torch.ones(5), kind, DistillConfig(teacher="t", temperature=3.0))
    assert loss.item() == pytest.approx(0.0, abs=1e-5)
    (gradient,) = torch.autograd.grad(loss, student)
    assert gradient.abs().max() < 1e-5
    assert teacher_loss(-student, answers, torch.ones(5), kind, DistillConfig(teacher="t")) > 1


def test_hard_targets_are_the_teachers_best_class() -> None:
    torch.manual_seed(0)
    logits, answers = torch.randn(5, CLASSES), torch.randn(5, CLASSES)
    loss = teacher_loss(logits, answers, torch.ones(5), "softmax", DistillConfig(teacher="t", target="hard"))
    torch.testing.assert_close(loss, F.cross_entropy(logits, answers.argmax(1), reduction="sum"))


def test_the_share_of_the_teacher_mixes_the_two_losses() -> None:
    torch.manual_seed(0)
    logits, answers, labels, ones = (
        torch.randn(5, CLASSES),
        torch.randn(5, CLASSES),
        torch.zeros(5).long(),
        torch.ones(5),
    )
    share = DistillConfig(teacher="t", weight=0.3)
    teacher = Teacher(TinyModel(), share, prepare, None)
    loss = Objective(TrainConfig(total_steps=1), None, teacher)(logits, labels, ones, answers)
    expected = 0.7 * loss_sum(logits, labels, ones) + 0.3 * teacher_loss(logits, answers, ones, "softmax", share)
    torch.testing.assert_close(loss, expected)


def test_a_student_learns_from_a_teacher_alone() -> None:
    torch.manual_seed(1)
    teacher = Teacher(TinyModel(0.5), DistillConfig(teacher="t", weight=1.0), prepare, torch.tensor([2, 0, 1]))
    state, losses = make_state(dropout=0.0), []
    asked = config(80)
    hooks = Hooks(window=lambda _, metrics: losses.append(metrics["train/loss"]))
    same = [dataclasses.replace(make_batch(0), step=None) for _ in range(80)]
    train(state, same, asked, ALONE, prepare, hooks, objective=Objective(asked.train, teacher=teacher))
    assert losses[-1] < 0.1 * losses[0]
    images = make_batch(0).images[:-1]
    state.model.eval()
    found = state.model(prepare(images)).logits.softmax(1)
    torch.testing.assert_close(found, teacher.logits(images, asked.train).softmax(1), atol=0.1, rtol=0.1)
    assert all(parameter.grad is None for parameter in teacher.model.parameters())


def test_classes_are_matched_by_name() -> None:
    assert match_classes(("a", "b"), ("a", "b")) is None
    assert match_classes(("a", "b"), ("c", "b", "a")) == [2, 1]
    with pytest.raises(ValueError, match="does not know 1 of 2 classes \\(b\\)"):
        match_classes(("a", "b"), ("a", "c"))
