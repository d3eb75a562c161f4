"""Smaller images while training: which size when, the same however it is cut, and whole images in validation."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from pipelines.config import RecipeError, from_dict
from pipelines.fit import check_model
from pipelines.pretrain import PretrainRecipe
from pipelines.training.build import build_state
from pipelines.training.compute import macs_per_image
from pipelines.training.config import AdamW, MaskedConfig, PackingConfig, ProgressiveConfig, TrainConfig
from pipelines.training.loop import Hooks, LoopConfig, train
from pipelines.training.objective import Objective
from pipelines.training.parallel import Ranks
from pipelines.training.schedules import ScheduleConfig
from pipelines.training.sizes import draw_sizes, forward_packed, scaled, shrink, size_at
from pipelines.training.state import TrainState
from tests.pipelines.training.test_masked import MODEL, batch, batches, prepare
from vit_model import ViTConfig, build_model, forward_macs, variant


def test_progressive_sizes_grow_evenly_to_whole_images() -> None:
    config = ProgressiveConfig(smallest=0.5, until=0.5)
    sizes = [size_at(config, step, 100, (224, 224), 16) for step in range(100)]
    assert sizes[0] == (112, 112) and sizes[25] == (160, 160)  # 168 is no whole number of patches: to even.
    assert sizes[50:] == [(224, 224)] * 50
    assert sizes == sorted(sizes) and all(height % 16 == 0 for height, _ in sizes)


def test_a_size_is_at_least_one_patch_and_never_more_than_the_image() -> None:
    assert scaled((16, 8), 0.1, 8) == (8, 8)
    assert scaled((224, 112), 0.99, 16) == (224, 112)


def test_the_size_of_a_packed_image_follows_from_seed_epoch_and_sample_alone() -> None:
    config, whole = PackingConfig(smallest=0.25), batch(3)
    sizes = draw_sizes(config, whole, 5, 4)
    part = batch(3)
    part.images, part.sample_ids = part.images[2:4], part.sample_ids[2:4]
    assert part.epochs is not None
    part.epochs = part.epochs[2:4]
    assert torch.equal(draw_sizes(config, part, 5, 4), sizes[2:4])
    many = torch.cat([draw_sizes(config, batch(step), 5, 4) for step in range(100)])
    assert set(many[:, 0].tolist()) == {4, 8, 12, 16} and torch.equal(many[:, 0], many[:, 1])
    assert not torch.equal(draw_sizes(config, whole, 6, 4), sizes)


def test_packed_logits_are_those_of_each_image_alone() -> None:
    model = build_model(ViTConfig(resolution=16, patch_size=4, width=16, depth=2, mlp_dim=32, num_heads=2), 5, seed=0)
    with torch.no_grad():
        assert model.head.out is not None
        model.head.out.weight.normal_(generator=torch.Generator().manual_seed(0))
    given = batch(0)
    sizes = draw_sizes(PackingConfig(), given, 1, 4)
    assert len(set(map(tuple, sizes.tolist()))) > 1
    packed = forward_packed(model.eval(), given.images, sizes, prepare, TrainConfig(total_steps=1))
    for i, (height, width) in enumerate(sizes.tolist()):
        alone = model(shrink(prepare(given.images[i : i + 1]), (height, width))).logits[0]
        torch.testing.assert_close(packed[i], alone, atol=1e-5, rtol=1e-4)


OPTIONS = [{"progressive": ProgressiveConfig()}, {"packing": PackingConfig()}]


def run(config: TrainConfig, kept: dict[int, dict[str, Tensor]], begin: int = 0) -> TrainState:
    state = build_state(build_model(MODEL, 3, seed=0), config, AdamW(peak_lr=1e-2), Ranks())
    if begin:
        state.load(kept[begin], begin)
    loop = LoopConfig(train=config, schedule=ScheduleConfig(), peak_lr=1e-2, total_steps=12, seed=3)
    snapshots: dict[int, dict[str, Tensor]] = {}
    train(
        state,
        batches(begin),
        loop,
        Ranks(),
        prepare,
        Hooks(after_step=lambda now: snapshots.update({now.step: now.tensors()})),
    )
    if not begin:
        kept |= snapshots
    return state


@pytest.mark.parametrize("option", OPTIONS, ids=str)
def test_stopped_and_resumed_is_bit_for_bit_the_same_as_uninterrupted(option: dict[str, Any]) -> None:
    config, kept = TrainConfig(batch_size=6, total_steps=12, **option), {}
    whole = run(config, kept)
    torch.manual_seed(999)
    again = run(config, kept, begin=5)
    assert all(torch.equal(again.tensors()[name], tensor) for name, tensor in whole.tensors().items())
    plain = run(TrainConfig(batch_size=6, total_steps=12), {})
    assert not torch.equal(plain.weights()["patch_embedding.weight"], whole.weights()["patch_embedding.weight"])


def test_pieces_of_a_packed_batch_add_up_to_its_gradient() -> None:
    config = TrainConfig(batch_size=6, total_steps=12, packing=PackingConfig())
    model = build_model(ViTConfig(resolution=16, patch_size=4, width=16, depth=1, mlp_dim=32, num_heads=2), 3, seed=0)
    objective, given = Objective(config), batch(0)
    plan = objective.plan(model, given, 1, torch.device("cpu"))
    assert plan is not None

    def loss(part: slice) -> float:
        return float(
            objective.terms(model, given.images[part], given.labels[part], given.weights[part], plan[part], prepare)[
                0
            ].detach()
        )

    assert loss(slice(0, 2)) + loss(slice(2, 6)) == pytest.approx(loss(slice(0, 6)), rel=1e-5)


def test_compute_counts_what_is_seen_of_an_image_in_the_mean_over_the_run() -> None:
    model = ViTConfig()

    def share(model: ViTConfig, **options: Any) -> float:
        return macs_per_image(model, 10, "linear", TrainConfig(total_steps=1, **options)) / forward_macs(model, 10)

    assert share(model) == 1.0
    assert share(ViTConfig(patch_dropout=0.5)) == pytest.approx(0.5, abs=0.01)
    assert share(model, progressive=ProgressiveConfig(smallest=0.5, until=1.0)) == pytest.approx(0.57, abs=0.02)
    assert share(model, packing=PackingConfig(smallest=0.5)) == pytest.approx(0.57, abs=0.02)
    assert share(model, progressive=ProgressiveConfig(smallest=0.5, until=0.01)) == pytest.approx(1.0, abs=0.01)


def test_what_does_not_fit_is_refused() -> None:
    config = TrainConfig(total_steps=1, packing=PackingConfig())
    check_model(config, MODEL)
    for model in (variant("R50x1"), ViTConfig(drop_path=0.1)):
        with pytest.raises(ValueError, match=r"or train\.progressive"):
            check_model(config, model)
    with pytest.raises(ValueError, match="a ResNet or a hybrid has none"):
        check_model(TrainConfig(total_steps=1, masked=MaskedConfig()), variant("R50x1"))
    values = {"corpus": "c", "model": {"variant": "Ti/16"}, "train": {"total_steps": 1, "progressive": {}}}
    from_dict(PretrainRecipe, values)
    values["train"] = {"total_steps": 1, "progressive": {}, "packing": {}}
    with pytest.raises(RecipeError, match="exclude each other"):
        from_dict(PretrainRecipe, values)
