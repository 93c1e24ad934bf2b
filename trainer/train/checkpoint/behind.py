"""Saving behind the training: it goes on while a copy of its state is written, checked and published.

One save at a time, in a thread of each rank; the threads agree over a channel of their own, by the same protocol as a
save that the training waits for, so nothing is weaker. The next save waits for the one before. What went wrong is told
at the next step boundary; the checkpoint before is intact.
"""

import threading
from collections.abc import Callable
from copy import deepcopy
from dataclasses import replace

from trainer.distributed.strategy import Strategy
from trainer.train.checkpoint.fence import Fence
from trainer.train.checkpoint.publish import Channel, SaveFailed, publish, save
from trainer.train.checkpoint.snapshot import HostCopies, Snapshot
from trainer.train.state import TrainState


class Saver:
    """Publishes the state of training. All ranks call every method alike.

    Args:
        strategy: prepared.
        fence: this process's right to publish.
        channel: for the threads alone; None: the training waits for every save.
        identity, base: of the run, as in the manifest.
        before, after: on rank 0, before a checkpoint is published and after it was, with the state in it.
        warn: told about a save that failed, where there will be another try.
    """

    def __init__(
        self,
        strategy: Strategy,
        fence: Fence,
        channel: Channel | None,
        *,
        identity: str,
        base: str,
        before: Callable[[], None],
        after: Callable[[TrainState], None],
        warn: Callable[[str], None],
    ) -> None:
        self._strategy, self._fence, self._channel = strategy, fence, channel
        self._identity, self._base = identity, base
        self._before, self._after, self._warn = before, after, warn
        self._copies = HostCopies()
        self._thread: threading.Thread | None = None
        self._fault: Exception | None = None

    def save(self, state: TrainState, *, required: bool) -> None:
        """Publish ``state``; one that is ``required`` is on disk on return, another may be so later.

        Raises:
            SaveFailed: a required one could not be written, or with no channel any.
            Fenced, TrainingFault: as in ``publish``; also of the save before.
        """
        self.finish()
        if self._channel is None:
            save(self._strategy, self._fence, state, identity=self._identity, base=self._base, before=self._before)
            self._clean_up(state)
            return
        # The loop changes its state in place: a save needs it as it is now.
        state = replace(deepcopy(state), scaler=self._strategy.scaler_state())
        self._thread = threading.Thread(
            target=self._work, args=(self._channel, self._copies.take(self._strategy), state), name="saving"
        )
        self._thread.daemon = True  # a process that has to end does not wait for a disk
        self._thread.start()
        if required:
            self._join()
            self._raise(any_failure=True)

    def check(self) -> None:
        """At a step boundary: tell of a save that has failed meanwhile. Waits for nothing.

        Raises:
            Fenced, TrainingFault: as in ``publish``.
        """
        if self._thread is not None and not self._thread.is_alive():
            self._join()
            self._raise(any_failure=False)

    def finish(self) -> None:
        """Wait for the save that is under way.

        Raises:
            Fenced, TrainingFault: as in ``publish``.
        """
        self._join()
        self._raise(any_failure=False)

    def leave(self) -> None:
        """Wait for the save that is under way, whatever came of it: the training has ended, one way or the other."""
        self._join()
        fault, self._fault = self._fault, None
        if fault is not None:
            self._warn(str(fault))

    def _work(self, channel: Channel, snapshot: Snapshot, state: TrainState) -> None:
        try:
            publish(
                channel,
                self._fence,
                snapshot,
                state,
                identity=self._identity,
                base=self._base,
                before=self._before,
            )
            self._clean_up(state)
        except Exception as fault:
            self._fault = fault

    def _clean_up(self, state: TrainState) -> None:
        """What rank 0 does after a checkpoint was published; the run does not end because an old one cannot go."""
        if not self._strategy.ranks.is_first:
            return
        try:
            self._after(state)
        except OSError as fault:
            self._fence.check()
            self._warn(f"old checkpoints could not be deleted: {fault}")

    def _join(self) -> None:
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def _raise(self, *, any_failure: bool) -> None:
        fault, self._fault = self._fault, None
        if fault is None:
            return
        if any_failure or not isinstance(fault, SaveFailed):
            raise fault
        self._warn(f"{fault}\n  training goes on and will try again")
