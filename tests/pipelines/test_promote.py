"""The gate before `champion`: every outcome of contracts 6, on models whose every answer is known."""

from __future__ import annotations

import multiprocessing
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipelines import evaluate, identity, promote, store
from pipelines.config import RecipeError, from_dict, load_recipe
from pipelines.corpus.manifest import Corpus
from pipelines.evaluate import EvaluateRecipe
from pipelines.evaluation.paired import compare
from pipelines.identity import StageResult
from pipelines.promote import PromoteRecipe, decide
from pipelines.tracking.client import connect
from pipelines.tracking.registry import VersionInfo, alias_target, find_version
from tests.pipelines.tracking.toys import own_root
from tests.pipelines.worlds import levels_corpus, register_threshold, threshold_weights

LEVELS = range(64, 192)


@dataclass(frozen=True)
class World:
    """A corpus and one registered model name of this test's own."""

    folder: Path
    corpus: Corpus
    name: str

    def version(self, threshold: float) -> str:
        return register_threshold(self.folder, self.name, threshold, self.corpus)

    def evaluated(self, version: str) -> StageResult:
        return evaluate.run(EvaluateRecipe(model=version, corpus=self.corpus.reference, num_pictures=0))

    def promote(self, version: str, minimum: float = 0.5, **fields: Any) -> StageResult:
        return promote.run(PromoteRecipe(evaluation=self.evaluated(version).uri, minimum=minimum, **fields))

    def champion(self) -> str | None:
        target = alias_target(self.name, "champion")
        return target.uri if target else None


