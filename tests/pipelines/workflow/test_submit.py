"""Jobs: what is uploaded, how the node finds the code, one job per run, the exit code of the run."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import uuid
import zipfile
from pathlib import Path

import pytest

from infra.endpoints import Endpoints
from pipelines.config import load_recipe
from pipelines.pretrain import PretrainRecipe
from pipelines.shard import ShardRecipe
from pipelines.shard import run as shard_run
from pipelines.workflow.home import state_folder
from pipelines.workflow.planning import plan
from pipelines.workflow.submit import EXCLUDES, JobFailed, client, code_folder, entrypoint, follow, run_as_job, submit

ROOT = Path(__file__).parent.parent.parent.parent
SECRET = "-".join(["a", "key", "that", "must", "not", "leave"])  # Not to be found in this file itself.


def archive(folder: Path, target: Path, excludes: tuple[str, ...] = ()) -> zipfile.ZipFile:
    """What Ray itself would upload for `--working-dir FOLDER`."""
    from ray._private.runtime_env.packaging import create_package
    from ray._private.runtime_env.working_dir import upload_working_dir_if_needed

    def keep(path: str, excludes: list[str], is_file: bool = False) -> None:
        create_package(path, target, include_gitignore=True, excludes=excludes)

    upload_working_dir_if_needed(
        {"working_dir": str(folder), "excludes": list(excludes)}, include_gitignore=True, upload_fn=keep
    )
    return zipfile.ZipFile(target)


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of this source folder in use: a state folder with keys, a virtual environment, caches."""
    folder = tmp_path / "checkout"
    ignore = shutil.ignore_patterns(".git", ".venv", ".vit", "__pycache__", ".*_cache", "*.pyc")
    shutil.copytree(ROOT, folder, ignore=ignore)
    monkeypatch.chdir(folder)
    monkeypatch.delenv("VIT_STATE", raising=False)
    for name in ("keys/s3.json", "mlflow/mlflow.db", "s3/data.dat", "keys/ray.token"):
        file = state_folder() / name
        file.parent.mkdir(exist_ok=True)
        file.write_text(SECRET)
    for name in (".git/config", ".venv/lib/thing.py", "pipelines/__pycache__/x.pyc"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(SECRET)
    return folder


@pytest.mark.parametrize("excludes", [(), EXCLUDES], ids=["ray job submit", "vit submit"])
def test_the_uploaded_archive_holds_the_code_and_no_state_and_no_secret(
    checkout: Path, tmp_path: Path, excludes: tuple[str, ...]
) -> None:
    with archive(checkout, tmp_path / "upload.zip", excludes) as uploaded:
        names = uploaded.namelist()
        assert "pipelines/cli.py" in names and "pipelines/recipes/workflows/demo.yaml" in names
        assert not [name for name in names if Path(name).parts[0] in {".vit", ".git", ".venv"} or name.endswith(".pyc")]
        assert not [name for name in names if SECRET.encode() in uploaded.read(name)]


def test_the_state_folder_is_left_out_wherever_it_lies(
    checkout: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VIT_STATE", str(checkout / "my" / "own-state"))
    (state_folder() / "token").write_text(SECRET)
    with archive(checkout, tmp_path / "upload.zip") as uploaded:
        assert not [name for name in uploaded.namelist() if SECRET.encode() in uploaded.read(name)]


def test_the_state_folder_is_closed_to_others(checkout: Path) -> None:
    assert state_folder().stat().st_mode & 0o777 == 0o700


def run_on_a_node(tmp_path: Path, path: list[Path], *arguments: str) -> subprocess.CompletedProcess[str]:
    """As Ray runs an entrypoint: through a shell, in the uploaded folder, which is on PYTHONPATH."""
    environment = {"PATH": os.pathsep.join(map(str, path)), "PYTHONPATH": str(ROOT), "HOME": str(tmp_path)}
    return subprocess.run(
        ["/bin/sh", "-c", entrypoint(arguments)], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60
    )


@pytest.fixture
def python_only(tmp_path: Path) -> Path:
    folder = tmp_path / "bin"
    folder.mkdir()
    script = folder / "python"
    script.write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')  # A link would lose the virtual environment.
    script.chmod(0o755)
    return folder


def test_a_node_without_the_console_script_runs_the_package(tmp_path: Path, python_only: Path) -> None:
    done = run_on_a_node(tmp_path, [python_only], "recipes", "demo")
    assert done.returncode == 0, done.stderr
    assert "workflows/demo" in done.stdout


def test_a_node_with_the_console_script_runs_it(tmp_path: Path, python_only: Path) -> None:
    script = python_only / "vit"
    script.write_text('#!/bin/sh\necho "the script got $2"\nexit 7\n')
    script.chmod(0o755)
    done = run_on_a_node(tmp_path, [python_only], "pretrain", "two words")
    assert (done.stdout, done.returncode) == ("the script got two words\n", 7)


def test_a_source_folder_is_uploaded_and_an_installed_package_is_not() -> None:
    assert code_folder() == ROOT
    assert (code_folder() or Path()).joinpath("pyproject.toml").is_file()


@pytest.fixture
def shard_recipe(photos: Path) -> ShardRecipe:
    return ShardRecipe(
        source=str(photos), destination=f"jobs-{uuid.uuid4().hex[:8]}", splits={"train": 0.7, "val": 0.1, "test": 0.2}
    )


@pytest.mark.stack
@pytest.mark.timeout(600)
def test_a_second_submission_attaches_and_a_third_finds_the_result(
    stack: Endpoints, shard_recipe: ShardRecipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VIT_ROOT", f"{stack.root}/jobs")  # The nodes' own is another; the submitter's counts.
    planned = plan("shard", shard_recipe)
    first = submit(planned, shard_recipe, folder=ROOT)
    assert first == f"shard-{planned.digest[:12]}-a1"
    assert submit(planned, shard_recipe, folder=ROOT) == first
    follow(client(), first)
    result = run_as_job("shard", shard_recipe)
    assert result.reused and result.digest == planned.digest
    assert len([job for job in client().list_jobs() if planned.digest[:12] in str(job.submission_id)]) == 1


@pytest.mark.stack
@pytest.mark.timeout(600)
@pytest.mark.usefixtures("stack")
def test_a_job_that_fails_shows_its_log_and_a_later_one_gets_a_new_id(
    photos: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    source = tmp_path / "photos"
    shutil.copytree(photos, source)
    for name in ("dark/001.png", "light/001.png"):
        (source / name).write_bytes(b"no picture")
    recipe = ShardRecipe(source=str(source), destination=f"jobs-{uuid.uuid4().hex[:8]}", max_bad_fraction=0.0)
    planned = plan("shard", recipe)
    for attempt in (1, 2):
        with pytest.raises(JobFailed, match="failed, exit code 1") as caught:
            run_as_job("shard", recipe)
        assert f"shard-{planned.digest[:12]}-a{attempt}" in str(caught.value)
        assert "max_bad_fraction" in capfd.readouterr().out


@pytest.mark.stack
@pytest.mark.timeout(900)
def test_plain_ray_job_submit_runs_a_recipe_as_it_is(stack: Endpoints, shard_recipe: ShardRecipe) -> None:
    """The README's own line. Without an installed console script the package is run in its place."""
    corpus = shard_run(shard_recipe)
    command = ["vit"] if (Path(sys.executable).parent / "vit").exists() else ["python", "-m", "pipelines"]
    submit_line = [str(Path(sys.executable).with_name("ray")), "job", "submit", "--address", str(stack.ray_jobs)]
    arguments = ["pretrain", "smoke/pretrain", "--corpus", corpus.uri, "--train.total-steps", "8"]
    done = subprocess.run(
        [*submit_line, "--working-dir", ".", "--", *command, *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=800,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "uploaded by the job" in done.stdout or "installed" in done.stdout
    recipe = load_recipe(PretrainRecipe, "smoke/pretrain", {"corpus": corpus.uri, "train.total_steps": 8})
    assert plan("pretrain", recipe).state == "finished"
