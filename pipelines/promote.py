"""Stage `promote`: the gate before `champion`. The only caller in this code that moves an alias.

No champion yet: the candidate must reach `minimum`. The same version: nothing moves, success. Else an exact paired
one-sided test on the same images against the champion; a refusal says how many images it takes to decide.
"""

from __future__ import annotations

import contextvars
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

from pipelines import identity, store
from pipelines.config import Strict, input_
from pipelines.identity import StageResult

if TYPE_CHECKING:
    from pipelines.evaluation.paired import Comparison
    from pipelines.identity import Attempt
    from pipelines.tracking.registry import VersionInfo

__all__ = ["REFUSED", "STAGE", "VERSION", "Decision", "PromoteRecipe", "exit_code", "made_nothing", "run"]

STAGE = "promote"
VERSION = 1

REFUSED = 3  # Exit code of `vit promote` when the candidate does not pass: not a failure of the stage, nor a success.
LEASE_WAIT_SECONDS = 120.0
TRIES = 5


@dataclass(frozen=True, kw_only=True, slots=True)
class PromoteRecipe(Strict):
    """An evaluation that passes the gate -> the alias `champion`."""

    evaluation: str = input_()  # URI of an evaluate result
    minimum: float  # Accuracy that any champion must reach, 0 to 1
    metric: Literal["top1", "top5"] = "top1"
    name: str | None = None  # Registered model; None takes that of the evaluated version
    alias: str = "champion"
    alpha: float = 0.05  # Level of the one-sided test

    def __post_init__(self) -> None:
        if not 0 <= self.minimum <= 1:
            raise ValueError(f"minimum={self.minimum} is no accuracy; give a share from 0 to 1, such as 0.9")
        if not 0 < self.alpha <= 0.5:
            raise ValueError(f"alpha={self.alpha} is no level of a test; give a number above 0 up to 0.5, such as 0.05")
        if not self.alias.isidentifier() or self.alias == "latest" or self.alias.lstrip("v").isdigit():
            raise ValueError(
                f"alias={self.alias!r}: MLflow keeps 'latest' and 'v1' for itself; use letters, such as 'champion'"
            )


@dataclass(frozen=True, slots=True)
class Decision:
    """What the gate says, before anything moves."""

    outcome: Literal["first", "better", "already champion", "tie", "worse", "too few images", "below minimum"]
    reason: str

    @property
    def moves(self) -> bool:
        return self.outcome in {"first", "better"}

    @property
    def passes(self) -> bool:
        return self.moves or self.outcome == "already champion"


class ChampionMoved(RuntimeError):
    """Another promotion was decided since this one read the champion."""


def exit_code(result: StageResult) -> int:
    """0 when the candidate is the champion now, REFUSED when the gate refused it."""
    return 0 if result.details.get("passed") else REFUSED


def made_nothing(uri: str) -> str | None:
    """A refusal with no champion before it leaves an alias that points nowhere; every other result is a version."""
    return "nothing was promoted" if "@" in uri else None


def run(recipe: PromoteRecipe) -> StageResult:
    from pipelines.tracking.registry import alias_target, find_version, is_version

    evaluation = identity.result_of(_place(recipe.evaluation))
    if evaluation.stage != "evaluate":
        raise ValueError(f"{recipe.evaluation} is a {evaluation.stage} result; give the URI of an evaluate result")
    model = str(evaluation.details["model"])
    if not is_version(model):
        raise ValueError(
            f"the evaluation is of {model}; only a registered version can be promoted, evaluate models:/..."
        )
    candidate = find_version(model)
    if recipe.name is not None and recipe.name != candidate.name:
        raise ValueError(
            f"name={recipe.name!r}, but the evaluation is of {model}; leave name out or evaluate that model"
        )
    for _ in range(TRIES):
        champion = alias_target(candidate.name, recipe.alias)
        inputs = {"evaluation": evaluation.digest, "incumbent": _incumbent(candidate, champion, recipe.alias)}
        try:
            return identity.run_stage(
                STAGE,
                VERSION,
                recipe,
                inputs,
                partial(_promote, recipe, evaluation, candidate, champion),
            )
        except ChampionMoved:
            candidate = find_version(model)  # Its tags may have changed too.
    raise RuntimeError(
        f"{recipe.alias} of {candidate.name} moved {TRIES} times while this promotion was decided; try again"
    )


