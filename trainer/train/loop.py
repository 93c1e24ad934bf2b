"""The training loop.

It is our own because what it guarantees is what this project is for: a step is a pure function of weights, optimizer
state and step number, so a killed run continues bit by bit; all ranks decide alike, in the one collective that sums the
loss; and a step with a value that is not finite is never taken, so that nothing poisoned is ever saved.

Loss of a step = sum of the token losses of all ranks and micro-batches / number of targets of the step, which the
schedule knows beforehand. ``train_step`` is the only place where anything is normalised: strategies average gradients
over the ranks, so a micro-batch's summed loss counts ``world_size / num_targets``.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NoReturn

import torch

from trainer.data.batches import Load, PlannedStep, TrainingBatches
from trainer.distributed.seeds import seed_all
from trainer.distributed.strategy import Strategy
from trainer.errors import StoppedInGoodOrder, TrainingFault
from trainer.model.device import peak_memory_gb
from trainer.train.checkpoint.publish import SaveFailed
from trainer.train.guard import FaultPolicy, Judge, NonFinite, StopFlag, exhausted, non_finite, spike_fault
from trainer.train.metrics import StepRecord, StepTimer
from trainer.train.state import TrainState


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What all ranks know after a step's forward and backward passes.

    ``loss``: nats per target. ``grad_norm``: global, before clipping. ``tokens``: without padding, over all ranks.
    ``stop``: some rank was asked to stop. ``fault``: why the step was not taken. ``refused``: it was not taken because
    of the loss alone. ``skipped``: float16 overflowed, the loss scale was lowered and the weights left alone.
    """

    loss: float
    grad_norm: float
    tokens: int
    stop: bool
    fault: NonFinite | None
    skipped: bool
    refused: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """Numbers that the loop goes by.

    ``seed``: of dropout and other noise. ``lr``: learning rate of a step index. ``validate_every``, ``save_every``: in
    optimizer steps; the last step is always validated and saved, and so is every new best. ``spike_factor``,
    ``spike_window``: see ``LossHistory``. ``policy``: what happens to a faulty step. ``judge``: chooses the best
    checkpoint, ends a run early.
    """

    seed: int
    lr: Callable[[int], float]
    validate_every: int
    save_every: int
    judge: Judge
    spike_factor: float = 0.0
    spike_window: int = 32
    policy: FaultPolicy = FaultPolicy()  # noqa: RUF009  (it never changes)


@dataclass(frozen=True, slots=True, kw_only=True)
class Hooks:
    """What the loop has others do. All ranks call all of them.

    ``validate``: figures such as ``{"loss": 1.2}``, equal on all ranks; None: there is no validation. ``save``: publish
    the state (raises ``SaveFailed`` on all ranks), by the time of the return if the second argument says that it is
    required. ``record``: write one step with its validation figures. ``warn``: tell the user. ``boundary``: told before
    every step what comes (``train``), and before a ``validation`` or a ``saving``; it may end the run. ``rollback``:
    fill weights and optimizer from the last good checkpoint and return its state; None: there is none.
    """

    validate: Callable[[], Mapping[str, float]] | None
    save: Callable[[TrainState, bool], None]
    record: Callable[[StepRecord, Mapping[str, float]], None]
    warn: Callable[[str], None]
    boundary: Callable[[str, int], None] = lambda _phase, _step: None
    rollback: Callable[[], TrainState | None] = lambda: None


