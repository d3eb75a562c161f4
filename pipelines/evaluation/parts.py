"""Predictions as Parquet parts of a fixed number of rows: a run that was killed goes on after its last whole part."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from pipelines import store

if TYPE_CHECKING:
    import pyarrow as pa

    from pipelines.identity import Attempt

__all__ = ["PART_ROWS", "Parts", "claim_destination", "row_schema"]

PART_ROWS = 100_000  # Decides where parts are cut: change it only with the VERSION of `predict`.
MARKER = "_predict.json"  # Readers of Parquet folders pass over names with an underscore.


def row_schema() -> pa.Schema:
    import pyarrow as pa

    return pa.schema(
        [
            ("path", pa.string()),  # Relative to the folder that was given; of a corpus, the source of the sample.
            ("prediction", pa.string()),
            ("probability", pa.float32()),
            ("top_classes", pa.list_(pa.string())),
            ("top_probabilities", pa.list_(pa.float32())),
            ("error", pa.string()),
        ]
    )


class Parts:
    """Parquet parts of PART_ROWS rows; those that an earlier attempt finished are kept."""

    def __init__(self, attempt: Attempt, total: int) -> None:
        self._attempt, self._total = attempt, total
        # A place of its own for each `--again`: the parts of the answer that stands are not touched.
        own = ("attempts", str(attempt.first)) if attempt.first > 1 else ()
        self.folder = store.join(attempt.root, *own, "predictions")
        self._waiting: list[pa.Table] = []
        self._num_waiting = 0
        self.uris: list[str] = []
        self.num_rows = self.num_unreadable = 0
        self._take_up()

    def _take_up(self) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        while self.num_rows < self._total and store.exists(uri := self._uri(len(self.uris))):
            errors = pq.read_table(pa.BufferReader(store.read(uri)), columns=["error"])["error"]
            if len(errors) != min(PART_ROWS, self._total - self.num_rows):
                break  # Not a part of this listing; it is written again.
            self.uris.append(uri)
            self.num_rows += len(errors)
            self.num_unreadable += len(errors) - errors.null_count

    def _uri(self, number: int) -> str:
        return store.join(self.folder, f"part-{number:05d}.parquet")

    def add(self, table: pa.Table) -> None:
        self._waiting.append(table)
        self._num_waiting += len(table)
        self.num_rows += len(table)
        self.num_unreadable += len(table) - table["error"].null_count
        while self._num_waiting >= PART_ROWS:
            self._write(PART_ROWS)

    def close(self) -> None:
        if self._num_waiting:
            self._write(self._num_waiting)
        if self.num_rows != self._total:
            raise RuntimeError(f"{self.num_rows:,} rows for {self._total:,} images; Ray Data lost some, run it again")

    def _write(self, rows: int) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        table = pa.concat_tables(self._waiting)
        part, rest = table.slice(0, rows), table.slice(rows)
        self._waiting, self._num_waiting = ([rest], len(rest)) if len(rest) else ([], 0)
        uri = self._uri(len(self.uris))
        self._attempt.check()
        with tempfile.TemporaryDirectory(prefix="vit-predict-") as folder:
            path = Path(folder) / "part.parquet"
            pq.write_table(part, path, compression="zstd")
            store.upload(path, uri)
        self.uris.append(uri)

    def publish(self, destination: str) -> str:
        """Copy the parts to where the user wants them; the marker says whose they are and whether all are there."""
        self._attempt.check()
        claim_destination(destination, self._attempt.digest)  # Another run may have come in between.
        marker = {"digest": self._attempt.digest, "rows": self.num_rows, "parts": len(self.uris)}
        store.write_json(store.join(destination, MARKER), {**marker, "is_complete": False})
        for uri in self.uris:
            store.write(store.join(destination, uri.rsplit("/", 1)[-1]), store.read(uri))
        store.write_json(store.join(destination, MARKER), {**marker, "is_complete": True})
        return destination


def claim_destination(destination: str, digest: str) -> None:
    """Mark an empty folder as this run's own, so that predictions of two runs never mix in it.

    The mark of a run that has put nothing there gives way. Raises ValueError, StoreError.
    """
    found = [info.uri for info in store.list_objects(destination)]
    marker = store.join(destination, MARKER)
    try:
        owner = store.read_json(marker)["digest"]
    except store.NotFound:
        owner = None
    if owner == digest:
        return
    if found and (owner is None or len(found) > 1):
        raise ValueError(
            f"destination {destination} holds {len(found):,} files of something else, such as {found[0]}; "
            "choose an empty folder or delete them"
        )
    store.write_json(marker, {"digest": digest, "is_complete": False})
