"""What a recipe will need: against the paper's own figures and against what a real step keeps."""

from __future__ import annotations

import pytest
import torch

from pipelines.config import RecipeError, load_recipe
from pipelines.estimate import KNOWN, Size, estimate, main
from pipelines.finetune import FinetuneRecipe
from pipelines.pretrain import PretrainRecipe
from pipelines.training.config import AdamW, EmaConfig, ParallelConfig, Sgd, TrainConfig
from pipelines.training.hardware import HARDWARE, find_hardware
from pipelines.training.memory import activation_bytes, state_bytes
from vit_model import ViTConfig, build_model, variant


def test_the_paper_s_compute_and_the_hand_s_cost() -> None:
    """Table 6 of the paper: B/16, 7 epochs of JFT, 224 exaFLOPs."""
    recipe = load_recipe(PretrainRecipe, "pretrain/vit_b16_imagenet", {"train.epochs": 7, "train.loss": "softmax"})
    made = estimate(recipe, Size(*KNOWN["jft300m"]), HARDWARE["h100"], 8, mfu=0.5, price=2.0)
    assert made.exaflops == pytest.approx(224, rel=0.02)
    seconds = made.exaflops * 1e18 / (0.5 * 989e12 * 8)
    assert made.days == pytest.approx(seconds / 86_400, rel=1e-6)
    assert made.dollars == pytest.approx(seconds / 3600 * 8 * 2.0, rel=1e-6)
    assert made.step_seconds * made.total_steps == pytest.approx(seconds, rel=1e-6)


@pytest.mark.parametrize("pool", ["token", "gap"])
def test_what_is_counted_block_by_block_is_what_a_whole_forward_keeps(pool: str) -> None:
    config = ViTConfig(resolution=32, patch_size=8, width=48, depth=5, mlp_dim=96, num_heads=3, pool=pool)  # type: ignore[arg-type]
    model = build_model(config, 11, seed=0).train()
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, int] = {}
    held = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in own:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            held.append(tensor)
        return tensor

    images = 4
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(torch.zeros(images, 3, 32, 32), tokens=False)
    counted = activation_bytes(config, 11, "linear", TrainConfig(total_steps=1))
    assert counted * images == pytest.approx(sum(kept.values()), rel=0.03)


def test_checkpointing_and_half_precision_take_less() -> None:
    model = variant("S/16")
    of = lambda **options: activation_bytes(model, 10, "linear", TrainConfig(total_steps=1, **options))  # noqa: E731
    assert of(activation_checkpointing=True) < 0.25 * of()
    assert 0.45 * of() < of(precision="bf16_pure") < of(precision="bf16") < 0.62 * of()


def test_the_state_is_cut_over_the_devices() -> None:
    train, ddp, fsdp = TrainConfig(total_steps=1), ParallelConfig(), ParallelConfig(kind="fsdp")
    assert state_bytes(1000, 100, AdamW(), train, ddp, 8) == 16_000
    assert state_bytes(1000, 100, Sgd(), train, ddp, 8) == 12_000
    with_average = TrainConfig(total_steps=1, ema=EmaConfig())
    assert state_bytes(1000, 100, AdamW(), with_average, ddp, 8) == 20_000
    assert state_bytes(1000, 100, AdamW(), train, fsdp, 8) == 2_000 + 3 * 100 * 4


def test_what_takes_longer_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    main(["pretrain/vit_h14_jft"])
    assert "a third more for activation_checkpointing" in capsys.readouterr().out
    main(["pretrain/vit_s16_plain_90", "--train.precision", "fp32"])
    assert "twice as long for fp32" in capsys.readouterr().out


def test_groups_that_the_devices_do_not_fill_are_refused() -> None:
    recipe = load_recipe(PretrainRecipe, "pretrain/vit_s16_plain_90", {"parallel": {"kind": "hsdp", "replicas": 3}})
    with pytest.raises(ValueError, match="replicas=3 does not divide 64 devices"):
        estimate(recipe, Size(*KNOWN["imagenet"]), HARDWARE["h100"], 64, 0.5, None)


def test_cores_for_reading_are_said_only_of_images_like_those_that_were_measured(
    capsys: pytest.CaptureFixture[str],
) -> None:
    main(["pretrain/vit_b16_imagenet"])
    assert "cores for 110 kB JPEGs" in capsys.readouterr().out
    main(["demo/pretrain", "--images", "57000", "--classes", "10"])
    assert "cores by the size of its images" in capsys.readouterr().out


def test_hardware_is_known_by_name_and_number() -> None:
    assert find_hardware("H100x8") == (HARDWARE["h100"], 8)
    assert find_hardware("a100-40") == (HARDWARE["a100-40"], 1)
    with pytest.raises(ValueError, match="'h10x8' is not known; nearest: h100x8"):
        find_hardware("h10x8")
    assert all(hardware.price_source for hardware in HARDWARE.values())


def test_the_verb_answers_without_a_store(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["pretrain/vit_b16_imagenet", "--on", "a100x16", "--price=1.5", "--model.variant", "Ti/16"]) == 0
    shown = capsys.readouterr().out
    assert "1,281,167 images, 1,000 classes" in shown and "on 16 x a100" in shown and "(--price)" in shown


def test_what_does_not_fit_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    main(["pretrain/vit_b16_imagenet", "--on", "h100x1"])
    assert "4,096 fall to each device: auto cuts them" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "text"),
    [
        ([], "needs a recipe"),
        (["pretrain/vit_b16_imagenet", "--mfu", "2"], "--mfu '2' is no such number"),
        (["pretrain/vit_b16_imagenet", "--on"], "--on needs a value"),
        (["demo/promote"], "only pretrain and finetune train"),
    ],
)
def test_a_wrong_command_is_refused(words: list[str], text: str) -> None:
    with pytest.raises(RecipeError, match=text):
        main(words)


def test_a_finetune_without_weights_or_model_cannot_be_estimated() -> None:
    recipe = load_recipe(FinetuneRecipe, "finetune/cifar10")
    with pytest.raises(ValueError, match="give --weights, or model"):
        estimate(recipe, Size(50_000, 10), HARDWARE["h100"], 1, 0.4, None)


def test_what_makes_a_step_longer_makes_it_dearer() -> None:
    def seconds(**options: object) -> float:
        changes = {f"train.{name}": value for name, value in options.items()}
        recipe = load_recipe(PretrainRecipe, "pretrain/vit_b16_imagenet", changes)
        return estimate(recipe, Size(*KNOWN["imagenet"]), HARDWARE["h100"], 8, 0.45, None).step_seconds

    assert seconds(activation_checkpointing=True) == pytest.approx(seconds() * 4 / 3)
    assert seconds(precision="fp32") == pytest.approx(seconds() * 2)


def test_hsdp_holds_a_copy_on_each_node_of_eight() -> None:
    def state(devices: int, **parallel: object) -> float:
        changes = {f"parallel.{name}": value for name, value in parallel.items()}
        recipe = load_recipe(PretrainRecipe, "pretrain/vit_b16_imagenet", changes)
        return estimate(recipe, Size(*KNOWN["imagenet"]), HARDWARE["h100"], devices, 0.45, None).state_gib

    assert state(64, kind="hsdp") == state(8, kind="fsdp") > state(64, kind="fsdp")


@pytest.mark.parametrize("words", [["--images", "0.5"], ["--classes", "2.5"], ["--price", "inf"]])
def test_half_an_image_is_no_number_of_images(words: list[str]) -> None:
    with pytest.raises(RecipeError, match="is no such number"):
        main(["pretrain/vit_b16_imagenet", *words])
