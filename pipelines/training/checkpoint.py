"""Checkpoints: safetensors and JSON under ATTEMPT/checkpoints/STEP/, the manifest with its hashes written last.

    tensors-00000-of-00001.safetensors    parameters and optimizer state; where they are cut, one file per part
    state.json                            step, order, layout; read by people and by the next attempt
    manifest.json                         names, sizes and sha256 of the others: the commit point
Whoever writes here is trusted for weights, never for code: nothing in this file can run any.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import re
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from pipelines import store
from pipelines.training.checkpoint_state import problem_of
from pipelines.training.layout import WHOLE, Layout, Part

__all__ = ["CheckpointError", "Checkpoints", "Found", "Loaded", "Place"]

log = logging.getLogger(__name__)

FORMAT = 1
TENSORS = Layout().file_name(0)  # Where nothing is cut.
STATE = "state.json"
MANIFEST = "manifest.json"
PART_SECONDS = 600.0  # That the first part waits for the others.
MAX_JSON_BYTES = 16 << 20  # A manifest is some hundred bytes; more is not ours.


class CheckpointError(RuntimeError):
    """A stored checkpoint is torn, foreign or unreadable; an older one may be good."""


class Place(Protocol):
    """What a checkpoint needs to know of the attempt it belongs to (identity.Attempt)."""

    @property
    def root(self) -> str: ...
    @property
    def digest(self) -> str: ...
    @property
    def number(self) -> int: ...
    @property
    def first(self) -> int: ...
    @property
    def uri(self) -> str: ...
    def check(self) -> None: ...


@dataclass(frozen=True, slots=True)
class Found:
    """A checkpoint that has a manifest; whether it is good shows when it is loaded."""

    uri: str
    step: int
    attempt: int


@dataclass(frozen=True, slots=True)
class Loaded:
    """A verified checkpoint."""

    found: Found
    tensors: dict[str, Tensor]
    state: dict[str, Any]


class Checkpoints:
    """The checkpoints of one digest, over all its attempts since the last `--again` began."""

    def __init__(self, place: Place, keep: int = 2, part: Part = WHOLE) -> None:
        """`part`: of the cut tensors, what this rank holds: what it saves, and what it has loaded."""
        self.place, self.keep, self.part = place, keep, part
        self._refused: set[str] = set()  # Seen not to be whole: none of the `keep` that stay.
        self._pattern = re.compile(rf"{re.escape(place.root)}/attempts/(\d+)/checkpoints/(\d+)/([^/]+)$")

    def found(self) -> list[Found]:
        """Committed checkpoints, newest first."""
        listed = [found for found, names in self._listed() if MANIFEST in names]
        return sorted(listed, key=lambda found: (found.step, found.attempt), reverse=True)

    def _listed(self) -> Iterator[tuple[Found, set[str]]]:
        names: dict[tuple[int, int], set[str]] = {}
        for item in store.list_objects(store.join(self.place.root, "attempts")):
            if match := self._pattern.match(item.uri):
                names.setdefault((int(match[1]), int(match[2])), set()).add(match[3])
        for (attempt, step), members in names.items():
            if attempt >= self.place.first:
                yield Found(self._uri(attempt, step), step, attempt), members

    def _uri(self, attempt: int, step: int) -> str:
        return store.join(self.place.root, "attempts", str(attempt), "checkpoints", f"{step:09d}")

    def newest(self) -> Loaded | None:
        """The newest checkpoint that is whole. A bad one is passed over, and said so."""
        for found in self.found():
            try:
                return self.load(found)
            except CheckpointError as error:
                log.warning("%s; falling back to the one before", error)
        return None

    def newest_state(self) -> dict[str, Any]:
        """state.json of the newest checkpoint that has one as its manifest says; empty if there is none.

        Its tensors are not looked at: where they are torn, the one before is of the same order and engine.
        """
        for found in self.found():
            try:
                with tempfile.TemporaryDirectory(prefix="vit-state-") as folder:
                    return self._state(found, self._manifest(found), Path(folder))
            except CheckpointError as error:
                log.warning("%s; looking at the one before", error)
        return {}

    def at(self, attempt: int, step: int) -> Loaded:
        """Exactly this checkpoint: what another rank has chosen."""
        return self.load(Found(self._uri(attempt, step), step, attempt))

    def load(self, found: Found) -> Loaded:
        """Download what this part needs and verify it; raises CheckpointError."""
        try:
            return self._load(found)
        except CheckpointError:
            self.refuse(found)
            raise

    def refuse(self, found: Found) -> None:
        """It is not whole, as this or another rank has seen: it is no longer one of the `keep`."""
        self._refused.add(found.uri)

    def _load(self, found: Found) -> Loaded:
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        manifest = self._manifest(found)
        with tempfile.TemporaryDirectory(prefix="vit-checkpoint-") as folder:
            state = self._state(found, manifest, Path(folder))
            layout = _layout(state, manifest, found)
            files = {index: layout.file_name(index) for index in layout.needed(self.part)}
            paths = {index: self._verified(found, name, manifest[name], Path(folder)) for index, name in files.items()}
            try:
                read = {index: load_file(path) for index, path in paths.items()}
                tensors = {name: tensor.clone() for name, tensor in layout.join(read, self.part).items()}
            except (SafetensorError, OSError, ValueError, LookupError, TypeError, RuntimeError) as error:
                raise CheckpointError(f"the tensors of {found.uri} are not safetensors as written ({error})") from None
        return Loaded(found, tensors, state)

    def _state(self, found: Found, manifest: Mapping[str, Mapping[str, Any]], folder: Path) -> dict[str, Any]:
        uri = store.join(found.uri, STATE)
        state = _parse(self._verified(found, STATE, manifest[STATE], folder).read_bytes(), uri)
        if state.get("step") != found.step:
            raise CheckpointError(f"{uri} says step {state.get('step')}, its place {found.step}")
        if problem := problem_of(state):
            raise CheckpointError(f"{uri}: {problem}")
        return state

    def _manifest(self, found: Found) -> dict[str, dict[str, Any]]:
        uri = store.join(found.uri, MANIFEST)
        try:
            if store.stat(uri).size > MAX_JSON_BYTES:
                raise CheckpointError(f"{uri} is too large for a manifest")
            manifest = _parse(store.read(uri), uri)
        except (store.NotFound, store.Unreadable) as error:
            raise CheckpointError(_not_there(uri, error)) from None
        if manifest.get("format") != FORMAT:
            raise CheckpointError(f"{uri} has format {manifest.get('format')!r}, this code reads {FORMAT}")
        if manifest.get("digest") != self.place.digest or manifest.get("step") != found.step:
            raise CheckpointError(f"{uri} belongs to another run or step")
        files = manifest.get("files")
        if not isinstance(files, dict) or STATE not in files or not all(isinstance(of, dict) for of in files.values()):
            raise CheckpointError(f"{uri} does not list {STATE} and the files of its tensors")
        return files

    def _verified(self, found: Found, name: str, wanted: Mapping[str, Any], folder: Path) -> Path:
        uri = store.join(found.uri, name)
        try:
            size = store.stat(uri).size  # First: nothing is downloaded that is not as large as what was written.
            if size != wanted.get("size"):
                raise CheckpointError(f"{uri} has {size} bytes, its manifest says {wanted.get('size')}")
            path = store.download(uri, folder / name)
        except (store.NotFound, store.Unreadable) as error:
            raise CheckpointError(_not_there(uri, error)) from None
        if _sha256(path) != wanted.get("sha256"):
            raise CheckpointError(f"{uri} does not match the sha256 of its manifest")
        return path

    def save(
        self,
        step: int,
        tensors: Mapping[str, Tensor],
        state: Mapping[str, Any],
        rows: Mapping[str, int] | None = None,
        token: str = "",
    ) -> Found | None:
        """Files first, manifest last, then retention. Raises LeaseLost if another attempt took over.

        `rows`: over all parts, of the tensors that are cut. The first part commits, once all others have come with
        the same `token`, which every start of the group draws anew; the others return None.
        """
        from safetensors.torch import save_file

        found = Found(self._uri(self.place.number, step), step, self.place.number)
        self._refused.discard(found.uri)
        layout = Layout(self.part.count, rows or {})
        with tempfile.TemporaryDirectory(prefix="vit-checkpoint-") as folder:
            path = Path(folder) / layout.file_name(self.part.index)
            save_file(dict(tensors), path, metadata={"format": "pt"})
            files = {path.name: self._upload(path, found)}
            if self.part.index:
                store.write_json(self._part_uri(found, self.part.index), {"token": token, **files[path.name]})
                return None
            about = {**state, "step": step, "layout": layout.to_json()}
            (Path(folder) / STATE).write_text(json.dumps(about, indent=1, sort_keys=True))
            files[STATE] = self._upload(Path(folder) / STATE, found)
        for index in range(1, layout.files):
            files[layout.file_name(index)] = self._other_part(found, index, token)
        self.place.check()
        manifest = {
            "format": FORMAT,
            "digest": self.place.digest,
            "step": step,
            "attempt": self.place.number,
            "files": files,
        }
        store.write_json(store.join(found.uri, MANIFEST), manifest)
        # The parts' own notes stay until retention takes the folder: their writers may still be at them.
        self._retain(found, {name: int(entry["size"]) for name, entry in files.items()})
        return found

    def _upload(self, path: Path, found: Found) -> dict[str, Any]:
        entry = {"size": path.stat().st_size, "sha256": _sha256(path)}
        store.upload(path, store.join(found.uri, path.name))
        return entry

    def _part_uri(self, found: Found, index: int) -> str:
        return store.join(found.uri, f"part-{index:05d}.json")

    def _other_part(self, found: Found, index: int, token: str) -> dict[str, Any]:
        """Size and sha256 of what another rank has uploaded; one left by an earlier start does not count."""
        deadline = time.monotonic() + PART_SECONDS
        while True:
            with contextlib.suppress(store.NotFound):
                part = store.read_json(self._part_uri(found, index))
                if part.get("token") == token:
                    return {"size": part["size"], "sha256": part["sha256"]}
            if time.monotonic() > deadline:
                raise store.StoreError(
                    f"part {index} of the checkpoint at step {found.step} did not come within {PART_SECONDS:.0f} s;"
                    " the checkpoints before it stay"
                )
            time.sleep(0.1)

    def _retain(self, newest: Found, sizes: Mapping[str, int]) -> None:
        """Drop what is older than the newest `keep`, once the newest is seen to stand in the store whole."""
        try:
            if any(store.stat(store.join(newest.uri, name)).size != size for name, size in sizes.items()):
                log.warning("%s does not stand in the store as it was written; older checkpoints stay", newest.uri)
                return
            good = [found for found in self.found() if found.uri not in self._refused]
            kept = {found.uri for found in good[: self.keep]} | {newest.uri}
            for found, names in list(self._listed()):
                # A folder without manifest is an upload in progress if it is ours and newer, else an orphan.
                if found.uri in kept or (found.attempt == newest.attempt and found.step > newest.step):
                    continue
                for name in sorted(names, key=lambda name: name != MANIFEST):  # The manifest first: never a torn one.
                    store.delete(store.join(found.uri, name))
        except store.StoreError as error:
            log.warning("old checkpoints could not be swept: %s", error)


def _layout(state: Mapping[str, Any], manifest: Mapping[str, Any], found: Found) -> Layout:
    """The layout that the state tells; the manifest must list exactly its files."""
    try:
        layout = Layout.from_json(state.get("layout", {"files": 1}))
    except (ValueError, AttributeError, TypeError) as error:
        raise CheckpointError(f"{store.join(found.uri, STATE)}: {error}") from None
    if set(manifest) != {STATE, *(layout.file_name(index) for index in range(layout.files))}:
        raise CheckpointError(f"the manifest of {found.uri} does not list {STATE} and {layout.files} files of tensors")
    return layout


def _not_there(uri: str, error: store.StoreError) -> str:
    return f"{uri} is missing" if isinstance(error, store.NotFound) else str(error)


def _parse(data: bytes, uri: str) -> dict[str, Any]:
    try:
        value = json.loads(data)
    except (ValueError, RecursionError):
        raise CheckpointError(f"{uri} is not JSON") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{uri} is not a JSON object")
    return value


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
