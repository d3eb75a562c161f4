"""Every header is checked: the walk finds what tarfile finds, and damage never looks like a shorter archive."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipelines.reader.tar import BLOCK, walk

MEMBERS = [
    ("a.cls", b"1"),
    ("a.png", b"x" * 700),
    ("b.cls", b"2"),
    ("b.png", b"y" * 512),
    ("c.cls", b"0"),
    ("c.png", b""),
]


def archive(members: Sequence[tuple[str, bytes]], form: int = tarfile.USTAR_FORMAT, end: bool = False) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=form) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
        length = tar.offset
    return file.getvalue() if end else file.getvalue()[:length]


def found(data: bytes) -> tuple[list[tuple[str, dict[str, bytes]]], str]:
    samples, problem = walk(memoryview(data))
    read = [
        (sample.key, {name: data[start : start + size] for name, (start, size) in sample.members.items()})
        for sample in samples
    ]
    return read, problem.reason if problem else ""


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
@pytest.mark.parametrize("end", [False, True])
def test_samples_are_grouped_by_key(form: int, end: bool) -> None:
    assert found(archive(MEMBERS, form, end)) == (
        [
            ("a", {"cls": b"1", "png": b"x" * 700}),
            ("b", {"cls": b"2", "png": b"y" * 512}),
            ("c", {"cls": b"0", "png": b""}),
        ],
        "",
    )


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_long_names_and_folders_are_part_of_the_key(form: int) -> None:
    folder = "/".join(["folder" * 5] * 4)
    members = [(f"{folder}/k1.JPG", b"1"), (f"{folder}/k1.cls", b"2"), ("k1.jpg", b"3"), ("k12.seg.png", b"4")]
    samples, problem = found(archive(members, form))
    assert [key for key, _ in samples] == [f"{folder}/k1", "k1", "k12"]
    assert [sorted(files) for _, files in samples] == [["cls", "jpg"], ["jpg"], ["seg.png"]]
    assert not problem


def test_members_outside_samples_are_passed_over() -> None:
    samples, problem = found(archive([("README", b"?"), *MEMBERS[:2], (".hidden", b"?")]))
    assert [key for key, _ in samples] == ["a"]
    assert not problem


@given(st.data())
def test_a_page_cut_anywhere_gives_whole_samples_and_says_so(data: st.DataObject) -> None:
    tar = archive(MEMBERS)
    cut = data.draw(st.integers(1, len(tar) - 1))
    samples, problem = found(tar[:cut])
    whole = found(tar)[0]
    if problem:
        assert problem == "tar_truncated"
        assert samples == whole[: len(samples)]
    else:  # Between two members nothing shows in the bytes; there the missing member and the number of rows tell.
        assert cut % BLOCK == 0
        assert samples[:-1] == whole[: len(samples) - 1]
        assert samples[-1][1].items() <= whole[len(samples) - 1][1].items()


@given(st.data())
def test_a_flipped_header_bit_is_never_overlooked(data: st.DataObject) -> None:
    tar = bytearray(archive(MEMBERS))
    headers = [0, 2 * BLOCK, 5 * BLOCK, 7 * BLOCK, 9 * BLOCK, 11 * BLOCK]
    header = data.draw(st.sampled_from(headers))
    at = header + data.draw(st.integers(0, BLOCK - 1))
    tar[at] ^= 1 << data.draw(st.integers(0, 7))
    samples, problem = found(bytes(tar))
    whole = found(archive(MEMBERS))[0]
    if not problem:  # The checksum field's own padding may change without meaning.
        assert 148 <= at - header < 156
    assert samples == whole[: len(samples)]
    assert problem or samples == whole


@pytest.mark.parametrize("form", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
@pytest.mark.parametrize("label_first", [False, True])
def test_a_flipped_bit_after_an_extension_header_never_cuts_a_member(form: int, label_first: bool) -> None:
    """Of names over 100 bytes each member has one, and a size of 2 bytes in place of 3 still reads as a label."""
    names = sorted((("cls", b"123"), ("png", b"x" * 700)), reverse=not label_first)
    members = [(f"{'folder/' * 15}{key}.{name}", data) for key in "abc" for name, data in names]
    tar = archive(members, form)
    whole = found(tar)[0]
    assert len(whole) == 3
    headers = [at for at in range(0, len(tar), BLOCK) if tar[at + 257 : at + 262] == b"ustar"]
    assert len(headers) == 2 * len(members)
    for at in headers:
        for bit in range(124 * 8, 136 * 8):
            broken = bytearray(tar)
            broken[at + bit // 8] ^= 1 << bit % 8
            samples, problem = found(bytes(broken))
            assert problem and samples == whole[: len(samples)]


@pytest.mark.parametrize(
    "kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE, tarfile.GNUTYPE_SPARSE]
)
def test_links_devices_and_sparse_files_are_refused(kind: bytes) -> None:
    info = tarfile.TarInfo("b.png")
    info.type, info.linkname = kind, "/etc/passwd"
    samples, problem = found(archive(MEMBERS[:2]) + info.tobuf(tarfile.GNU_FORMAT))
    assert problem == "tar_unsafe"
    assert samples == []


@pytest.mark.parametrize("name", ["/etc/passwd.png", "../up.png", "a/../../up.png"])
def test_names_that_leave_the_archive_are_refused(name: str) -> None:
    assert found(archive([(name, b"")]))[1] == "tar_unsafe"


def test_a_member_twice_in_a_sample_is_refused() -> None:
    assert found(archive([("a.png", b""), ("a.PNG", b"")]))[1] == "tar_duplicate"


def test_a_huge_name_is_refused_without_being_read() -> None:
    info = tarfile.TarInfo("././@LongLink")
    info.type, info.size = tarfile.GNUTYPE_LONGNAME, 1 << 20
    assert found(info.tobuf(tarfile.GNU_FORMAT) + bytes(1 << 20))[1] == "tar_unsafe"


@given(st.binary(max_size=4 * BLOCK))
def test_random_bytes_never_raise(data: bytes) -> None:
    samples, problem = found(data)
    assert samples == []
    assert problem or not any(data[:BLOCK])
