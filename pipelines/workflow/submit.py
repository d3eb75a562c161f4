"""A stage as a job on the Ray cluster. The submission id comes from the digest: a second submission attaches."""

from __future__ import annotations

import asyncio
import logging
import os
import shlex
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from pipelines import store
from pipelines.config import RecipeError, parse, to_yaml
from pipelines.identity import AGAIN, AGAIN_OF, Held, StageResult, find_result, reusable
from pipelines.progress import say
from pipelines.results import read_record
from pipelines.workflow.again import TOKEN_VARIABLE
from pipelines.workflow.planning import Plan, plan
from pipelines.workflow.stages import STAGES, nearest, recipe_class

__all__ = ["JobFailed", "code_folder", "entrypoint", "main", "run_as_job", "submit"]

log = logging.getLogger(__name__)

LOST_SECONDS = 60.0  # How long an unreachable head is waited for before giving up on a log.
EXCLUDES = (".git", ".venv", ".vit", "**/__pycache__", "dist", "build")


class JobFailed(RuntimeError):
    """The job ended without a result; its log has the reason."""

    def __init__(self, submission_id: str, status: str, exit_code: int | None) -> None:
        super().__init__(f"job {submission_id}: {status.lower()}, exit code {exit_code}; its log is above")
        self.exit_code = exit_code


def main(arguments: Sequence[str], *, again: bool = False, prepare: Callable[[], None] = lambda: None) -> int:
    """`[--working-dir DIR] STAGE RECIPE [--dotted.flag VALUE ...]`; returns the job's exit code."""
    folder, words = _working_dir(list(arguments))
    if words and words[0] not in STAGES and not words[0].startswith("-"):
        raise RecipeError(f"unknown stage {words[0]!r}{nearest(words[0], STAGES)}")
    if len(words) < 2 or words[0].startswith("-"):
        raise RecipeError("vit submit needs a stage and a recipe, as in `vit submit pretrain smoke/pretrain`")
    stage, *rest = words
    recipe = parse(recipe_class(stage), rest, prog=f"vit submit {stage}")
    prepare()
    planned = plan(stage, recipe)
    if planned.result is not None and not again:
        say(f"{stage} {planned.digest[:12]}: reused, nothing was submitted -> {planned.result.uri}")
        return 0
    try:
        follow(client(), submit(planned, recipe, folder=folder, again=again))
    except JobFailed as failed:
        say(str(failed))
        return failed.exit_code or 1
    return 0


def _working_dir(words: list[str]) -> tuple[Path | None, list[str]]:
    """The folder to upload, and the other words."""
    if not words or words[0].split("=")[0] != "--working-dir":
        return code_folder(), words
    words = [*words[0].split("=", 1), *words[1:]]
    if len(words) < 2:
        raise RecipeError("--working-dir needs a folder, or `none` to run the code installed on the cluster")
    folder = None if words[1] == "none" else Path(words[1])
    if folder is not None and not folder.is_dir():
        raise RecipeError(f"--working-dir {folder}: no such folder")
    return folder, words[2:]


def run_as_job(stage: str, recipe: Any) -> StageResult:
    """The stage's result, made by a Ray job that is submitted, or attached to, unless it is there already."""
    planned = plan(stage, recipe)
    again = AGAIN.get()
    if planned.result is not None and reusable(read_record(planned.place)):
        say(f"{stage} {planned.digest[:12]}: reused")
        return planned.result
    follow(client(), submit(planned, recipe, folder=code_folder(), again=again))
    made = find_result(stage, planned.digest)
    if made is None:
        raise RuntimeError(
            f"the job of {stage} {planned.digest[:12]} succeeded but left no result; did an input change?"
        )
    return replace(made, reused=False)


def client() -> Any:
    """For VIT_RAY_JOBS; the token comes from where RAY_AUTH_TOKEN_PATH says."""
    from ray.job_submission import JobSubmissionClient

    address = os.environ.get("VIT_RAY_JOBS")
    if not address:
        raise ValueError("VIT_RAY_JOBS is not set; give the URL of the cluster's dashboard, or start one: vit up")
    for name in ("ray._private.runtime_env", "ray.dashboard.modules"):  # Seven lines on what is not uploaded.
        logging.getLogger(name).setLevel(logging.ERROR)
    return JobSubmissionClient(address)


def submit(planned: Plan, recipe: Any, *, folder: Path | None, again: bool = False) -> str:
    """The submission id of a job that is at this run: one that lives already, or a new one."""
    jobs = client()
    prefix = f"{planned.stage}-{planned.digest[:12]}-a"
    former = {
        job.submission_id: str(job.status) for job in jobs.list_jobs() if str(job.submission_id).startswith(prefix)
    }
    living = [name for name, status in former.items() if status in {"PENDING", "RUNNING"}]
    if living:
        say(f"{planned.stage} {planned.digest[:12]}: attached to job {living[0]}")
        return str(living[0])
    if planned.holder is not None:
        raise Held(f"{planned.stage} {planned.digest[:12]} is held by {planned.holder}, which is not a job")
    number = max([_attempts(planned), *(int(name.removeprefix(prefix)) for name in former)]) + 1
    name = f"{prefix}{number}"
    recipe_uri = store.join(planned.place, "submissions", f"{name}.yaml")
    store.write(recipe_uri, to_yaml(recipe).encode())
    # Where results belong is said by whoever submits: the nodes may have another VIT_ROOT. It is no secret.
    runtime_env: dict[str, Any] = {"env_vars": {"VIT_ROOT": store.root()}}
    if folder is not None:
        runtime_env |= {"working_dir": str(folder), "excludes": list(EXCLUDES)}
    if token := AGAIN_OF.get():
        runtime_env["env_vars"][TOKEN_VARIABLE] = token
    try:
        jobs.submit_job(
            entrypoint=entrypoint([planned.stage, recipe_uri, *(["--again"] if again else [])]),
            submission_id=name,
            runtime_env=runtime_env,
            metadata={"vit.stage": planned.stage, "vit.digest": planned.digest},
        )
    except RuntimeError as error:
        if "already" not in str(error):  # Two submissions at the same moment: one wins, the other attaches.
            raise
    say(f"{planned.stage} {planned.digest[:12]}: job {name}" + (f" with the code of {folder}" if folder else ""))
    return str(name)


def entrypoint(arguments: Sequence[str]) -> str:
    """A shell line that finds `vit` on the node, or the package beside it; the job's exit code is its own."""
    words = shlex.join(arguments)
    return f"if command -v vit >/dev/null 2>&1; then exec vit {words}; else exec python -m pipelines {words}; fi"


def code_folder() -> Path | None:
    """The source folder that runs here, to be uploaded; None when the package is installed: then nodes have it too."""
    folder = Path(__file__).resolve().parent.parent.parent
    return folder if (folder / "pyproject.toml").is_file() else None


def follow(jobs: Any, name: str) -> None:
    """Shows the job's log until it ends; the end of the log is not the end of the job. Raises JobFailed."""
    try:
        status = asyncio.run(_follow(jobs, name))
    except KeyboardInterrupt:
        say(f"job {name} goes on; the same command attaches to it, `ray job stop {name}` ends it")
        raise
    if status != "SUCCEEDED":
        info = jobs.get_job_info(name)
        raise JobFailed(name, status, getattr(info, "driver_exit_code", None))


async def _follow(jobs: Any, name: str) -> str:
    shown = 0
    last_sign = time.monotonic()
    while True:
        seen = 0  # A new connection starts at the log's beginning.
        try:
            async for chunk in jobs.tail_job_logs(name):
                fresh = chunk[max(0, shown - seen) :]
                seen += len(chunk)
                shown = max(shown, seen)
                sys.stdout.write(fresh)
                sys.stdout.flush()
        except (RuntimeError, OSError) as error:
            log.debug("log of %s: %s", name, error)
        try:
            status = str(jobs.get_job_status(name))
            last_sign = time.monotonic()
        except (RuntimeError, OSError) as error:
            if time.monotonic() - last_sign > LOST_SECONDS:
                raise ConnectionError(
                    f"job {name}: the Ray head has not answered for {LOST_SECONDS:.0f} s ({error}); "
                    "the same command attaches again, or resumes"
                ) from None
            status = "UNKNOWN"
        if status in {"SUCCEEDED", "FAILED", "STOPPED"}:
            return status
        await asyncio.sleep(1.0)


def _attempts(planned: Plan) -> int:
    try:
        return int(store.read_json(store.join(planned.place, "lease.json"))["attempt"])
    except store.NotFound:
        return 0
