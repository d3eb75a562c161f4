"""Whether a manifest still has all its pieces: looked at before a finished corpus is reused or written once more."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from pipelines import store
from pipelines.corpus.errors import ManifestError
from pipelines.corpus.manifest import Corpus, open_corpus
from pipelines.corpus.ranged import open_object
from pipelines.identity import StageResult

__all__ = ["lost_manifest", "lost_piece"]

MOST_PARTS = 32  # Parts of the sample table whose footers are read, of a million rows each.


def lost_piece(corpus: Corpus) -> str | None:
    """What of the manifest is missing or damaged. Of the sample table the footers are read, not the rows."""
    try:
        shards = corpus.table
        reasons = Counter(corpus.quarantine()["reason"].to_pylist())
        if dict(reasons) != corpus.head.rejected:
            return f"quarantine.parquet of {corpus.reference} is not the one of its head"
        if not corpus.head.sources:
            _check_parts(corpus, sum(shards["samples"].to_pylist()))
    except ManifestError as error:
        return str(error)
    return None


def lost_manifest(result: StageResult) -> str | None:
    """For `identity.run_stage`: whether the corpus of a finished run still has its manifest."""
    try:
        corpus = open_corpus(result.uri, result.details.get("account", ""))
    except (ManifestError, store.NotFound):
        return f"the manifest of {result.uri} is gone"
    return lost_piece(corpus)


def _check_parts(corpus: Corpus, total: int) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    folder = store.join(corpus.manifest, "samples")
    uris = [info.uri for info in store.list_objects(folder) if info.uri.endswith(".parquet")]
    firsts = [int(Path(uri).stem) for uri in uris]
    if firsts[:1] != [0]:
        raise ManifestError(f"{folder} is incomplete")
    every = range(0, len(uris), -(-len(uris) // MOST_PARTS))
    ends = [*firsts[1:], total]
    for part in every:
        try:
            with pq.ParquetFile(open_object(uris[part])) as file:
                rows = file.metadata.num_rows
        except (pa.ArrowException, OSError) as error:
            raise ManifestError(f"{uris[part]} is damaged ({error})") from None
        if firsts[part] + rows != ends[part]:
            raise ManifestError(f"{folder} is incomplete: {uris[part]} has {rows:,} rows")