def train(
    strategy: Strategy, source: TrainingBatches, settings: Settings, hooks: Hooks, state: TrainState, stop: StopFlag
) -> TrainState:
    """Train from ``state`` to the last step, or until patience ends; returns the final state, which is saved.

    Raises:
        NonFinite: a loss or gradient that is not a finite number, by policy; the step was not taken.
        TrainingFault: a loss spike, by policy (after saving); too many steps not taken, or nothing to go back to; a
            validation without usable figures.
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
            hooks.boundary("train", planned.index + 1)
            timer = StepTimer()
            lr = settings.lr(planned.index)
            bound = state.losses.bound(factor=settings.spike_factor, window=settings.spike_window)
            outcome = train_step(
                strategy,
                source,
                planned,
                load,
                lr=lr,
                seed=settings.seed,
                stop=stop.is_up,
                timer=timer,
                highest=bound if settings.policy.refuses_spikes() else math.inf,
            )
            state.tokens += outcome.tokens
            record = _record(strategy, planned, outcome, state, lr, timer)
            rolled_back, spike = False, None
            if outcome.fault is not None or outcome.refused:
                rolled_back = _not_taken(settings, hooks, state, record, outcome)
            else:
                state.faults_in_row = 0
                state.step, state.skipped = record.step, state.skipped + outcome.skipped
                spike = _watch(settings, hooks, state, outcome)
            last = state.step == source.num_steps
            due = hooks.validate is not None and (last or state.step % settings.validate_every == 0)
            if outcome.stop and not last:
                _stop(hooks, state, record, due=due)
            best = False
            if due:
                best = _validate(strategy, settings, hooks, state, record, timer)
            else:
                hooks.record(record, {})
            must_save = last or state.stopped_early or spike is not None
            if must_save or best or rolled_back or state.step % settings.save_every == 0:
                hooks.boundary("saving", state.step)
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
    highest: float = math.inf,
) -> Outcome:
    """Forward and backward over this rank's micro-batches, agree with the other ranks, and take the optimizer step.

    ``load`` is called for one micro-batch after the other, when the one before has gone backward. ``stop`` is asked as
    late as possible. The step is not taken when a loss or the gradient is not finite (``Outcome.fault``), or the loss
    above ``highest`` (``Outcome.refused``).

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
        loss = sum(map(sum, per_rank)) / planned.num_targets
        refused = fault is None and loss > highest
        if skipped or (fault is None and not refused):
            strategy.step()
        else:
            strategy.discard()
    return Outcome(
        loss=loss,
        grad_norm=grad_norm,
        tokens=int(tokens),
        stop=stop_votes > 0,
        fault=None if skipped else fault,
        skipped=skipped,
        refused=refused,
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


def _not_taken(settings: Settings, hooks: Hooks, state: TrainState, record: StepRecord, outcome: Outcome) -> bool:
    """Do with a step that was not taken what the policy says; returns whether an older state was gone back to.

    Raises:
        TrainingFault: the policy says stop, it was too often, or there is nothing to go back to.
    """
    policy, usual = settings.policy, state.losses.usual(settings.spike_window)
    fault = outcome.fault or spike_fault(
        record.step,
        outcome.loss,
        usual or outcome.loss,
        factor=settings.spike_factor,
        do="look at the data of these steps and at optim.lr; raise guard.spike_factor if this is usual here",
    )
    action = policy.spike if outcome.fault is None else policy.nonfinite
    state.faults, state.faults_in_row = state.faults + 1, state.faults_in_row + 1
    too_often = exhausted(fault, total=state.faults, in_row=state.faults_in_row, policy=policy)
    if action == "stop" or too_often is not None:
        hooks.record(record, {})
        raise too_often if action != "stop" and too_often is not None else fault
    state.losses.spikes += outcome.fault is None
    state.step = record.step
    if action == "skip":
        hooks.warn(f"{fault}\n  the step is skipped ({state.faults} so far)")
        return False
    older = hooks.rollback()
    if older is None:
        hooks.record(record, {})
        raise fault
    state.losses, state.rollbacks = replace(older.losses, spikes=state.losses.spikes), state.rollbacks + 1
    hooks.warn(
        f"{fault}\n  back to the weights of step {older.step}; the data of steps {older.step + 1} to {state.step} is "
        f"passed over ({state.faults} so far)"
    )
    return True


def _watch(settings: Settings, hooks: Hooks, state: TrainState, outcome: Outcome) -> TrainingFault | None:
    """Tell about an overflow or a spike; returns the fault to raise after saving if a spike has to stop the run."""
    if outcome.skipped:
        hooks.warn(f"step {state.step}: float16 overflow, step skipped and loss scale lowered ({state.skipped} so far)")
    usual = state.losses.add(outcome.loss, factor=settings.spike_factor, window=settings.spike_window)
    if usual is None:
        return None
    do = "look at the data of this step and at optim.lr; the state is saved, and the same command goes on from it"
    fault = spike_fault(state.step, outcome.loss, usual, factor=settings.spike_factor, do=do)
    if settings.policy.spike == "stop":
        return fault
    hooks.warn(f"step {state.step}: {fault.problems[0].what}")
    return None


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
    hooks.boundary("validation", state.step)
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
    hooks.boundary("saving", state.step)
    _save(hooks, state, required=True)
    raise StoppedInGoodOrder(
        f"stopped after step {state.step}; the state is saved", do="run the same command again to continue"
    )


def _save(hooks: Hooks, state: TrainState, *, required: bool) -> None:
    """Save; a failure is only a warning while there will be another try."""
    try:
        hooks.save(state, required)
    except SaveFailed as fault:
        if required:
            raise
        hooks.warn(f"step {state.step}: {fault}\n  training goes on and will try again")
