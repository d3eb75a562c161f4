"""The errors of the corpus: each message names the value, the rule and the remedy."""

from __future__ import annotations

__all__ = ["MAKE_AGAIN", "CorpusError", "ManifestError", "QuarantineError", "SourceError"]

MAKE_AGAIN = "the command that made this corpus, run again, writes it anew"


class CorpusError(ValueError):
    """A corpus cannot be made or read."""


class SourceError(CorpusError):
    """The source is not what it should be: empty, missing, of one class, changed while it was read."""


class QuarantineError(CorpusError):
    """More images are bad than the recipe allows."""


class ManifestError(CorpusError):
    """No such corpus or version, or a manifest that is damaged or of another schema."""
