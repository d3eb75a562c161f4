"""What the demo says of its accuracies, and how it takes a folder of one's own."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipelines.cli import main as cli_main
from pipelines.demo import Measured, _missing_splits, _parse, difference
from pipelines.evaluation.accuracy import wilson

COUNTS = st.tuples(st.integers(0, 400), st.integers(1, 400)).map(lambda pair: (min(pair), max(pair)))


def measured(right: int, n: int) -> Measured:
    return Measured(right / n, *wilson(right, n))


@given(COUNTS, COUNTS)
def test_the_interval_of_a_difference_holds_it_and_stays_within_plus_minus_one(
    one: tuple[int, int], other: tuple[int, int]
) -> None:
    gain, low, high = difference(measured(*one), measured(*other))
    assert -1 - 1e-9 <= low <= gain <= high <= 1 + 1e-9
    assert difference(measured(*other), measured(*one))[0] == pytest.approx(-gain)


def test_the_interval_of_a_difference_is_newcombes() -> None:
    # Newcombe 1998, Statistics in Medicine 17:873, table II, example (a): 56/70 - 48/80, method 10.
    gain, low, high = difference(measured(56, 70), measured(48, 80))
    assert (gain, low, high) == pytest.approx((0.2, 0.0524, 0.3339), abs=5e-5)


@pytest.mark.parametrize(
    ("files", "said"),
    [
        ([], "0 sub-folders with images"),
        (["cats/1.png"], "1 sub-folders with images"),
        (["cats/1.png", "dogs/notes.txt"], "1 sub-folders with images"),
    ],
)
def test_a_folder_without_two_classes_is_refused_before_anything_starts(
    files: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in files:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    assert cli_main(["demo", "--corpus", str(tmp_path)]) == 2
    assert said in capsys.readouterr().err


def test_a_folder_of_class_folders_is_taken_with_or_without_splits(tmp_path: Path) -> None:
    for name in ("a/train/cats/1.png", "a/train/dogs/1.JPG", "b/cats/1.png", "b/dogs/deep/1.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    assert _parse(["--corpus", str(tmp_path / "a")]) == (tmp_path / "a", 0)
    assert _parse([f"--corpus={tmp_path / 'b'}", "--seed", "3"]) == (tmp_path / "b", 3)
    assert _parse([]) == (None, 0)


def test_a_missing_folder_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli_main(["demo", "--corpus", "/no/such/folder"]) == 2
    assert "/no/such/folder: no such folder" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("folders", "splits"),
    [
        ([], {"train": 0.7, "val": 0.08, "test": 0.22}),
        (["train", "test"], {"train": 0.92, "val": 0.08}),
        (["train", "val", "test"], None),
        (["test"], {"train": 0.7, "val": 0.08, "test": 0.22}),  # A class of this name: without train it is no split.
    ],
)
def test_splits_that_the_folder_has_are_kept_and_the_others_are_cut_from_train(
    folders: list[str], splits: dict[str, float] | None, tmp_path: Path
) -> None:
    for name in folders:
        (tmp_path / name).mkdir()
    assert _missing_splits(tmp_path) == (pytest.approx(splits) if splits else None)
