"""The training loop.

It is our own because what it guarantees is what this project is for: a step is a pure function of weights, optimizer
state and step number, so a killed run continues bit by bit; all ranks decide alike, in the one collective that sums the
loss; and a value that is not finite ends the run before the optimizer step, so that nothing poisoned is ever saved.

Loss of a step = sum of the token losses of all ranks and micro-batches / number of targets of the step, which the
schedule knows beforehand. ``train_step`` is the only place where anything is normalised: strategies average gradients
over the ranks, so a micro-batch's summed loss counts ``world_size / num_targets``.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, NoReturn

import torch

from trainer.data.batches import Load, PlannedStep, TrainingBatches
from trainer.distributed.seeds import seed_all
from trainer.distributed.strategy import Strategy
from trainer.errors import StoppedInGoodOrder, TrainingFault
from trainer.model.device import peak_memory_gb
from trainer.train.checkpoint.publish import SaveFailed
from trainer.train.guard import Judge, NonFinite, StopFlag, non_finite
from trainer.train.metrics import StepRecord, StepTimer
from trainer.train.state import TrainState


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What all ranks know after a step's forward and backward passes.

    ``loss``: nats per target. ``grad_norm``: global, before clipping. ``tokens``: without padding, over all ranks.
    ``stop``: some rank was asked to stop. ``fault``: why the step was not taken. ``skipped``: float16 overflowed, the
    loss scale was lowered and the weights left alone.
    """

    loss: float
    grad_norm: float
    tokens: int
    stop: bool
    fault: NonFinite | None
    skipped: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """Numbers that the loop goes by.

    ``seed``: of dropout and other noise. ``lr``: learning rate of a step index. ``validate_every``, ``save_every``: in
    optimizer steps; the last step is always validated and saved, and so is every new best. ``spike_factor``,
    ``spike_window``, ``spike_action``: see ``LossHistory``. ``judge``: chooses the best checkpoint, ends a run early.
    """

    seed: int
    lr: Callable[[int], float]
    validate_every: int
    save_every: int
    judge: Judge
    spike_factor: float = 0.0
    spike_window: int = 32
    spike_action: Literal["warn", "stop"] = "warn"


@dataclass(frozen=True, slots=True, kw_only=True)
class Hooks:
    """What the loop has others do. All ranks call all of them.

    ``validate``: figures such as ``{"loss": 1.2}``, equal on all ranks; None: there is no validation. ``save``: publish
    the state (raises ``SaveFailed`` on all ranks). ``record``: write one step with its validation figures. ``warn``:
    tell the user.
    """

    validate: Callable[[], Mapping[str, float]] | None
    save: Callable[[TrainState], None]
    record: Callable[[StepRecord, Mapping[str, float]], None]
    warn: Callable[[str], None]


def train(
    strategy: Strategy, source: TrainingBatches, settings: Settings, hooks: Hooks, state: TrainState, stop: StopFlag
) -> TrainState:
    """Train from ``state`` to the last step, or until patience ends; returns the final state, which is saved.

    Raises:
        NonFinite: a loss or gradient that is not a finite number; the step was not taken.
        TrainingFault: a loss spike with ``spike_action`` stop (after saving), or a validation without usable figures.
        StoppedInGoodOrder: a rank was asked to stop; the state is saved.
        SaveFailed: the state could not be saved when it had to be.
    """
    strategy.module.train()
    if state.pending is not None and not state.stopped_early:
        _validate(strategy, settings, hooks, state, state.pending)
    with source.ahead(state.step) as load:
        for planned in source.steps(state.step):
            if state.stopped_early:
                break
            timer = StepTimer()
            lr = settings.lr(planned.index)
            outcome = train_step(
                strategy, source, planned, load, lr=lr, seed=settings.seed, stop=stop.is_up, timer=timer
            )
            state.tokens += outcome.tokens
            record = _record(strategy, planned, outcome, state, lr, timer)
            if outcome.fault is not None:
                hooks.record(record, {})
                raise outcome.fault
            state.step, state.skipped = record.step, state.skipped + outcome.skipped
            last = state.step == source.num_steps
            spike = _watch(settings, hooks, state, outcome)
            due = hooks.validate is not None and (last or state.step % settings.validate_every == 0)
            if outcome.stop and not last:
                _stop(hooks, state, record, due=due)
            best = False
            if due:
                best = _validate(strategy, settings, hooks, state, record, timer)
            else:
                hooks.record(record, {})
            must_save = last or state.stopped_early or spike is not None
            if must_save or best or state.step % settings.save_every == 0:
                _save(hooks, state, required=must_save)
            if spike is not None:
                raise spike
    return state


