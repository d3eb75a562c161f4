"""Image pipelines that all end in uint8 batches of 256 at 224 px on 2 cores: ours and its peers.

    python benchmarks/inputs/contestants.py NAME JSON

runs one of them as a process of its own: it prints READY, then takes `go COUNT` lines and answers each with one line of
JSON. So several can be measured in interleaved rounds, each with its workers warm.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

for _name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
    os.environ.setdefault(_name, "1")

import psutil  # noqa: E402

BATCH, SIDE, CORES = 256, 224, 2
Round = Callable[[int], Iterator[Any]]  # number of batches -> uint8 (256, 3, 224, 224) each


# Ours ---------------------------------------------------------------------------------------------------------------


def ours(corpus: str, backend: str, engine: str, decode: str = "auto") -> Round:
    """`train_batches`, a new stream for each round: its start counts."""
    from pipelines.corpus.manifest import open_corpus
    from pipelines.reader.loader import AugmentConfig, ReaderConfig, train_batches
    from vit_model.preprocess import InputSpec

    if backend == "ray":
        start_ray()
    opened = open_corpus(corpus)
    config = ReaderConfig(backend=backend, engine=engine, decode=decode, num_threads=CORES)
    spec = InputSpec(height=SIDE, width=SIDE)
    done = 0

    def batches(count: int) -> Iterator[Any]:
        nonlocal done
        start, done = done, done + count
        with train_batches(
            opened,
            batch_size=BATCH,
            seed=0,
            spec=spec,
            augment=AugmentConfig(),
            reader=config,
            start_step=start,
            total_steps=start + count,
        ) as stream:
            for batch in stream:
                yield batch.images

    return batches


def raw_threads(tars: list[str], engine: str) -> Round:
    """No framework: each thread decodes whole batches out of memory-mapped tars, with the decoder that ours uses."""
    import mmap

    import numpy as np
    import torch

    from pipelines.reader.augment import AugmentConfig
    from pipelines.reader.decode import decode_for_training
    from pipelines.reader.tar import walk
    from vit_model.preprocess import InputSpec

    spec, augment = InputSpec(height=SIDE, width=SIDE), AugmentConfig()
    files: list[memoryview] = []
    for tar in tars:
        with open(tar, "rb") as file:  # noqa: PTH123
            data = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
        samples, _ = walk(data)
        files += [data[at : at + size] for sample in samples for at, size in [sample.members["jpg"]]]
    pool = ThreadPoolExecutor(CORES)
    rng = np.random.default_rng(0)

    def decode(ids: np.ndarray) -> torch.Tensor:
        out = np.empty((BATCH, 3, SIDE, SIDE), np.uint8)
        chosen = [files[i] for i in ids]
        faults = decode_for_training(
            chosen, np.arange(BATCH), ids, spec=spec, augment=augment, seed=0, epoch=0, out=out, engine=engine
        )
        assert not faults
        return torch.from_numpy(out)

    def batches(count: int) -> Iterator[Any]:
        waiting: deque[Any] = deque()
        for _ in range(count):
            waiting.append(pool.submit(decode, rng.integers(0, len(files), BATCH)))
            if len(waiting) > CORES:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()

    return batches


# Peers --------------------------------------------------------------------------------------------------------------


def timm_transform() -> Any:
    """What timm trains with by default, without the photometric part: crop, bicubic resize, flip, uint8."""
    import_timm()
    from timm.data import create_transform

    return create_transform(SIDE, is_training=True, use_prefetcher=True, color_jitter=None, interpolation="bicubic")


def import_timm() -> Any:
    """timm; a CUDA torchvision on a CPU torch needs its operators left out, which PIL's path never calls."""
    import importlib
    import types

    try:
        importlib.import_module("torchvision")
    except RuntimeError as error:
        if "torchvision::nms" not in str(error):
            raise
        sys.modules["torchvision._meta_registrations"] = types.ModuleType("torchvision._meta_registrations")
        importlib.import_module("torchvision")
    return importlib.import_module("timm")


def timm_loader(folder: str) -> Round:
    """timm's ImageDataset over class folders in torch's DataLoader."""
    import torch

    transform = timm_transform()
    from timm.data import ImageDataset
    from timm.data.loader import fast_collate

    loader = torch.utils.data.DataLoader(
        ImageDataset(folder, transform=transform),
        batch_size=BATCH,
        shuffle=True,
        num_workers=CORES,
        collate_fn=fast_collate,
        persistent_workers=True,
        drop_last=True,
    )
    return epochs(lambda: (images for images, _ in loader))


