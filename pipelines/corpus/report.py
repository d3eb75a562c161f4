"""A corpus as one HTML file that needs nothing else. Names and keys are other people's text: everything is escaped.

The page runs no script and loads nothing: its content security policy says so to the browser as well.
"""

from __future__ import annotations

import base64
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipelines.corpus.anomalies import ANOMALIES
from pipelines.corpus.manifest import Corpus
from pipelines.corpus.quarantine import NOTES, REASONS
from pipelines.corpus.survey import BYTES, SIDES, Picture, Survey

__all__ = ["report"]

POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"
BARS = 60  # Classes in the histogram; the rest stands in one line.
PAIRS = 24
LISTED = 30
LONGEST = 120  # Characters of a name.

STYLE = """
:root { --ink: #1c2430; --soft: #5d6878; --line: #e3e7ed; --fill: #3b6fb6; --faint: #eef2f7; --page: #f6f7f9 }
* { box-sizing: border-box }
body { margin: 0; background: var(--page); color: var(--ink);
  font: 15px/1.45 system-ui, "Segoe UI", Roboto, sans-serif }
main { max-width: 1180px; margin: 0 auto; padding: 36px 28px 64px }
h1 { font-size: 27px; margin: 0; letter-spacing: -.3px; overflow-wrap: anywhere }
h2 { font-size: 18px; margin: 38px 0 12px }
h3 { font-size: 14px; margin: 0 0 12px; color: var(--soft); font-weight: 600 }
p { margin: 6px 0 }
.soft { color: var(--soft) } code { font: 12.5px ui-monospace, Menlo, Consolas, monospace; overflow-wrap: anywhere }
.card { background: #fff; border: 1px solid var(--line); border-radius: 10px; padding: 18px 20px }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(150px, 1fr)); gap: 12px; margin-top: 22px }
.tile b { display: block; font-size: 24px; letter-spacing: -.4px; font-variant-numeric: tabular-nums }
.tile span { color: var(--soft); font-size: 13px }
.columns { display: grid; grid-template-columns: repeat(auto-fit, minmax(320px, 1fr)); gap: 14px }
.bar { display: grid; grid-template-columns: minmax(90px, 190px) 1fr 92px; gap: 10px; align-items: center; height: 22px;
  font-size: 13px }
.bar > :first-child { overflow: hidden; text-overflow: ellipsis; white-space: nowrap }
.bar i { display: block; height: 13px; border-radius: 3px; background: var(--fill) }
.columns .bar { grid-template-columns: 124px 1fr 50px }
.bar u { text-decoration: none; background: var(--faint); border-radius: 3px }
.bar em { font-style: normal; text-align: right; color: var(--soft); font-variant-numeric: tabular-nums }
table { border-collapse: collapse; width: 100%; font-size: 13.5px }
td, th { text-align: left; padding: 6px 14px 6px 0; border-bottom: 1px solid var(--line); vertical-align: top;
  overflow-wrap: anywhere }
th { color: var(--soft); font-weight: 600 } tr:last-child td { border-bottom: 0 }
td.n { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap }
.sheet { display: grid; grid-template-columns: repeat(auto-fill, minmax(80px, 1fr)); gap: 8px }
.sheet span, .pair span { display: grid; place-items: center; aspect-ratio: 1; max-width: 92px;
  background: var(--faint); border-radius: 6px; overflow: hidden; font-size: 11px; color: #a33; text-align: center }
.sheet img, .pair img { max-width: 100%; max-height: 100%; display: block }
.group { margin-bottom: 14px } .group h3 b { color: var(--ink) }
.pairs { display: grid; grid-template-columns: repeat(auto-fill, minmax(214px, 1fr)); gap: 12px }
.pair { display: grid; grid-template-columns: 92px 92px; gap: 8px; font-size: 11.5px } .pair p { grid-column: 1 / 3;
  margin: 0; overflow-wrap: anywhere }
"""


