"""The report says what the corpus holds, and nothing that other people named can act in it."""

from __future__ import annotations

import io
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from pipelines import show, store
from pipelines.config import RecipeError, from_dict, parse
from pipelines.corpus.grow import exclude
from pipelines.corpus.manifest import Corpus
from pipelines.corpus.small import write_corpus
from pipelines.corpus.survey import difference_hash, survey
from pipelines.index import adopt_tars
from pipelines.show import ShowRecipe, make_report
from pipelines.subset import SubsetRecipe, make_subset
from tests.integration.browser import chromium, open_page

from .corpus.foreign import write_tars
from .test_index import recipe as index_recipe

HOSTILE = "<script>window.hit=1</script>"
NAMES = (HOSTILE, "'\"><img src=x onerror=window.hit=1>", "a & b\u202e\u0007", "x" * 3000)


def drawing(number: int, size: tuple[int, int] = (60, 40), shift: int = 0, quality: int = 95) -> bytes:
    """A smooth picture that differs for each number; `shift` brightens it, which a hash should not see."""
    y, x = np.mgrid[0 : size[1], 0 : size[0]] / max(size)
    rng = np.random.default_rng(number)
    waves = sum(np.sin(rng.uniform(3, 14) * x + rng.uniform(3, 14) * y + rng.uniform(0, 6)) for _ in range(3))
    file = io.BytesIO()
    Image.fromarray((waves * 35 + 120 + shift).clip(0, 255).astype(np.uint8)).convert("RGB").save(
        file, "JPEG", quality=quality
    )
    return file.getvalue()


@pytest.fixture
def corpus(tmp_path: Path) -> Corpus:
    images = []
    for i in range(60):
        name = NAMES[min(i % 8, 3)]
        images.append((("train", "val")[i % 5 == 4], name, f"{HOSTILE}/{i}.jpg", drawing(i, (60 + i, 40))))
    images.append(("train", NAMES[0], "copy.jpg", drawing(3, (63, 40))))
    images.append(("val", NAMES[3], "near.jpg", drawing(7, (67, 40), shift=6, quality=80)))
    return write_corpus(tmp_path / HOSTILE.replace("/", "") / "c", images, class_names=NAMES)


def recipe(corpus: Corpus, **settings: Any) -> ShowRecipe:
    return from_dict(ShowRecipe, {"corpus": corpus.reference} | settings)


