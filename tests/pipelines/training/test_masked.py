"""Masked patch prediction: what is corrupted, what is asked, what counts, and what is handed on."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
from torch import Tensor

from pipelines.batch import Batch
from pipelines.config import RecipeError, from_dict
from pipelines.finetune import FinetuneRecipe
from pipelines.pretrain import PretrainRecipe
from pipelines.training.build import build_state
from pipelines.training.config import AdamW, MaskedConfig, TrainConfig
from pipelines.training.loop import Hooks, LoopConfig, train
from pipelines.training.masked import build, draw, macs, masked_terms, targets
from pipelines.training.parallel import Ranks
from pipelines.training.schedules import ScheduleConfig
from pipelines.training.state import TrainState
from pipelines.training.validation import validate
from vit_model import MaskedViT, ViTConfig, build_model, load_model, save_weights, without_masking

MODEL = ViTConfig(resolution=16, patch_size=4, width=16, depth=2, mlp_dim=32, num_heads=2, dropout=0.1)
Target = Literal["mean_colour", "colours", "pixels"]
TARGETS: list[Target] = ["mean_colour", "colours", "pixels"]


def batch(step: int, size: int = 6) -> Batch:
    source = torch.Generator().manual_seed(step)
    images = torch.randint(0, 256, (size, 3, 16, 16), dtype=torch.uint8, generator=source)
    weights = torch.ones(size)
    weights[-1] = 0.0
    ids = torch.arange(size) + step * size
    return Batch(images, torch.zeros(size, dtype=torch.int64), weights, ids, step, torch.full((size,), step // 3))


def batches(start: int) -> Iterator[Batch]:
    while True:
        yield batch(start)
        start += 1


def prepare(images: Tensor) -> Tensor:
    return images.float() / 127.5 - 1


def config(target: Target = "mean_colour", **options: Any) -> TrainConfig:
    return TrainConfig(batch_size=6, total_steps=12, masked=MaskedConfig(target=target), **options)


def state(target: Target = "mean_colour", **options: Any) -> TrainState:
    model = build(MODEL, MaskedConfig(target=target), seed=0)
    return build_state(model, config(target, **options), AdamW(peak_lr=1e-2), Ranks())


def learn(
    into: TrainState, steps: int, train_config: TrainConfig, keep: dict[int, dict[str, Tensor]] | None = None
) -> list[float]:
    """Losses of the steps; `keep` takes the state after each."""
    losses: list[float] = []
    loop = LoopConfig(
        train=train_config, schedule=ScheduleConfig(), peak_lr=1e-2, total_steps=steps, seed=3, log_every_steps=1
    )
    hooks = Hooks(
        window=lambda _, metrics: losses.append(metrics["train/loss"]),
        after_step=lambda state: None if keep is None else keep.update({state.step: state.tensors()}),
    )
    train(into, batches(into.step), loop, Ranks(), prepare, hooks)
    return losses


def test_half_of_the_patches_are_corrupted_four_fifths_of_them_by_the_mask() -> None:
    ids = np.arange(2000)
    rows, sources = draw(0, np.zeros(2000, np.int64), ids, 49, 0.5)
    assert rows.shape == sources.shape == (2000, 24)
    assert all(len(set(row)) == 24 for row in rows.tolist())
    masked, own = sources == -1, sources == rows
    assert masked.mean() == pytest.approx(0.8, abs=0.01)
    assert own.mean() == pytest.approx(0.1, abs=0.01)
    assert ((sources >= 0) & (sources < 49))[~masked].all()
    # Every patch is as likely as every other, and so is every other patch in its place.
    assert np.bincount(rows.flat, minlength=49) / 2000 == pytest.approx(24 / 49, abs=0.06)
    moved = (sources - rows)[~masked & ~own] % 49
    assert np.bincount(moved, minlength=49)[1:] == pytest.approx(len(moved) / 48, rel=0.5)


def test_the_draws_of_an_image_follow_from_seed_epoch_and_sample_alone() -> None:
    ids, epochs = np.array([5, 9, 1 << 40]), np.array([0, 1, 2])
    rows, sources = draw(7, epochs, ids, 16, 0.5)
    for i in range(3):
        alone = draw(7, epochs[i : i + 1], ids[i : i + 1], 16, 0.5)
        assert np.array_equal(alone[0][0], rows[i]) and np.array_equal(alone[1][0], sources[i])
    for other in (draw(8, epochs, ids, 16, 0.5), draw(7, epochs + 1, ids, 16, 0.5), draw(7, epochs, ids + 1, 16, 0.5)):
        assert not np.array_equal(other[0], rows)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("cells", [1, 4])
def test_colour_targets_are_those_of_a_plain_loop(channels: int, cells: int) -> None:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (2, channels, 24, 16), dtype=torch.uint8, generator=generator)
    images[0, :, :8, :8] = 32  # On an edge between two bins.
    rows = torch.tensor([[5, 0, 2], [1, 3, 4]])
    found = targets(images, rows, MaskedConfig(target="mean_colour" if cells == 1 else "colours"), 8)
    side = 8 // cells
    for b in range(2):
        for m, patch in enumerate(rows[b].tolist()):
            top, left = patch // 2 * 8, patch % 2 * 8
            for cell in range(cells**2):
                y, x = top + cell // cells * side, left + cell % cells * side
                expected = 0
                for channel in range(channels):
                    values = [int(images[b, channel, y + i, x + j]) for i in range(side) for j in range(side)]
                    expected = expected * 8 + sum(values) // len(values) // 32
                assert found[b, m, cell] == expected


def test_pixel_targets_are_the_patches() -> None:
    images = torch.arange(2 * 3 * 8 * 8).remainder(256).to(torch.uint8).view(2, 3, 8, 8)
    found = targets(images, torch.tensor([[3], [1]]), MaskedConfig(target="pixels"), 4)
    torch.testing.assert_close(found[0, 0], images[0, :, 4:, 4:].flatten() / 127.5 - 1)
    torch.testing.assert_close(found[1, 0], images[1, :, :4, 4:].flatten() / 127.5 - 1)


def randomized() -> MaskedViT:
    model = build(MODEL, MaskedConfig(), seed=0).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)) * 0.2)
    return model


def test_the_model_answers_for_the_corrupted_patches_and_sees_nothing_under_the_mask() -> None:
    model = randomized()
    pixels = prepare(batch(0, 2).images)
    rows, sources = torch.tensor([[3, 7], [1, 15]]), torch.tensor([[-1, 2], [-1, 15]])
    answers = model(pixels, rows, sources)
    assert answers.shape == (2, 2, 512)
    hidden, other, kept = (pixels.clone() for _ in range(3))
    hidden[0, :, :4, 12:] += 1.0  # Patch 3, under the mask.
    other[0, :, :4, 8:12] += 1.0  # Patch 2, which patch 7 shows too.
    kept[1, :, 12:, 12:] += 1.0  # Patch 15, asked and unchanged.
    torch.testing.assert_close(model(hidden, rows, sources), answers)
    assert not torch.allclose(model(other, rows, sources)[0], answers[0])
    assert not torch.allclose(model(kept, rows, sources)[1], answers[1])


def test_without_corruption_the_tokens_are_those_of_the_plain_model() -> None:
    model = randomized()
    plain = build_model(MODEL, 0).eval()
    plain.load_state_dict(without_masking(model.state_dict()))
    pixels, rows = prepare(batch(0, 2).images), torch.arange(16).expand(2, 16)
    tokens = plain(pixels).tokens
    assert tokens is not None
    torch.testing.assert_close(model(pixels, rows, rows), model.patch_head(tokens[:, 1:]))


@pytest.mark.parametrize("target", TARGETS)
def test_the_loss_counts_corrupted_patches_alone_and_images_by_their_weight(target: Target) -> None:
    model, train_config, given = build(MODEL, MaskedConfig(target=target), seed=0), config(target), batch(0)
    with torch.no_grad():
        model.patch_head.weight.normal_(generator=torch.Generator().manual_seed(2))
    rows, sources = (torch.from_numpy(part) for part in draw(0, np.zeros(6, np.int64), np.arange(6), 16, 0.5))
    plan = torch.stack([rows, sources], dim=1)
    model.eval()

    def loss(images: Tensor, weights: Tensor) -> float:
        return float(masked_terms(model, images, weights, plan, prepare, train_config)[0].detach())

    first = torch.zeros(6)
    first[0] = 1.0
    assert train_config.masked is not None
    wanted = targets(given.images, rows, train_config.masked, 4)[0]
    with torch.no_grad():
        outputs = model(prepare(given.images), rows, sources)[0]
    if target == "pixels":
        expected = float(((outputs - wanted) ** 2).mean())
    else:
        chances = outputs.view(8, wanted.shape[1], -1).log_softmax(dim=2)
        expected = -float(chances.gather(2, wanted[:, :, None]).mean())
    assert loss(given.images, first) == pytest.approx(expected, rel=1e-5)
    assert loss(given.images, torch.zeros(6)) == 0.0
    assert loss(given.images, 2 * first) == pytest.approx(2 * expected, rel=1e-5)


def test_it_begins_at_the_loss_of_guessing_and_learns() -> None:
    whole = state()
    model = whole.model
    train_config = config()
    losses = learn(whole, 40, train_config)
    assert losses[0] == pytest.approx(np.log(512), abs=1e-4)
    assert losses[-1] < losses[0] - 1.0
    measured = validate(model, [batch(500)], train_config, prepare, Ranks(), 3)
    assert measured.images == 5 and measured.confusion is None and 0 <= measured.top1 <= 1


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("pieces", [None, 4])
def test_stopped_and_resumed_is_bit_for_bit_the_same_as_uninterrupted(target: Target, pieces: int | None) -> None:
    kept: dict[int, dict[str, Tensor]] = {}
    train_config = config(target, per_device_batch_size=pieces)
    whole, second = state(target), state(target)
    learn(whole, 12, train_config, kept)
    second.load(kept[5], 5)
    torch.manual_seed(999)  # Whatever randomness another process has must not matter.
    learn(second, 12, train_config)
    assert second.tensors().keys() == whole.tensors().keys()
    for name, tensor in whole.tensors().items():
        assert torch.equal(second.tensors()[name], tensor), name


def test_fine_tuning_starts_from_its_weights_with_a_new_head(tmp_path: Path) -> None:
    trained = state()
    learn(trained, 4, config())
    plain = build_model(MODEL, 0)
    plain.load_state_dict(without_masking(trained.weights()))
    save_weights(plain, tmp_path / "w.safetensors")
    model = load_model(tmp_path / "w.safetensors", num_classes=5, resolution=24)
    block = "blocks.1.mlp.dense1.weight"
    assert torch.equal(model.state_dict()[block], trained.weights()[block])
    assert model(torch.zeros(1, 3, 24, 24)).logits.shape == (1, 5)
    assert not {name for name in model.state_dict() if name.startswith(("mask", "patch_head"))}


def test_compute_counts_the_head_over_corrupted_patches() -> None:
    base = ViTConfig()
    from vit_model import forward_macs

    assert macs(base, MaskedConfig()) == forward_macs(base, 0) + 98 * 768 * 512


BASE: dict[str, Any] = {
    "corpus": "c",
    "head": "linear",
    "model": {"variant": "Ti/16"},
    "train": {"batch_size": 16, "total_steps": 60, "masked": {}},
}


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"head": "mlp"}, "set head: linear"),
        ({"distill": {"teacher": "t"}}, "trains no classes"),
        ({"augment": {"mixup": 0.2}}, "mix labels"),
        ({"model": {"variant": "Ti/16", "patch_dropout": 0.5}}, "patch_dropout"),
        ({"train": {**BASE["train"], "label_smoothing": 0.1}}, "have no effect with masked"),
        ({"train": {**BASE["train"], "masked": {"share": 0.0}}}, "share=0.0 is outside"),
    ],
)
def test_settings_that_masked_patches_cannot_use_are_refused(changes: dict[str, Any], text: str) -> None:
    from_dict(PretrainRecipe, BASE)
    with pytest.raises(RecipeError, match=text):
        from_dict(PretrainRecipe, {**BASE, **changes})


def test_fine_tuning_itself_learns_labels() -> None:
    with pytest.raises(RecipeError, match="belongs to pretrain"):
        from_dict(FinetuneRecipe, {"corpus": "c", "weights": "w", "train": BASE["train"]})


def test_models_without_such_patches_are_refused() -> None:
    from vit_model import variant

    with pytest.raises(ValueError, match="a ResNet or a hybrid has none"):
        build(variant("R50+B/16"), MaskedConfig(), device="meta")
    with pytest.raises(ValueError, match="patch_size=14 cannot"):
        build(variant("H/14"), MaskedConfig(target="colours"), device="meta")
