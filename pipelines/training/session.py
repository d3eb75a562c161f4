"""One rank from start to end: resume, train, validate, checkpoint, export. What it needs is handed in."""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
import socket
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from pipelines import identity, store
from pipelines.training.checkpoint import Loaded
from pipelines.training.config import BestConfig, CheckpointConfig
from pipelines.training.faults import MOST_STARTS, Faults, say_noticed
from pipelines.training.forward import Prepare
from pipelines.training.handover import choices, hand_over, write_outcome
from pipelines.training.heldout import Batches, HeldOut
from pipelines.training.loop import Hooks, LoopConfig, NotFinite, train
from pipelines.training.names import TrainingError
from pipelines.training.nodes import NodeLoad
from pipelines.training.objective import Objective
from pipelines.training.parallel import Ranks
from pipelines.training.pieces import OutOfMemory, Pieces
from pipelines.training.reporter import OpenLog, Reporter
from pipelines.training.run_order import RunOrder
from pipelines.training.saves import Saves
from pipelines.training.selection import Selection
from pipelines.training.state import TrainState
from pipelines.training.step import gradients_of
from pipelines.training.tally import Tally
from pipelines.training.watchdog import Watchdog

__all__ = ["Session", "SessionConfig"]

log = logging.getLogger(__name__)

MOST_LEFT_OUT = 5  # Steps that were not finite; more are no accident.
NODE_DIGITS = 15  # Of a node's id: what fits an int64.


@dataclass(frozen=True, kw_only=True)
class SessionConfig:
    attempt: identity.Attempt
    loop: LoopConfig
    # What decides which images form a step; on resume "lanes" and "window_pages" are taken from the checkpoint.
    order: dict[str, Any]
    engine: str  # What decodes, by its pixels: the same from the first step to the last.
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    num_classes: int
    best: BestConfig | None = None
    hang_seconds: float | None = None  # Without progress for so long a worker ends itself.
    node_load_seconds: float | None = None  # Between two points of the load of the nodes; None: none are made.
    dollars_per_hour: float | None = None  # Of one worker.


