"""A whole rank without Ray, trained on images with several labels."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from torch import nn

from pipelines import evaluate, fit, identity, store
from pipelines.batch import Batch
from pipelines.config import RecipeError, from_dict
from pipelines.corpus.manifest import Corpus
from pipelines.pretrain import PretrainRecipe
from pipelines.reader.engines import choose
from pipelines.reader.loader import AugmentConfig, ReaderConfig
from pipelines.tracking import figures
from pipelines.training.config import AdamW, CheckpointConfig, TrainConfig, ValidationConfig, WorkerConfig
from pipelines.training.job import TrainJob, build_session
from pipelines.training.losses import loss_sum
from pipelines.training.names import OUTCOME, WEIGHTS
from pipelines.training.objective import class_weight_tensor
from pipelines.training.parallel import Ranks
from pipelines.training.schedules import ScheduleConfig
from pipelines.training.validation import validate
from pipelines.training.watch import Outcome
from tests.pipelines.tiny_corpus import COLOURS, write_colour_lists
from vit_model import InputSpec, OutputSpec, ViTConfig

STEPS = 60


@pytest.fixture(scope="module")
def colours(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    return write_colour_lists(tmp_path_factory.mktemp("colours"))


class Trained:
    """One attempt in a folder of runs: to its end, or to a stop."""

    def __init__(self, corpus: Corpus, runs: Path, number: int = 1, stop_at: int | None = None, **train: Any) -> None:
        root = str(runs / "pretrain" / ("d" * 64))
        store.write_json(store.join(root, "lease.json"), {"token": f"t{number}"})
        self.attempt = identity.Attempt("pretrain", "d" * 64, number, root, f"t{number}", 1)
        session = build_session(
            TrainJob(
                attempt=self.attempt,
                run_id=None,
                corpus=corpus.reference,
                split="train",
                lanes=4,
                window_pages=2,
                seed=3,
                total_steps=STEPS,
                num_images=corpus.splits["train"],
                model=ViTConfig(resolution=16, patch_size=8, width=32, depth=2, mlp_dim=64, num_heads=2, dropout=0.1),
                head="linear",
                initial=None,
                input_spec=InputSpec(height=16, width=16, mean=(0.5,) * 3, std=(0.5,) * 3),
                output_spec=OutputSpec(class_names=corpus.class_names, activation="sigmoid"),
                macs_per_image=1,
                train=TrainConfig(batch_size=16, total_steps=STEPS, loss="sigmoid", **train),
                optimizer=AdamW(peak_lr=5e-3),
                schedule=ScheduleConfig(warmup_steps=5),
                augment=AugmentConfig(),
                reader=ReaderConfig(backend="local", num_threads=1),
                engine=choose("wheels"),
                validation=ValidationConfig(split="val", batch_size=9),
                checkpoint=CheckpointConfig(every_seconds=1e9),
                workers=WorkerConfig(log_every_steps=5),
                use_gpu=False,
            ),
            Ranks(),
        )
        self.losses: list[float] = []
        window = session._window

        def noted(step: int, metrics: dict[str, float]) -> None:
            self.losses.append(metrics["train/loss"])
            window(step, metrics)

        session._window = noted  # type: ignore[method-assign]
        if stop_at is not None:
            session._wants_stop = lambda: session.state.step >= stop_at  # type: ignore[method-assign]
        session.run()
        self.folder = Path(root) / "attempts" / str(number)
        self.outcome: dict[str, Any] = json.loads((self.folder / OUTCOME).read_text())

    @property
    def weights(self) -> str:
        return hashlib.sha256((self.folder / WEIGHTS).read_bytes()).hexdigest()


@pytest.fixture(scope="module")
def trained(colours: Corpus, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    return Trained(colours, tmp_path_factory.mktemp("runs"))


def test_a_run_learns_which_colours_there_are(trained: Trained) -> None:
    assert trained.losses[-1] < 0.5 * trained.losses[0]
    assert trained.outcome["metrics"]["val/top1"] > 0.9
    assert trained.outcome["measured_images"] == {"val": 24}
    assert trained.outcome["confusion"] is None, "an image of two colours has no one row in it"


def test_a_run_that_was_stopped_goes_on_to_the_same_bits(colours: Corpus, trained: Trained, tmp_path: Path) -> None:
    first = Trained(colours, tmp_path, stop_at=23)
    assert first.outcome["stopped"] and first.outcome["step"] == 25
    second = Trained(colours, tmp_path, number=2)
    assert len(second.losses) == (STEPS - 25) // 5
    assert second.weights == trained.weights


def test_pieces_of_a_batch_and_weights_of_classes_take_lists_of_labels(colours: Corpus, tmp_path: Path) -> None:
    run = Trained(colours, tmp_path, per_device_batch_size=5, class_weights={"red": 2.0}, label_smoothing=0.1)
    assert run.losses[-1] < 0.8 * run.losses[0]


def test_sample_pictures_name_the_colours(trained: Trained, monkeypatch: pytest.MonkeyPatch) -> None:
    samples = load_file(trained.outcome["samples"])
    assert samples["labels"].shape == samples["probabilities"].shape == (24, 3)
    drawn: dict[str, Any] = {}
    monkeypatch.setattr(
        figures,
        "predictions_figure",
        lambda images, labels, predictions, chances: drawn.update(labels=labels, predictions=predictions),
    )
    names: list[str] = []
    run: Any = SimpleNamespace(history=lambda key: [], log_figure=lambda figure, name: names.append(name))
    outcome = Outcome(
        weights="w", step=STEPS, metrics={"val/top1": 1.0}, train_seconds=1.0, samples=trained.outcome["samples"]
    )
    fit.log_pictures(run, trained.attempt, outcome, COLOURS)
    assert names == ["summary", "samples"]
    for label, prediction, row in zip(drawn["labels"], drawn["predictions"], samples["labels"], strict=True):
        own = [COLOURS[number] for number in np.flatnonzero(row)]
        assert label == (prediction if prediction in own else ", ".join(own))


def test_the_names_of_a_sample_that_was_missed_are_all_of_its_own() -> None:
    row = np.array([1.0, 0.0, 1.0], np.float32)
    assert [fit._true_name(row, best, COLOURS) for best in range(3)] == ["blue", "blue, red", "red"]
    assert fit._true_name(np.int64(1), 0, COLOURS) == "green"


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_the_loss_is_the_plain_sum_over_images_and_classes(smoothing: float) -> None:
    source = torch.Generator().manual_seed(1)
    logits = torch.randn(6, 3, generator=source)
    hot = (torch.rand(6, 3, generator=source) > 0.5).float()
    counts = torch.tensor([1.0, 1.0, 0.0, 1.0, 1.0, 0.0])
    weights = class_weight_tensor({"red": 3.0}, COLOURS)
    wanted = 0.0
    for image in range(6):
        for k, factor in enumerate((1.0, 1.0, 3.0)):
            chance = 1 / (1 + np.exp(-logits[image, k].item()))
            target = hot[image, k].item() * (1 - smoothing) + smoothing / 3
            wanted -= counts[image].item() * factor * (target * np.log(chance) + (1 - target) * np.log(1 - chance))
    assert loss_sum(logits, hot, counts, "sigmoid", smoothing, weights).item() == pytest.approx(wanted, rel=1e-5)


class BesideLonger(Ranks):
    """A rank beside one that has a batch more."""

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        if values.ndim == 0:  # Who still has a batch.
            ASKED.append(values)
            return values + (len(ASKED) <= 2)
        return values


ASKED: list[torch.Tensor] = []


@pytest.mark.parametrize("in_step", [False, True])
def test_validation_counts_a_best_class_among_the_labels_as_right(in_step: bool) -> None:
    class Fixed(nn.Module):
        def forward(self, images: torch.Tensor, tokens: bool = True) -> SimpleNamespace:
            return SimpleNamespace(logits=nn.functional.one_hot(images[:, 0, 0, 0].long(), 3).float())

    best, hot = [0, 0, 1, 2, 2], [[1, 0, 1], [0, 1, 1], [1, 1, 1], [0, 0, 1], [1, 1, 0]]
    images = torch.tensor(best, dtype=torch.uint8).view(5, 1, 1, 1).expand(5, 3, 2, 2)
    batch = Batch(images, torch.tensor(hot).float(), torch.tensor([1.0, 1.0, 1.0, 0.0, 1.0]), torch.arange(5))
    config = TrainConfig(batch_size=5, total_steps=1, loss="sigmoid")
    ASKED.clear()
    found = validate(Fixed(), [batch], config, lambda x: x, BesideLonger(), 3, keep_samples=True, in_step=in_step)
    assert len(ASKED) == (3 if in_step else 0)
    assert (found.top1, found.images, found.confusion) == (2 / 4, 4, None)
    assert found.samples["labels"].tolist() == [row for i, row in enumerate(hot) if i != 3]


def recipe(corpus: Corpus, **train: Any) -> PretrainRecipe:
    values = {
        "corpus": corpus.reference,
        "resolution": 16,
        "model": {"patch_size": 8, "width": 32, "depth": 2, "mlp_dim": 64, "num_heads": 2},
        "train": {"batch_size": 16, "total_steps": 9, **train},
    }
    return from_dict(PretrainRecipe, values | ({"head": "linear"} if "masked" in train else {}))


def test_softmax_is_refused_with_its_remedy_and_sigmoid_is_not(colours: Corpus) -> None:
    with pytest.raises(RecipeError, match=r"several labels an image.*train.loss: sigmoid"):
        fit.check_choices(recipe(colours), colours)
    fit.check_choices(recipe(colours, loss="sigmoid"), colours)
    fit.check_choices(recipe(colours, masked={}), colours)  # Reads no label.


def test_evaluate_refuses_several_labels_an_image_by_name(colours: Corpus, tmp_path: Path) -> None:
    given = evaluate.EvaluateRecipe(model=str(tmp_path / "w.safetensors"), corpus=colours.reference, split="val")
    with pytest.raises(ValueError, match=r"corpus@\w+ has several labels an image.*validation.test_split"):
        evaluate.run(given)
