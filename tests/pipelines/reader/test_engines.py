"""The engine of a run is chosen once, known by its pixels, and kept over restarts and nodes."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from pipelines.reader import engines, native, nvjpeg
from pipelines.reader.augment import AugmentConfig
from pipelines.reader.decode import decode_for_training
from pipelines.reader.engines import Engine, EngineError, choose, engine_here, require
from pipelines.reader.loader import ReaderConfig
from pipelines.reader.rows import FetchJob, Item, Job, read_decoded
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
    assert deciding_fields(ReaderConfig(nvjpeg=True)) == {"nvjpeg": True}  # Other pixels: another result.


def test_a_read_task_refuses_work_from_an_engine_with_other_pixels() -> None:
    """A node that joins late is checked by its first task, before anything is fetched."""
    job = Job(FetchJob(0, 3), InputSpec(), AugmentConfig(), "mask", Engine("wheels", "f" * 16))
    with pytest.raises(EngineError, match="other pixels"):
        next(read_decoded(job, Item(0, 0, 0, 0, 0, 1, True, ())))


# nvJPEG -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def nvjpeg_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> Any:
    """torchvision's decoder by another one, and the CPU for its GPU: all around nvJPEG, but not nvJPEG."""
    import simplejpeg
    import torch

    def decode_jpeg(files: list[torch.Tensor], mode: str, device: torch.device) -> list[torch.Tensor]:
        assert mode == "rgb" and device.type == "cpu"
        try:
            decoded = [simplejpeg.decode_jpeg(file.numpy().tobytes(), "RGB") for file in files]
        except ValueError as error:
            raise RuntimeError(str(error)) from error
        return [torch.from_numpy(pixels).permute(2, 0, 1) for pixels in decoded]

    io = SimpleNamespace(decode_jpeg=decode_jpeg, ImageReadMode=SimpleNamespace(RGB="rgb"))
    monkeypatch.setattr(nvjpeg, "_torchvision", lambda: io)
    monkeypatch.setattr(nvjpeg, "_device", lambda: torch.device("cpu"))
    monkeypatch.setattr(nvjpeg, "why_not", lambda: "")
    monkeypatch.setattr(engines, "version", lambda package: "0")
    engine_here.cache_clear()
    yield
    engine_here.cache_clear()


def test_nvjpeg_takes_the_same_crops(nvjpeg_on_the_cpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nvjpeg, "TOGETHER", 3)
    files = [memoryview(path.read_bytes()) for path in sorted(engines.PROBE.iterdir())] * 4
    broken = bytearray(files[0])
    broken[-2:] = b"xx"  # No end marker.
    files += [memoryview(bytes(broken[: len(broken) // 2])), memoryview(b"no image")]
    spec, places = InputSpec(height=64, width=80), np.arange(len(files))
    found = {}
    for engine in ("wheels", "nvjpeg"):
        out = np.zeros((len(files), 3, 64, 80), np.uint8)
        faults = decode_for_training(
            files, places, places, spec=spec, augment=AugmentConfig(), seed=0, epoch=0, out=out, engine=engine
        )
        assert set(faults) == set(places[-2:].tolist())
        found[engine] = out[:-2].astype(int)
    difference = np.abs(found["nvjpeg"] - found["wheels"])
    assert difference.max() <= 2  # The wheels resize whole numbers.
    assert found["wheels"].std() > 20


def test_a_run_with_nvjpeg_keeps_it(nvjpeg_on_the_cpu: None) -> None:
    engine = choose(ReaderConfig(nvjpeg=True).wanted_engine)
    assert engine.name == "nvjpeg" and "torchvision-0" in engine.versions
    assert choose("nvjpeg", engine.key) == engine
    for wanted, recorded in (("auto", engine.key), ("nvjpeg", engine_here("wheels").key)):
        with pytest.raises(EngineError, match="--again"):
            choose(wanted, recorded)  # type: ignore[arg-type]


@pytest.mark.skipif(not nvjpeg.why_not(), reason="nvJPEG is here")
def test_without_nvjpeg_its_option_is_refused_with_the_remedy() -> None:
    with pytest.raises(EngineError, match=r"\((torchvision cannot|torch finds no CUDA).*leave reader\.nvjpeg off"):
        choose("nvjpeg")


@pytest.mark.gpu
@pytest.mark.skipif(bool(nvjpeg.why_not()), reason="no torchvision with CUDA")
def test_nvjpeg_shows_the_same_pictures() -> None:
    files = [memoryview(path.read_bytes()) for path in sorted(engines.PROBE.glob("*.jpg"))]
    spec, places = InputSpec(height=64, width=80), np.arange(len(files))
    found = {}
    for engine in ("wheels", "nvjpeg"):
        out = np.zeros((len(files), 3, 64, 80), np.uint8)
        assert not decode_for_training(
            files, places, places, spec=spec, augment=AugmentConfig(), seed=0, epoch=0, out=out, engine=engine
        )
        found[engine] = out.astype(int)
    assert np.abs(found["nvjpeg"] - found["wheels"]).mean() < 4


def test_nvjpeg_and_another_engine_are_not_asked_for_together() -> None:
    for other in ({"engine": "native"}, {"decode": "tasks"}):
        with pytest.raises(ValueError, match="leave both at auto"):
            ReaderConfig(nvjpeg=True, **other)  # type: ignore[arg-type]
