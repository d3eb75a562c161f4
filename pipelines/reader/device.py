"""Batches on the device that trains, changed there: copied ahead of time beside the computation, then augmented.

On a GPU a thread copies each batch out of page-locked memory on a CUDA stream of its own and runs the augmentation
there, so that neither is waited for. On a CPU nothing is copied.
"""

from __future__ import annotations

import queue
import threading
import weakref
from collections import deque
from dataclasses import replace
from types import TracebackType
from typing import TYPE_CHECKING, Any

from pipelines.batch import Batch
from pipelines.reader.labels import multi_hot
from pipelines.reader.levels import Changes
from pipelines.reader.mixup import draw_mix, mix_images, mix_labels
from pipelines.reader.policies import change_images
from pipelines.reader.stream import BatchStream, ReaderStats

if TYPE_CHECKING:
    import torch

__all__ = ["DeviceBatches", "changed"]

AHEAD = 2  # Batches on the device before they are asked for.


def changed(batch: Batch, changes: Changes, seed: int, num_classes: int, host: Batch | None = None) -> Batch:
    """The batch as the model sees it, before normalisation. `host`: the same batch where numpy can read it.

    Lists of labels become multi-hot, and are mixed as single labels are.
    Raises ValueError for a batch without its lanes and epochs, which key the random numbers.
    """
    if batch.labels.ndim == 2 and not batch.labels.is_floating_point():
        batch = replace(batch, labels=multi_hot(batch.labels, num_classes))
    if changes.is_nothing:
        return batch
    host = host or batch
    if host.epochs is None or host.lanes is None or host.step is None:
        raise ValueError("this batch tells no step, lanes or epochs: augmentation is for training batches")
    images = change_images(batch.images, changes, seed, host.epochs.numpy(), host.sample_ids.numpy())
    if not changes.mixes:
        return replace(batch, images=images)
    height, width = images.shape[2:]
    mix = draw_mix(
        changes.mixup,
        changes.cutmix,
        seed,
        host.step,
        host.lanes.numpy(),
        host.weights.numpy(),
        (height, width),
    )
    return replace(batch, images=mix_images(images, mix), labels=mix_labels(batch.labels, mix, num_classes))


class DeviceBatches:
    """Iterator of a stream's batches on `device`, with `changes` applied. Close it, or use it in a `with`.

    Mixing needs `num_classes`, and so does a corpus with several labels an image.
    """

    def __init__(
        self,
        stream: BatchStream,
        device: torch.device,
        *,
        changes: Changes | None = None,
        seed: int = 0,
        num_classes: int = 0,
    ) -> None:
        self._stream = stream
        self._work = changes or Changes(), seed, num_classes
        self._copies: _Copies | None = None
        if device.type == "cuda":
            self._copies = _Copies(stream, device, self._work)
            weakref.finalize(self, self._copies.stop).atexit = False

    def __iter__(self) -> DeviceBatches:
        return self

    def __next__(self) -> Batch:
        if self._copies is not None:
            return self._copies.next()
        return changed(next(self._stream), *self._work)

    def __enter__(self) -> DeviceBatches:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Stop copying and reading."""
        if self._copies is not None:
            self._copies.stop()
        self._stream.close()

    def stats(self) -> ReaderStats:
        return self._stream.stats()


class _Copies:
    """The thread that copies and changes on a CUDA stream of its own."""

    def __init__(self, stream: BatchStream, device: torch.device, work: tuple[Changes, int, int]) -> None:
        import torch

        self._stream, self._device, self._work = stream, device, work
        self._side = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._ready: queue.Queue[tuple[Batch, Any] | BaseException | None] = queue.Queue(AHEAD)
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="device-copy", daemon=True)
        self._is_started = False

    def next(self) -> Batch:
        import torch

        if not self._is_started:
            self._is_started = True
            self._thread.start()
        found = self._ready.get()
        if found is None or isinstance(found, BaseException):
            self._stopping.set()
            self._ready.put(found)  # For whoever asks again.
            raise StopIteration if found is None else found
        batch, done = found
        now = torch.cuda.current_stream(self._device)
        now.wait_event(done)
        for tensor in (batch.images, batch.labels, batch.weights):
            tensor.record_stream(now)  # type: ignore[no-untyped-call]  # The allocator must not give it away before.
        return batch

    def stop(self) -> None:
        self._stopping.set()
        while True:  # The thread may wait for room.
            try:
                self._ready.get_nowait()
            except queue.Empty:
                break
        if self._is_started and threading.current_thread() is not self._thread:
            self._thread.join(10)

    def _run(self) -> None:
        import torch

        torch.cuda.set_device(self._device)
        held: deque[tuple[Batch, Any]] = deque()  # Page-locked memory must stay until it is copied.
        try:
            for host in self._stream:
                with torch.cuda.stream(self._side):
                    batch = replace(
                        host,
                        images=host.images.to(self._device, non_blocking=True),
                        labels=host.labels.to(self._device, non_blocking=True),
                        weights=host.weights.to(self._device, non_blocking=True),
                    )
                    batch = changed(batch, *self._work, host=host)
                    done = torch.cuda.Event()  # type: ignore[no-untyped-call]
                    done.record(self._side)
                held.append((host, done))
                while held and held[0][1].query():
                    held.popleft()
                self._put((batch, done))
                if self._stopping.is_set():
                    return
            self._put(None)
        except BaseException as error:
            self._put(error)
        finally:
            self._side.synchronize()

    def _put(self, found: tuple[Batch, Any] | BaseException | None) -> None:
        while not self._stopping.is_set():
            try:
                return self._ready.put(found, timeout=0.1)
            except queue.Full:
                continue
