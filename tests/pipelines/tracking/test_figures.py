"""Pictures draw any class name as it stands."""

from __future__ import annotations

import io
import warnings

import numpy as np
import pytest

from pipelines.tracking import figures

HOSTILE = [
    "$\\frac{1}{0}$",
    "a$b",
    "\n\r\t",
    "<script>alert(1)</script>",
    "x" * 500,
    "",
    "\u202e abc",
    "\ud800",
    "100%",
]


def drawn(figure: object) -> bytes:
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with figures.boxes_for_unknown_letters():
            figure.savefig(buffer, format="png")  # type: ignore[attr-defined]
    return buffer.getvalue()


def test_the_page_of_a_run_has_its_facts_and_every_curve_that_it_has() -> None:
    from pipelines.tracking.figures import PANELS, summary_figure

    curves = {"train/loss": [(10, 2.0), (20, 1.0)], "val/loss": [(20, 1.5)], "lr": []}
    figure = summary_figure("pretrain-abc-a1", {"val/top1": "0.5", "name": "$x^"}, curves)
    head, *panels = figure.axes
    assert [axes.get_title() for axes in panels] == list(PANELS)
    assert [len(axes.get_lines()) for axes in panels] == [2, 0, 0, 0, 0, 0]
    assert "val/top1  0.5" in head.texts[0].get_text() and "$x^" in head.texts[0].get_text()
    figure.canvas.draw()


def test_confusion_matrix_takes_hostile_names_and_unknown_labels() -> None:
    n = len(HOSTILE)
    labels = np.array([*range(n), -1])
    figure = figures.confusion_figure(labels, np.zeros(n + 1, np.int64), np.ones(n + 1, np.int64), HOSTILE)
    assert drawn(figure).startswith(b"\x89PNG")


@pytest.mark.parametrize("channels", [1, 3])
def test_sample_predictions_take_hostile_names(channels: int) -> None:
    images = [np.full((channels, 8, 8), 128, np.uint8)] * len(HOSTILE)
    figure = figures.predictions_figure(images, HOSTILE, HOSTILE[::-1], [0.5] * len(HOSTILE))
    assert drawn(figure).startswith(b"\x89PNG")


def test_too_many_classes_for_a_picture_give_none() -> None:
    empty = np.zeros(0, np.int64)
    assert figures.confusion_figure(empty, empty, empty, [str(i) for i in range(21_000)]) is None
    assert figures.confusion_figure(empty, empty, empty, [str(i) for i in range(300)]) is not None


def test_plain_shortens_and_replaces() -> None:
    assert figures.plain("y" * 100, 10) == "yyyyyyy..."
    assert figures.plain("a\x00b") == "a\N{REPLACEMENT CHARACTER}b"
