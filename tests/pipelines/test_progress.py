"""Progress is readable where there is no terminal, and never interprets what it shows."""

from __future__ import annotations

import pytest

from pipelines import progress as module
from pipelines.progress import progress, say


def test_plain_lines_name_done_total_and_fields(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "PLAIN_EVERY_SECONDS", 0.0)
    with progress("pretrain", 1000, "steps") as shown:
        shown.update(500, loss=0.123456, images_per_second=900)
        shown.update(750)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("pretrain: 500/1,000 steps")
    assert "loss 0.1235" in lines[0] and "images/s 900" in lines[0]
    assert "eta" in lines[1]


def test_the_last_line_is_shown_whatever_the_interval(capsys: pytest.CaptureFixture[str]) -> None:
    with progress("shard", 3, "images") as shown:
        for done in range(1, 4):
            shown.update(done)
    assert capsys.readouterr().out.splitlines() == ["shard: 3/3 images"]


def test_text_is_taken_as_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    say("[red]class[/red] [0] " + "x" * 300)
    assert capsys.readouterr().out == "[red]class[/red] [0] " + "x" * 300 + "\n"


def test_names_of_files_cannot_command_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    from pipelines.messages import say_error
    from pipelines.progress import say

    say("a\x1b[2J\x07b \u202ec é [red]")
    say_error("two\nlines \x9b31m")
    found = capsys.readouterr()
    assert found.out == "a\\x1b[2J\\x07b \\u202ec é [red]\n"
    assert found.err == "vit: two\nlines \\x9b31m\n"


def test_names_neither_command_the_terminal_nor_break_lines(capsys: pytest.CaptureFixture[str]) -> None:
    from pipelines.messages import say_error
    from pipelines.progress import as_line, say

    say("a \x1b[2J\x1b]0;name\x07.png [b]")
    say_error("\x1b[31mred\u202e.png\nnext line")
    shown = capsys.readouterr()
    assert shown.out == "a \\x1b[2J\\x1b]0;name\\x07.png [b]\n"
    assert shown.err == "vit: \\x1b[31mred\\u202e.png\nnext line\n"
    assert as_line(("a\tb\nc", 7, "\x1b")) == "a\\tb\\nc\t7\t\\x1b\n"
