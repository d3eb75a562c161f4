"""Jobs: what is uploaded, how the node finds the code, one job per run, the exit code of the run."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from pipelines.workflow.home import state_folder
from pipelines.workflow.submit import EXCLUDES, code_folder, entrypoint

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
