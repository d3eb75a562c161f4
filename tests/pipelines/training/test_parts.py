"""Checkpoints in parts: every rank writes its rows, the first commits, and any number of ranks reads them."""

from __future__ import annotations

import dataclasses
import json
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from pipelines import identity, store
from pipelines.batch import Batch
from pipelines.training import checkpoint
from pipelines.training.build import build_state
from pipelines.training.checkpoint import CheckpointError, Checkpoints
from pipelines.training.config import AdamW, BestConfig, CheckpointConfig, EmaConfig, ParallelConfig, TrainConfig
from pipelines.training.layout import Part
from pipelines.training.names import OUTCOME, WEIGHTS
from pipelines.training.parallel import Ranks
from pipelines.training.session import Session, SessionConfig
from tests.pipelines.training.test_checkpoint import Place, flip_a_byte, truncate
from tests.pipelines.training.test_parameter_sharding import together
from tests.pipelines.training.tiny import CLASSES, TinyModel, make_batch, make_batches, make_config, prepare

ROWS = {"model/a": 5}
PARTS = [{"model/a": torch.arange(3.0), "step": torch.tensor(9)}, {"model/a": torch.arange(3.0, 5.0)}]


def save_both(place: Place, step: int, tokens: tuple[str, str] = ("t", "t")) -> None:
    other = threading.Thread(target=Checkpoints(place, 9, Part(1, 2)).save, args=(step, PARTS[1], {}, None, tokens[1]))
    other.start()
    Checkpoints(place, 9, Part(0, 2)).save(step, PARTS[0], {"seed": 1}, ROWS, tokens[0])
    other.join()


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(str(tmp_path / "runs" / "pretrain" / "d"))


def file_of(place: Place, step: int, name: str) -> Path:
    return Path(place.uri) / "checkpoints" / f"{step:09d}" / name


def test_any_number_of_ranks_reads_what_two_have_written(place: Place) -> None:
    save_both(place, 10)
    whole = Checkpoints(place).newest()
    assert whole is not None and torch.equal(whole.tensors["model/a"], torch.arange(5.0))
    assert whole.state["layout"] == {"kind": "sharded", "files": 2, "rows": ROWS}
    thirds = [Checkpoints(place, part=Part(index, 3)).at(1, 10).tensors for index in range(3)]
    assert [part["model/a"].tolist() for part in thirds] == [[0, 1], [2, 3], [4]]
    assert all(part["step"] == 9 for part in thirds)


@pytest.mark.parametrize("index", [0, 1])
@pytest.mark.parametrize("harm", [truncate, flip_a_byte, Path.unlink], ids=lambda harm: harm.__name__)
def test_a_torn_part_is_refused_by_whoever_needs_it(place: Place, index: int, harm: Callable[[Path], None]) -> None:
    save_both(place, 10)
    save_both(place, 20)
    harm(file_of(place, 20, f"tensors-{index:05d}-of-00002.safetensors"))
    with pytest.raises(CheckpointError):
        Checkpoints(place, part=Part(index, 2)).at(1, 20)
    loaded = Checkpoints(place).newest()
    assert loaded is not None and loaded.found.step == 10


def test_a_part_that_an_earlier_start_has_left_does_not_count(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint, "PART_SECONDS", 0.5)
    with pytest.raises(store.StoreError, match="part 1 of the checkpoint at step 10 did not come"):
        save_both(place, 10, ("new", "old"))
    assert not Checkpoints(place).found()


def test_a_manifest_that_leaves_a_part_out_is_refused(place: Place) -> None:
    save_both(place, 10)
    path = file_of(place, 10, "manifest.json")
    manifest = json.loads(path.read_text())
    del manifest["files"]["tensors-00001-of-00002.safetensors"]
    path.write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match="2 files of tensors"):
        Checkpoints(place).at(1, 10)


# Whole sessions, on groups of another size each time -----------------------------------------------------------------

STEPS = 12
OPTIONS = TrainConfig(batch_size=8, total_steps=STEPS, ema=EmaConfig(decay=0.8))