def report(corpus: Corpus, found: Survey, *, sheets_of: int, exact: Mapping[str, int]) -> str:
    """`sheets_of`: classes that were to get a contact sheet. `exact` counts images of equal bytes."""
    head = corpus.head
    total = found.total
    tiles = [
        (f"{found.samples:,}", "images"),
        (f"{len(corpus.class_names):,}", "classes"),
        (f"{head.shards:,}", "tars"),
        (_size(head.bytes), "in tars"),
        (f"{sum(head.rejected.values()):,}", "in quarantine"),
        (f"{exact.get('images', 0):,}", "exact copies"),
    ]
    name = corpus.uri.rstrip("/").rpartition("/")[2]
    parts = [
        f"<h1>{_text(name)}</h1><p class=soft><code>{_text(corpus.reference)}</code></p>",
        "<div class=tiles>" + "".join(_tile(*tile) for tile in tiles) + "</div>",
        _splits(found, total),
        _classes(corpus, total),
        _shapes(found),
        _copies(found, exact),
        _oddities(corpus, found),
        _sheets(corpus, found, total, sheets_of),
    ]
    return (
        "<!doctype html><html lang=en><head><meta charset=utf-8>"
        f'<meta http-equiv="Content-Security-Policy" content="{escape(POLICY)}">'
        '<meta name=viewport content="width=device-width, initial-scale=1">'
        f"<title>{_text(name)}</title><style>{STYLE}</style></head><body><main>{''.join(parts)}</main></body></html>"
    )


def _text(value: object) -> str:
    """Escaped, and without what turns the direction of the text or breaks its line."""
    text = "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in str(value))
    return escape(text if len(text) <= LONGEST else text[: LONGEST - 1] + "…")


def _size(count: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:,.0f} {unit}" if unit == "B" else f"{count:,.1f} {unit}"
        count /= 1000
    return f"{count:,.1f} TB"


def _tile(value: str, what: str) -> str:
    return f"<div class='card tile'><b>{_text(value)}</b><span>{_text(what)}</span></div>"


def _bars(rows: Iterable[tuple[str, int]], whole: int | None = None) -> str:
    """Labelled bars. `whole` adds each row's part of it."""
    rows = list(rows)
    most = max((count for _, count in rows), default=0) or 1
    lines = []
    for name, count in rows:
        share = f" · {count / whole:.1%}" if whole else ""
        lines.append(
            f"<div class=bar><span title='{_text(name)}'>{_text(name)}</span>"
            f"<u><i style='width:{100 * count / most:.2f}%'></i></u><em>{count:,}{share}</em></div>"
        )
    return "".join(lines)


def _card(title: str, body: str) -> str:
    return f"<div class=card><h3>{_text(title)}</h3>{body}</div>"


def _splits(found: Survey, total: NDArray[np.int64]) -> str:
    counts = {split: int(counts.sum()) for split, counts in found.per_class.items()}
    return "<h2>Splits</h2>" + _card("images of each split", _bars(counts.items(), int(total.sum()) or 1))


def _classes(corpus: Corpus, total: NDArray[np.int64]) -> str:
    order = np.argsort(-total, kind="stable").tolist()
    rows = [(corpus.class_names[number], int(total[number])) for number in order[:BARS]]
    rest = order[BARS:]
    low, high = int(total.min()), int(total.max())
    said = f"{low:,} to {high:,} images a class"
    if low:
        said += f", {high / low:,.1f} times as many in the largest as in the smallest"
    elif empty := int((total == 0).sum()):
        said += f"; {empty:,} classes have none"
    body = _bars(rows) + (
        f"<p class=soft>and {len(rest):,} smaller classes with {int(total[rest].sum()):,} images</p>" if rest else ""
    )
    return "<h2>Classes</h2>" + _card(said, body)


def _shapes(found: Survey) -> str:
    def between(names: Sequence[str]) -> list[str]:
        inner = [f"{low} – {high}" for low, high in pairwise(names[1:-1])]
        return [f"< {names[1]}", *inner, f"≥ {names[-2]}"]

    sides = between([f"{side:,}" for side in SIDES.tolist()])
    ratios = between(["0", "1:3", "1:2", "2:3", "3:4", "0.95", "1.05", "4:3", "3:2", "2:1", "3:1", ""])
    ratios[5] = "square (± 5 %)"
    sizes = between([_size(size).replace(".0 ", " ") for size in BYTES.tolist()])
    extremes = (
        f"<p class=soft>smallest {found.smallest[0]:,} × {found.smallest[1]:,}, "
        f"largest {found.largest[0]:,} × {found.largest[1]:,} pixels</p>"
    )
    cards = [
        _card("longer side, pixels", _bars(zip(sides, found.sides.tolist(), strict=True)) + extremes),
        _card("width to height", _bars(zip(ratios, found.aspects.tolist(), strict=True))),
        _card("bytes of a sample in its tar", _bars(zip(sizes, found.sizes.tolist(), strict=True))),
    ]
    return "<h2>Sizes and shapes</h2><div class=columns>" + "".join(cards) + "</div>"


