"""The house keeps its shape: imports point one way, every recipe loads, nothing unsafe is written, the map is right."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SOURCES = sorted(path for package in ("vit_model", "pipelines", "infra") for path in (ROOT / package).rglob("*.py"))
BOTTOM = {
    f"pipelines.{name}"
    for name in ("batch", "store", "processes", "lease", "results", "identity", "progress", "config")
}
VERBS = (
    "pipelines.why",
    "pipelines.demo",
    "pipelines.estimate",
    "pipelines.runs",
    "pipelines.garbage",
    "pipelines.corpus.command",
    "pipelines.verify",
    "pipelines.inspect_batch",
)
STAGES = {"shard", "index", "subset", "mix", "show", "pretrain", "finetune", "evaluate", "promote", "predict"}


def imports(path: Path) -> Iterator[str]:
    """Every module that a file imports, at the top or inside a function."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def below(module: str, *packages: str) -> bool:
    return any(module == package or module.startswith(package + ".") for package in packages)


def allowed(path: Path, module: str) -> bool:
    name = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
    ours = below(module, "vit_model", "pipelines", "infra")
    if below(name, "vit_model"):
        return below(module, "vit_model") or not (ours or below(module, "ray", "mlflow", "boto3", "pydantic", "tyro"))
    if below(name, "infra"):
        return below(module, "infra") or not ours
    if below(module, "pydantic", "tyro"):
        return name == "pipelines.config"
    if not ours or module in {"pipelines", "vit_model"}:
        return True
    if below(module, "infra"):
        return name == "pipelines.cli" or below(name, "pipelines.store")
    if below(module, *BOTTOM):
        return True
    if name in BOTTOM:
        return False
    folder = name.split(".")[1]
    stage_or_join = name.count(".") == 1
    if below(module, "vit_model"):
        return True
    match folder:
        case "corpus":
            return below(module, "pipelines.corpus")
        case "reader":
            return below(module, "pipelines.reader", "pipelines.corpus")
        case "training":
            own = below(module, "pipelines.training")
            return own or (
                name == "pipelines.training.job"
                and below(module, "pipelines.reader", "pipelines.corpus", "pipelines.tracking")
            )
        case "evaluation":
            return below(module, "pipelines.evaluation")
        case "tracking":
            return below(module, "pipelines.tracking")
        case "workflow":
            return below(module, "pipelines.workflow")
        case "cli":
            return below(module, "pipelines.cli", "pipelines.messages", "pipelines.workflow", *VERBS)
    return stage_or_join  # Stages join the parts.


def test_imports_point_one_way() -> None:
    wrong = [
        f"{path.relative_to(ROOT)} imports {module}"
        for path in SOURCES
        for module in imports(path)
        if not allowed(path, module)
    ]
    assert not wrong, "\n".join(wrong)


def test_only_the_worker_knows_ray_train() -> None:
    users = {
        path.relative_to(ROOT).as_posix() for path in SOURCES for module in imports(path) if below(module, "ray.train")
    }
    assert users <= {"pipelines/training/worker.py"}, users


def test_the_model_imports_with_torch_numpy_and_safetensors_alone() -> None:
    blocked = [
        "ray",
        "mlflow",
        "boto3",
        "PIL",
        "simplejpeg",
        "scipy",
        "sklearn",
        "pydantic",
        "tyro",
        "jaxtyping",
        "beartype",
        "pyarrow",
        "matplotlib",
    ]
    script = (
        f"import sys; sys.modules.update(dict.fromkeys({blocked!r}))\n"
        "import vit_model\n"
        "model = vit_model.build_model(vit_model.variant('Ti/16', resolution=32), num_classes=3)\n"
        "import torch; assert model(torch.zeros(1, 3, 32, 32)).logits.shape == (1, 3)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_nothing_unsafe_is_written() -> None:
    unsafe = re.compile(
        r"weights_only\s*=\s*False|\bpickle\.loads?\(|shell=True|verify=False|0\.0\.0\.0|yaml\.load\(|\beval\(|\bexec\("
    )
    found = [
        f"{path.relative_to(ROOT)}:{number}: {line.strip()}"
        for path in SOURCES
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if unsafe.search(re.sub(r"\.eval\(\)", "", line))
    ]
    assert not found, "\n".join(found)


def test_one_caller_moves_an_alias() -> None:
    callers = [
        path.relative_to(ROOT).as_posix() for path in SOURCES if "set_registered_model_alias" in path.read_text()
    ]
    assert callers == ["pipelines/promote.py"]


def test_library_code_does_not_print() -> None:
    printing = [
        f"{path.relative_to(ROOT)}:{node.lineno}"
        for path in SOURCES
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print"
    ]
    assert not printing, "\n".join(printing)


def readme_paths() -> list[str]:
    text = (ROOT / "README.md").read_text()
    table = text.split("## Where do I change", 1)[1].split("\n## ", 1)[0]
    return re.findall(
        r"`((?:vit_model|pipelines|infra|benchmarks|tests|docs)/[^`\s]*|[\w.-]+\.(?:ya?ml|toml|txt))`", table
    )


def test_the_readme_map_has_twelve_rows_and_leads_to_files_that_exist() -> None:
    text = (ROOT / "README.md").read_text().split("## Where do I change", 1)[1].split("\n## ", 1)[0]
    rows = [line for line in text.splitlines() if line.startswith("|")][2:]  # After the head and its rule.
    assert len(rows) == 12
    assert all("`" in row.split("|")[2] for row in rows)
    paths = readme_paths()
    assert len(paths) >= 12
    missing = [path for path in paths if not (ROOT / path).exists()]
    assert not missing, missing


@pytest.mark.parametrize("stage", sorted(STAGES))
def test_every_stage_has_the_same_three_names(stage: str) -> None:
    tree = ast.parse((ROOT / "pipelines" / f"{stage}.py").read_text())
    names = {
        target.id
        for node in tree.body
        if isinstance(node, ast.Assign)
        for target in node.targets
        if isinstance(target, ast.Name)
    }
    functions = {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
    classes = {node.name for node in tree.body if isinstance(node, ast.ClassDef)}
    assert {"STAGE", "VERSION"} <= names
    assert "run" in functions
    assert f"{stage.capitalize()}Recipe" in classes


def test_the_command_line_answers_within_half_a_second() -> None:
    """Checked by what is imported, not by the clock: none of the packages that take time."""
    script = (
        "import sys\nfrom pipelines import cli\n"
        "try:\n    cli.main(['--help'])\nexcept SystemExit:\n    pass\n"
        "slow = {'torch','ray','mlflow','dagster','pydantic','tyro','boto3','pyarrow','numpy'} & set(sys.modules)\n"
        "sys.exit(f'imported: {sorted(slow)}' if slow else 0)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
