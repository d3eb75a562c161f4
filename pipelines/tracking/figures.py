"""Pictures for MLflow: confusion, predictions, reliability, a run on one page. Class names are hostile input here."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = [
    "boxes_for_unknown_letters",
    "confusion_figure",
    "plain",
    "predictions_figure",
    "reliability_figure",
    "summary_figure",
]

MOST_NAMED = 40  # Classes with their names on the axes.
MOST_DRAWN = 1000  # Classes drawn at all.
PANELS = {  # Of the page of a run: curves by their names in MLflow.
    "loss": ("train/loss", "val/loss", "ema/loss"),
    "top-1": ("train/top1", "val/top1", "ema/top1"),
    "learning rate": ("lr",),
    "gradient norm": ("grad_norm",),
    "images/s": ("images_per_second",),
    "seconds a step": ("time/step", "time/data_wait"),
}


def plain(text: str, width: int = 24) -> str:
    """Text that matplotlib draws as it stands: no mathtext, no control characters, not longer than a label."""
    shown = "".join(letter if letter.isprintable() else "\N{REPLACEMENT CHARACTER}" for letter in text)
    return shown if len(shown) <= width else f"{shown[: width - 3]}..."


@contextmanager
def boxes_for_unknown_letters() -> Iterator[None]:
    """Around saving a figure: a letter that the font lacks is drawn as a box, without a warning for each."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        yield


def confusion_figure(
    labels: NDArray[np.int64], predictions: NDArray[np.int64], counts: NDArray[np.int64], class_names: Sequence[str]
) -> Figure | None:
    """Rows are true classes, shaded by their share. None for more classes than a picture can show."""
    size = len(class_names)
    if size > MOST_DRAWN:
        return None
    matrix = np.zeros((size, size))
    known = labels >= 0
    matrix[labels[known], predictions[known]] = counts[known]
    shares = matrix / np.maximum(matrix.sum(axis=1, keepdims=True), 1)
    is_named = size <= MOST_NAMED
    side = min(3 + 0.35 * size, 16) if is_named else 10
    figure = _figure(side, side)
    axes = figure.add_subplot()
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=1, interpolation="nearest")
    axes.set_xlabel("predicted")
    axes.set_ylabel("true")
    if is_named:
        names = [plain(name) for name in class_names]
        axes.set_xticks(range(size), names, rotation=90, parse_math=False)
        axes.set_yticks(range(size), names, parse_math=False)
        for row, column in zip(*np.nonzero(matrix), strict=True):
            colour = "white" if shares[row, column] > 0.5 else "black"
            axes.text(
                column, row, f"{int(matrix[row, column])}", ha="center", va="center", color=colour, fontsize="small"
            )
    return figure


def predictions_figure(
    images: Sequence[NDArray[np.uint8]],
    labels: Sequence[str],
    predictions: Sequence[str],
    probabilities: Sequence[float],
    columns: int = 6,
) -> Figure:
    """Images (C, H, W) with what they are and what the model says; wrong ones in red."""
    rows = max(1, -(-len(images) // columns))
    figure = _figure(1.9 * columns, 2.3 * rows)
    for place, (image, label, prediction, probability) in enumerate(
        zip(images, labels, predictions, probabilities, strict=True)
    ):
        axes = figure.add_subplot(rows, columns, place + 1)
        if image.shape[0] >= 3:
            axes.imshow(image[:3].transpose(1, 2, 0))
        else:
            axes.imshow(image[0], cmap="gray", vmin=0, vmax=255)
        axes.axis("off")
        is_right = label == prediction
        text = f"{plain(prediction)} {probability:.0%}" + ("" if is_right else f"\ntrue: {plain(label)}")
        axes.set_title(text, fontsize="small", color="black" if is_right else "firebrick", parse_math=False)
    return figure


def reliability_figure(calibration: Any) -> Figure:
    """Observed accuracy against stated probability (pipelines.evaluation.calibration.Calibration)."""
    figure = _figure(5, 5)
    axes = figure.add_subplot()
    width = np.diff(calibration.edges)
    axes.bar(calibration.edges[:-1], np.nan_to_num(calibration.accuracy), width, align="edge", edgecolor="white")
    axes.plot([0, 1], [0, 1], color="black", linewidth=1)
    axes.set_xlabel("stated probability")
    axes.set_ylabel("observed accuracy")
    axes.set_title(f"expected calibration error {calibration.error:.4f}")
    return figure


def summary_figure(title: str, facts: Mapping[str, str], curves: Mapping[str, Sequence[tuple[int, float]]]) -> Figure:
    """One page (A4): what the run was and came to, and its curves, points by (step, value); `PANELS` names them."""
    figure = _figure(8.3, 11.7)
    grid = figure.add_gridspec(4, 2, height_ratios=[max(1.0, 0.09 * len(facts)), 1.6, 1.6, 1.6])
    head = figure.add_subplot(grid[0, :])
    head.axis("off")
    width = max((len(name) for name in facts), default=0)
    lines = [f"{name:<{width}}  {plain(value, 80)}" for name, value in facts.items()]
    head.set_title(plain(title, 80), loc="left", fontweight="bold", parse_math=False)
    head.text(0, 1, "\n".join(lines), va="top", family="monospace", fontsize="x-small", parse_math=False)
    for place, (name, keys) in enumerate(PANELS.items()):
        axes = figure.add_subplot(grid[1 + place // 2, place % 2])
        axes.set_title(name, fontsize="small")
        axes.set_xlabel("step", fontsize="x-small")
        axes.tick_params(labelsize="x-small")
        drawn = [key for key in keys if curves.get(key)]
        for key in drawn:
            steps, values = zip(*curves[key], strict=True)
            axes.plot(steps, values, label=key, marker="." if len(steps) < 30 else None, linewidth=1)
        if len(drawn) > 1:
            axes.legend(fontsize="x-small", frameon=False)
    return figure


def _figure(width: float, height: float) -> Figure:
    # Figure without pyplot: no global state, no display, no leak, and safe in threads.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure
