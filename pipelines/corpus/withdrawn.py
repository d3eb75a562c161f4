"""Images that were withdrawn from a corpus do not come back by the way: not by the same command, not by another one."""

from __future__ import annotations

import numpy as np

from pipelines import store
from pipelines.corpus.errors import CorpusError, ManifestError
from pipelines.corpus.manifest import open_corpus
from pipelines.corpus.rows import tar_rows, tar_times

__all__ = ["check_withdrawn"]

SHOWN = 3


def check_withdrawn(base: str, digest: str) -> None:
    """Raises CorpusError if that version, made current, would bring back what the current one has withdrawn."""
    import pyarrow as pa
    import pyarrow.compute as pc

    try:
        current = open_corpus(f"{base}@current")
        if current.digest == digest or "withdrawn" not in current.head.rejected:
            return
        listed = current.quarantine()
    except ManifestError:  # There is none, or nothing can be known of it any more.
        return
    paths = pa.array(listed.filter(pc.equal(listed["reason"], "withdrawn"))["source"].to_pylist(), pa.string())
    made = open_corpus(f"{base}@{digest}")
    back: list[str] = []
    for split in made.splits:
        times = tar_times(made, split)
        first = 0
        for table in tar_rows(made, split, ["source"]):
            found = pc.is_in(table["source"], paths).to_numpy()
            if times is not None:
                found = found & (times[first : first + table.num_rows] > 0)
            back += table["source"].take(np.flatnonzero(found)).to_pylist()
            first += table.num_rows
    if back:
        raise CorpusError(
            f"{len(back):,} images that were withdrawn from {current.reference} would come again, such as"
            f" {', '.join(back[:SHOWN])}; --append adds what is new and leaves them out. If they may come, delete"
            f" {store.join(base, 'current.json')} and run the same command again"
        )
