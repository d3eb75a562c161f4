"""Which decoder a run uses. The driver chooses it once; every node and every later attempt must have the same.

An engine is known by its pixels: it decodes a few small files that ship with the package, and the digest of what comes
out stands in the run and in its checkpoints. So another version of a library is no fault while nothing changes, and
none goes unnoticed if something does (also if a processor takes another path through the same library).
"""

from __future__ import annotations

import hashlib
import socket
from dataclasses import dataclass
from functools import lru_cache
from importlib.metadata import version
from pathlib import Path
from typing import Literal, cast

import numpy as np

from pipelines.progress import say
from pipelines.reader import native, nvjpeg
from pipelines.reader.augment import AugmentConfig
from pipelines.reader.decode import EngineName, decode_for_training

__all__ = ["Engine", "EngineError", "Wanted", "check_nodes", "choose", "engine_here", "require"]

PROBE = Path(__file__).parent / "probe"
Wanted = Literal["auto", "wheels", "native", "nvjpeg"]
INSTALL = (
    "install a C compiler (Debian: gcc) and then this package again, with the same versions as where the run started"
)


class EngineError(RuntimeError):
    """The decoder that a run needs is not here, or gives other pixels here."""


@dataclass(frozen=True, slots=True)
class Engine:
    """A decoder by name and by what it makes of the probe files."""

    name: EngineName
    pixels: str  # Digest.
    versions: str = ""  # For people.

    @property
    def key(self) -> str:
        """What must be equal on all nodes and after a resume."""
        return f"{self.name} {self.pixels}"

    def __str__(self) -> str:
        return f"{self.key} ({self.versions})"


@lru_cache
def engine_here(name: EngineName) -> Engine:
    """The engine as it is in this process. Raises EngineError where it was not built."""
    if name == "native" and native.why_not():
        raise EngineError(
            f"decode engine native was not built on {socket.gethostname()} ({native.why_not()}); {INSTALL}, "
            "or set reader.engine=wheels"
        )
    if name == "nvjpeg" and nvjpeg.why_not():
        raise EngineError(
            f"nvJPEG cannot decode on {socket.gethostname()} ({nvjpeg.why_not()}); install torchvision with CUDA for "
            "this torch, start where a GPU is seen, or leave reader.nvjpeg off"
        )
    used = ["simplejpeg", "pillow", "torch", *["torchvision"] * (name == "nvjpeg")]
    packages = " ".join(f"{package}-{version(package)}" for package in used)
    own = f"native-{native.VERSION} " if name == "native" else ""
    return Engine(name, _probe(name), own + packages)


def _probe(name: EngineName) -> str:
    from vit_model.preprocess import InputSpec

    images = [memoryview(path.read_bytes()) for path in sorted(PROBE.iterdir()) if path.suffix in (".jpg", ".png")]
    places = np.arange(len(images))
    digest = hashlib.sha256()
    for spec in (InputSpec(height=20, width=24), InputSpec(height=96, width=112)):  # At 1/4 and 1/2, and enlarged.
        out = np.zeros((len(images), spec.channels, spec.height, spec.width), np.uint8)
        for epoch in range(4):
            augment = AugmentConfig(crop="inception" if epoch else "none")
            faults = decode_for_training(
                images, places, places, spec=spec, augment=augment, seed=0, epoch=epoch, out=out, engine=name
            )
            if faults:
                raise EngineError(f"decode engine {name} fails on its own probe files: {faults}; reinstall the package")
            digest.update(out.tobytes())
    return digest.hexdigest()[:16]


def choose(wanted: Wanted, recorded: str | None = None) -> Engine:
    """The engine of a run. `recorded` is the key that its checkpoint names: a resumed run keeps its engine."""
    if recorded is not None:
        return _recorded(wanted, recorded)
    if wanted in ("wheels", "nvjpeg"):
        return engine_here(wanted)
    if wanted == "auto" and native.why_not():
        _tell_once(
            f"reader: the native decoder was not built ({native.why_not()}); the wheels decode the same pixels "
            "at less than half the speed"
        )
        return engine_here("wheels")
    if wanted == "auto" and not native.has_simd():  # The wheels have vector code for more processors.
        return engine_here("wheels")
    engine, wheels = engine_here("native"), engine_here("wheels")
    if engine.pixels == wheels.pixels:
        return engine
    problem = f"decode engine native gives other pixels than the wheels here: {engine}, {wheels}"
    if wanted == "native":
        raise EngineError(f"{problem}; set reader.engine=wheels")
    _tell_once(f"reader: {problem}; the wheels decode")
    return wheels


def _recorded(wanted: Wanted, recorded: str) -> Engine:
    name = recorded.split(" ")[0]
    if name not in {"auto": ("wheels", "native")}.get(wanted, (wanted,)):
        raise EngineError(
            f"the checkpoint was made with decode engine {name}, the recipe asks for {wanted}; "
            "leave reader.engine at auto to go on, or start anew with --again"
        )
    engine = engine_here(cast(EngineName, name))
    if engine.key != recorded:
        raise EngineError(
            f"the checkpoint was made with decode engine {recorded}, here it is {engine}: other pixels; install the "
            "versions that the earlier attempt logged, or start anew with --again"
        )
    return engine


@lru_cache
def _tell_once(text: str) -> None:
    say(text)


@lru_cache
def require(name: EngineName, pixels: str) -> None:
    """Raises EngineError if this process would give other pixels than the one that sent the work."""
    here = engine_here(name)
    if here.pixels != pixels:
        raise EngineError(
            f"decode engine {here} on {socket.gethostname()} gives other pixels than where the run started ({pixels}); "
            f"{INSTALL}"
        )


def check_nodes(engine: Engine) -> None:
    """Before a run: every node of the Ray cluster must have the engine. Costs nothing on one node.

    A node that joins later is checked by its first read task. nvJPEG decodes in the processes that train, and each of
    them checks for itself.
    """
    if engine.name == "nvjpeg":
        return
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    nodes = [node for node in ray.nodes() if node["Alive"] and node["Resources"].get("CPU")]
    if len(nodes) < 2:
        return
    check = ray.remote(num_cpus=0)(_problem)
    asked = [
        check.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)).remote(
            engine.name, engine.pixels
        )
        for node in nodes
    ]
    if problems := [problem for problem in ray.get(asked) if problem]:
        text = "; ".join(sorted(set(problems)))
        raise EngineError(f"{len(problems)} of {len(nodes)} nodes cannot decode for this run: {text}")


def _problem(name: EngineName, pixels: str) -> str:
    """As text: Ray would wrap an error in its own trace."""
    try:
        require(name, pixels)
    except EngineError as error:
        return str(error)
    return ""