def _copies(found: Survey, exact: Mapping[str, int]) -> str:
    words = {
        "images": "images whose bytes occur before",
        "across_splits": "contents that lie in more than one split: held-out figures look better than they are",
        "across_classes": "contents that have more than one label",
    }
    rows = [f"<tr><td class=n>{exact.get(name, 0):,}</td><td>{text}</td></tr>" for name, text in words.items()]
    said = (
        f"{found.compared:,} of {found.samples:,} images were compared"
        + (" (a sample, by chance)" if found.compared < found.samples else "")
        + f": {len(found.near):,} pairs look nearly the same"
        + (f", the nearest {PAIRS}" if len(found.near) > PAIRS else "")
    )
    pairs = "".join(
        f"<div class=pair>{_picture(first)}{_picture(second)}"
        f"<p class=soft>{_text(first.row['source'])} ({_text(first.split)})<br>{_text(second.row['source'])}"
        f" ({_text(second.split)}) · {bits} of 64 bits differ</p></div>"
        for first, second, bits in found.near[:PAIRS]
    )
    body = f"<table>{''.join(rows)}</table>"
    near = f"<p class=soft>{said}</p><div class=pairs>{pairs}</div>"
    return f"<h2>Copies</h2>{_card('the same bytes', body)}<div class=card style='margin-top:14px'>{near}</div>"


def _oddities(corpus: Corpus, found: Survey) -> str:
    head = corpus.head
    groups = {
        "in quarantine": (head.rejected, REASONS),
        "kept, and converted when read": (head.noted, NOTES),
        "ignored in the source": (head.ignored, {}),
        "anomalies of the tars": (Counter(row["kind"] for row in found.anomalies), ANOMALIES),
    }
    cards = [_card(title, _counted(counts, known)) for title, (counts, known) in groups.items() if counts]
    if found.anomalies:
        rows = "".join(
            "<tr>" + "".join(f"<td>{_text(row[name])}</td>" for name in ("kind", "shard", "key", "detail")) + "</tr>"
            for row in found.anomalies[:LISTED]
        )
        more = len(found.anomalies) - LISTED
        listed = f"<table><tr><th>kind<th>tar<th>key<th>detail</tr>{rows}</table>"
        cards.append(
            _card("the first anomalies", listed + (f"<p class=soft>and {more:,} more</p>" if more > 0 else ""))
        )
    return "<h2>What is odd</h2><div class=columns>" + "".join(cards) + "</div>" if cards else ""


def _counted(counts: Mapping[str, int], known: Mapping[str, str]) -> str:
    rows = "".join(
        f"<tr><td class=n>{count:,}</td><td>{_text(name)}</td><td class=soft>{_text(known.get(name, ''))}</td></tr>"
        for name, count in counts.items()
    )
    return f"<table>{rows}</table>"


def _sheets(corpus: Corpus, found: Survey, total: NDArray[np.int64], sheets_of: int) -> str:
    groups = []
    for label, pictures in sorted(found.sheets.items()):
        title = f"<h3><b>{_text(corpus.class_names[label])}</b> · {int(total[label]):,} images</h3>"
        groups.append(f"<div class='card group'>{title}<div class=sheet>{''.join(map(_picture, pictures))}</div></div>")
    left = len(corpus.class_names) - sheets_of
    said = f"<p class=soft>{left:,} of {len(corpus.class_names):,} classes are not shown</p>" if left > 0 else ""
    return f"<h2>A few of each class</h2>{said}{''.join(groups)}" if groups else ""


def _picture(picture: Picture) -> str:
    row: Mapping[str, Any] = picture.row
    title = _text(f"{row['source']} {row['width']} x {row['height']}")
    if not picture.thumbnail:
        return f"<span title='{title}'>unreadable</span>"
    data = base64.b64encode(picture.thumbnail).decode()
    return f"<span title='{title}'><img alt='' src='data:image/jpeg;base64,{data}'></span>"
