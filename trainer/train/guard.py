"""What ends a training run, or puts it in doubt, other than reaching its last step.

A value that is not finite keeps all ranks from the optimizer step, so nothing poisoned is ever saved; what then happens
is a policy (``FaultPolicy``). A loss spike is measured against the run's own recent losses. Early stopping and the
choice of the best checkpoint follow one validation figure. A signal only raises a flag; the ranks vote on it at the
step boundary, in a collective that runs anyway.

The memory of these guards (``LossHistory``, ``Best``) is part of the training state and survives in the checkpoint, so
a resumed run stops where an uninterrupted one would have.
"""

import math
import signal
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from statistics import median
from types import FrameType
from typing import Literal

from trainer.errors import StoppedInGoodOrder, TrainingFault

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)

SPIKE_FLOOR = 0.1
"""Nats per token by which a spike exceeds the median at least: near zero, four times the median is still noise."""

LOWER_IS_BETTER = frozenset({"loss", "perplexity"})


class NonFinite(TrainingFault):
    """A loss or gradient that is not a finite number; the weights are those of the step before.

    ``only_gradient``: every loss was finite.
    """

    def __init__(self, what: str, *, only_gradient: bool, where: str, got: str, do: str) -> None:
        self.only_gradient = only_gradient
        super().__init__(what, where=where, got=got, do=do)


class StopFlag:
    """Whether this process was asked to stop, and by which signal. The handlers are set inside its context only."""

    def __init__(self) -> None:
        self.cause = ""
        self._at_once = ""
        self._before: dict[signal.Signals, object] = {}

    def is_up(self) -> bool:
        """Whether this process was asked to stop."""
        return bool(self.cause)

    def __enter__(self) -> "StopFlag":
        for number in STOP_SIGNALS:
            self._before[number] = signal.signal(number, self._on_signal)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]  # what signal.signal gave us
        self._before.clear()

    @contextmanager
    def at_once(self, stage: str) -> Iterator[None]:
        """Inside, a signal does not wait for a step boundary: there is no state that would be lost.

        Raises:
            StoppedInGoodOrder: when a signal arrives, or one had arrived before.
        """
        self._at_once = stage
        try:
            if self.cause:
                raise self._stopped()
            yield
        finally:
            self._at_once = ""

    def _on_signal(self, number: int, _frame: FrameType | None) -> None:
        self.cause = signal.Signals(number).name
        if self._at_once:
            raise self._stopped()

    def _stopped(self) -> StoppedInGoodOrder:
        return StoppedInGoodOrder(
            f"stopped on {self.cause} in the stage '{self._at_once}'",
            got="this stage starts again next time; everything before it is kept",
            do="run the same command again",
        )


def non_finite(
    step: int, losses: Sequence[Sequence[float]], grad_norm: float, describe: Callable[[int, int], str]
) -> NonFinite | None:
    """The fault of a step whose loss or gradient is not a finite number; None when all is well.

    Args:
        step: the step that is about to be taken, counted from 1.
        losses: summed loss per rank and micro-batch.
        grad_norm: global gradient norm.
        describe: the documents of a (rank, micro-batch) in words.
    """
    places = [(rank, micro) for rank, row in enumerate(losses) for micro in range(len(row))]
    bad = [(rank, micro) for rank, micro in places if not math.isfinite(losses[rank][micro])]
    if not bad and math.isfinite(grad_norm):
        return None
    if bad:
        rank, micro = bad[0]
        what = "the loss is not a finite number"
        got = f"{losses[rank][micro]} on rank {rank}, micro-batch {micro + 1} of {len(losses[rank])}"
        got += f" (the first of {len(bad)})" if len(bad) > 1 else ""
    else:
        what = "the gradient is not a finite number"
        got = f"gradient norm {grad_norm}, though every loss of the step is finite"
    documents = [text for place in bad[:1] or places if (text := describe(*place))]
    return NonFinite(
        what,
        only_gradient=not bad,
        where=f"step {step}",
        got=f"{got}; documents: {'; '.join(documents)}",
        do="look at these documents; lower optim.lr or optim.clip_norm; compute in float32 (model.dtype=float32). The "
        "step was not taken, and no checkpoint holds it",
    )