def run_session(ranks: Ranks, root: str, number: int, kind: Any, stop_at: int | None) -> dict[str, Any]:
    torch.manual_seed(7)
    state = build_state(TinyModel(0.0), OPTIONS, AdamW(peak_lr=1e-2), ranks, ParallelConfig(kind=kind), local_size=2)
    part = slice(ranks.rank * 8 // ranks.world_size, (ranks.rank + 1) * 8 // ranks.world_size)
    losses: dict[int, float] = {}
    started: list[int] = []

    @contextmanager
    def training(start: int, order: Mapping[str, Any]) -> Iterator[Iterator[Batch]]:
        started.append(start)
        yield make_batches(start, part=part)

    @contextmanager
    def held_out() -> Iterator[
        Iterator[Batch]
    ]:  # The same five on any number of ranks; rank 0 has one more than others.
        yield iter([make_batch(500 + number) for number in range(5)][ranks.rank :: ranks.world_size])

    def log(values: dict[str, float], step: int) -> None:
        if "train/loss" in values:
            losses[step] = values["train/loss"]

    loop = dataclasses.replace(make_config(STEPS, log_every_steps=1, validate_every_steps=6), train=OPTIONS)
    one = Session(
        SessionConfig(
            attempt=identity.Attempt("pretrain", "d" * 64, number, root, "t", 1),
            loop=loop,
            order={"corpus": "c", "lanes": 4, "window_pages": 4},
            engine="wheels 1",
            checkpoint=CheckpointConfig(every_seconds=1e9, every_steps=4),
            num_classes=CLASSES,
            best=BestConfig(metric="val/loss"),
        ),
        state,
        ranks,
        prepare=prepare,
        training=training,
        validation=held_out,
        test=None,
        open_log=lambda: nullcontext(log),
        export=lambda path, tensors: save_file(dict(tensors), path),
    )
    if stop_at is not None:
        one._wants_stop = lambda: state.step >= stop_at  # type: ignore[method-assign]
    one.run()
    return {"losses": losses, "started": started, "world": ranks.world_size}


def test_saved_on_two_ranks_a_run_goes_on_with_four_and_ends_with_one(tmp_path: Path) -> None:
    root = str(tmp_path / "runs" / "pretrain" / ("d" * 64))
    store.write_json(store.join(root, "lease.json"), {"token": "t"})
    (first, _) = together(2, tmp_path / "two", run_session, root, 1, "fsdp", 5)
    (second, *_) = together(4, tmp_path / "four", run_session, root, 2, "hsdp", 9)
    last = run_session(Ranks(), root, 3, "ddp", None)
    assert [first["started"], second["started"], last["started"]] == [[0], [5], [9]]

    other = str(tmp_path / "alone" / "pretrain" / ("d" * 64))
    store.write_json(store.join(other, "lease.json"), {"token": "t"})
    alone = run_session(Ranks(), other, 1, "ddp", None)
    assert {**first["losses"], **second["losses"], **last["losses"]} == pytest.approx(alone["losses"], rel=1e-4)
    ours, theirs = (
        json.loads((Path(place) / "attempts" / end / OUTCOME).read_text()) for place, end in ((root, "3"), (other, "1"))
    )
    assert ours["best"]["step"] == theirs["best"]["step"] and ours["others"].keys() == {"ema", "best"}
    for kind in ("", "-ema", "-best"):
        name = WEIGHTS.replace(".", f"{kind}.", 1)
        expected = load_file(Path(other) / "attempts" / "1" / name)
        for key, tensor in load_file(Path(root) / "attempts" / "3" / name).items():
            torch.testing.assert_close(tensor, expected[key], rtol=1e-3, atol=1e-5, msg=f"{name} {key}")


def test_a_sharded_run_hands_on_whole_weights(tmp_path: Path) -> None:
    root = str(tmp_path / "runs" / "pretrain" / ("d" * 64))
    store.write_json(store.join(root, "lease.json"), {"token": "t"})
    together(2, tmp_path / "group", run_session, root, 1, "fsdp", None)
    outcome = json.loads((Path(root) / "attempts" / "1" / OUTCOME).read_text())
    assert outcome["step"] == STEPS and outcome["measured_images"]["val"] == 35
    exported = load_file(Path(root) / "attempts" / "1" / WEIGHTS)
    assert {name: tensor.shape for name, tensor in exported.items()} == {
        name: parameter.shape for name, parameter in TinyModel().named_parameters()
    }
