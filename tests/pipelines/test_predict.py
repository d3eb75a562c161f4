"""Predictions: every image has its row, unreadable ones say why, and a killed run goes on after its last whole part."""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipelines import identity, predict, store
from pipelines.config import RecipeError, from_dict, load_recipe
from pipelines.evaluation import parts
from pipelines.evaluation.parts import claim_destination
from pipelines.identity import StageResult
from pipelines.predict import PredictRecipe
from pipelines.tracking.client import TrackingError, connect
from pipelines.tracking.registry import find_version
from tests.pipelines.tracking.toys import own_root
from tests.pipelines.worlds import grey, levels_corpus, register_threshold, threshold_weights


@pytest.fixture
def place(stack: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    own_root(monkeypatch)
    yield tmp_path


def folder_of_levels(folder: Path, levels: range) -> Path:
    (folder / "deep").mkdir(parents=True, exist_ok=True)
    for level in levels:
        inner = "deep" if level % 2 else "."
        (folder / inner / f"{level:03d}.png").write_bytes(grey(level))
    return folder


def rows_of(result: StageResult) -> list[dict[str, Any]]:
    uris = [info.uri for info in store.list_objects(result.uri) if info.uri.endswith(".parquet")]
    tables = [pq.read_table(pa.BufferReader(store.read(uri))) for uri in sorted(uris)]
    return list(pa.concat_tables(tables).to_pylist())


def level_of(row: dict[str, Any]) -> int:
    return int(Path(row["path"]).stem)


@pytest.mark.stack
@pytest.mark.parametrize("num_workers", [0, 1])
def test_the_champion_predicts_a_folder_on_ray_and_without(place: Path, num_workers: int) -> None:
    corpus = levels_corpus("levels", range(100, 110))
    name = f"toy-predict-{num_workers}"
    version = register_threshold(place, name, 127.5, corpus)
    info = find_version(version)
    connect().set_registered_model_alias(name, "champion", info.version)
    folder = folder_of_levels(place / "images", range(90, 160))
    (folder / "torn.png").write_bytes(grey(10)[:60])
    (folder / "empty.jpg").write_bytes(b"")
    (folder / "notes.txt").write_text("no image")
    (folder / ".hidden.png").write_bytes(grey(1))
    recipe = PredictRecipe(model=f"models:/{name}@champion", images=str(folder), num_workers=num_workers, batch_size=16)
    result = predict.run(recipe)
    rows = rows_of(result)
    assert len(rows) == result.details["num_images"] == 72
    assert result.details["num_unreadable"] == 2
    assert result.details["num_ignored"] == 2
    assert result.details["model"] == version
    assert [row["path"] for row in rows] == sorted(row["path"] for row in rows)
    bad = {row["path"]: row for row in rows if row["error"]}
    assert set(bad) == {"torn.png", "empty.jpg"}
    assert bad["empty.jpg"]["error"].startswith("empty: ")
    assert bad["empty.jpg"]["prediction"] is None
    for row in rows:
        if not row["error"]:
            assert row["prediction"] == ("light" if level_of(row) > 127 else "dark")
            assert row["probability"] == row["top_probabilities"][0] > 0.5
            assert row["top_classes"][0] == row["prediction"]
    again = predict.run(recipe)
    assert again.reused
    # The alias moves to another version: that is another question.
    other = register_threshold(place, name, 100.5, corpus)
    connect().set_registered_model_alias(name, "champion", find_version(other).version)
    if num_workers == 0:
        assert predict.run(recipe).details["model"] == other


@pytest.mark.stack
def test_a_corpus_split_is_predicted_from_its_tars(place: Path) -> None:
    corpus = levels_corpus("levels", range(120, 136))
    model = str(threshold_weights(place / "w.safetensors", 127.5))
    result = predict.run(PredictRecipe(model=model, images="levels@current", split="test", num_workers=0))
    rows = rows_of(result)
    assert [row["path"] for row in rows] == corpus.samples("test")["source"].to_pylist()
    assert [row["prediction"] for row in rows] == ["dark"] * 8 + ["light"] * 8


@pytest.mark.stack
def test_a_killed_run_goes_on_after_its_last_whole_part(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parts, "PART_ROWS", 10)
    monkeypatch.setattr(predict, "BLOCK_ROWS", 4)
    folder = folder_of_levels(place / "images", range(100, 135))
    model = str(threshold_weights(place / "w.safetensors", 127.5))
    recipe = PredictRecipe(model=model, images=str(folder), num_workers=0)
    whole = predict.run(recipe)
    expected = rows_of(whole)
    assert len(expected) == 35
    place_of_run = store.join(identity.runs(), "predict", whole.digest)
    store.delete(store.join(place_of_run, "result.json"))
    for number in (2, 3):
        store.delete(store.join(place_of_run, "predictions", f"part-{number:05d}.parquet"))
    answered: list[int] = []
    read_block = predict.read_block
    monkeypatch.setattr(
        predict, "read_block", lambda block, spec: answered.append(len(block)) or read_block(block, spec)
    )
    resumed = predict.run(recipe)
    assert sum(answered) == 15
    assert rows_of(resumed) == expected


@pytest.mark.stack
def test_a_destination_is_filled_once_and_never_mixed(place: Path) -> None:
    folder = folder_of_levels(place / "images", range(100, 110))
    model = str(threshold_weights(place / "w.safetensors", 127.5))
    destination = str(place / "out")
    recipe = PredictRecipe(model=model, images=str(folder), destination=destination, num_workers=0)
    result = predict.run(recipe)
    assert result.uri == destination
    assert len(rows_of(result)) == 10
    assert store.read_json(store.join(destination, "_predict.json"))["is_complete"]
    store.delete(store.join(identity.runs(), "predict", result.digest, "result.json"))
    assert not predict.run(recipe).reused
    (folder / "new.png").write_bytes(grey(5))
    with pytest.raises(ValueError, match="holds 2 files of something else"):
        predict.run(recipe)


@pytest.mark.parametrize("prefix", ["", "./"])
def test_a_destination_is_claimed_before_the_work_and_kept_by_who_fills_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, prefix: str
) -> None:
    monkeypatch.chdir(tmp_path)
    claim_destination(f"{prefix}out", "a")
    claim_destination(f"{prefix}out", "b")  # a has put nothing there.
    (tmp_path / "out" / "part-00000.parquet").write_text("")
    claim_destination(f"{prefix}out", "b")
    with pytest.raises(ValueError, match="holds 2 files of something else"):
        claim_destination(f"{prefix}out", "a")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter.txt").write_text("")
    with pytest.raises(ValueError, match=r"holds 1 files of something else, such as .*letter.txt"):
        claim_destination(f"{prefix}mine", "a")
    assert not (tmp_path / "mine" / "_predict.json").exists()