def _place(reference: str) -> str:
    """A digest alone stands for the evaluate run of that digest."""
    if len(reference) == 64 and "/" not in reference:
        return store.join(identity.runs(), "evaluate", reference)
    return reference


def _incumbent(candidate: VersionInfo, champion: VersionInfo | None, alias: str) -> str:
    """Whom the candidate is measured against; once it is champion itself, whom it replaced: so the digest stays."""
    if champion is None:
        return "none"
    if champion.version == candidate.version:
        return champion.tags.get(_tag(alias), "none")
    return f"{champion.digest}/{champion.version}"


def _tag(alias: str) -> str:
    return f"vit.{alias}_over"


def _promote(
    recipe: PromoteRecipe,
    evaluation: StageResult,
    candidate: VersionInfo,
    champion: VersionInfo | None,
    attempt: Attempt,
) -> StageResult:
    from pipelines.progress import say
    from pipelines.tracking.registry import alias_target, tag_version
    from pipelines.tracking.run import track

    with track(attempt, recipe, tags={"vit.candidate": candidate.uri, "vit.evaluation": evaluation.uri}) as run:
        value = float(evaluation.metrics[f"{evaluation.details['split']}/{recipe.metric}"])
        comparison = None
        if champion is not None and champion.version != candidate.version and value >= recipe.minimum:
            comparison = _compare(recipe, evaluation, champion)  # Long work: before the lease of the model.
        decision = decide(recipe, value, candidate, champion, comparison)
        what = f"{recipe.alias} of {candidate.name}"
        with _lease(candidate.name, what) as held:
            now = alias_target(candidate.name, recipe.alias)
            if (now and now.version) != (champion and champion.version):
                raise ChampionMoved(what)
            if decision.moves:
                attempt.check()
                held.check()
                # The tag first: killed between the two, the next run finds the same incumbent and the same digest.
                over = _incumbent(candidate, champion, recipe.alias)
                tag_version(candidate, {_tag(recipe.alias): over, "vit.promotion": decision.reason})
                _move(candidate, recipe.alias)
        winner = candidate if decision.passes else champion
        say(f"{'promoted' if decision.moves else 'not moved'}: {decision.reason}")
        run.set_tags({"vit.outcome": decision.outcome, "vit.reason": decision.reason})
        if comparison is not None:
            run.log_metrics(_metrics(comparison), step=0)
        return attempt.result(
            uri=winner.uri if winner else f"models:/{candidate.name}@{recipe.alias}",
            run_id=run.id,
            metrics={recipe.metric: value, **(_metrics(comparison) if comparison else {})},
            passed=decision.passes,
            promoted=decision.moves,
            already_champion=decision.outcome == "already champion",
            outcome=decision.outcome,
            reason=decision.reason,
            candidate=candidate.uri,
            champion=winner.uri if winner else None,
            former_champion=champion.uri if champion else None,
            comparison=_record(comparison),
        )