class Page(HTMLParser):
    """What a browser would see: tags with their attributes, and the text."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data + "\n"


def test_the_figures_are_those_of_the_corpus(corpus: Corpus) -> None:
    html, metrics = make_report(recipe(corpus), corpus)
    page = Page(html)
    assert metrics | {"images": 62.0, "classes": 4.0, "exact_copies": 1.0, "compared": 62.0} == metrics
    assert sum(metrics[name] for name in ("smallest_class", "largest_class")) == 8 + 37
    pairs = int(metrics["near_pairs"])
    assert 1 <= pairs < 8  # The planted one; smooth drawings may look alike by chance.
    for said in ("62\n", "train", "val", f"62 of 62 images were compared: {pairs} pairs", "near.jpg"):
        assert said in page.text, said
    assert "largest 119 × 40 pixels" in page.text and "smallest 60 × 40" in page.text
    pictures = [tag for tag, _ in page.tags if tag == "img"]
    assert len(pictures) == 9 + 8 + 8 + 12 + 2 * pairs  # Sheets of at most twelve, and the pairs.
    assert html == make_report(recipe(corpus), corpus)[0]


def test_names_and_keys_are_text_and_the_page_may_load_and_run_nothing(corpus: Corpus) -> None:
    html, _ = make_report(recipe(corpus), corpus)
    page = Page(html)
    assert not {tag for tag, _ in page.tags} & {"script", "iframe", "object", "embed", "link", "form", "svg", "base"}
    for tag, attributes in page.tags:
        assert not any(name.startswith("on") or name in ("href", "srcset") for name in attributes)
        if tag == "img":
            assert (attributes["src"] or "").startswith("data:image/jpeg;base64,")
    assert HOSTILE in page.text and "a & b\ufffd\ufffd" in page.text and "x" * 121 not in html
    policy = next(a["content"] for tag, a in page.tags if a.get("http-equiv") == "Content-Security-Policy")
    assert policy and policy.startswith("default-src 'none'; img-src data:;") and "script" not in policy
    assert not re.search(r"https?://", html)


@pytest.mark.skipif(chromium() is None, reason="no chromium on this machine")
def test_a_browser_shows_the_page_runs_nothing_and_asks_for_nothing(corpus: Corpus, tmp_path: Path) -> None:
    pytest.importorskip("playwright")
    path = tmp_path / "report.html"
    path.write_text(make_report(recipe(corpus), corpus)[0], encoding="utf-8")
    with open_page() as page:
        asked: list[str] = []
        page.on("request", lambda request: asked.append(request.url))
        page.goto(path.as_uri())
        assert page.evaluate("window.hit === undefined")
        assert page.evaluate("[...document.images].every(image => image.naturalWidth > 0)")
        assert HOSTILE in page.inner_text("body")
        wide = page.evaluate("[document.documentElement.scrollWidth, window.innerWidth]")
        assert wide[0] <= wide[1]  # A name of 3,000 characters breaks its line.
    assert [url for url in asked if not url.startswith("data:")] == [path.as_uri()]


def test_large_corpora_are_sampled_and_that_is_said(corpus: Corpus) -> None:
    html, metrics = make_report(recipe(corpus, compared=20, max_classes=2, images_per_class=3), corpus)
    assert metrics["compared"] == 20
    assert "20 of 62 images were compared (a sample, by chance)" in html
    assert "2 of 4 classes are not shown" in html
    assert len([tag for tag, _ in Page(html).tags if tag == "img"]) - 2 * int(metrics["near_pairs"]) == 6


def test_an_adopted_corpus_shows_its_anomalies_and_unreadable_images(tmp_path: Path) -> None:
    source = write_tars(
        tmp_path,
        members=lambda key, number: [
            ("README" + key, b"x"),
            (f"{key}.jpg", drawing(number)),
            (f"{key}.cls", b"%d" % (number % 2)),
        ],
    )
    corpus = adopt_tars(index_recipe(source)).corpus
    data = bytearray((source / "val" / "x.tar").read_bytes())
    first = corpus.samples("val").to_pylist()[0]
    start = data.find(b"\xff\xd8\xff", first["offset"])
    data[start : start + 400] = bytes(400)
    (source / "val" / "x.tar").write_bytes(data)
    html, _ = make_report(recipe(corpus), corpus)
    assert "loose_member" in html and "README00000" in html and html.count(">unreadable<") == 1


def test_the_hash_sees_the_picture_and_not_its_size_or_brightness() -> None:
    def of(data: bytes) -> int:
        value = difference_hash(Image.open(io.BytesIO(data)))
        assert value is not None
        return value

    base = of(drawing(1))
    assert (base ^ of(drawing(1, (180, 120), shift=8, quality=70))).bit_count() <= 4
    assert all((base ^ of(drawing(number))).bit_count() > 8 for number in range(2, 30))
    assert difference_hash(Image.new("RGB", (50, 50), (200, 200, 200))) is None


def test_a_recipe_that_cannot_be_is_refused_and_the_command_takes_a_corpus() -> None:
    with pytest.raises(RecipeError, match="above 50000"):
        from_dict(ShowRecipe, {"corpus": "c", "compared": 10**6})
    with pytest.raises(RecipeError, match="images_per_class=-1"):
        from_dict(ShowRecipe, {"corpus": "c", "images_per_class": -1})
    assert parse(ShowRecipe, ["photos@current", "--output", "x.html"]).corpus == "photos@current"


@pytest.mark.stack
def test_the_report_is_in_the_mlflow_run_and_in_a_file(tmp_path: Path, stack: Any) -> None:
    from pipelines.tracking.client import connect

    images = [("train", "ab"[i % 2], f"{i}.jpg", drawing(i)) for i in range(6)]
    corpus = write_corpus(f"test-show-{tmp_path.name}", images)
    output = tmp_path / "out" / "report.html"
    result = show.run(recipe(corpus, output=str(output)))
    assert output.read_bytes() == store.read(result.uri) and b"6 of 6 images were compared" in output.read_bytes()
    assert result.run_id and "report.html" in [item.path for item in connect().list_artifacts(result.run_id)]
    output.unlink()
    assert show.run(recipe(corpus, output=str(output))).reused and output.exists()


def test_withdrawn_images_and_what_a_subset_does_not_take_are_not_shown(tmp_path: Path) -> None:
    images = [("train", "ab"[i % 2], f"{i}.jpg", drawing(i)) for i in range(40)]
    corpus = write_corpus(tmp_path / "c", images)
    left = exclude(f"{tmp_path / 'c'}@current", [f"{i}.jpg" for i in range(2, 40, 2)])
    found = survey(left, classes=None, per_class=50, compared=50, side=32)
    assert found.samples == left.splits["train"] == 21 and found.per_class["train"].tolist() == [1, 20]
    assert [picture.row["source"] for picture in found.sheets[0]] == ["0.jpg"] and len(found.sheets[1]) == 20
    assert found.compared == 21 and int(found.sides.sum()) == 21
    assert "38.jpg" not in make_report(recipe(left), left)[0]
    half = SubsetRecipe(corpus=corpus.reference, destination=str(tmp_path / "half"), fraction=0.5, materialise="never")
    some = survey(made := make_subset(half, corpus), classes=None, per_class=2, compared=9, side=32)
    assert (
        some.samples == 20 and some.per_class["train"].tolist() == np.bincount(made.samples("train")["label"]).tolist()
    )