def test_a_folder_without_images_and_no_folder_are_told_apart(tmp_path: Path) -> None:
    (tmp_path / "empty.png").mkdir()
    with pytest.raises(ValueError, match=r"no image in .*empty.png; files ending in"):
        predict.list_folder(str(tmp_path / "empty.png"))
    with pytest.raises(ValueError, match=r"there is no .*/nothing; a bucket is written"):
        predict.list_folder(str(tmp_path / "nothing"))


@pytest.mark.stack
def test_wrong_places_are_said(place: Path) -> None:
    model = str(threshold_weights(place / "w.safetensors", 127.5))
    (place / "none").mkdir()
    (place / "none" / "readme.txt").write_text("x")
    with pytest.raises(ValueError, match=r"no image in .*none \(1 other files\)"):
        predict.run(PredictRecipe(model=model, images=str(place / "none")))
    with pytest.raises(TrackingError):
        predict.run(PredictRecipe(model="models:/nobody@champion", images=str(place / "none")))


def test_one_file_is_a_folder_of_one(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(grey(3))
    assert predict.list_folder(str(path)).names == ["a.png"]


def test_the_listing_names_its_content(tmp_path: Path) -> None:
    folder_of_levels(tmp_path / "x", range(4))
    first = predict.list_folder(str(tmp_path / "x"))
    assert predict.list_folder(str(tmp_path / "x") + "/").digest == first.digest
    (tmp_path / "x" / "002.png").write_bytes(grey(200))
    assert predict.list_folder(str(tmp_path / "x")).digest != first.digest


def test_file_names_that_are_no_utf8_keep_their_bytes(tmp_path: Path) -> None:
    import os

    from vit_model import InputSpec

    folder = tmp_path / "x"
    folder.mkdir()
    Path(os.fsdecode(os.fsencode(folder) + b"/a\xff.png")).write_bytes(grey(9))
    listing = predict.list_folder(str(folder))
    table = predict.read_block(listing.table(0, 1), InputSpec(height=4, width=4))
    assert table["name"].to_pylist() == ["a\N{REPLACEMENT CHARACTER}.png"]
    assert table["error"].to_pylist() == [""]


def test_a_file_that_went_away_is_an_error_in_its_row(tmp_path: Path) -> None:
    from vit_model import InputSpec

    folder_of_levels(tmp_path, range(3))
    listing = predict.list_folder(str(tmp_path))
    (tmp_path / "deep" / "001.png").unlink()
    errors = predict.read_block(listing.table(0, 3), InputSpec(height=4, width=4))["error"].to_pylist()
    assert [bool(error) for error in errors] == [False, False, True]
    assert errors[2].startswith("missing: ")


def test_a_picture_is_prepared_as_the_reference_path_prepares_it(tmp_path: Path) -> None:
    import numpy as np
    from PIL import Image

    import vit_model
    from vit_model import InputSpec

    buffer = io.BytesIO()
    pixels = np.random.default_rng(0).integers(0, 255, (37, 53, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(buffer, "JPEG")
    (tmp_path / "a.jpg").write_bytes(buffer.getvalue())
    spec = InputSpec(height=16, width=16, resize="shorter_side", resize_to=20)
    table = predict.read_block(predict.list_folder(str(tmp_path)).table(0, 1), spec)
    expected = vit_model.load_image(buffer.getvalue(), spec).numpy()
    assert table["image"].to_pylist() == [expected.tobytes()]


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"images": "digits@current"}, "say which split"),
        ({"images": "./x", "split": "test"}, "has no effect on a folder"),
        ({"images": "./x", "batch_size": 0}, "batch_size=0"),
        ({"images": "./x", "num_workers": -1}, "num_workers=-1"),
    ],
)
def test_wrong_recipes_are_refused(fields: dict[str, Any], says: str) -> None:
    with pytest.raises(RecipeError, match=says):
        from_dict(PredictRecipe, {"model": "models:/x@champion", **fields})


@pytest.mark.parametrize("name", ["demo/predict", "smoke/predict", "predict/folder"])
def test_packaged_recipes_load(name: str) -> None:
    load_recipe(PredictRecipe, name)


def test_the_digest_of_a_recipe_stays_what_it_was() -> None:
    """Fails when the same recipe would be computed anew: raise VERSION if that is meant, or restore the fields."""
    recipe = PredictRecipe(model="m", images="x", destination="/out", batch_size=7, num_workers=3)
    found = identity.digest_of("predict", predict.VERSION, recipe, {"model": "a", "images": "b"})
    assert found == "3ff83506fca5e0759f7282106ceb6e64c75e2c08c9383b101aa689fdfb29aab8"
