"""The engine of a run is chosen once, known by its pixels, and kept over restarts and nodes."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from pipelines.reader import engines, native
from pipelines.reader.augment import AugmentConfig
from pipelines.reader.engines import Engine, EngineError, choose, engine_here, require
from pipelines.reader.loader import ReaderConfig
from pipelines.reader.rows import Item, Job, read_item
from vit_model.preprocess import InputSpec

needs_native = pytest.mark.skipif(bool(native.why_not()), reason=f"not built: {native.why_not()}")


@pytest.fixture
def without_extension(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(native, "_why_not", "no compiler")
    for cached in (engines.engine_here, engines.require, engines._tell_once):
        cached.cache_clear()
    yield
    engines.engine_here.cache_clear()


@pytest.fixture
def other_pixels(monkeypatch: pytest.MonkeyPatch) -> None:
    here = engine_here

    def changed(name: Any) -> Engine:
        return replace(here(name), pixels="0" * 16) if name == "native" else here(name)

    monkeypatch.setattr(engines, "engine_here", changed)
    engines._tell_once.cache_clear()
    engines.require.cache_clear()


@needs_native
def test_both_engines_give_the_same_pixels() -> None:
    assert engine_here("native").pixels == engine_here("wheels").pixels


@needs_native
def test_auto_is_native_where_its_vector_code_runs() -> None:
    assert choose("auto").name == ("native" if native.has_simd() else "wheels")


def test_without_the_extension_the_wheels_serve_and_say_so_once(
    without_extension: None, capsys: pytest.CaptureFixture[str]
) -> None:
    assert [choose("auto").name for _ in range(3)] == ["wheels"] * 3
    text = capsys.readouterr()
    assert (text.out + text.err).count("no compiler") == 1


def test_without_the_extension_native_fails_with_the_remedy(without_extension: None) -> None:
    with pytest.raises(EngineError, match=r"no compiler.*reader\.engine=wheels"):
        choose("native")
    with pytest.raises(EngineError, match="compiler"):
        require("native", "0" * 16)


@needs_native
def test_an_engine_with_other_pixels_is_not_used(other_pixels: None, capsys: pytest.CaptureFixture[str]) -> None:
    assert choose("auto").name == "wheels"
    with pytest.raises(EngineError, match="other pixels"):
        choose("native")


def test_a_node_with_other_pixels_is_refused() -> None:
    require("wheels", engine_here("wheels").pixels)
    with pytest.raises(EngineError, match="other pixels than where the run started"):
        require("wheels", "f" * 16)


def test_a_resumed_run_keeps_its_engine() -> None:
    wheels = engine_here("wheels")
    assert choose("auto", wheels.key) == wheels
    with pytest.raises(EngineError, match="--again"):
        choose("native", wheels.key)
    with pytest.raises(EngineError, match="other pixels"):
        choose("auto", f"wheels {'f' * 16}")
    with pytest.raises(EngineError, match="nvjpeg"):
        choose("auto", "nvjpeg 0123")


def test_the_engine_decides_no_digest() -> None:
    from pipelines.identity import deciding_fields

    assert deciding_fields(ReaderConfig(engine="wheels")) == deciding_fields(ReaderConfig(engine="native")) == {}


def test_a_read_task_refuses_work_from_an_engine_with_other_pixels() -> None:
    """A node that joins late is checked by its first task, before anything is fetched."""
    job = Job(0, InputSpec(), AugmentConfig(), 3, "mask", Engine("wheels", "f" * 16))
    with pytest.raises(EngineError, match="other pixels"):
        next(read_item(job, Item(0, 0, 0, 0, 0, 1, True, ())))