def decide(
    recipe: PromoteRecipe,
    value: float,
    candidate: VersionInfo,
    champion: VersionInfo | None,
    comparison: Comparison | None,
) -> Decision:
    """The whole law of the gate (contracts 6); pure."""
    what = f"{candidate.uri} has {recipe.metric} {value:.4f}"
    if champion is not None and champion.version == candidate.version:
        return Decision("already champion", f"{candidate.uri} is already {recipe.alias}")
    if value < recipe.minimum:
        return Decision(
            "below minimum", f"{what}, below the minimum {recipe.minimum:g}; train longer or lower the minimum"
        )
    if champion is None:
        return Decision("first", f"{what}, reaches the minimum {recipe.minimum:g}, and there was no {recipe.alias}")
    if comparison is None:
        raise ValueError("a champion other than the candidate needs a comparison")
    against = f"{what} against {champion.uri}: {comparison}"
    if comparison.is_better:
        return Decision("better", against)
    needed = f"about {comparison.images_needed:,} images are needed to decide, {comparison.n:,} were there"
    if comparison.num_wins == comparison.num_losses:
        return Decision("tie", f"{against}; a tie: {needed} (to see a gain of one point)")
    if comparison.num_wins < comparison.num_losses:
        return Decision("worse", f"{against}; not better: {needed} (to see a gain of one point)")
    return Decision("too few images", f"{against}; too few images to decide: {needed}")


def _compare(recipe: PromoteRecipe, evaluation: StageResult, champion: VersionInfo) -> Comparison:
    """Both models on the same images; the champion is evaluated on them now unless it has been."""
    from pipelines import evaluate
    from pipelines.evaluation.paired import compare

    details = evaluation.details
    question = evaluate.EvaluateRecipe(
        model=champion.uri,
        corpus=str(details["corpus"]),
        split=str(details["split"]),
        # A class that was added since the champion was trained must not block every promotion.
        unknown_classes="wrong",
    )
    # `promote --again` asks for a new decision, not for the champion's evaluation once more.
    other = contextvars.copy_context().run(_once, lambda: evaluate.run(question))
    depth = {"top1": 1, "top5": 5}[recipe.metric]
    ours, theirs = (_right(result, depth) for result in (evaluation, other))
    if ours.keys() != theirs.keys():
        raise ValueError(
            f"{evaluation.uri} has {len(ours):,} images and {other.uri} has {len(theirs):,}; "
            "evaluate both again with --again, one of them missed some"
        )
    import numpy as np

    ids = sorted(ours)
    return compare(np.array([ours[i] for i in ids]), np.array([theirs[i] for i in ids]), recipe.alpha)


def _once(call: Callable[[], StageResult]) -> StageResult:
    identity.AGAIN.set(False)
    return call()


def _right(result: StageResult, depth: int) -> dict[int, bool]:
    from pipelines.evaluate import read_predictions

    table = read_predictions(result)
    return dict(zip(table["sample_id"].to_pylist(), (table["rank"].to_numpy() < depth).tolist(), strict=True))


@contextmanager
def _lease(name: str, what: str) -> Iterator[identity.Lease]:
    """One lease per registered model around read, compare, set: MLflow has no compare-and-set."""
    with ExitStack() as stack:
        uri = store.join(store.root(), "leases", "models", f"{name}.json")
        try:
            held = stack.enter_context(identity.lease(uri, what, wait_seconds=LEASE_WAIT_SECONDS))
        except identity.Held as error:  # Not Held: nobody else does this promotion for us.
            raise RuntimeError(f"{error} for more than {LEASE_WAIT_SECONDS:.0f} s; try again") from None
        yield held


def _move(candidate: VersionInfo, alias: str) -> None:
    from pipelines.tracking.client import connect

    connect().set_registered_model_alias(candidate.name, alias, candidate.version)


def _metrics(comparison: Comparison) -> dict[str, float]:
    return {
        "difference": comparison.difference,
        "difference_low": comparison.interval[0],
        "difference_high": comparison.interval[1],
        "p_value": comparison.p_value,
        "num_images": float(comparison.n),
        "images_needed": float(comparison.images_needed),
    }


def _record(comparison: Comparison | None) -> dict[str, Any] | None:
    if comparison is None:
        return None
    return {
        **_metrics(comparison),
        "num_wins": comparison.num_wins,
        "num_losses": comparison.num_losses,
        "alpha": comparison.alpha,
        "test": "exact McNemar, one-sided",
    }
