"""`vit VERB ...`: the one entry for a person. Verbs are names here; what they need is imported when one is chosen."""

from __future__ import annotations

import logging
import os
import shlex
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import Any

from pipelines.messages import FAILED, INTERRUPTED, OK, TERMINATED, UsageError, report, say_error, say_help, write
from pipelines.workflow.stages import STAGES, check, exit_code, nearest, recipe_class

__all__ = ["main"]

OURS = ("pipelines", "infra", "vit_model")


@dataclass(frozen=True, slots=True)
class Flags:
    """Flags that stand anywhere after the verb. `debug` is for all, the others for the verbs that compute."""

    again: bool = False
    debug: bool = False
    plain: bool = False


@dataclass(frozen=True, slots=True)
class Verb:
    usage: str
    help: str
    call: Callable[[list[str], Flags], int]


def main(argv: list[str] | None = None) -> int:
    """Runs one command; its exit code is 0 done, 1 failed, 2 wrong command or recipe, 3 refused, 130 interrupted."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    command = "vit " + shlex.join(arguments)
    debug = "--debug" in arguments
    try:
        return _dispatch(arguments)
    except KeyboardInterrupt:
        say_error(f"interrupted; the same command resumes: {command}")
        return INTERRUPTED
    except SystemExit as stop:  # tyro's own --help (0) and flag errors (2); SIGTERM (143)
        if stop.code == TERMINATED:
            say_error(f"terminated; the same command resumes: {command}")
        return stop.code if isinstance(stop.code, int) else (OK if stop.code is None else FAILED)
    except BrokenPipeError:  # `vit recipes | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return OK
    except Exception as error:
        return report(error, debug)


def _dispatch(arguments: list[str]) -> int:
    if not arguments or arguments[0] in {"-h", "--help", "help"}:
        say_help(_groups())
        return OK
    verb, *rest = arguments
    if verb in {"--version", "-V"}:
        from importlib.metadata import PackageNotFoundError, version

        try:
            write(f"vit {version('vit-pipelines')}")
        except PackageNotFoundError:
            write("vit (run from the source folder, not installed)")
        return OK
    if verb not in VERBS:
        raise UsageError(f"unknown verb {verb!r}{nearest(verb, VERBS)}; `vit --help` shows them all")
    flags = Flags(**{name: f"--{name}" in rest for name in ("again", "debug", "plain")})
    for name, takers in {"again": ("demo", *STAGES, "run", "submit"), "plain": ("demo", "run")}.items():
        if getattr(flags, name) and verb not in takers:
            raise UsageError(f"--{name} has no effect on `vit {verb}`; it is for {', '.join(takers)}")
    rest = [word for word in rest if word not in {"--again", "--debug", "--plain"}]
    if verb not in STAGES and verb not in INFRA and rest[:1] in (["--help"], ["-h"]):
        write(f"usage: vit {verb} {VERBS[verb].usage}\n\n{VERBS[verb].help}")
        return OK
    _set_up_process(flags.debug)
    return VERBS[verb].call(rest, flags)


def _groups() -> dict[str, dict[str, str]]:
    """Titles of the help, each with its verbs and what they do."""
    start = ["demo", *INFRA]
    groups = {
        "start here": start,
        "stages: vit VERB RECIPE [--dotted.flag VALUE ...]": list(STAGES),
        "together": [verb for verb in VERBS if verb not in STAGES and verb not in start],
    }
    return {title: {verb: VERBS[verb].help for verb in verbs} for title, verbs in groups.items()}


def _set_up_process(debug: bool) -> None:
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    for package in OURS:
        logging.getLogger(package).setLevel(logging.DEBUG if debug else logging.INFO)
    if signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:  # So that a lease is given back and children end.
        try:
            signal.signal(signal.SIGTERM, lambda *_: sys.exit(TERMINATED))
        except ValueError:  # Not the main thread: a notebook or a test.
            logging.getLogger(__name__).debug("SIGTERM is left as it is outside the main thread")


# ---------------------------------------------------------------------------------------------------------- the verbs


def _infra(verb: str) -> Callable[[list[str], Flags], int]:
    def call(arguments: list[str], flags: Flags) -> int:
        from infra.cli import main as infra_main

        return infra_main(verb, arguments)

    return call


def _stage(stage: str) -> Callable[[list[str], Flags], int]:
    def call(arguments: list[str], flags: Flags) -> int:
        from pipelines.config import parse

        # A recipe that `vit submit` left in the store; any other URI is the subject of a stage that takes one.
        if arguments and "://" in arguments[0] and arguments[0].endswith(".yaml"):
            ensure_stack()
            recipe = _stored_recipe(stage, arguments)
        else:
            recipe = parse(recipe_class(stage), arguments, prog=f"vit {stage}")
            check(stage, recipe)
            ensure_stack()
        from pipelines.workflow.again import TOKEN_VARIABLE, again
        from pipelines.workflow.report import say_result
        from pipelines.workflow.runner import run_stage_named

        with again(flags.again, os.environ.get(TOKEN_VARIABLE)):
            outcome = run_stage_named(stage, recipe)
        say_result(outcome)
        return exit_code(stage, outcome.result)

    return call


def _stored_recipe(stage: str, arguments: list[str]) -> Any:
    import tempfile
    from pathlib import Path

    from pipelines.config import parse
    from pipelines.store import download

    with tempfile.TemporaryDirectory() as folder:
        recipe = download(arguments[0], Path(folder) / f"{stage}.yaml")
        return parse(recipe_class(stage), [str(recipe), *arguments[1:]], prog=f"vit {stage}")


def _module(name: str) -> Callable[[list[str], Flags], int]:
    """A verb whose module has `main(arguments, prepare)`."""

    def call(arguments: list[str], flags: Flags) -> int:
        code: int = import_module(name).main(arguments, ensure_stack)
        return code

    return call


def _run(arguments: list[str], flags: Flags) -> int:
    from pipelines.workflow.again import again
    from pipelines.workflow.flags import workflow_arguments
    from pipelines.workflow.report import duration, say_step
    from pipelines.workflow.spec import load_workflow, merged

    name, values = workflow_arguments("run", arguments)
    workflow = load_workflow(name, values)  # What is wrong is said before anything starts.
    if more := _demo_values(name):
        workflow = load_workflow(name, merged(more, values))
    ensure_stack()
    from pipelines.progress import say

    started = time.monotonic()
    with again(flags.again):
        outcomes = run_workflow(workflow, plain=flags.plain, observe=say_step)
    ran = sum(not outcome.result.reused for outcome in outcomes.values())
    say(f"{workflow.name}: {ran} ran, {len(outcomes) - ran} reused, {duration(time.monotonic() - started)}")
    return OK


def run_workflow(workflow: Any, *, plain: bool, observe: Callable[[Any], None]) -> dict[str, Any]:
    """Through Dagster in this process, or plainly one step after the other; the results are the same."""
    if plain:
        from pipelines.workflow.runner import run_plain

        return run_plain(workflow, observe)
    from pipelines.workflow.assets import run_in_process

    return run_in_process(workflow, observe)


def _demo(arguments: list[str], flags: Flags) -> int:
    from pipelines.demo import main as demo_main

    return demo_main(arguments, run=run_workflow, plain=flags.plain, recompute=flags.again, prepare=ensure_stack)


def _why(arguments: list[str], flags: Flags) -> int:
    from pipelines.why import main as why_main

    return why_main(arguments, ensure_stack, _demo_values)


def _schedule(arguments: list[str], flags: Flags) -> int:
    from infra.endpoints import current
    from pipelines.workflow.schedules import main as schedule_main

    if found := current():  # From a sub-folder too: the state folder is the stack's.
        found.apply()

    return schedule_main(arguments, ensure_stack)


def _submit(arguments: list[str], flags: Flags) -> int:
    from pipelines.workflow.submit import main as submit_main

    return submit_main(arguments, again=flags.again, prepare=ensure_stack)


def _recipes(arguments: list[str], flags: Flags) -> int:
    from pipelines.config import find_recipe, packaged_recipes
    from pipelines.progress import say

    names = [name for name in packaged_recipes() if not arguments or any(word in name for word in arguments)]
    if not names:
        if not arguments:
            raise UsageError("this installation has no packaged recipes; install it again")
        raise UsageError(f"no packaged recipe has {' or '.join(arguments)} in its name; `vit recipes` lists them all")
    width = max(map(len, names))
    for name in names:
        with find_recipe(name).open() as lines:
            first = next((line[1:].strip() for line in lines if line.startswith("#")), "")
        say(f"{name:<{width}}  {first}".rstrip())
    return OK


INFRA = {
    "up": "start the embedded stack: object store, MLflow server, Ray head; a second `up` attaches",
    "down": "stop exactly what `up` started; the data stays",
    "status": "what runs where",
    "env": 'the endpoints as shell exports: eval "$(vit env)"',
}
VERBS: dict[str, Verb] = {
    "demo": Verb(
        "[--corpus DIR] [--seed N] [--plain]", "the whole flow on real images, from raw files to a champion", _demo
    ),
    **{verb: Verb("[--help]", text, _infra(verb)) for verb, text in INFRA.items()},
    **{stage: Verb("RECIPE [--dotted.flag VALUE ...]", text, _stage(stage)) for stage, text in STAGES.items()},
    "run": Verb(
        "WORKFLOW [--STEP.dotted.field VALUE ...] [--plain]",
        "all steps of a workflow file, finished ones reused; --plain: without Dagster",
        _run,
    ),
    "why": Verb(
        "[STAGE] RECIPE [--dotted.flag VALUE ...] | WORKFLOW [--STEP.dotted.field VALUE ...]",
        "finished, running or missing, and which fields differ from the nearest former run",
        _why,
    ),
    "verify": Verb(
        "CORPUS [--deep] [--num-workers N]",
        "every byte of a corpus against its manifest; exit code 1 if anything differs",
        _module("pipelines.verify"),
    ),
    "estimate": Verb(
        "RECIPE [--on h100x8] [--mfu 0.45] [--price DOLLARS] [--images N] [--classes K] [--dotted.flag VALUE ...]",
        "what a training will need and cost: memory, time, dollars, reading; nothing is started",
        _module("pipelines.estimate"),
    ),
    "runs": Verb(
        "[list [STAGE]] | tail DIGEST | stop DIGEST | compare DIGEST DIGEST",
        "every stage run in the store: where it stands; follow it, stop it, compare two",
        _module("pipelines.runs"),
    ),
    "gc": Verb(
        "--older-than AGE [--results] [--dry-run]",
        "free spent checkpoints and abandoned runs; --results: also finished runs that no version and no run names",
        _module("pipelines.garbage"),
    ),
    "inspect-batch": Verb(
        "[STAGE] RECIPE [--step N] [--images N] [--output FILE] [--dotted.flag VALUE ...]",
        "a picture of what the model will see, with labels and weights",
        _module("pipelines.inspect_batch"),
    ),
    "submit": Verb(
        "[--working-dir DIR] STAGE RECIPE [--dotted.flag VALUE ...]",
        "a stage as a job on the Ray cluster; attaches when it already runs there",
        _submit,
    ),
    "schedule": Verb("start|stop|status [WORKFLOW]", "run a workflow by the clock: its file says when", _schedule),
    "corpus": Verb(
        "exclude CORPUS LIST [--copies] | versions CORPUS",
        "withdraw listed images as a new version; show all versions",
        _module("pipelines.corpus.command"),
    ),
    "recipes": Verb("[WORD ...]", "the packaged recipes and what each is for", _recipes),
}


def _demo_values(name: str) -> dict[str, dict[str, Any]]:
    """The packaged demo's images lie in the state folder: `vit run demo` and `vit why demo` fill them in, too."""
    if name.removeprefix("workflows/") != "demo":
        return {}
    ensure_stack()  # It says which state folder.
    from pipelines.demo import sample_values

    return sample_values(None)[0]


def ensure_stack() -> None:
    """Starts or heals the embedded stack unless the environment names other endpoints; says what it did."""
    from infra.endpoints import ensure
    from pipelines.progress import say

    ensure(say=say)
