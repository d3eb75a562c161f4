"""The command line: what is wrong is said in one message with the nearest right name, before anything starts."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest

from pipelines import cli
from pipelines.cli import VERBS, main
from pipelines.workflow.stages import STAGES
from tests.pipelines.workflow.conftest import house, write  # noqa: F401  fixtures

ROOT = Path(__file__).parent.parent.parent
Write = Callable[[str, str], str]


@pytest.fixture(autouse=True)
def no_stack(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """These tests start nothing: what would start the stack notes that it was asked."""
    asked: list[str] = []
    monkeypatch.setattr(cli, "ensure_stack", lambda: asked.append("stack"))
    return asked


def test_help_names_every_verb(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    text = capsys.readouterr().out
    assert all(re.search(rf"^  {verb} ", text, re.MULTILINE) for verb in VERBS)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["pretrian", "x"], "unknown verb 'pretrian'; did you mean 'pretrain'?"),
        (["run"], "vit run needs a workflow"),
        (["run", "no-such-workflow"], "neither a file nor a packaged workflow"),
        (["recipes", "no-such-word"], "no packaged recipe has no-such-word"),
        (["why"], "vit why needs"),
        (["submit"], "vit submit needs"),
        (["submit", "pretrian", "x"], "unknown stage 'pretrian'; did you mean 'pretrain'?"),
        (["schedule"], "vit schedule needs"),
        (["schedule", "stat"], "did you mean"),
        (["demo", "--corpse", "x"], "did you mean '--corpus'?"),
        (["corpus"], "vit corpus exclude CORPUS LIST"),
        (["run", "workflows/demo", "--pretrain.train.batchsize", "4"], "did you mean 'batch_size'?"),
        (["why", "workflows/demo", "--pretrain.train.batchsize", "4"], "did you mean 'batch_size'?"),
        (["pretrain", "smoke/pretrain", "--plain"], "--plain has no effect on `vit pretrain`"),
        (["run", "workflows/demo", "--finetune.model.variant", "B/16"], "model has no effect with weights="),
        (["finetune", "demo/finetune"], "weights=null trains from scratch and needs model"),
        (["finetune", "demo/finetune_scratch", "--register-as", "a/b"], "model name 'a/b'"),
        (["down", "--again"], "--again has no effect on `vit down`"),
    ],
)
def test_a_wrong_command_exits_2_and_starts_nothing(
    arguments: list[str], said: str, capsys: pytest.CaptureFixture[str], no_stack: list[str]
) -> None:
    assert main(arguments) == 2
    assert said in capsys.readouterr().err
    assert not no_stack


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_without_a_recipe_says_how_to_name_one(
    stage: str, capsys: pytest.CaptureFixture[str], no_stack: list[str]
) -> None:
    assert main([stage]) == 2
    assert re.search(r"needs (a \w+, or )?a recipe", capsys.readouterr().err)
    assert main([stage, "no/such.yaml"]) == 2
    assert "neither a file nor a packaged recipe" in capsys.readouterr().err
    assert not no_stack


def a_stage_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    verb = cli.Verb("RECIPE", "water -> tea", cli._stage("brew"))
    monkeypatch.setitem(VERBS, "brew", verb)


def test_a_stage_runs_and_says_what_it_made_then_that_it_was_reused(
    write: Write,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    no_stack: list[str],
) -> None:
    a_stage_of_its_own(monkeypatch)
    recipe = write("r.yaml", "# tea\nleaf: mint\n")
    assert main(["brew", recipe, "--minutes", "5"]) == 0
    assert no_stack == ["stack"]
    out = capsys.readouterr().out
    assert "ran, " in out and "strength  1.25" in out
    assert main(["brew", recipe, "--minutes", "5"]) == 0
    assert "reused, " in capsys.readouterr().out
    assert main(["brew", recipe, "--minutes", "5", "--again"]) == 0
    assert "ran, " in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--minuts", "5"], "--minutes"),
        (["--minutes", "long"], "invalid"),
        (["--minutes", "0"], "tea needs at least 1"),
    ],
)
def test_a_wrong_flag_exits_2_and_starts_nothing(
    flags: list[str],
    said: str,
    write: Write,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    no_stack: list[str],
) -> None:
    a_stage_of_its_own(monkeypatch)
    assert main(["brew", write("r.yaml", "leaf: mint\n"), *flags]) == 2
    captured = capfd.readouterr()
    assert said in captured.err + captured.out
    assert "Traceback" not in captured.err
    assert not no_stack


def test_help_of_a_recipe_shows_its_fields(
    write: Write,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    a_stage_of_its_own(monkeypatch)
    assert main(["brew", write("r.yaml", "leaf: mint\n"), "--help"]) == 0
    captured = capfd.readouterr()
    assert "--minutes" in captured.out and "How long." in captured.out


@pytest.mark.parametrize(
    ("trouble", "code", "said", "traceback"),
    [
        ("value", 1, "the kettle is cold; heat it first", False),
        ("full", 1, "No space left on device: 'cup'; free some and run the same command again", False),
        ("bug", 1, "TypeError: not a cup", True),
        ("interrupt", 130, "the same command resumes: vit brew", False),
    ],
)
def test_errors_of_ours_are_one_message_and_bugs_show_where(
    trouble: str,
    code: int,
    said: str,
    traceback: bool,
    write: Write,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    a_stage_of_its_own(monkeypatch)
    assert main(["brew", write("r.yaml", f"trouble: {trouble}\n")]) == code
    err = capsys.readouterr().err
    assert said in err
    assert ("Traceback" in err) == traceback
    if trouble == "value":
        assert main(["brew", write("r.yaml", f"trouble: {trouble}\n"), "--debug"]) == code
        assert "Traceback" in capsys.readouterr().err


def test_a_run_that_another_process_is_at_exits_0_with_its_name(
    write: Write,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    from pipelines import store
    from pipelines.identity import digest_of, lease, runs
    from tests.pipelines.workflow.brew import BrewRecipe

    a_stage_of_its_own(monkeypatch)
    digest = digest_of("brew", 1, BrewRecipe(leaf="mint"), {})
    with lease(store.join(runs(), "brew", digest, "lease.json"), "brew"):
        assert main(["brew", write("r.yaml", "leaf: mint\n")]) == 0
    assert "held by process" in capsys.readouterr().err


def test_a_workflow_takes_flags_for_its_steps(
    write: Write,  # noqa: F811
    capsys: pytest.CaptureFixture[str],
) -> None:
    write("r.yaml", "")
    path = write("w.yaml", "steps: {a: {stage: brew, recipe: r.yaml}}")
    assert main(["run", path, "--plain", "--a.minutes", "8", "--a.leaf=mint"]) == 0
    assert "1 ran, 0 reused" in capsys.readouterr().out
    assert main(["run", path, "--plain", "--minutes", "8"]) == 2
    assert "--STEP.field VALUE" in capsys.readouterr().err


def readme_commands() -> list[str]:
    readme = ROOT / "README.md"
    text = readme.read_text() if readme.exists() else ""
    return sorted({line.strip() for line in re.findall(r"^\s*(?:\$ )?(vit [a-z].*)$", text, re.MULTILINE)})


@pytest.mark.parametrize("command", readme_commands())
def test_every_command_of_the_readme_is_one(command: str) -> None:
    import shlex

    from pipelines.config import find_recipe

    verb, *rest = shlex.split(command, comments=True)[1:]
    assert verb in VERBS
    if verb in STAGES and rest and "/" in rest[0] and not rest[0].endswith(".yaml"):
        assert find_recipe(rest[0])
