from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipelines.corpus import texts
from pipelines.corpus.listing import Files, SourceFile
from pipelines.corpus.sources import open_source
from pipelines.corpus.texts import Texts

from .inputs import class_folders


@given(st.lists(st.text(max_size=30)), st.integers(1, 60), st.data())
def test_texts_come_back_by_number_and_in_order_from_memory_and_from_disk(
    given: list[str], limit: int, data: st.DataObject
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(texts, "IN_MEMORY", limit)
        patch.setattr(texts, "READ", 16)
        found = Texts()
        for text in given:
            found.append(text)
        assert list(found) == given and len(found) == len(given) and found[:] == given
        rows = data.draw(st.lists(st.sampled_from(range(len(given))))) if given else []
        assert found.take(rows) == [given[row] for row in rows] == [found[row] for row in rows]


def test_names_that_are_no_utf8_come_back_too() -> None:
    found = Texts()
    found.append("caf\udce9")
    assert found[-1] == "caf\udce9" and list(found) == ["caf\udce9"]
    with pytest.raises(IndexError):
        found[1]


def test_a_folder_is_listed_in_the_order_of_its_paths(tmp_path: Path) -> None:
    base = class_folders(tmp_path / "s", {"a": 2, "a-b": 2, "a/x": 1, "a.b": 1, "A": 1, "a/x-y/z": 1})
    files = open_source(str(base)).files
    paths = [file.path for file in files]
    assert paths == sorted(paths) and len(paths) == 8
    assert [files[i] for i in range(8)] == list(files) == files[:]


def test_a_bucket_that_lists_in_no_order_and_keys_with_two_slashes_are_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    from pipelines import store
    from pipelines.corpus.listing import list_files

    uris = ["s3://b/p/z/1.png", "s3://b/p//a/1.png", "s3://b/p/c/1.png"]
    monkeypatch.setattr(store, "list_objects", lambda prefix: (store.ObjectInfo(uri, 5, "e") for uri in uris))
    files, _ = list_files("s3://b/p")
    assert isinstance(files, Files)
    assert list(files) == [
        SourceFile(uri.split("/p/")[1].lstrip("/"), uri, 5, "e") for uri in (uris[1], uris[2], uris[0])
    ]