def train_step(
    strategy: Strategy,
    source: TrainingBatches,
    planned: PlannedStep,
    load: Load,
    *,
    lr: float,
    seed: int,
    stop: Callable[[], bool],
    timer: StepTimer,
) -> Outcome:
    """Forward and backward over this rank's micro-batches, agree with the other ranks, and take the optimizer step.

    ``load`` is called for one micro-batch after the other, when the one before has gone backward. ``stop`` is asked as
    late as possible. The step is not taken when a loss or the gradient is not finite (``Outcome.fault``).

    Raises:
        TrainingFault: the batches do not hold the targets that the schedule counted.
    """
    ranks = strategy.ranks
    for group in strategy.optimizer.param_groups:
        group["lr"] = lr
    losses: list[torch.Tensor] = []
    tokens = targets = 0
    for number, documents in enumerate(planned.documents, 1):
        with timer.part("data"):
            batch = load(documents)
        with timer.part("forward_backward"), strategy.micro_batch(last=number == len(planned.documents)):
            seed_all(seed, planned.index, *documents.tolist())
            loss = strategy.module(batch)
            strategy.backward(loss * (ranks.world_size / planned.num_targets))
        losses.append(loss.detach())
        tokens, targets = tokens + batch.num_tokens, targets + batch.num_targets
    with timer.part("forward_backward"):  # on a GPU this is where the host waits for the work queued above
        per_rank, (stop_votes, tokens, targets) = _agree(strategy, losses, (float(stop()), tokens, targets))
    if targets != planned.num_targets:
        raise TrainingFault(
            "the batches do not hold the targets that the schedule counted; the loss would be scaled wrongly",
            where=f"step {planned.index + 1}",
            got=f"{targets:.0f} targets",
            allowed=f"{planned.num_targets}",
            do="delete the prepared data of this run; if it happens again, report it",
        )
    with timer.part("optimizer"):
        grad_norm = float(strategy.clip())
        fault = non_finite(planned.index + 1, per_rank, grad_norm, lambda r, m: source.describe(planned.index, r, m))
        skipped = fault is not None and fault.only_gradient and strategy.may_overflow
        if fault is None or skipped:
            strategy.step()
    return Outcome(
        loss=sum(map(sum, per_rank)) / planned.num_targets,
        grad_norm=grad_norm,
        tokens=int(tokens),
        stop=stop_votes > 0,
        fault=None if skipped else fault,
        skipped=skipped,
    )


def _agree(
    strategy: Strategy, losses: Sequence[torch.Tensor], counts: Sequence[float]
) -> tuple[list[list[float]], list[float]]:
    """One all-reduce: every micro-batch's loss in its own place, so all ranks know whose went wrong, and the counts.

    Returns the summed losses [world_size][accumulation] and the sums of ``counts``.
    """
    ranks = strategy.ranks
    shared = torch.zeros(ranks.world_size * len(losses) + len(counts), dtype=torch.float64, device=ranks.device)
    shared[ranks.rank * len(losses) : (ranks.rank + 1) * len(losses)] = torch.stack(list(losses)).double()
    shared[-len(counts) :] = torch.tensor(counts, dtype=torch.float64)
    values = ranks.sum_over_ranks(shared).tolist()
    per_rank = [values[rank * len(losses) : (rank + 1) * len(losses)] for rank in range(ranks.world_size)]
    return per_rank, values[-len(counts) :]


def _record(
    strategy: Strategy, planned: PlannedStep, outcome: Outcome, state: TrainState, lr: float, timer: StepTimer
) -> StepRecord:
    return StepRecord(
        step=planned.index + 1,
        loss=outcome.loss,
        lr=lr,
        grad_norm=outcome.grad_norm,
        tokens_per_second=outcome.tokens / timer.total,
        tokens=state.tokens,
        targets=planned.num_targets,
        epoch=planned.epoch,
        seconds=dict(timer.parts),
        memory_gb=peak_memory_gb(strategy.ranks.device),
    )


def _watch(settings: Settings, hooks: Hooks, state: TrainState, outcome: Outcome) -> TrainingFault | None:
    """Tell about an overflow or a spike; returns the fault to raise after saving if a spike has to stop the run."""
    if outcome.skipped:
        hooks.warn(f"step {state.step}: float16 overflow, step skipped and loss scale lowered ({state.skipped} so far)")
    usual = state.losses.add(outcome.loss, factor=settings.spike_factor, window=settings.spike_window)
    if usual is None:
        return None
    what = f"loss spike: {outcome.loss:.4g}, {outcome.loss / usual:.1f} times the median of the last steps"
    if settings.spike_action == "warn":
        hooks.warn(f"step {state.step}: {what}")
        return None
    return TrainingFault(
        what,
        where=f"step {state.step}",
        got=f"{outcome.loss:.4g}",
        allowed=f"at most {settings.spike_factor:g} times {usual:.4g} (guard.spike_factor)",
        do="look at the data of this step and at optim.lr; the state is saved, and the same command goes on from it",
    )


def _validate(
    strategy: Strategy,
    settings: Settings,
    hooks: Hooks,
    state: TrainState,
    record: StepRecord,
    timer: StepTimer | None = None,
) -> bool:
    """Validate after ``record``'s step and write its line; returns whether this is the best so far."""
    if hooks.validate is None:
        return False
    timer = timer or StepTimer()
    with timer.part("validation"):
        figures = hooks.validate()
    strategy.module.train()
    best = settings.judge.observe(state.best, state.step, figures)
    state.stopped_early = settings.judge.gives_up(state.best)
    state.pending = None
    seconds = record.seconds | {"validation": timer.parts["validation"]}
    hooks.record(replace(record, seconds=seconds), figures)
    return best


def _stop(hooks: Hooks, state: TrainState, record: StepRecord, *, due: bool) -> NoReturn:
    """Save at once and leave. A validation that is due takes too long now: the resumed run begins with it."""
    if due:
        state.pending = record
    else:
        hooks.record(record, {})
    _save(hooks, state, required=True)
    raise StoppedInGoodOrder(
        f"stopped after step {state.step}; the state is saved", do="run the same command again to continue"
    )


def _save(hooks: Hooks, state: TrainState, *, required: bool) -> None:
    """Save; a failure is only a warning while there will be another try."""
    try:
        hooks.save(state)
    except SaveFailed as fault:
        if required:
            raise
        hooks.warn(f"step {state.step}: {fault}\n  training goes on and will try again")
