"""The picture shows exactly what a training step gets."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image

from pipelines.cli import main
from pipelines.config import RecipeError, from_dict, load_recipe
from pipelines.inspect_batch import batch_figure, training_batch
from pipelines.inspect_batch import main as inspect_main
from pipelines.pretrain import PretrainRecipe

from .tiny_corpus import COLOURS, write_colour_lists, write_colours

KEYS = "{policy: three, color_jitter: 0.3, mixup: 0.8, cutmix: 1.0}"


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("inspect")
    corpus = write_colours(str(folder / "corpus"), train=90, held_out=3)
    path = folder / "pretrain.yaml"
    path.write_text(
        "# Colours, mixed.\n"
        f"corpus: {corpus.reference}\nresolution: 16\n"
        "model: {patch_size: 4, width: 32, depth: 2, mlp_dim: 64, num_heads: 2}\n"
        f"train: {{batch_size: 16, total_steps: 40}}\naugment: {KEYS}\nlanes: 4\n"
    )
    return path


def test_a_picture_is_written_for_a_recipe(recipe: Path, tmp_path: Path) -> None:
    output = tmp_path / "seen" / "batch.png"
    assert inspect_main([str(recipe), "--step", "3", "--images", "12", "--output", str(output), "--seed", "5"]) == 0
    with Image.open(output) as picture:
        assert picture.size[0] > 1000
        assert len(picture.convert("RGB").getcolors(1 << 24)) > 1000


def test_the_batch_is_the_one_of_the_step_with_mixed_labels(recipe: Path) -> None:
    from pipelines.corpus.manifest import open_corpus
    from pipelines.reader.loader import AugmentConfig, ReaderConfig, train_batches
    from vit_model import InputSpec

    loaded = load_recipe(PretrainRecipe, recipe)
    corpus = open_corpus(loaded.corpus)
    batch = training_batch(loaded, corpus, 7)
    stream = train_batches(
        corpus,
        batch_size=16,
        seed=0,
        spec=InputSpec(height=16, width=16),
        augment=AugmentConfig(),
        total_steps=8,
        start_step=7,
        lanes=4,
        reader=ReaderConfig(backend="local"),
    )
    plain = next(stream)
    assert batch.sample_ids.tolist() == plain.sample_ids.tolist()
    assert batch.labels.shape == (16, 3)
    torch.testing.assert_close(batch.labels.sum(dim=1), torch.ones(16))
    assert (batch.labels.gather(1, plain.labels[:, None]) > 0).all()
    assert (batch.images != plain.images).flatten(1).any(dim=1).all()


def test_bad_samples_are_marked(recipe: Path) -> None:
    from pipelines.corpus.manifest import open_corpus

    loaded = load_recipe(PretrainRecipe, recipe)
    corpus = open_corpus(loaded.corpus)
    batch = training_batch(loaded, corpus, 0)
    batch.weights[2] = 0
    titles = [axes.get_title() for axes in batch_figure(batch, corpus.class_names, 4).axes]
    assert titles[2].startswith("bad sample,\nweight 0")
    assert "%" in titles[1] and f"#{int(batch.sample_ids[1])}" in titles[1]


def test_of_several_labels_two_are_named_and_the_others_counted(tmp_path: Path) -> None:
    corpus = write_colour_lists(tmp_path, train=32)
    tiny = {"patch_size": 8, "width": 32, "depth": 2, "mlp_dim": 64, "num_heads": 2}
    values = {"corpus": corpus.reference, "resolution": 16, "model": tiny}
    loaded = from_dict(PretrainRecipe, values | {"train": {"batch_size": 32, "total_steps": 1, "loss": "sigmoid"}})
    batch = training_batch(loaded, corpus, 0)
    titles = [axes.get_title().splitlines()[:-1] for axes in batch_figure(batch, corpus.class_names, 32).axes]
    assert {len(title) for title in titles} == {1, 2, 3}
    for title, row in zip(titles, batch.labels, strict=True):
        assert {line.removeprefix("100% ") for line in title[:2]} <= {COLOURS[k] for k in row.nonzero()[:, 0].tolist()}
        assert len(title) == row.sum() and title[2:] in ([], ["and 1 more"])


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "needs a recipe"),
        (["smoke/shard"], "no recipe that trains"),
        (["smoke/pretrain", "--step", "-1"], "--step -1"),
        (["smoke/pretrain", "--output", "x.xyz"], "--output x.xyz"),
        (["smoke/pretrain", "--output", "/tmp"], "--output /tmp"),
    ],
)
def test_what_cannot_be_inspected_is_refused(
    arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(RecipeError, match=words):
        inspect_main(arguments)
    assert main(["inspect-batch", *arguments]) == 2
    assert words in capsys.readouterr().err
