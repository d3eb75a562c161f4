"""What the loop costs around a step, and what a checkpoint costs the loop.

    loop_overhead     share of a step that is not forward, backward or optimizer, by the loop's own clock; the median
    wall_ratio        the loop's step over that of a bare loop of the same operations, run in turn
    checkpoint_stall  the loop's pause for a checkpoint over the default time between two (60 s)
    upload_slowdown   step time while a checkpoint is written and hashed, over step time without; in turn
Batches lie in memory, the store is a local folder, one process. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).parent.parent))

from pipelines import store
from pipelines.batch import Batch
from pipelines.training.async_saver import AsyncSaver
from pipelines.training.build import build_state
from pipelines.training.checkpoint import Checkpoints
from pipelines.training.config import AdamW, CheckpointConfig, TrainConfig
from pipelines.training.loop import Hooks, LoopConfig, train
from pipelines.training.objective import Objective
from pipelines.training.parallel import Ranks
from pipelines.training.schedules import ScheduleConfig
from pipelines.training.state import TrainState
from vit_model import InputSpec, ViTConfig, build_model, normalize

CLASSES, SIDE = 100, 64
BALLAST = 512 << 20  # Bytes.
SPEC = InputSpec(channels=3, height=SIDE, width=SIDE, mean=(0.5,) * 3, std=(0.5,) * 3)


class Place:
    """Of the checkpoints: a folder that nobody else wants."""

    def __init__(self, folder: Path) -> None:
        self.root, self.digest, self.number, self.first = str(folder), "d" * 64, 1, 1
        self.uri = store.join(self.root, "attempts", "1")

    def check(self) -> None:
        return None


class Clock:
    """Seconds inside forward, backward and optimizer, from the outside: the loop itself is not changed."""

    def __init__(self, state: TrainState) -> None:
        self.inside = 0.0
        state.model.forward = self.timed(state.model.forward)  # type: ignore[method-assign]
        for optimizer in state.optimizers:
            optimizer.step = self.timed(optimizer.step)  # type: ignore[method-assign]
        self._backward = torch.autograd.backward

    def timed(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*arguments: Any, **options: Any) -> Any:
            started = time.perf_counter()
            try:
                return call(*arguments, **options)
            finally:
                self.inside += time.perf_counter() - started

        return timed

    def __enter__(self) -> Clock:
        torch.autograd.backward = self.timed(self._backward)  # type: ignore[assignment]
        return self

    def __exit__(self, *_: object) -> None:
        torch.autograd.backward = self._backward  # type: ignore[assignment]


class TimedObjective(Objective):
    def __init__(self, config: TrainConfig, clock: Clock) -> None:
        super().__init__(config)
        self._timed_call = clock.timed(super().__call__)

    def __call__(self, *arguments: Any) -> Tensor:  # type: ignore[override]
        loss: Tensor = self._timed_call(*arguments)
        return loss


def new_state() -> TrainState:
    config = ViTConfig(resolution=SIDE, patch_size=8, width=192, depth=4, mlp_dim=768, num_heads=3)
    model = build_model(config, CLASSES, seed=0)
    return build_state(model, TrainConfig(batch_size=32, total_steps=10**6), AdamW(), Ranks())


def batches(size: int, start: int = 0) -> Iterator[Batch]:
    images = torch.randint(0, 256, (size, 3, SIDE, SIDE), dtype=torch.uint8)
    labels, ones, ids = torch.randint(0, CLASSES, (size,)), torch.ones(size), torch.arange(size)
    step = start
    while True:
        yield Batch(images, labels, ones, ids, step)
        step += 1


def run_loop(
    state: TrainState, size: int, steps: int, after: Callable[[TrainState], None], clock: Clock | None = None
) -> None:
    config = LoopConfig(
        train=TrainConfig(batch_size=size, total_steps=state.step + steps),
        schedule=ScheduleConfig(),
        peak_lr=1e-3,
        total_steps=state.step + steps,
    )
    prepare: Callable[[Tensor], Tensor] = lambda images: normalize(images, SPEC)  # noqa: E731
    objective = Objective(config.train)
    if clock is not None:  # Pixels and loss belong to the forward pass.
        prepare, objective = clock.timed(prepare), TimedObjective(config.train, clock)
    hooks = Hooks(after_step=after)
    train(state, batches(size, state.step), config, Ranks(), prepare, hooks, objective=objective)


def overhead(size: int, steps: int) -> list[float]:
    """Of each step the share outside forward, backward and optimizer."""
    state, shares = new_state(), []
    with Clock(state) as clock:
        last = [time.perf_counter(), 0.0]

        def after(_: TrainState) -> None:
            now = time.perf_counter()
            shares.append(1.0 - (clock.inside - last[1]) / (now - last[0]))
            last[:] = [now, clock.inside]

        run_loop(state, size, steps, after, clock)
    return shares[1:]  # The first contains the start.


def bare(state: TrainState, size: int, steps: int) -> list[float]:
    """Seconds of each step of a loop that does nothing else: no schedule, no figures, no order."""
    source, seconds = batches(size), []
    parameters = [parameter for parameter in state.model.parameters()]
    for _ in range(steps):
        started = time.perf_counter()
        batch = next(source)
        pixels: Tensor = normalize(batch.images, SPEC)
        loss = F.cross_entropy(state.model(pixels, tokens=False).logits, batch.labels)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        for optimizer in state.optimizers:
            optimizer.step()
        for parameter in parameters:
            assert parameter.grad is not None
            parameter.grad.zero_()
        seconds.append(time.perf_counter() - started)
    return seconds


def looped(state: TrainState, size: int, steps: int) -> list[float]:
    seconds: list[float] = []
    last = [time.perf_counter()]

    def after(_: TrainState) -> None:
        now = time.perf_counter()
        seconds.append(now - last[0])
        last[0] = now

    run_loop(state, size, steps, after)
    return seconds[1:]


def checkpoints(size: int, rounds: int, folder: Path) -> tuple[list[float], list[float]]:
    """Pauses in seconds, and of each round the step time during the upload over that without."""
    state = new_state()
    run_loop(state, size, 1, lambda _: None)  # The optimizer has its state now.
    saver = AsyncSaver(Checkpoints(Place(folder)))
    ballast = {
        "ballast": torch.zeros(BALLAST // 4)
    }  # So that an upload lasts some steps, as that of a real model does.
    pauses, ratios = [], []
    for _ in range(rounds):
        quiet = statistics.median(looped(state, size, 4))
        during: list[float] = []
        last = [0.0]

        def after(state: TrainState, during: list[float] = during, last: list[float] = last) -> None:
            now = time.perf_counter()
            if last[0] and saver.busy:  # Whole steps under an upload alone.
                during.append(now - last[0])
            if not last[0] or not saver.busy:
                started = time.perf_counter()
                tensors = state.tensors()
                pauses.append(time.perf_counter() - started)
                saver.save(state.step, tensors | ballast, {})
            last[0] = time.perf_counter()

        run_loop(state, size, 5, after)
        saver.wait()
        if during:
            ratios.append(statistics.median(during) / quiet)
    return pauses, ratios


def long_enough(seconds: float = 0.115) -> int:
    """Images of a step that takes 100 ms here, and a little more: in eights."""
    step = statistics.median(bare(new_state(), 16, 6)[2:])
    return max(16, 8 * math.ceil(16 * seconds / step / 8))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="ends within 60 s")
    parser.add_argument("--batch", type=int, default=None, help="images a step; default: as many as take 100 ms")
    parser.add_argument("--steps", type=int, default=None, help="of the loop's own clock; default 200")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    args.steps = args.steps or (30 if args.quick else 200)
    rounds = 3 if args.quick else 9
    args.batch = args.batch or long_enough()
    shares = overhead(args.batch, args.steps)
    first, second = new_state(), new_state()
    pairs: list[tuple[float, float]] = []
    for number in range(rounds):  # In turn, and nobody is always first.
        sides = [lambda: looped(first, args.batch, 5), lambda: bare(second, args.batch, 4)]
        done = {index: statistics.median(sides[index]()) for index in ((0, 1) if number % 2 else (1, 0))}
        pairs.append((done[0], done[1]))
    with tempfile.TemporaryDirectory() as folder:
        pauses, ratios = checkpoints(args.batch, rounds, Path(folder))
    summary = {
        "loop_overhead": round(statistics.median(shares), 4),
        "wall_ratio": round(statistics.median(ours / theirs for ours, theirs in pairs), 3),
        "checkpoint_stall": round(statistics.median(pauses) / CheckpointConfig().every_seconds, 5),
        "upload_slowdown": round(statistics.median(ratios), 3) if ratios else None,
    }
    step = statistics.median(ours for ours, _ in pairs)
    print(f"torch {torch.__version__}, {args.threads} thread(s), batch {args.batch}, step {step * 1e3:.0f} ms")
    print(f"{len(shares)} steps by the loop's clock, {rounds} rounds in turn, {len(pauses)} checkpoints")
    if step < 0.1:
        print("the step takes less than 100 ms: give a larger --batch")
    results = Path("bench-results")
    results.mkdir(exist_ok=True)
    content = {"settings": vars(args), "step_seconds": step, "pauses": pauses, "ratios": ratios, **summary}
    (results / "training_loop.json").write_text(json.dumps(content, indent=2))
    print(json.dumps(summary))


if __name__ == "__main__":
    main()
