"""`vit why RECIPE`: what is finished, running, lost or missing, and how it differs from the nearest former run."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from pipelines import store
from pipelines.config import RecipeError, find_recipe, flatten, load_recipe, parse, read_yaml
from pipelines.identity import canonical, code_fingerprint, runs
from pipelines.progress import say
from pipelines.workflow.flags import workflow_arguments
from pipelines.workflow.planning import Plan, plan
from pipelines.workflow.spec import StepValues, find_workflow, load_workflow, merged
from pipelines.workflow.stages import STAGES, nearest, recipe_class

__all__ = ["differences", "former_runs", "main", "nearest_run", "stage_of"]

log = logging.getLogger(__name__)
Record = Mapping[str, Any]

NOT_SET = "(default)"
FORMER_RUNS = 500  # Compared at most; each is one small object.


def main(
    arguments: Sequence[str],
    prepare: Callable[[], None] = lambda: None,
    values_of: Callable[[str], StepValues] = lambda name: {},
) -> int:
    """`[STAGE] RECIPE [--dotted.flag VALUE ...] | WORKFLOW [--STEP.dotted.field VALUE ...]`.

    `prepare` makes the store answer.

    `values_of` gives what a packaged workflow leaves open, by the workflow's name.
    """
    words = list(arguments)
    if not words or words[0].startswith("-"):
        raise RecipeError("vit why needs a recipe or a workflow; `vit recipes` lists the packaged ones")
    if len(words) > 1 and not words[1].startswith("-"):
        stage, *words = words
        if stage not in STAGES:
            raise RecipeError(f"unknown stage {stage!r}{nearest(stage, STAGES)}")
    elif _is_workflow(words[0]):
        name, values = workflow_arguments("why", words)
        workflow = load_workflow(name, values)  # What is wrong is said before anything starts.
        if more := values_of(name):
            workflow = load_workflow(name, merged(more, values))
        prepare()
        for line in why_workflow(workflow):
            say(line)
        return 0
    else:
        stage = stage_of(words[0])
    recipe = parse(recipe_class(stage), words, prog=f"vit why {stage}")
    prepare()
    for line in describe(stage, plan(stage, recipe), recipe):
        say(line)
    return 0


def stage_of(recipe: str) -> str:
    """The stage whose recipe dataclass accepts this file."""
    find_recipe(recipe)
    fits: list[str] = []
    refusals: list[str] = []
    for stage in STAGES:
        try:
            load_recipe(recipe_class(stage), recipe)
        except RecipeError as error:
            refusals.append(f"  {stage}: {str(error).splitlines()[-1].strip()}")
        else:
            fits.append(stage)
    named = [stage for stage in fits or STAGES if stage in recipe]
    if len(fits) == 1 or (fits and len(named) == 1):
        return (named or fits)[0] if len(fits) > 1 else fits[0]
    if fits:
        raise RecipeError(f"{recipe} fits {' and '.join(fits)}; say which: vit why {fits[0]} {recipe}")
    if len(named) == 1:
        load_recipe(recipe_class(named[0]), recipe)  # Raises what is wrong with it, in full.
    raise RecipeError("\n".join([f"{recipe} fits no stage's recipe:", *refusals]))


def why_workflow(workflow: Any) -> Iterator[str]:
    """Each step in order; a step that takes from an unfinished one cannot be named yet."""
    uris: dict[str, str] = {}
    width = max(map(len, workflow.steps))
    for name in workflow.order():
        waits = [source for source in workflow.steps[name].inputs.values() if source not in uris]
        if waits:
            yield f"{name:<{width}}  waits for {', '.join(dict.fromkeys(waits))}"
            continue
        recipe = workflow.recipe(name, uris)
        stage = workflow.steps[name].stage
        try:
            planned = plan(stage, recipe)
        except (ValueError, OSError, RuntimeError) as error:
            yield f"{name:<{width}}  cannot be named yet: {error}"
            continue
        yield from describe(f"{name:<{width}}", planned, recipe)
        if planned.result is not None:
            uris[name] = planned.result.uri


def describe(label: str, planned: Plan, recipe: Any) -> Iterator[str]:
    digest = planned.digest[:12]
    match planned.state:
        case "finished":
            record = store.read_json(store.join(planned.place, "result.json"))
            yield f"{label}  finished    {digest}  {_made(record)}"
            return
        case "running":
            yield f"{label}  running     {digest}  held by {planned.holder}"
        case "lost":
            yield f"{label}  lost        {digest}  {planned.problem}; the same command makes it again"
            return
        case "unfinished":
            yield f"{label}  unfinished  {digest}  nobody is at it; the same command resumes"
        case "missing":
            yield f"{label}  missing     {digest}"
    former = nearest_run(planned, former_runs(planned.stage))
    indent = " " * (len(label) + 2)
    if former is None:
        yield f"{indent}no {planned.stage} run has finished here before"
        return
    digest, record = former
    yield f"{indent}differs from the nearest finished run {digest[:12]} ({_made(record)}) in"
    rows = differences(record, planned.identity, flatten(recipe))
    width = max((len(field) for field, _, _ in rows), default=0)
    for field, then, now in rows:
        yield f"{indent}  {field:<{width}}  {then} -> {now}"


def former_runs(stage: str) -> list[tuple[str, Record]]:
    """(digest, result record) of the finished runs of a stage."""
    place = store.join(runs(), stage)
    uris = [info.uri for info in store.list_objects(place) if info.uri.endswith("/result.json")]
    if len(uris) > FORMER_RUNS:
        log.warning("%s has %d finished runs; %d of them are compared", stage, len(uris), FORMER_RUNS)
    with ThreadPoolExecutor(8) as pool:
        records = pool.map(store.read_json, uris[:FORMER_RUNS])
        return [
            (uri.split("/")[-2], record) for uri, record in zip(uris, records, strict=False) if "identity" in record
        ]


def nearest_run(planned: Plan, former: Sequence[tuple[str, Record]]) -> tuple[str, Record] | None:
    """The one with the fewest differing fields; of equals the newest."""
    return min(
        (run for run in former if run[0] != planned.digest),
        key=lambda run: (len(_differing(run[1]["identity"], planned.identity)), -float(run[1].get("started", 0))),
        default=None,
    )


def differences(record: Record, identity: Record, recipe: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """(field, then, now) of what decides the result and differs; `recipe` is this recipe, flattened."""
    then_full = flatten(record.get("recipe", {}))
    rows = []
    for field in _differing(record["identity"], identity):
        then, now = _flat(record["identity"]).get(field), _flat(identity).get(field)
        # A field at its default is not in the identity; the full recipe knows the value.
        name = field.removeprefix("recipe.")
        rows.append((name, _shown(then, then_full.get(name, NOT_SET)), _shown(now, recipe.get(name, NOT_SET))))
    return rows


def _flat(identity: Record) -> dict[str, Any]:
    return flatten(
        {key: identity[key] for key in ("version", "recipe", "inputs") if identity.get(key) not in (None, {})}
    )


def _differing(one: Record, other: Record) -> list[str]:
    left, right = _flat(one), _flat(other)
    return sorted(key for key in left.keys() | right.keys() if canonical(left.get(key)) != canonical(right.get(key)))


def _shown(value: Any, default: Any) -> str:
    text = str(default if value is None else value)
    is_digest = len(text) == 64 and all(letter in "0123456789abcdef" for letter in text)
    return text[:12] if is_digest else text


def _made(record: Record) -> str:
    made_by, here = str(record.get("code", "unknown")), code_fingerprint()
    when = time.strftime("%Y-%m-%d %H:%M", time.localtime(float(record.get("started", 0))))
    same = made_by.split("-")[0] == here.split("-")[0]
    return f"{when}, {float(record.get('seconds', 0)):.1f} s" + ("" if same else f", by code {made_by}; this is {here}")


def _is_workflow(name: str) -> bool:
    try:
        values = read_yaml(find_workflow(name))
    except RecipeError:
        return False
    return isinstance(values, dict) and "steps" in values
