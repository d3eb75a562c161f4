"""What the demo takes: its flags, and a folder of one's own."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from pipelines.cli import main as cli_main
from pipelines.demo import _missing_splits, _parse, sample_values
from pipelines.workflow.spec import load_workflow


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


def test_without_fashion_mnist_the_gate_asks_for_less_and_with_own_images_for_more_than_guessing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("cats/1.png", "dogs/1.png", "owls/1.png", "emus/1.png"):
        (tmp_path / "My Pets" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "My Pets" / name).write_bytes(b"x")
    monkeypatch.setenv("VIT_STATE", str(tmp_path / "state"))
    monkeypatch.setenv("PATH", "")  # No apt.
    monkeypatch.setattr("pipelines.corpus.samples.INSTALLED", tmp_path / "nothing")
    values, told, is_stand_in = sample_values(None)
    assert is_stand_in and "stand-in" in told
    assert values["promote"] == {"minimum": 0.75} and values["shard_fashion"]["source"].endswith("photo-crops")
    values, _, _ = sample_values(tmp_path / "My Pets")
    assert values["promote"] == {"minimum": 0.25}
    assert values["finetune"] == {"register_as": "my-pets"} and values["shard_digits"]["destination"] == "my-pets"
    load_workflow("demo", values)  # Every name and value fits the recipes.
    (tmp_path / "My Pets").rename(tmp_path / "кошки")
    named = sample_values(tmp_path / "кошки")[0]
    assert re.fullmatch("own-[0-9a-f]{8}", named["finetune"]["register_as"])
    load_workflow("demo", named)