def webdataset(urls: list[str]) -> Round:
    """webdataset's own pipeline with its shuffle, and timm's transform."""
    import numpy as np
    import torch
    import webdataset as wds

    transform = timm_transform()

    def collate(samples: list[Any]) -> torch.Tensor:
        return torch.from_numpy(np.stack([image for image, _ in samples]))

    dataset = (
        wds.WebDataset(urls, shardshuffle=100, nodesplitter=wds.split_by_node, workersplitter=wds.split_by_worker)
        .shuffle(1000)
        .decode("pil")
        .to_tuple("jpg", "cls")
        .map_tuple(transform, int)
        .batched(BATCH, collation_fn=collate, partial=False)
    )
    loader = wds.WebLoader(dataset, batch_size=None, num_workers=CORES, persistent_workers=True)
    return epochs(lambda: iter(loader))


def ray_docs(paths: list[str]) -> Round:
    """As Ray's documentation has it: read_webdataset with its decoder, map, iter_torch_batches."""
    import ray.data

    start_ray()
    filesystem = None
    if paths[0].startswith("s3://"):
        import pyarrow.fs as fs

        filesystem = fs.S3FileSystem(endpoint_override=os.environ["AWS_ENDPOINT_URL"], region="us-east-1")
        paths = [path.removeprefix("s3://") for path in paths]
    dataset = ray.data.read_webdataset(paths, filesystem=filesystem).map(Augment())

    def epoch() -> Iterator[Any]:
        for batch in dataset.iter_torch_batches(batch_size=BATCH, drop_last=True):
            yield batch["image"]

    return epochs(epoch)


class Augment:
    """timm's transform on a row; made where it runs, because it cannot be sent."""

    transform: Any = None

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        from PIL import Image

        self.transform = self.transform or timm_transform()
        return {"image": self.transform(Image.fromarray(row["jpg"]))}


def start_ray() -> None:
    """A cluster of this process alone, so that its CPU time can be counted."""
    import logging

    import ray

    os.environ.pop("RAY_ADDRESS", None)
    os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"  # Ray then keeps to the loopback address that it is given.
    os.environ["RAY_DATA_DISABLE_PROGRESS_BARS"] = "1"
    ray.init(
        num_cpus=CORES,
        include_dashboard=False,
        logging_level="ERROR",
        log_to_driver=False,
        object_store_memory=1_000_000_000,  # As the embedded stack has it.
        _node_ip_address="127.0.0.1",
        _system_config={"idle_worker_killing_time_threshold_ms": 60_000},  # The same: workers stay warm.
    )
    logging.getLogger("ray.data").setLevel(logging.ERROR)


def epochs(epoch: Callable[[], Iterator[Any]]) -> Round:
    """Rounds of any length out of epochs, each begun anew."""

    def batches(count: int) -> Iterator[Any]:
        while count:
            for images in epoch():
                yield images
                count -= 1
                if not count:
                    break

    return batches


CONTESTANTS: dict[str, Callable[..., Round]] = {
    "ours": ours,
    "raw_threads": raw_threads,
    "timm_dataloader": timm_loader,
    "webdataset": webdataset,
    "ray_docs": ray_docs,
}


# Measuring ----------------------------------------------------------------------------------------------------------


def cpu_seconds() -> float:
    """Of this process and all it has started, the dead ones included."""
    total = 0.0
    me = psutil.Process()
    for process in (me, *me.children(recursive=True)):
        with contextlib.suppress(psutil.Error):
            times = process.cpu_times()
            total += times.user + times.system + times.children_user + times.children_system
    return total


class Memory(threading.Thread):
    """Peak PSS of the process tree, and what it costs to find out, which is no part of the pipeline."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.peak = 0
        self.cpu_seconds = 0.0

    def run(self) -> None:
        me = psutil.Process()
        while True:
            total = 0
            for process in (me, *me.children(recursive=True)):
                with contextlib.suppress(psutil.Error):
                    total += process.memory_full_info().pss
            self.peak = max(self.peak, total)
            self.cpu_seconds = time.thread_time()
            time.sleep(2.0)


def measure(batches: Iterator[Any], memory: Memory) -> dict[str, float]:
    cpu, started = cpu_seconds() - memory.cpu_seconds, time.perf_counter()
    first, count = started, 0
    for images in batches:
        assert tuple(images.shape) == (BATCH, 3, SIDE, SIDE), images.shape
        assert images.element_size() == 1
        if not count:
            first = time.perf_counter()
        count += 1
    ended = time.perf_counter()
    return {
        "images_per_second": count * BATCH / (ended - started),
        "steady_images_per_second": (count - 1) * BATCH / max(1e-9, ended - first),
        "first_batch_seconds": first - started,
        "cpu_us_per_image": (cpu_seconds() - memory.cpu_seconds - cpu) / (count * BATCH) * 1e6,
    }


def main() -> None:
    name, options = sys.argv[1], json.loads(sys.argv[2])
    run = CONTESTANTS[name](**options)
    memory = Memory()
    memory.start()
    print("READY", flush=True)
    for line in sys.stdin:
        result = measure(run(int(line.split()[1])), memory)
        print(json.dumps(result | {"pss_bytes": memory.peak}), flush=True)
    os._exit(0)  # Workers of the peers end with their pipes.


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent.parent.parent))
    main()
