from __future__ import annotations

import hashlib
import io
import json
import tarfile

from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines.corpus.tar import ShardContent, ShardWriter, sample_key

from .inputs import picture

names = st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1, max_size=300)
samples = st.lists(
    st.tuples(names, st.binary(max_size=3000), st.sampled_from(["jpg", "png", "webp"]), st.integers(0, 999)),
    min_size=1,
    max_size=8,
    unique_by=lambda sample: sample[0],
)


def write(rows: list[tuple[str, bytes, str, int]]) -> tuple[bytes, ShardContent]:
    file = io.BytesIO()
    writer = ShardWriter(file)
    for path, image, extension, label in rows:
        writer.add(path=path, image=image, extension=extension, width=3, height=2, label=label)
    content = writer.close()
    return file.getvalue(), content


@settings(max_examples=60, deadline=None)
@given(samples)
def test_the_same_samples_give_the_same_bytes_and_any_tar_reader_finds_them(
    rows: list[tuple[str, bytes, str, int]],
) -> None:
    data, content = write(rows)
    assert write(rows)[0] == data
    assert (content.bytes, content.sha256) == (len(data), hashlib.sha256(data).hexdigest())

    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        members = {member.name: (member, tar.extractfile(member).read()) for member in tar}  # type: ignore[union-attr]
    assert len(members) == 3 * len(rows)
    for member, _ in members.values():
        assert (member.mtime, member.uid, member.gid, member.mode, member.uname) == (0, 0, 0, 0o444, "vit")
    for path, image, extension, label in rows:
        key = sample_key(path)
        assert members[f"{key}.{extension}"][1] == image
        assert members[f"{key}.cls"][1] == str(label).encode()
        assert json.loads(members[f"{key}.json"][1]) == {"path": path, "width": 3, "height": 2, "label": label}


def test_one_range_of_the_tar_holds_exactly_one_sample() -> None:
    rows = [(f"a/{i}.png", picture(i, (5 + i, 9)), "png", i % 3) for i in range(20)]
    data, content = write(rows)
    for (path, image, _, _), row in zip(rows, content.rows.to_pylist(), strict=True):
        with tarfile.open(fileobj=io.BytesIO(data[row["offset"] : row["offset"] + row["bytes"]])) as tar:
            found = {member.name: tar.extractfile(member).read() for member in tar}  # type: ignore[union-attr]
        assert found[f"{sample_key(path)}.png"] == image and len(found) == 3
        assert row["key"] == sample_key(path) and row["source"] == path
        assert row["content"] == hashlib.sha256(image).digest()[:16]


def test_keys_have_no_dot_and_no_slash_at_which_foreign_readers_cut() -> None:
    assert sample_key("train/a.b.c/x.tar.jpg") == hashlib.sha256(b"train/a.b.c/x.tar.jpg").hexdigest()[:16]
    assert len({sample_key(f"{i}") for i in range(10_000)}) == 10_000


@settings(max_examples=30, deadline=None)
@given(samples)
def test_the_bytes_are_those_of_the_webdataset_writer_on_a_plain_tarfile(
    rows: list[tuple[str, bytes, str, int]],
) -> None:
    from webdataset import TarWriter

    sink = io.BytesIO()
    with TarWriter(sink, user="vit", group="vit", mode=0o444, mtime=0, encoder=False) as tar:
        tar.tarstream.format = tarfile.USTAR_FORMAT
        for path, image, extension, label in rows:
            described = {"path": path, "width": 3, "height": 2, "label": label}
            text = json.dumps(described, sort_keys=True, separators=(",", ":")).encode()
            tar.write({"__key__": sample_key(path), extension: image, "cls": str(label).encode(), "json": text})
    assert write(rows)[0] == sink.getvalue()


def test_several_labels_stand_in_json_alone_and_in_the_rows() -> None:
    file = io.BytesIO()
    writer = ShardWriter(file, multi_label=True)
    writer.add(path="a.jpg", image=b"x", extension="jpg", width=1, height=1, label=[2, 0])
    rows = writer.close().rows
    assert rows["labels"].to_pylist() == [[2, 0]] and "label" not in rows.column_names
    with tarfile.open(fileobj=io.BytesIO(file.getvalue())) as tar:
        key = sample_key("a.jpg")
        assert tar.getnames() == [f"{key}.jpg", f"{key}.json"]
        assert json.loads(tar.extractfile(f"{key}.json").read())["labels"] == [2, 0]  # type: ignore[union-attr]
