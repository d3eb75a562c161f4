"""Recipes: every mistake is found before anything starts, named, and answered with the nearest right name."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import pytest

from pipelines.config import (
    BY_KIND,
    RecipeError,
    Strict,
    find_recipe,
    flatten,
    from_dict,
    how,
    load_recipe,
    parse,
    read_yaml,
    to_dict,
    to_yaml,
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Adam(Strict):
    kind: Literal["adam"] = "adam"
    peak_lr: float = 1e-3  # Highest learning rate.


@dataclass(frozen=True, kw_only=True, slots=True)
class Sgd(Strict):
    kind: Literal["sgd"] = "sgd"
    peak_lr: float = 1e-2
    momentum: float = 0.9


@dataclass(frozen=True, kw_only=True, slots=True)
class Train(Strict):
    batch_size: int = 64  # Images.
    steps: int = 10

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise ValueError(f"batch_size={self.batch_size} must be at least 1; try 64")


@dataclass(frozen=True, kw_only=True, slots=True)
class Recipe(Strict):
    corpus: str
    train: Train = field(default_factory=Train)
    optimizer: Annotated[Adam | Sgd, BY_KIND] = field(default_factory=Adam)
    workers: int = how(default=1)
    minimum: float | None = None


def write(folder: Path, text: str) -> Path:
    path = folder / "recipe.yaml"
    path.write_text(text)
    return path


def test_a_recipe_and_flags_make_one_object(tmp_path: Path) -> None:
    path = write(tmp_path, "corpus: photos\noptimizer: {kind: sgd, peak_lr: 3.0e-2}\ntrain: {batch_size: 8}\n")
    recipe = parse(Recipe, [str(path), "--train.batch-size", "16", "--optimizer.momentum", "0.5"])
    assert recipe == Recipe(corpus="photos", train=Train(batch_size=16), optimizer=Sgd(peak_lr=0.03, momentum=0.5))
    assert flatten(recipe)["optimizer.momentum"] == 0.5
    assert from_dict(Recipe, to_dict(recipe)) == recipe
    assert load_recipe(Recipe, write(tmp_path, to_yaml(recipe))) == recipe


@pytest.mark.parametrize("flags", [["--minimum", "null"], ["--minimum=null"], ["--minimum", "None"]])
def test_a_flag_takes_null_as_a_recipe_does(tmp_path: Path, flags: list[str]) -> None:
    path = write(tmp_path, "corpus: a\nminimum: 0.5\n")
    assert parse(Recipe, [str(path), *flags]).minimum is None


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("corpus: a\ntrain: {batch_siez: 3}", "train.batch_siez: unknown key; did you mean 'batch_size'"),
        ("corpus: a\noptimizer: {kind: sgd, momentun: 3}", "did you mean 'momentum'"),
        ("corpus: a\noptimizer: {kind: adam, momentum: 3}", "optimizer.adam.momentum: unknown key"),
        ("train: {batch_size: 4}", "corpus: required, and not given"),
        ("corpus: a\ntrain: {batch_size: 4k}", "got '4k'"),
        ("corpus: a\ntrain: {batch_size: 0}", "batch_size=0 must be at least 1; try 64"),
        ("corpus: a\noptimizer: {kind: lion}", "lion"),
        ("- 1", "a recipe is a mapping"),
        ("corpus: [", "not valid YAML"),
        ("corpus: a\ntrain:\n  steps: 1\n  steps: 2\n", "line 4: key 'steps' stands twice"),
    ],
)
def test_a_wrong_recipe_is_refused_with_the_remedy(tmp_path: Path, text: str, says: str) -> None:
    with pytest.raises(RecipeError) as error:
        load_recipe(Recipe, write(tmp_path, text))
    assert says in str(error.value)


def test_all_problems_are_listed_at_once(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="3 problem"):
        load_recipe(Recipe, write(tmp_path, "corpsu: a\nworkers: many\n"))


@pytest.mark.parametrize("flags", [["--minimum", "null"], ["--minimum", "None"], ["--minimum=null"]])
def test_null_and_none_are_the_same_word_for_a_field_that_may_be_empty(tmp_path: Path, flags: list[str]) -> None:
    path = write(tmp_path, "corpus: a\nminimum: 0.5\n")
    assert parse(Recipe, [str(path), *flags]).minimum is None
    assert parse(Recipe, [str(path), *flags, "--corpus", "null"]).corpus == "null"


def test_a_flag_that_does_not_fit_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(tmp_path, "corpus: a\n")
    for flags, says in (
        (["--train.batch-siez", "3"], "--train.batch-size"),
        (["--train.batch-size", "0"], "batch_size=0 must be at least 1; try 64"),
    ):
        with pytest.raises(SystemExit) as stop:
            parse(Recipe, [str(path), *flags])
        assert stop.value.code == 2
        assert says in capsys.readouterr().err


def test_overrides_reach_into_the_recipe(tmp_path: Path) -> None:
    path = write(tmp_path, "corpus: a\n")
    assert load_recipe(Recipe, path, {"train.steps": 3, "corpus": "b"}) == Recipe(corpus="b", train=Train(steps=3))
    with pytest.raises(RecipeError, match="reaches into 'corpus'"):
        load_recipe(Recipe, path, {"corpus.x": 3})


def test_an_unknown_recipe_names_the_way_to_list_them() -> None:
    with pytest.raises(RecipeError, match="vit recipes"):
        find_recipe("no/such/recipe")


def test_a_file_that_is_no_text_or_cannot_be_read_is_named(tmp_path: Path) -> None:
    path = tmp_path / "picture.yaml"
    path.write_bytes(b"\x89PNG\xff")
    with pytest.raises(RecipeError, match=r"picture.yaml is not UTF-8 text \(byte 0\)"):
        load_recipe(Recipe, path)
    with pytest.raises(RecipeError, match=r"cannot read .*: Is a directory"):
        read_yaml(tmp_path)