@pytest.fixture
def world(stack: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[World]:
    own_root(monkeypatch)
    corpus = levels_corpus("levels", LEVELS)
    yield World(tmp_path, corpus, f"gate-{abs(hash(tmp_path)) % 10**9}")


@pytest.mark.stack
def test_without_a_champion_the_minimum_decides(world: World) -> None:
    version = world.version(100.5)  # wrong on 27 of 128: top-1 0.789
    refused = world.promote(version, minimum=0.9)
    assert (refused.details["outcome"], promote.exit_code(refused)) == ("below minimum", 3)
    assert world.champion() is None
    promoted = world.promote(version, minimum=0.75)
    assert (promoted.details["outcome"], promoted.uri, promote.exit_code(promoted)) == ("first", version, 0)
    assert promoted.details["promoted"] is True
    assert world.champion() == version


@pytest.mark.stack
def test_a_second_run_is_reused_and_without_its_result_the_version_is_already_champion(world: World) -> None:
    version = world.version(127.5)
    first = world.promote(version)
    again = world.promote(version)
    assert (again.reused, again.digest, again.uri) == (True, first.digest, version)
    store.delete(store.join(identity.runs(), "promote", first.digest, "result.json"))
    computed = world.promote(version)
    assert (computed.reused, computed.digest, computed.uri) == (False, first.digest, version)
    assert computed.details["outcome"] == "already champion"
    assert (computed.details["promoted"], computed.details["already_champion"]) == (False, True)
    assert promote.exit_code(computed) == 0
    assert world.champion() == version


@pytest.mark.stack
def test_a_better_version_takes_over_and_its_result_stays_findable(world: World) -> None:
    old, new = world.version(100.5), world.version(127.5)
    world.promote(old)
    result = world.promote(new)
    assert result.details["outcome"] == "better"
    assert result.details["former_champion"] == old
    comparison = result.details["comparison"]
    assert (comparison["num_wins"], comparison["num_losses"], comparison["num_images"]) == (27, 0, 128)
    assert world.champion() == result.uri == new
    again = world.promote(new)
    assert (again.reused, again.digest) == (True, result.digest)
    # The former champion may come back only through the same gate.
    back = world.promote(old)
    assert (back.details["outcome"], back.uri, world.champion()) == ("worse", new, new)


@pytest.mark.stack
def test_a_tie_is_refused_with_n_interval_and_the_number_needed(world: World) -> None:
    champion, candidate = world.version(117.5), world.version(137.5)  # ten wrong each, on different images
    world.promote(champion)
    result = world.promote(candidate)
    assert (result.details["outcome"], promote.exit_code(result)) == ("tie", 3)
    assert result.uri == world.champion() == champion
    reason = result.details["reason"]
    assert "n=128 images, 10 won and 10 lost" in reason
    assert "95 % interval -" in reason
    assert f"about {result.details['comparison']['images_needed']:,.0f} images are needed" in reason
    assert world.promote(candidate).reused


@pytest.mark.stack
def test_too_few_images_are_refused_with_the_number_needed(world: World) -> None:
    champion, candidate = world.version(123.5), world.version(127.5)  # four wins of four: p = 0.0625
    world.promote(champion)
    result = world.promote(candidate)
    assert result.details["outcome"] == "too few images"
    assert result.details["comparison"]["images_needed"] > 128
    assert result.uri == world.champion() == champion


@pytest.mark.stack
def test_a_champion_does_not_lower_the_minimum(world: World) -> None:
    champion, candidate = world.version(70.5), world.version(100.5)
    world.promote(champion)
    result = world.promote(candidate, minimum=0.9)
    assert (result.details["outcome"], world.champion()) == ("below minimum", champion)


@pytest.mark.stack
def test_a_champion_set_by_hand_is_measured_against_like_any_other(world: World) -> None:
    old, new = world.version(100.5), world.version(127.5)
    client = connect()
    info = find_version(old)
    client.set_registered_model_alias(info.name, "champion", info.version)
    assert world.promote(old).details["outcome"] == "already champion"
    assert world.promote(new).details["outcome"] == "better"


@pytest.mark.stack
def test_promoters_at_the_same_time_leave_the_best_as_champion(world: World) -> None:
    versions = [world.version(threshold) for threshold in (90.5, 127.5)]
    evaluations = [world.evaluated(version).uri for version in versions]
    results: list[StageResult] = []
    threads = [
        threading.Thread(target=lambda uri=uri: results.append(promote.run(PromoteRecipe(evaluation=uri, minimum=0.5))))
        for uri in evaluations
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert world.champion() == versions[1]
    assert sorted(result.details["outcome"] for result in results) in (["better", "first"], ["first", "worse"])


@pytest.mark.stack
def test_two_promoters_of_one_evaluation_promote_once(world: World) -> None:
    uri = world.evaluated(world.version(127.5)).uri
    context = multiprocessing.get_context("spawn")
    with context.Pool(2) as pool:
        outcomes = pool.map(_promote_elsewhere, [uri, uri])
        pool.close()  # Its workers end by themselves: one that is killed may leave the other waiting for its lock.
        pool.join()
    assert set(outcomes) <= {"first", "first (reused)", "held"}
    assert outcomes.count("first") == 1
    assert world.champion() is not None


def _promote_elsewhere(uri: str) -> str:
    try:
        result = promote.run(PromoteRecipe(evaluation=uri, minimum=0.5))
    except identity.Held:
        return "held"
    return str(result.details["outcome"]) + (" (reused)" if result.reused else "")


@pytest.mark.stack
def test_the_champion_of_fewer_classes_does_not_block_a_grown_corpus(world: World) -> None:
    old = world.version(127.5)
    world.promote(old)
    grown = levels_corpus("grown", LEVELS, ("dark", "light", "newt"))
    champion = evaluate.run(EvaluateRecipe(model=old, corpus=grown.reference, unknown_classes="wrong"))
    assert promote.run(PromoteRecipe(evaluation=champion.uri, minimum=0.5)).details["outcome"] == "already champion"


@pytest.mark.stack
def test_only_the_evaluation_of_a_registered_version_is_taken(world: World) -> None:
    weights = str(threshold_weights(world.folder / "w.safetensors", 127.5))
    loose = evaluate.run(EvaluateRecipe(model=weights, corpus=world.corpus.reference))
    with pytest.raises(ValueError, match="only a registered version can be promoted"):
        promote.run(PromoteRecipe(evaluation=loose.uri, minimum=0.5))
    with pytest.raises(ValueError, match="names no stage run"):
        promote.run(PromoteRecipe(evaluation="s3://x/y", minimum=0.5))
    evaluation = world.evaluated(world.version(127.5))
    with pytest.raises(ValueError, match="leave name out"):
        promote.run(PromoteRecipe(evaluation=evaluation.uri, minimum=0.5, name="another"))
    assert promote.run(PromoteRecipe(evaluation=evaluation.digest, minimum=0.5)).details["outcome"] == "first"


# The law alone -------------------------------------------------------------------------------------------------------


def info(version: str) -> VersionInfo:
    return VersionInfo(name="m", version=version, digest=version * 64, run_id="r", tags={})


def outcome(value: float, champion: str | None, wins: int = 0, losses: int = 0, n: int = 1000) -> str:
    candidate = np.zeros(n, bool)
    other = np.zeros(n, bool)
    candidate[:wins] = True
    other[wins : wins + losses] = True
    recipe = PromoteRecipe(evaluation="x", minimum=0.5)
    comparison = compare(candidate, other) if champion not in {None, "2"} else None
    return decide(recipe, value, info("2"), info(champion) if champion else None, comparison).outcome


@pytest.mark.parametrize(
    ("value", "champion", "wins", "losses", "expected"),
    [
        (0.5, None, 0, 0, "first"),
        (0.4999, None, 0, 0, "below minimum"),
        (0.1, "2", 0, 0, "already champion"),
        (0.9, "1", 5, 0, "better"),
        (0.9, "1", 4, 0, "too few images"),
        (0.9, "1", 0, 0, "tie"),
        (0.9, "1", 30, 30, "tie"),
        (0.9, "1", 30, 31, "worse"),
        (0.9, "1", 31, 30, "too few images"),
        (0.4, "1", 300, 0, "below minimum"),
    ],
)
def test_the_law_of_the_gate(value: float, champion: str | None, wins: int, losses: int, expected: str) -> None:
    assert outcome(value, champion, wins, losses) == expected


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({}, "minimum: required"),
        ({"minimum": 90}, "no accuracy"),
        ({"minimum": 0.9, "alpha": 0}, "no level of a test"),
        ({"minimum": 0.9, "alias": "v1"}, "MLflow keeps"),
        ({"minimum": 0.9, "alias": "latest"}, "MLflow keeps"),
        ({"minimum": 0.9, "metric": "loss"}, "metric"),
        ({"minimum": 0.9, "minimun": 0.9}, "did you mean 'minimum'"),
    ],
)
def test_wrong_recipes_are_refused(fields: dict[str, Any], says: str) -> None:
    with pytest.raises(RecipeError, match=says):
        from_dict(PromoteRecipe, {"evaluation": "x", **fields})


@pytest.mark.parametrize("name", ["demo/promote", "smoke/promote", "promote/champion"])
def test_packaged_recipes_load(name: str) -> None:
    load_recipe(PromoteRecipe, name)


def test_the_digest_of_a_recipe_stays_what_it_was() -> None:
    """Fails when the same recipe would be decided anew: raise VERSION if that is meant, or restore the fields."""
    recipe = PromoteRecipe(evaluation="e", minimum=0.9)
    found = identity.digest_of("promote", promote.VERSION, recipe, {"evaluation": "a", "incumbent": "none"})
    assert found == "148628992bb7b69f6c60402214329a2456ac4ee1992a2a19c4fb51b4609f4910"
