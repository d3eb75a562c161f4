"""Pictures for MLflow: confusion matrix, sample predictions, reliability. Class names are hostile input here."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["boxes_for_unknown_letters", "confusion_figure", "plain", "predictions_figure", "reliability_figure"]

MOST_NAMED = 40  # Classes with their names on the axes.
MOST_DRAWN = 1000  # Classes drawn at all.


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


def _figure(width: float, height: float) -> Figure:
    # Figure without pyplot: no global state, no display, no leak, and safe in threads.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure
