from __future__ import annotations

import dataclasses
import json
import pickle
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pytest

from pipelines import store
from pipelines.corpus.commit import commit, current_etag
from pipelines.corpus.errors import CorpusError
from pipelines.corpus.images import ImageRejected
from pipelines.corpus.manifest import Corpus, ManifestError, corpus_digest, open_corpus
from pipelines.corpus.parts import PART_ROWS
from pipelines.corpus.rows import shard_rows
from pipelines.corpus.small import write_corpus
from pipelines.corpus.tables import write_table

from .inputs import picture


def images(count: int = 60) -> list[tuple[str, str, str, bytes]]:
    splits = ("train", "train", "val", "test")
    return [(splits[i % 4], "ab"[i % 2], f"{'ab'[i % 2]}/{i}.png", picture(i)) for i in range(count)]


@pytest.fixture
def corpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Corpus:
    monkeypatch.setenv("VIT_ROOT", str(tmp_path))
    monkeypatch.setattr("pipelines.corpus.pages.PAGE_SAMPLES", 4)
    return write_corpus("pets", images(), shard_samples=10)


def test_a_corpus_is_opened_by_name_version_prefix_uri_and_folder(corpus: Corpus, tmp_path: Path) -> None:
    base = tmp_path / "corpora" / "pets"
    for reference in ("pets@current", f"pets@{corpus.digest}", f"pets@{corpus.digest[:12]}", f"{base}@current"):
        opened = open_corpus(reference)
        assert opened == corpus and opened.reference == f"{base}@{corpus.digest}"
    assert pickle.loads(pickle.dumps(corpus)) == corpus
    assert corpus.splits == {"train": 30, "val": 15, "test": 15} and list(corpus.splits) == ["train", "val", "test"]
    assert corpus.class_names == ("a", "b")


@pytest.mark.parametrize(
    "reference, words",
    [
        ("pets", "names no version; write pets@current"),
        ("pest@current", "nearest: pets"),
        ("pets@newest", "neither 'current' nor 12 to 64 hex digits"),
        ("pets@abcdef", "neither 'current'"),
        ("pets@0123456789ab", "has no version '0123456789ab'; it has"),
        ("pets@" + "0" * 64, "has no version"),
        ("a b@current", "is not letters, digits"),
        ("/nowhere/x@current", "vit shard"),
        ("../pets@current", "no corpus"),
    ],
)
def test_a_wrong_reference_says_what_there_is(reference: str, words: str, corpus: Corpus) -> None:
    with pytest.raises(ManifestError, match=words):
        open_corpus(reference)


def test_pages_lead_to_the_bytes_of_their_samples(corpus: Corpus) -> None:
    import io
    import tarfile

    seen = []
    for split, count in corpus.splits.items():
        pages, table = corpus.pages(split), corpus.samples(split).to_pylist()
        assert len(table) == count == pages.rows.sum() and (pages.rows <= 4).all() and len(pages) > 3
        ids = [row["sample_id"] for row in table]
        assert ids == list(range(corpus.first_sample(split), corpus.first_sample(split) + count))
        for number in range(len(pages)):
            page = pages[number]
            assert corpus.shards[page.shard].split == split and page.chosen is None
            assert page.rows == page.tar_rows == pages.rows[number]
            data = store.read(corpus.shard_uri(page.shard), page.offset, page.length)
            with tarfile.open(fileobj=io.BytesIO(data)) as tar:
                keys = list(dict.fromkeys(name.split(".")[0] for name in tar.getnames()))
            first = page.first_row - corpus.first_sample(split)
            assert keys == [row["key"] for row in table[first : first + page.rows]]
        seen += ids
    assert seen == list(range(60))
    with pytest.raises(ManifestError, match="no split 'dev'; it has train, val, test"):
        corpus.pages("dev")


def test_the_sample_table_is_read_by_slices_of_several_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert PART_ROWS >= 100_000
    monkeypatch.setattr("pipelines.corpus.parts.PART_ROWS", 22)
    monkeypatch.setattr("pipelines.corpus.tables.GROUP_ROWS", 5)
    corpus = write_corpus(tmp_path / "c", images(), shard_samples=7)
    assert len(list(tmp_path.rglob("samples/*.parquet"))) > 2
    for split in corpus.splits:
        sources = corpus.samples(split)["source"].to_pylist()
        assert sources == [path for own, _, path, _ in images() if own == split]
    every = pa.concat_tables(corpus.samples(split) for split in corpus.splits)
    for shard in range(corpus.head.shards):
        origin, rows = shard_rows(open_corpus(corpus.reference), shard)
        assert origin == corpus and rows.equals(every.filter(pc.equal(every["shard"], shard)))


def test_the_digest_covers_content_classes_splits_and_pages_and_nothing_else(corpus: Corpus) -> None:
    table = corpus.table
    digest = corpus_digest(corpus.class_names, corpus.splits, table)
    assert digest == corpus.digest
    renamed = table.set_column(0, "name", pa.array([f"other-{i}.tar" for i in range(table.num_rows)]))
    assert corpus_digest(corpus.class_names, corpus.splits, renamed) == digest
    assert corpus_digest(("b", "a"), corpus.splits, table) != digest
    assert corpus_digest(corpus.class_names, {"train": 30, "test": 15, "val": 15}, table) != digest
    for column in ("sha256", "split", "samples", "page_offset", "page_length", "page_rows"):
        values = table[column].to_pylist()
        values[0] = values[0] + [1] if isinstance(values[0], list) else values[0] * 2
        changed = table.set_column(table.schema.get_field_index(column), column, pa.array(values, table[column].type))
        assert corpus_digest(corpus.class_names, corpus.splits, changed) != digest, column


