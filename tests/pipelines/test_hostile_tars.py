"""Hostile tars at every door: `index`, `shard` from tars, and the reader. Nothing is followed, written or believed."""

from __future__ import annotations

import io
import os
import tarfile
import threading
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines.config import from_dict
from pipelines.corpus.adopt import scan_tar
from pipelines.corpus.errors import CorpusError
from pipelines.index import IndexRecipe, adopt_tars
from pipelines.reader.tar import walk
from pipelines.shard import ShardRecipe, make_corpus

from .corpus.foreign import BLOCK, Member, foreign_tar, raw_header, sample, special
from .corpus.inputs import picture

IMAGE = picture(7, kind="PNG")
SECRET = b"the content of a file that no tar may reach"


def padded(data: bytes) -> bytes:
    return data + bytes(-len(data) % BLOCK)


def member(name: bytes, data: bytes, kind: bytes = b"0", size: bytes | None = None) -> bytes:
    return raw_header(name, b"%011o\0" % len(data) if size is None else size, kind) + padded(data)


def pax(*fields: tuple[bytes, bytes], kind: bytes = b"x") -> bytes:
    record = b""
    for name, value in fields:
        length = len(name) + len(value) + 3
        while len(str(length)) + len(name) + len(value) + 3 != length:
            length = len(str(length)) + len(name) + len(value) + 3
        record += b"%d %s=%s\n" % (length, name, value)
    return member(b"pax", record, kind)


def linked(kind: bytes, target: str) -> bytes:
    return foreign_tar([special("evil.png", kind, target)], end=False)


LABEL = member(b"evil.cls", b"1")
FILE = member(b"evil.png", IMAGE)
BASE_256 = b"\x80" + (1 << 62).to_bytes(11, "big")
HOSTILE: dict[str, bytes] = {
    "absolute": member(b"/tmp/evil.png", IMAGE) + member(b"/tmp/evil.cls", b"1"),
    "dots": member(b"../../evil.png", IMAGE) + member(b"../../evil.cls", b"1"),
    "dots inside": member(b"a/../../evil.png", IMAGE) + member(b"a/../../evil.cls", b"1"),
    "dots in pax": pax((b"path", b"../evil.png")) + FILE + pax((b"path", b"../evil.cls")) + LABEL,
    "dots in a long name": foreign_tar(
        [(f"../{'d' * 200}/evil.png", IMAGE), (f"../{'d' * 200}/evil.cls", b"1")], end=False
    ),
    "symlink": linked(tarfile.SYMTYPE, "SECRET") + LABEL,
    "hard link": linked(tarfile.LNKTYPE, "SECRET") + LABEL,
    "character device": linked(tarfile.CHRTYPE, "") + LABEL,
    "block device": linked(tarfile.BLKTYPE, "") + LABEL,
    "fifo": linked(tarfile.FIFOTYPE, "") + LABEL,
    "sparse": member(b"evil.png", IMAGE, b"S") + LABEL,
    "sparse in pax": pax((b"GNU.sparse.major", b"1"), (b"GNU.sparse.realsize", b"9" * 15)) + FILE + LABEL,
    "huge pax header": member(b"pax", b"x" * (2 << 20), b"x") + FILE + LABEL,
    "huge long name": member(b"long", b"n" * (2 << 20), b"L") + FILE + LABEL,
    "headers without end": pax((b"comment", b"x")) * 50 + FILE + LABEL,
    "malformed pax": member(b"pax", b"9999 path=x\n", b"x") + FILE + LABEL,
    "pax length 0": member(b"pax", b"0 path=x\n", b"x") + FILE + LABEL,
    "negative pax size": pax((b"size", b"-5")) + FILE + LABEL,
    "endless pax size": pax((b"size", b"9" * 18)) + FILE + LABEL,
    "negative size": member(b"evil.png", IMAGE, size=b"-0000000077\0") + LABEL,
    "negative binary size": member(b"evil.png", IMAGE, size=b"\xff" * 12) + LABEL,
    "endless binary size": member(b"evil.png", IMAGE, size=BASE_256) + LABEL,
    "no number": member(b"evil.png", IMAGE, size=b"12monkeys\0\0\0") + LABEL,
    "global header": pax((b"path", b"good.png"), kind=b"g") + FILE + LABEL,
    "unknown type": member(b"evil.png", IMAGE, b"Z") + LABEL,
}
# What tarfile reads without harm: shard may take the image, whose name is its own again.
HARMLESS_TO_SHARD = {"headers without end", "global header", "unknown type"}