class Session:
    """`run` on every rank at the same time. Only rank 0 writes, and whoever holds a part of the checkpoints."""

    def __init__(
        self,
        config: SessionConfig,
        state: TrainState,
        ranks: Ranks,
        *,
        prepare: Prepare,
        training: Callable[[int, Mapping[str, Any]], Batches],
        validation: Callable[[], Batches] | None,
        test: Callable[[], Batches] | None,
        open_log: OpenLog,
        export: Callable[[Path, Mapping[str, Tensor]], None],
        objective: Objective | None = None,
        bad_samples: Callable[[], Mapping[str, int]] | None = None,
        is_noticed: Callable[[], bool] = lambda: False,
        node: str = "",
        reads_node: bool = True,
    ) -> None:
        """`training(start_step, order)`, `validation()`, `test()` open this rank's batches.

        `export(path, tensors)` writes whole weights as a file; only rank 0 calls it.
        `bad_samples`: this rank's count so far of each reason, the same reasons in the same order on every rank.
        `is_noticed`: this process was told that it will be ended; `node`: where it runs, hex digits; `reads_node`:
        of the processes of this node it is the one that tells of the node's load.
        """
        self.config, self.state, self.ranks = config, state, ranks
        self._prepare, self._training, self._export = prepare, training, export
        self._objective = objective
        self._is_noticed, self._node = is_noticed, node[:NODE_DIGITS]
        self._gradients = gradients_of(state, ranks)
        self._reporter = Reporter(config.attempt.uri, open_log) if ranks.rank == 0 else None
        self._saves = Saves(
            config.attempt, config.checkpoint, state, self._gradients, ranks, self._reporter, self._about
        )
        self._faults = Faults(config.attempt.uri, ranks.rank)
        self._watchdog = Watchdog(config.hang_seconds, self._hangs)
        self._selection = Selection(config.best)
        self._held_out = HeldOut(
            validation,
            test,
            state=state,
            config=config.loop.train,
            prepare=prepare,
            ranks=ranks,
            num_classes=config.num_classes,
            is_cut=self._saves.is_cut,
            selection=self._selection,
            watchdog=self._watchdog,
            reporter=self._reporter,
        )
        self._tally = Tally(
            ranks,
            config.loop.train.batch_size,
            self._reporter,
            bad_samples=bad_samples,
            nodes=NodeLoad(ranks, node, reads_node, config.node_load_seconds),
            dollars_per_hour=config.dollars_per_hour,
        )
        self._pieces = Pieces(config.loop.train.per_device_batch_size)
        self._left_out: set[int] = set()
        self._order = RunOrder(config.order, config.engine)
        self._ended = False  # As asked, and not by a loss.

    def run(self) -> None:
        """Until the last step, or until a stop is asked for; leaves outcome.json. Resumes by itself.

        Raises TrainingError, on whichever rank it came up, with the outcome written; for the rest try again.
        """
        try:
            with self._watchdog:
                self._resume()
                finished = self._train()
                self._finish(finished)
        except (TrainingError, identity.CannotResume) as error:
            # From any rank: the others may wait for this one in a collective, and can say nothing.
            with contextlib.suppress(store.StoreError):  # The error itself is raised, and ends the group.
                self._write_outcome(error=str(error), begin_anew=isinstance(error, identity.CannotResume))
            self._saves.settle()
            raise
        except Exception as error:
            details = {"kind": OutOfMemory.__name__, "images": error.images} if isinstance(error, OutOfMemory) else {}
            self._faults.write(self.state.step, error, **details)
            self._saves.settle()  # The upload under way saves the next start some steps.
            raise
        finally:
            self._tally.close()
            if self._reporter is not None:
                self._reporter.close()

    # Start ----------------------------------------------------------------------------------------------------------

    def _resume(self) -> None:
        """The step that all ranks load from the same checkpoint is the one truth about the step."""
        self._saves.token = str(self.ranks.from_rank_zero([secrets.randbits(62)])[0])
        loaded = self._saves.load_together()
        step, attempt = (loaded.found.step, loaded.found.attempt) if loaded else (0, 0)
        if loaded:
            self._order.take_over(loaded.found.uri, loaded.state)
            self._restore(loaded)
            if self._reporter is not None:
                for values, at in loaded.state.get("curves", ()):
                    self._reporter.log(values, at)
            self._note(f"resumed from the checkpoint at step {step:,} (attempt {attempt})")
        starts = self._count_start(step)
        if starts >= MOST_STARTS:
            raise TrainingError(
                f"training started {starts} times from step {step:,} and got no further; {self._faults.say_last()}"
                "; mend that and run the same command again"
            )
        ended = loaded is not None and loaded.state.get("ended", False)
        if starts > 1 or (attempt == self.config.attempt.number and self.ranks.rank == 0 and not ended):
            self._note(f"the workers were started again: {self._faults.say_last()}")

    def _count_start(self, step: int) -> int:
        """How often in a row from this step. After pieces that did not fit it takes smaller ones, and counts anew."""
        starts, too_many = 0, 0
        if self.ranks.rank == 0:
            too_many = (self._faults.images_that_did_not_fit() if self._pieces.auto else None) or 0
            smaller = too_many > 1 and (self._pieces.size is None or self._pieces.size >= too_many)
            starts = self._faults.record_start(step, smaller)
            too_many = too_many if smaller else 0
        starts, too_many = self.ranks.from_rank_zero([starts, too_many])
        if too_many:
            self._pieces = Pieces("auto", too_many // 2)
            self._note(f"{too_many} images at once did not fit; going on with {too_many // 2}")
        return starts

    def _restore(self, loaded: Loaded) -> None:
        self.state.load(loaded.tensors, loaded.found.step)
        self._selection.load(loaded.state.get("best", {}))
        self._left_out |= set(loaded.state.get("left_out", ()))
        self._tally.load(loaded.state)
        if self._pieces.auto and (size := loaded.state.get("per_device_batch_size")):
            self._pieces = Pieces("auto", int(size))

    def _hangs(self, text: str) -> None:
        assert self.config.hang_seconds is not None
        self._faults.write_stacks(self.state.step, self.config.hang_seconds, text)

    def _note(self, text: str) -> None:
        if self._reporter is not None:
            self._reporter.note(text)

    # Between ----------------------------------------------------------------------------------------------------------

    def _train(self) -> bool:
        """False if it was stopped before its end."""
        loop = self.config.loop
        if self.state.step >= loop.total_steps:
            self._validate(self.state.step)
            return True
        if loop.train.non_finite == "rollback" and self.state.step == 0:
            self._saves.save()  # Else there is nothing to go back to before the first checkpoint.
        nodes = self.ranks.of_all(int(self._node or "0", 16))
        if self._reporter is not None:
            where = {"pid": os.getpid(), "host": socket.gethostname(), "workers": self.ranks.world_size}
            if self._node:
                where["nodes"] = sorted({f"{node:0{NODE_DIGITS}x}" for node in nodes})
            self._reporter.progress(step=self.state.step, metrics={}, **where)
        self._tally.join()
        while not self._selection.exhausted:
            try:
                return self._train_on()
            except NotFinite as error:
                if loop.train.non_finite != "rollback":
                    raise
                self._go_back(error)
        return True

    def _train_on(self) -> bool:
        hooks = Hooks(
            window=self._window,
            validate=self._validate,
            after_step=self._after_step,
            save=lambda _: self._saves.save(),
            wants_stop=self._wants_stop,
            wants_save=self._saves.wanted,
        )
        self._tally.begin(self.state.step)
        with self._training(self.state.step, self._order.fields) as batches:
            return train(
                self.state,
                batches,
                self.config.loop,
                self.ranks,
                self._prepare,
                hooks,
                objective=self._objective,
                pieces=self._pieces,
                left_out=self._left_out,
            )

    def _go_back(self, error: NotFinite) -> None:
        """To the newest checkpoint before the step that was not finite, which is left out this time."""
        if len(self._left_out) >= MOST_LEFT_OUT:
            raise TrainingError(f"{error}; {len(self._left_out)} steps were left out before it") from error
        self._saves.settle()
        loaded = self._saves.load_together(latest=error.step)
        if loaded is None:
            raise TrainingError(f"{error}; there is no checkpoint to go back to") from error
        self._restore(loaded)
        self._left_out.add(error.step)
        self._note(f"step {error.step:,} was not finite: back to step {loaded.found.step:,}, and it is left out")

    def _window(self, step: int, metrics: dict[str, float]) -> None:
        self._tally.window(step, metrics, last=step >= self.config.loop.total_steps)

    def _validate(self, step: int) -> bool:
        return self._held_out.validate(step, last=step >= self.config.loop.total_steps)

    def _wants_stop(self) -> bool:
        """Any rank may know of one reason alone: a notice reaches one process, a request rank 0."""
        asked = self._reporter is not None and self._reporter.stop_wanted
        return asked or self._saves.fatal is not None or self._is_noticed()

    def _after_step(self, state: TrainState) -> None:
        self._watchdog.beat()
        if state.step < self.config.loop.total_steps:  # After the last one `_finish` saves.
            self._saves.after_step(state)

    def _about(self) -> dict[str, Any]:
        """What the next start must know besides tensors and step."""
        return {
            **self._order.to_json(),
            **self._tally.to_json(),
            "world_size": self.ranks.world_size,
            "curves": self._reporter.unsent() if self._reporter is not None else [],
            "images_seen": self.state.step * self.config.loop.train.batch_size,
            "per_device_batch_size": self._pieces.size,
            "best": self._selection.to_json(),
            "left_out": sorted(self._left_out),
            "code": identity.code_fingerprint(),
            "ended": self._ended,
        }

    # End ------------------------------------------------------------------------------------------------------------

    def _finish(self, finished: bool) -> None:
        # Collective, so before anything that only one rank may see.
        noticed = [rank for rank, told in enumerate(self.ranks.of_all(int(self._is_noticed()))) if told]
        if self._saves.fatal is not None:
            self._write_outcome(error=str(self._saves.fatal))
            return
        export = self.config.loop.train.export
        if finished:
            chosen = choices(self.state, export)
            as_trained = export == "last" and not self.state.averages_itself
            handed_on = {} if as_trained else chosen[export]
            if export != "last" or self.state.step < self.config.loop.total_steps:
                self._held_out.conclude("val", handed_on)
            self._held_out.conclude("test", handed_on)
        self._ended = not finished
        self._saves.save()
        self._saves.wait()
        if self._saves.fatal is not None:
            raise TrainingError(str(self._saves.fatal))  # The other ranks may be in a collective.
        if not finished:
            if self._reporter is not None:
                self._write_outcome(stopped=True, again=self._reporter.make_way or say_noticed(noticed))
            return
        whole = {kind: self._gradients.gather(weights) for kind, weights in chosen.items()}  # Collective.
        if self.ranks.rank == 0:
            fields = hand_over(
                self.config.attempt, whole, export, self._export, self._held_out.measured, self._watchdog.beat
            )
            fields["measured_images"] = self._held_out.images
            if self._selection.step is not None:
                fields["best"] = self._selection.to_json()
            self._write_outcome(**fields, left_out=sorted(self._left_out))

    def _write_outcome(self, **fields: Any) -> None:
        seconds, metrics = self._tally.seconds, self._tally.metrics(self._held_out.latest)
        write_outcome(self.config.attempt, step=self.state.step, metrics=metrics, train_seconds=seconds, **fields)
