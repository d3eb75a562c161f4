"""Laws of the manifest for any corpus: pages cover it exactly once; its digest is that of content and order alone."""

from __future__ import annotations

import tempfile
from pathlib import Path

from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines import store
from pipelines.corpus.manifest import open_corpus
from pipelines.corpus.small import write_corpus
from pipelines.reader.tar import walk

from .inputs import picture

PICTURES = [picture(i, (4 + i % 3, 5)) for i in range(12)]
rows = st.lists(
    st.tuples(st.sampled_from(["train", "val", "test", "extra"]), st.sampled_from("abc"), st.integers(0, 11)),
    min_size=1,
    max_size=25,
)


@settings(max_examples=15, deadline=None)
@given(rows, st.integers(1, 9), st.data())
def test_pages_cover_every_sample_once_and_the_digest_is_that_of_the_content(
    chosen: list[tuple[str, str, int]], shard_samples: int, data: st.DataObject
) -> None:
    images = [
        (split, name, f"{name}/{place}.png", PICTURES[number]) for place, (split, name, number) in enumerate(chosen)
    ]
    with tempfile.TemporaryDirectory() as folder:
        base = Path(folder)
        corpus = write_corpus(base / "a", images, class_names="abc", shard_samples=shard_samples)
        assert sum(corpus.splits.values()) == len(images) == corpus.head.samples
        for split, count in corpus.splits.items():
            table = corpus.samples(split).to_pylist()
            assert [row["source"] for row in table] == [path for own, _, path, _ in images if own == split]
            pages, at = corpus.pages(split), 0
            for page in (pages[number] for number in range(len(pages))):
                found, problem = walk(memoryview(store.read(corpus.shard_uri(page.shard), page.offset, page.length)))
                assert problem is None and page.first_row == corpus.first_sample(split) + at
                assert [one.key for one in found] == [row["key"] for row in table[at : at + page.rows]]
                at += page.rows
            assert at == count

        again = write_corpus(base / "b", images, class_names="abc", shard_samples=shard_samples)
        assert again.digest == corpus.digest == open_corpus(f"{base / 'b'}@current").digest
        victim = data.draw(st.integers(0, len(images) - 1))
        split, name, path, image = images[victim]
        other = data.draw(st.sampled_from(["abc"[("abc".index(name) + 1) % 3], "image", "path"]))
        images[victim] = (
            split,
            other if len(other) == 1 else name,
            f"{path}x" if other == "path" else path,
            PICTURES[(PICTURES.index(image) + 1) % 12] if other == "image" else image,
        )
        changed = write_corpus(base / "c", images, class_names="abc", shard_samples=shard_samples)
        assert changed.digest != corpus.digest
