"""SIGKILL at the worst moments of finetune, evaluate and promote: nothing half-written shows, the same command ends."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pipelines import evaluate, finetune, identity, promote
from pipelines.config import from_dict, to_yaml
from pipelines.corpus.manifest import Corpus
from pipelines.evaluate import EvaluateRecipe
from pipelines.finetune import FinetuneRecipe
from pipelines.promote import PromoteRecipe
from pipelines.tracking.client import connect
from pipelines.tracking.registry import alias_target, find_version
from pipelines.workflow.planning import plan
from tests.pipelines.tracking.toys import own_root
from tests.pipelines.worlds import levels_corpus, register_threshold

pytestmark = pytest.mark.stack
ROOT = Path(__file__).parent.parent.parent

# `vit STAGE RECIPE`, killed when it calls MODULE.NAME for an object whose address ends in ENDING.
COMMAND = """
import importlib, os, signal, sys
stage, recipe, module, name, ending = sys.argv[1:]
owner = importlib.import_module(module)
inner = getattr(owner, name)

def kill(*args, **options):
    if not ending or str(args[0]).endswith(ending):
        os.kill(os.getpid(), signal.SIGKILL)
    return inner(*args, **options)

setattr(owner, name, kill)
from pipelines.cli import main
sys.exit(main([stage, recipe]))
"""


@pytest.fixture
def place(stack: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    own_root(monkeypatch)
    yield tmp_path


def killed(stage: str, recipe: Any, folder: Path, function: str, ending: str = "") -> None:
    """Runs the command until it is killed before that call; its result is not there, and nobody holds its lease."""
    path = folder / f"{stage}.yaml"
    path.write_text(to_yaml(recipe))
    module, _, name = function.rpartition(".")
    words = [sys.executable, "-c", COMMAND, stage, str(path), module, name, ending]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=200)
    assert done.returncode == -signal.SIGKILL, done.stdout + done.stderr
    assert plan(stage, recipe).state == "unfinished"


def runs_of(result: identity.StageResult) -> list[str]:
    client = connect()
    experiment = client.get_experiment_by_name(result.stage)
    assert experiment is not None
    found = client.search_runs([experiment.experiment_id], f"tags.`vit.digest` = '{result.digest}'")
    return [run.info.status for run in found]


def world(folder: Path) -> tuple[Corpus, str]:
    corpus = levels_corpus("levels", range(64, 192))
    return corpus, register_threshold(folder, f"kills-{folder.name}", 100.5, corpus)  # Wrong on 27 of 128.


def test_an_evaluation_that_is_killed_twice_ends_with_the_right_figures(place: Path) -> None:
    corpus, version = world(place)
    recipe = EvaluateRecipe(model=version, corpus=corpus.reference, num_pictures=0)
    killed("evaluate", recipe, place, "pipelines.store.write_json", "/evaluation.json")
    assert "metric.test/top1" not in find_version(version).tags
    killed("evaluate", recipe, place, "pipelines.identity.commit_record")
    result = evaluate.run(recipe)
    assert not result.reused and result.uri.endswith("/attempts/3/evaluation.json")
    assert result.metrics["test/top1"] == pytest.approx(101 / 128)
    assert runs_of(result) == ["FINISHED"]


def test_a_promotion_that_is_killed_on_either_side_of_the_alias_promotes_once(place: Path) -> None:
    corpus, version = world(place)
    evaluation = evaluate.run(EvaluateRecipe(model=version, corpus=corpus.reference, num_pictures=0))
    recipe = PromoteRecipe(evaluation=evaluation.uri, minimum=0.5)
    name = find_version(version).name
    killed("promote", recipe, place, "pipelines.promote._move")
    assert alias_target(name, "champion") is None
    killed("promote", recipe, place, "pipelines.identity.commit_record")
    champion = alias_target(name, "champion")
    assert champion is not None and champion.uri == version
    result = promote.run(recipe)
    assert (result.reused, result.uri, promote.exit_code(result)) == (False, version, 0)
    assert result.details["outcome"] == "already champion"
    assert runs_of(result) == ["FINISHED"]
    assert promote.run(recipe).reused


@pytest.mark.timeout(400)
def test_a_finetune_that_is_killed_after_it_registered_leaves_one_version(place: Path) -> None:
    from tests.pipelines.tiny_corpus import write_colours

    corpus = write_colours("colours", train=60, held_out=12).reference
    name = f"kills-{place.name}"
    values = {
        "corpus": corpus,
        "model": {"patch_size": 4, "width": 16, "depth": 1, "mlp_dim": 32, "num_heads": 2},
        "resolution": 16,
        "train": {"batch_size": 8, "total_steps": 6},
        "optimizer": {"kind": "adamw"},
        "augment": {"crop": "none"},
        "validation": {"every_epochs": None},
        "workers": {"count": 1},
        "register_as": name,
    }
    recipe = from_dict(FinetuneRecipe, values)
    killed("finetune", recipe, place, "pipelines.identity.commit_record")
    left = find_version(f"models:/{name}/1")
    result = finetune.run(recipe)
    assert not result.reused and result.uri == left.uri
    assert result.details["weights_sha256"] == left.tags["vit.weights_sha256"]
    assert result.details["steps"] == 6
    assert len(connect().search_model_versions(f"name = '{name}'")) == 1
    assert runs_of(result) == ["FINISHED"]