@dataclass(slots=True, kw_only=True)
class LossHistory:
    """Losses of the last steps, and how many of all steps were spikes."""

    recent: list[float] = field(default_factory=list[float])
    spikes: int = 0

    def add(self, loss: float, *, factor: float, window: int) -> float | None:
        """Remember ``loss`` (nats per target); returns the running median if ``loss`` is a spike above it, else None.

        A spike is more than ``factor`` times the median of the last ``window`` losses and ``SPIKE_FLOOR`` above it.
        There is no verdict before a quarter of the window is filled. ``factor`` 0 only remembers.
        """
        usual, bound = self.usual(window), self.bound(factor=factor, window=window)
        self.recent = [*self.recent, loss][-window:]
        if usual is None or loss <= bound:
            return None
        self.spikes += 1
        return usual

    def usual(self, window: int) -> float | None:
        """The running median; None before a quarter of the window is filled."""
        return median(self.recent) if len(self.recent) >= max(2, window // 4) else None

    def bound(self, *, factor: float, window: int) -> float:
        """The loss above which the next one is a spike; infinite where there is no verdict."""
        usual = self.usual(window)
        return math.inf if usual is None or factor == 0 else max(factor * usual, usual + SPIKE_FLOOR)


NonFiniteAction = Literal["stop", "skip", "rollback"]
SpikeAction = Literal["warn", "stop", "skip", "rollback"]


@dataclass(frozen=True, slots=True, kw_only=True)
class FaultPolicy:
    """What happens to a step that is not taken, and how often.

    ``skip``: its data is passed over. ``rollback``: weights and optimizer return to the last good checkpoint, and all
    data since then is passed over. ``most``: such steps in a run, ``most_in_row``: one after the other; then it stops.
    """

    nonfinite: NonFiniteAction = "stop"
    spike: SpikeAction = "warn"
    most: int = 10
    most_in_row: int = 3

    def refuses_spikes(self) -> bool:
        """Whether a step whose loss is a spike is not taken."""
        return self.spike in ("skip", "rollback")


def exhausted(fault: TrainingFault, *, total: int, in_row: int, policy: FaultPolicy) -> TrainingFault | None:
    """The error of a run with ``total`` steps not taken, the last ``in_row`` in a row; None: it may go on."""
    if total <= policy.most and in_row <= policy.most_in_row:
        return None
    first = fault.problems[0]
    return TrainingFault(
        f"too many steps could not be taken; the last one: {first.what}",
        where=first.where,
        got=f"{total} in this run, {in_row} in a row; {first.got}",
        allowed=f"{policy.most} in a run (guard.max_faults), {policy.most_in_row} in a row (guard.max_faults_in_row)",
        do=f"the model or the data is at fault, not a single step: {first.do}",
    )


def spike_fault(step: int, loss: float, usual: float, *, factor: float, do: str) -> TrainingFault:
    """The fault of a loss far above the ``usual`` one."""
    return TrainingFault(
        f"loss spike: {loss:.4g}, {loss / usual:.1f} times the median of the last steps",
        where=f"step {step}",
        got=f"{loss:.4g}",
        allowed=f"at most {factor:g} times {usual:.4g} (guard.spike_factor)",
        do=do,
    )


@dataclass(slots=True, kw_only=True)
class Best:
    """The best validation so far: its ``step``, its ``value`` of the chosen figure, and all its ``figures``.

    ``stale``: validations since the figure last improved by enough for patience.
    """

    value: float | None = None
    step: int | None = None
    figures: dict[str, float] = field(default_factory=dict[str, float])
    stale: int = 0
    bar: float | None = None
    """What the figure has to beat by ``min_improvement`` for ``stale`` to start again."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Judge:
    """Chooses the best checkpoint by ``metric`` and ends a run after ``patience`` validations without improvement.

    The best checkpoint is the best by any margin; ``min_improvement`` only counts for patience. Scores of few rows are
    often equal (0.0 again and again at the start): then the lower validation loss decides, where there is one.
    """

    metric: str
    patience: int | None = None
    min_improvement: float = 0.0

    def observe(self, best: Best, step: int, figures: Mapping[str, float]) -> bool:
        """Take the validation of ``step`` into ``best``; returns whether it is the best so far.

        Raises:
            TrainingFault: the figure is missing or not finite.
        """
        value = figures.get(self.metric)
        if value is None or not math.isfinite(value):
            raise TrainingFault(
                f"the validation has no usable figure '{self.metric}' to choose the best checkpoint by",
                where=f"step {step}",
                got=", ".join(f"{name}={figure}" for name, figure in sorted(figures.items())) or "no figures",
                allowed="a finite number",
                do="set eval.metric to one of these figures",
            )
        improved = best.value is None or self._gain(best.value, value) > 0
        if best.value == value:
            improved = figures.get("loss", math.inf) < best.figures.get("loss", math.inf)
        if improved:
            best.value, best.step, best.figures = value, step, dict(figures)
        if best.bar is None or self._gain(best.bar, value) > self.min_improvement:
            best.bar, best.stale = value, 0
        else:
            best.stale += 1
        return improved

    def gives_up(self, best: Best) -> bool:
        """Whether patience is at its end."""
        return self.patience is not None and best.stale >= self.patience

    def _gain(self, old: float, new: float) -> float:
        return old - new if self.metric in LOWER_IS_BETTER else new - old