@pytest.fixture
def tars(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder in which a tar of hostile members may be put between clean ones; the working folder is watched."""
    (tmp_path / "work").mkdir()
    (tmp_path / "secret.png").write_bytes(SECRET)
    monkeypatch.chdir(tmp_path / "work")
    (tmp_path / "tars").mkdir()
    return tmp_path / "tars"


def write(tars: Path, evil: bytes) -> None:
    clean: list[Member] = [part for i in range(4) for part in sample(f"a{i}", i)]
    last: list[Member] = [part for i in range(4, 8) for part in sample(f"b{i}", i)]
    evil = evil.replace(b"SECRET", str(tars.parent / "secret.png").encode()[:6])
    (tars / "x.tar").write_bytes(foreign_tar(clean, end=False) + evil + foreign_tar(last))


def within(seconds: float, call: Any) -> Any:
    """The call's result or error; a FIFO or an endless file must not hang anything."""
    box: list[Any] = []

    def run() -> None:
        try:
            box.append(call())
        except CorpusError as error:
            box.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    assert box, "hangs, or raised something that is no CorpusError"
    return box[0]


def nothing_happened(tars: Path) -> None:
    assert list(Path.cwd().iterdir()) == []
    assert sorted(path.name for path in tars.parent.iterdir()) == ["c", "secret.png", "tars", "work"]
    assert not Path("/tmp/evil.png").exists()
    for path in tars.parent.rglob("*"):
        assert not path.is_symlink() and (path.is_file() or path.is_dir())
        assert path.name == "secret.png" or path.is_dir() or SECRET not in path.read_bytes()


@pytest.mark.parametrize("what", HOSTILE)
def test_index_names_it_and_takes_none_of_it(what: str, tars: Path) -> None:
    write(tars, HOSTILE[what])
    recipe = {"source": str(tars), "destination": str(tars.parent / "c"), "num_workers": 0, "max_bad_fraction": 1.0}
    done = within(20, lambda: adopt_tars(from_dict(IndexRecipe, recipe | {"damaged": "keep"})))
    nothing_happened(tars)
    keys = done.corpus.samples("train")["key"].to_pylist()
    assert not any("evil" in key for key in keys) and {"a0", "a1", "a2"} <= set(keys)
    assert done.anomalies and set(done.anomalies) <= {"unsafe_name", "unsupported_member", "missing_member", "damaged"}
    if "damaged" in done.anomalies:
        assert isinstance(within(20, lambda: adopt_tars(from_dict(IndexRecipe, recipe))), CorpusError)
    else:
        assert {"b4", "b7"} <= set(keys)


@pytest.mark.parametrize("what", HOSTILE)
def test_shard_refuses_it_or_leaves_it_out(what: str, tars: Path) -> None:
    write(tars, HOSTILE[what])
    recipe = from_dict(
        ShardRecipe,
        {"source": str(tars), "destination": str(tars.parent / "c"), "num_workers": 0, "max_bad_fraction": 1.0},
    )
    (tars.parent / "c").mkdir()
    done = within(20, lambda: make_corpus(recipe))
    nothing_happened(tars)
    if isinstance(done, CorpusError):
        assert "x.tar" in str(done)
        return
    sources = done.samples("train")["source"].to_pylist()
    assert {"x.tar/a0.jpg", "x.tar/b7.jpg"} <= set(sources)
    assert what in HARMLESS_TO_SHARD or not any("evil" in source for source in sources)


@pytest.mark.parametrize("what", HOSTILE)
def test_the_reader_gives_no_sample_of_it(what: str, tars: Path) -> None:
    """A manifest never lists such a page; one that was put there afterwards is refused from that byte on."""
    write(tars, HOSTILE[what])
    page = (tars / "x.tar").read_bytes()
    samples, problem = walk(memoryview(page))
    # A global header renames nothing for our readers: they pass over it. Extension headers may be any number.
    if what in ("global header", "headers without end"):
        assert problem is None and [one.key for one in samples][4] == "evil"
        return
    assert problem is not None and problem.reason.startswith("tar_")
    assert all(one.key in ("a0", "a1", "a2", "a3") for one in samples)


def test_a_long_name_of_a_folder_is_not_taken_for_that_of_the_file_after_it() -> None:
    folder = tarfile.TarInfo("/".join(["deep"] * 40))
    folder.type = tarfile.DIRTYPE
    for form in (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        page = foreign_tar([folder, *sample("k", 1)], form)
        samples, problem = walk(memoryview(page))
        assert problem is None and [one.key for one in samples] == ["k"]


@pytest.mark.parametrize(
    "label",
    [b"[" * 500_000, b'{"label": ' + b"9" * 6000 + b"}", b'{"label": 1e999}', b'{"label": true}', b"\xff\xfe", b"{}"],
)
def test_a_hostile_json_is_no_label(label: bytes, tmp_path: Path) -> None:
    members: list[Member] = [("k.json", label), ("k.png", IMAGE)]
    data = foreign_tar([*members, *sample("a", 1)])
    scan, rows = scan_tar("x.tar", len(data), lambda start, n: data[start : start + n], split="train", decode=True)
    assert [item.reason for item in scan.rejected] == ["missing_label"] and rows["key"].to_pylist() == ["a"]


# What the index frames, the reader reads: for any tar, whole or broken -----------------------------------------------

names = st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1, max_size=12)
keys = st.sampled_from(["a", "b", "c", "d/e", "f.g", "../h", "i" * 150])
endings = st.sampled_from(["png", "PNG", "jpg", "cls", "json", "txt", "seg.png"])
contents = st.sampled_from([IMAGE, picture(8, kind="JPEG"), b"1", b"2", b"", b'{"label": 2}', IMAGE[:50]])
anything = st.one_of(
    st.tuples(st.builds("{}.{}".format, keys, endings), contents),
    st.tuples(names, contents),
    st.builds(special, names, st.sampled_from([tarfile.SYMTYPE, tarfile.DIRTYPE, tarfile.FIFOTYPE])),
)


@settings(max_examples=150, deadline=None)
@given(
    st.lists(anything, max_size=14),
    st.sampled_from([tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]),
    st.one_of(st.none(), st.tuples(st.floats(0, 1), st.integers(0, 255))),
)
def test_every_page_of_the_index_walks_to_exactly_its_samples(
    members: list[Member], form: int, damage: tuple[float, int] | None
) -> None:
    data = bytearray(foreign_tar(members, form))
    if damage is not None:
        data[int(damage[0] * (len(data) - 1))] ^= damage[1]
    whole = bytes(data)
    scan, rows = scan_tar("x.tar", len(whole), lambda start, n: whole[start : start + n], split="s", decode=False)
    listed = rows.to_pylist()
    at = 0
    for offset, length, count in zip(scan.page_offset, scan.page_length, scan.page_rows, strict=True):
        samples, problem = walk(memoryview(whole)[offset : offset + length])
        assert problem is None
        assert [one.key for one in samples] == [row["key"] for row in listed[at : at + count]]
        for one, row in zip(samples, listed[at : at + count], strict=True):
            page = whole[offset : offset + length]
            assert any(
                page[start : start + size].startswith((b"\x89PNG", b"\xff\xd8")) for start, size in one.members.values()
            )
            assert offset <= row["offset"] and row["offset"] + row["bytes"] <= offset + length
        at += count
    assert at == len(listed) == scan.samples


def test_the_hostile_set_is_what_it_says() -> None:
    """Python's tarfile sees the links and devices too; else the tests above would prove nothing."""
    kinds = {}
    for what in ("symlink", "hard link", "character device", "block device", "fifo"):
        with tarfile.open(fileobj=io.BytesIO(HOSTILE[what] + bytes(1024))) as tar:
            kinds[what] = tar.next().type  # type: ignore[union-attr]
    assert list(kinds.values()) == [b"2", b"1", b"3", b"4", b"6"]
    assert os.path.basename(tarfile.open(fileobj=io.BytesIO(HOSTILE["dots"])).getnames()[0]) == "evil.png"  # noqa: PTH119, SIM115