def test_the_same_images_are_the_same_corpus_wherever_they_lie(corpus: Corpus, tmp_path: Path) -> None:
    again = write_corpus(tmp_path / "elsewhere", images(), shard_samples=10)
    assert again.digest == corpus.digest and again.uri != corpus.uri


def test_a_damaged_manifest_is_noticed(corpus: Corpus) -> None:
    uri = f"{corpus.uri}/manifests/{corpus.digest}/shards.parquet"
    write_table(uri, open_corpus("pets@current").table.slice(1))
    with pytest.raises(ManifestError, match="is damaged"):
        open_corpus("pets@current").pages("train")
    store.write(uri, b"no parquet")
    with pytest.raises(ManifestError, match="is damaged"):
        open_corpus("pets@current").pages("train")
    store.delete(uri)
    with pytest.raises(ManifestError, match="is missing"):
        open_corpus("pets@current").pages("train")


@pytest.mark.parametrize("change, words", [({"schema": 2}, "manifest schema 2"), ({"colour": "red"}, "unknown keys")])
def test_a_manifest_of_another_release_is_refused(change: dict[str, object], words: str, corpus: Corpus) -> None:
    uri = f"{corpus.uri}/manifests/{corpus.digest}/head.json"
    store.write_json(uri, store.read_json(uri) | change)
    with pytest.raises(ManifestError, match=words):
        open_corpus("pets@current")


def test_a_second_version_becomes_current_and_the_first_stays(corpus: Corpus) -> None:
    second = write_corpus("pets", images(40), shard_samples=10)
    assert open_corpus("pets@current") == second != corpus
    assert open_corpus(f"pets@{corpus.digest[:12]}") == corpus
    assert len(corpus.samples("train")) == 30


def test_a_version_is_written_once_and_never_again(corpus: Corpus) -> None:
    files = {path: path.read_bytes() for path in Path(corpus.uri).rglob("manifests/**/*") if path.is_file()}
    times = {path: path.stat().st_mtime_ns for path in files}
    assert write_corpus("pets", images(), shard_samples=10) == corpus
    assert {path: path.stat().st_mtime_ns for path in files} == times


def test_a_writer_that_came_in_between_is_noticed(corpus: Corpus, tmp_path: Path) -> None:
    before = current_etag(corpus.uri)
    write_corpus("pets", images(40), shard_samples=10)
    with pytest.raises(CorpusError, match=r"was moved to .* by another writer"):
        commit(corpus.uri, _records(corpus), class_names=("a", "b"), current=before)
    assert open_corpus("pets@current").splits["train"] == 20


def _records(corpus: Corpus) -> list[object]:
    from pipelines.corpus.commit import ShardRecord

    records = []
    for number, row in enumerate(corpus.table.to_pylist()):
        rows = f"rows/{row['name'].removesuffix('.tar')}.parquet"
        records.append(ShardRecord(number=number, etag="", rows=rows, **row))
    return records


def test_equal_images_are_counted_by_where_they_lie(tmp_path: Path) -> None:
    rows = [("train", "a", "a/1.png", picture(1)), ("train", "a", "a/2.png", picture(1))]
    rows += [
        ("test", "a", "a/3.png", picture(2)),
        ("train", "b", "b/1.png", picture(2)),
        ("train", "b", "b/2.png", picture(3)),
    ]
    corpus = write_corpus(tmp_path / "c", rows)
    assert corpus.head.duplicates == {"images": 2, "across_splits": 1, "across_classes": 1}


def test_the_head_is_plain_json_that_keeps_the_order_of_splits(corpus: Corpus) -> None:
    text = json.dumps(corpus.head.to_json(), sort_keys=True)
    head = type(corpus.head).from_json(json.loads(text), "here")
    assert head == corpus.head and list(head.splits) == ["train", "val", "test"]
    assert dataclasses.replace(head, source="x") != head


def test_the_small_writer_refuses_a_bad_image(tmp_path: Path) -> None:
    with pytest.raises(ImageRejected):
        write_corpus(tmp_path / "c", [("train", "a", "x.png", b"no image")])
    assert not (tmp_path / "c" / "current.json").exists()


@pytest.mark.parametrize("data", [b"[]", b"{}", b"null", b'"x"', b'{"digest": 5}', b'{"digest": "../../x"}'])
def test_a_damaged_current_json_is_named(data: bytes, corpus: Corpus) -> None:
    store.write(f"{corpus.uri}/current.json", data)
    with pytest.raises(ManifestError, match=r"pets/current.json is damaged: it names no digest"):
        open_corpus("pets@current")


@pytest.mark.parametrize(
    "change",
    [
        {"class_names": None},
        {"class_names": 5},
        {"splits": {"train": 10}},
        {"splits": [["train"]]},
        {"splits": [["train", "many"]]},
        {"bytes": "x"},
        {"shards": None},
        {"rejected": []},
        {"sources": [{}]},
    ],
)
def test_a_damaged_head_is_named(change: dict[str, object], corpus: Corpus) -> None:
    uri = f"{corpus.uri}/manifests/{corpus.digest}/head.json"
    head = store.read_json(uri)
    store.write_json(uri, {name: value for name, value in (head | change).items() if value is not None})
    with pytest.raises(ManifestError, match=r"head.json is damaged"):
        open_corpus(corpus.reference)
    store.write(uri, b"[]")
    with pytest.raises(ManifestError, match=r"head.json is damaged: no JSON object"):
        open_corpus(corpus.reference)
