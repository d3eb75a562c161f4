"""`vit corpus exclude|versions`: what is done to a corpus by hand."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from pipelines import store
from pipelines.config import RecipeError
from pipelines.corpus.errors import CorpusError
from pipelines.progress import say

__all__ = ["main"]

USAGE = "vit corpus exclude CORPUS LIST [--copies] | versions CORPUS"


def main(arguments: Sequence[str], prepare: Callable[[], None]) -> int:
    """`prepare` brings up what the object store needs. Returns the exit code."""
    match list(arguments):
        case ["exclude", name, path, *more] if more in ([], ["--copies"]):
            listed = _lines(path)
            prepare()
            _exclude(name, listed, path, bool(more))
        case ["versions", name]:
            prepare()
            _versions(name)
        case _:
            raise RecipeError(f"usage: {USAGE}; LIST is a file with a key or a relative path a line")
    return 0


def _lines(path: str) -> list[str]:
    hint = "LIST is a file with a key or a path a line"
    try:
        data = store.read(path) if store.is_s3(path) else Path(path).read_bytes()
        return data.decode("utf-8-sig").splitlines()
    except OSError as error:
        raise CorpusError(f"cannot read {path}: {error.strerror}; {hint}") from None
    except UnicodeDecodeError as error:
        raise CorpusError(f"{path} is not UTF-8 (byte {error.start:,}); {hint}") from None


def _exclude(name: str, listed: list[str], path: str, copies: bool) -> None:
    from pipelines.corpus.commit import one_writer
    from pipelines.corpus.grow import exclude
    from pipelines.corpus.manifest import open_corpus

    corpus = open_corpus(f"{name.removesuffix('@current')}@current")  # A mistyped name leaves nothing behind.
    with one_writer(corpus.uri):
        made = exclude(f"{corpus.uri}@current", listed, path, copies=copies)
    counts = ", ".join(f"{split} {count:,}" for split, count in made.splits.items())
    say(f"{made.uri}@{made.digest[:12]}: {made.head.rejected.get('withdrawn', 0):,} images withdrawn; {counts}")


def _versions(name: str) -> None:
    from pipelines.corpus.grow import versions
    from pipelines.corpus.manifest import open_corpus

    name = name.removesuffix("@current")
    newest = open_corpus(f"{name}@current").digest
    for corpus in versions(name):
        head = corpus.head
        counts = ", ".join(f"{split} {count:,}" for split, count in head.splits.items())
        parent = f"from {head.parent[:12]}" if head.parent else "from nothing"
        mark = "  current" if corpus.digest == newest else ""
        say(f"{corpus.digest[:12]}  {parent:<17}  {head.shards:,} shards, {head.bytes / 1e9:.3g} GB, {counts}{mark}")
