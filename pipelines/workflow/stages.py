"""The stages by name. Naming one imports nothing; its module is imported when it is used."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Mapping
from importlib import import_module
from typing import TYPE_CHECKING, Any

from pipelines.config import RecipeError

if TYPE_CHECKING:
    from pipelines.identity import StageResult

__all__ = ["STAGES", "check", "exit_code", "made_nothing", "nearest", "recipe_class", "stage_run"]

# Stage NAME is the module pipelines.NAME with `VERSION`, `run` and the class NameRecipe. In the order of the flow.
STAGES: Mapping[str, str] = {
    "shard": "raw images (class folders, IDX files, a bucket) -> a corpus: tars and a manifest",
    "index": "WebDataset tars that others wrote -> a corpus, in place: a manifest beside them",
    "subset": "a part of a corpus, or one with rare classes repeated -> a corpus",
    "mix": "several corpora with their weights and label spaces -> a corpus",
    "show": "a corpus -> an HTML report: counts, shapes, copies, a contact sheet per class",
    "pretrain": "a corpus -> weights, trained on the Ray cluster",
    "finetune": "weights + a corpus, at a higher resolution -> a model version in the registry",
    "evaluate": "a model version + the held-out split -> metrics with their intervals",
    "promote": "an evaluation that passes the gate -> the alias champion",
    "predict": "a model version + a folder of images -> predictions as Parquet",
}


def recipe_class(stage: str) -> type[Any]:
    _known(stage)
    found = getattr(import_module(f"pipelines.{stage}"), f"{stage.capitalize()}Recipe")
    assert isinstance(found, type)
    return found


def stage_run(stage: str) -> Callable[[Any], StageResult]:
    _known(stage)
    run: Callable[[Any], StageResult] = import_module(f"pipelines.{stage}").run
    return run


def check(stage: str, recipe: Any) -> None:
    """What can be wrong with a recipe that is whole, before anything starts; most stages have nothing to say."""
    _known(stage)
    own: Callable[[Any], None] | None = getattr(import_module(f"pipelines.{stage}"), "check", None)
    if own is not None:
        own(recipe)


def exit_code(stage: str, result: StageResult) -> int:
    """0, or what the stage itself says of a result that is finished and still not a success, such as a refused gate."""
    _known(stage)
    own: Callable[[StageResult], int] | None = getattr(import_module(f"pipelines.{stage}"), "exit_code", None)
    return own(result) if own is not None else 0


def made_nothing(stage: str, uri: str) -> str | None:
    """Why a finished run of this stage left nothing for a next step to take, or None; `uri` is what it returned."""
    _known(stage)
    own: Callable[[str], str | None] | None = getattr(import_module(f"pipelines.{stage}"), "made_nothing", None)
    return own(uri) if own is not None else None


def nearest(name: str, names: Iterable[str], count: int = 1) -> str:
    """ "; did you mean 'x'?" or the whole list, to end an error message with."""
    known = list(names)
    near = difflib.get_close_matches(name, known, n=count, cutoff=0.5)
    if near:
        return f"; did you mean {' or '.join(repr(word) for word in near)}?"
    return f"; known: {', '.join(known)}" if known else ""


def _known(stage: str) -> None:
    if stage not in STAGES:
        raise RecipeError(f"unknown stage {stage!r}{nearest(stage, STAGES)}")
