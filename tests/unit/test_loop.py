"""The loop: its normalisation, its decisions, what it saves and what it never saves."""

import json
import os
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from train_fixtures import (
    Run,
    make_data,
    make_source,
    read_metrics,
    tiny_loss,
    tiny_strategy,
    train_run,
    weights_of,
    with_data,
)

from trainer.data.batches import PlannedStep, TrainingBatches
from trainer.distributed.ranks import Ranks, start_ranks
from trainer.distributed.strategy import Strategy
from trainer.errors import StoppedInGoodOrder, TrainingFault
from trainer.train.checkpoint.format import published, verify
from trainer.train.checkpoint.publish import SaveFailed
from trainer.train.guard import FaultPolicy, Judge, NonFinite, StopFlag
from trainer.train.loop import Hooks, Outcome, Settings, train, train_step
from trainer.train.metrics import StepRecord, StepTimer
from trainer.train.state import TrainState


@pytest.fixture(scope="module")
def ranks() -> Ranks:
    return start_ranks(device="cpu", world_size=1)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_data(tmp_path_factory.mktemp("data"))


@pytest.fixture
def folder(data: Path, tmp_path: Path) -> Path:
    """A run folder with the data in it."""
    return with_data(tmp_path, data)


def times(factor: Callable[[], float]) -> Callable[[nn.Module, object, torch.Tensor], torch.Tensor]:
    """A forward hook that multiplies the loss."""
    return lambda module, inputs, output: output * factor()


def take_step(source: TrainingBatches, strategy: Strategy, index: int) -> Outcome:
    return step_of(source, strategy, next(source.steps(index)))


def step_of(
    source: TrainingBatches, strategy: Strategy, planned: PlannedStep, *, lr: float = 1e-3, seed: int = 0
) -> Outcome:
    return train_step(strategy, source, planned, source.load, lr=lr, seed=seed, stop=lambda: False, timer=StepTimer())


# -- one step ------------------------------------------------------------------------------------------------------


def test_loss_and_gradient_are_means_over_the_targets_of_the_step(ranks: Ranks, data: Path) -> None:
    """Against one forward pass per document through the plain model, summed and divided once."""
    strategy, _ = tiny_strategy(ranks, lora=False, clip_norm=0.0)
    source = make_source(data, ranks, packs=2)
    planned = next(source.steps(0))
    reference = tiny_loss(lora=False).model
    total, count = torch.zeros(()), 0
    for batch in (source.load(documents) for documents in planned.documents):
        for start, stop in zip(batch.boundaries[:-1], batch.boundaries[1:], strict=True):
            logits = reference(input_ids=batch.input_ids[:, start:stop]).logits[0]
            labels = batch.labels[0, start:stop]
            total = total + F.cross_entropy(logits, labels, reduction="sum", ignore_index=-100)
            count += int((labels != -100).sum())
    (total / count).backward()
    norm = torch.nn.utils.get_total_norm([p.grad for p in reference.parameters() if p.grad is not None])

    outcome = take_step(source, strategy, 0)
    assert count == planned.num_targets
    assert outcome.loss == pytest.approx(float(total.detach() / count), abs=1e-6)
    assert outcome.grad_norm == pytest.approx(float(norm), rel=1e-5)
    assert outcome.tokens == sum(source.load(documents).num_tokens for documents in planned.documents)
    assert (outcome.stop, outcome.fault, outcome.skipped) == (False, None, False)


def test_the_learning_rate_is_written_before_the_step(ranks: Ranks, data: Path) -> None:
    strategy, _ = tiny_strategy(ranks, lora=True)
    before = weights_of(strategy)
    source = make_source(data, ranks, packs=2)
    step_of(source, strategy, next(source.steps(0)), lr=0.0)
    assert all(torch.equal(weight, before[name]) for name, weight in weights_of(strategy).items())
    step_of(source, strategy, next(source.steps(1)), lr=1e-2)
    assert any(not torch.equal(weight, before[name]) for name, weight in weights_of(strategy).items())


def test_noise_belongs_to_seed_step_and_documents(ranks: Ranks, data: Path) -> None:
    """Dropout is the same whatever was drawn before; another seed or step draws other noise."""
    source = make_source(data, ranks, packs=2)

    def loss(seed: int, index: int = 3, disturb: int = 0) -> float:
        strategy, _ = tiny_strategy(ranks, lora=False, dropout=0.3)
        strategy.module.train()
        torch.manual_seed(disturb)
        planned = replace(next(source.steps(3)), index=index)
        return step_of(source, strategy, planned, lr=0.0, seed=seed).loss

    assert loss(1) == loss(1, disturb=99)
    assert loss(1) != loss(2)
    assert loss(1) != loss(1, index=4)


def test_filler_micro_batches_change_nothing(ranks: Ranks, data: Path) -> None:
    source = make_source(data, ranks, packs=2)
    planned = next(source.steps(0))
    filled = replace(planned, documents=(*planned.documents, np.array([], np.int32)))
    outcomes = []
    for each in (planned, filled):
        strategy, _ = tiny_strategy(ranks, lora=False)
        outcomes.append(step_of(source, strategy, each))
    assert outcomes[0] == outcomes[1]


def test_targets_that_the_schedule_did_not_count_are_a_fault(ranks: Ranks, data: Path) -> None:
    strategy, _ = tiny_strategy(ranks, lora=True)
    source = make_source(data, ranks, packs=2)
    planned = next(source.steps(4))
    wrong = replace(planned, num_targets=planned.num_targets + 1)
    with pytest.raises(TrainingFault, match="step 5: the batches do not hold the targets that the schedule counted"):
        step_of(source, strategy, wrong)


@pytest.mark.parametrize("kind", ["loss", "gradient"])
def test_a_value_that_is_not_finite_leaves_the_weights_alone(ranks: Ranks, data: Path, kind: str) -> None:
    strategy, loss = tiny_strategy(ranks, lora=True)
    if kind == "loss":
        loss.register_forward_hook(times(lambda: float("nan")))
    else:
        next(iter(strategy.trainable.values())).register_hook(lambda gradient: gradient * float("inf"))
    before = weights_of(strategy)
    outcome = take_step(make_source(data, ranks, packs=2), strategy, 0)
    assert outcome.fault is not None
    assert outcome.fault.only_gradient == (kind == "gradient")
    assert "document" in outcome.fault.problems[0].got
    assert all(torch.equal(weight, before[name]) for name, weight in weights_of(strategy).items())
    assert all(float(fragment.step) == 0 for fragment in strategy.fragments(saving=False))


def test_a_float16_overflow_is_a_skipped_step_and_not_a_fault(ranks: Ranks, data: Path) -> None:
    strategy, _ = tiny_strategy(ranks, lora=True, dtype=torch.float16)
    parameter = next(iter(strategy.trainable.values()))
    handle = parameter.register_hook(lambda gradient: gradient * float("inf"))
    source = make_source(data, ranks, packs=2)
    before, scale = weights_of(strategy), strategy.scaler_state()["scale"]
    outcome = take_step(source, strategy, 0)
    assert (outcome.skipped, outcome.fault) == (True, None)
    assert strategy.scaler_state()["scale"] == scale / 2
    assert all(torch.equal(weight, before[name]) for name, weight in weights_of(strategy).items())
    handle.remove()
    outcome = take_step(source, strategy, 1)
    assert (outcome.skipped, outcome.fault) == (False, None)
    strategy.load_scaler_state(strategy.scaler_state() | {"scale": 1.0})
    parameter.register_hook(lambda gradient: gradient * float("inf"))
    outcome = take_step(source, strategy, 2)
    assert outcome.fault is not None, "a scale of 1 cannot be what overflowed"


# -- equivalences --------------------------------------------------------------------------------------------------


def assert_close(one: list[float], other: list[float], *, largest: float, mean: float) -> None:
    difference = np.abs(np.array(one) - np.array(other)) / np.maximum(1.0, np.abs(np.array(one)))
    assert len(one) == len(other)
    assert difference.max() <= largest
    assert difference.mean() <= mean


@pytest.mark.parametrize("lora", [False, True])
def test_eight_packs_at_once_are_eight_packs_one_by_one(ranks: Ranks, data: Path, lora: bool) -> None:
    """Accumulation 1 x 8 against one micro-batch that holds all documents of the step."""
    source = make_source(data, ranks, packs=8, epochs=8.0)
    curves: list[list[Outcome]] = []
    for together in (False, True):
        strategy, _ = tiny_strategy(ranks, lora=lora, lr=1e-3)
        strategy.module.train()
        outcomes = []
        for planned in list(source.steps(0))[:12]:
            if together:
                planned = replace(planned, documents=(np.concatenate(planned.documents),))
            outcomes.append(step_of(source, strategy, planned))
        curves.append(outcomes)
    for name in ("loss", "grad_norm"):
        values = [[float(getattr(outcome, name)) for outcome in outcomes] for outcomes in curves]
        assert_close(*values, largest=1e-5, mean=2e-6)


@pytest.mark.parametrize("lora", [False, True])
def test_packed_is_unpacked(ranks: Ranks, data: Path, lora: bool) -> None:
    """Every document in a micro-batch of its own gives the same course: documents of a pack do not see each other."""
    source = make_source(data, ranks, packs=2)
    curves: list[list[Outcome]] = []
    for packed in (True, False):
        strategy, _ = tiny_strategy(ranks, lora=lora, lr=1e-3)
        outcomes = []
        for planned in list(source.steps(0))[:12]:
            if not packed:
                alone = [single for documents in planned.documents for single in np.split(documents, len(documents))]
                planned = replace(planned, documents=tuple(alone))
            outcomes.append(step_of(source, strategy, planned))
        curves.append(outcomes)
    for name in ("loss", "grad_norm"):
        values = [[float(getattr(outcome, name)) for outcome in outcomes] for outcomes in curves]
        assert_close(*values, largest=1e-5, mean=2e-6)


def test_a_second_start_after_the_end_does_nothing(ranks: Ranks, folder: Path) -> None:
    run = Run(folder=str(folder), epochs=1.0, lora=True)
    _, state, _ = train_run(run, ranks)
    before = (folder / "metrics.jsonl").read_bytes()
    strategy, again, _ = train_run(run, ranks)
    assert again == state
    assert (folder / "metrics.jsonl").read_bytes() == before
    assert strategy is not None


# -- what the loop decides -----------------------------------------------------------------------------------------


class Recorder:
    """Hooks that write down what the loop did."""

    def __init__(self, figures: Callable[[int], float] | None = None, fail: int = 0) -> None:
        self.events: list[str] = []
        self.lines: list[tuple[StepRecord, dict[str, float]]] = []
        self.warnings: list[str] = []
        self._figures, self._fail, self._step = figures, fail, 0
        self.older: TrainState | None = None

    def hooks(self) -> Hooks:
        return Hooks(
            validate=self.validate if self._figures else None,
            save=self.save,
            record=lambda record, figures: self.record(record, dict(figures)),
            warn=self.warnings.append,
        )

    def validate(self) -> dict[str, float]:
        assert self._figures is not None
        self.events.append("validate")
        value = self._figures(self.events.count("validate"))
        return {"loss": value, "other": 1.0}

    def save(self, state: TrainState, _required: bool) -> None:
        if self._fail > 0:
            self._fail -= 1
            self.events.append(f"save {state.step} failed")
            raise SaveFailed("a checkpoint could not be written", got="no space")
        self.events.append(f"save {state.step}")

    def rollback(self) -> TrainState | None:
        self.events.append("rollback")
        return self.older

    def record(self, record: StepRecord, figures: dict[str, float]) -> None:
        self.events.append(f"record {record.step}")
        self.lines.append((record, figures))


def settings(**changes: object) -> Settings:
    defaults: dict[str, object] = {
        "seed": 0, "lr": lambda step: 1e-3, "validate_every": 3, "save_every": 2, "judge": Judge(metric="loss"),
    }  # fmt: skip
    return Settings(**(defaults | changes))  # type: ignore[arg-type]


def course(
    ranks: Ranks,
    data: Path,
    recorder: Recorder,
    steps: int = 7,
    state: TrainState | None = None,
    stop: StopFlag | None = None,
    **changes: object,
) -> TrainState:
    strategy, _ = tiny_strategy(ranks, lora=True)
    source = make_source(data, ranks, packs=2, max_steps=steps)
    return train(strategy, source, settings(**changes), recorder.hooks(), state or TrainState(), stop or StopFlag())


def test_the_order_of_a_course(ranks: Ranks, data: Path) -> None:
    """Recorded before saved, validated before recorded; the best, every second and the last are saved."""
    recorder = Recorder(lambda number: [3.0, 4.0, 2.0][number - 1])
    state = course(ranks, data, recorder)
    assert recorder.events == [
        "record 1",
        "record 2", "save 2",
        "validate", "record 3", "save 3",
        "record 4", "save 4",
        "record 5",
        "validate", "record 6", "save 6",
        "validate", "record 7", "save 7",
    ]  # fmt: skip
    assert (state.step, state.best.step, state.best.figures) == (7, 7, {"loss": 2.0, "other": 1.0})
    assert [line[1] for line in recorder.lines if line[1]] == [
        {"loss": 3.0, "other": 1.0}, {"loss": 4.0, "other": 1.0}, {"loss": 2.0, "other": 1.0},
    ]  # fmt: skip
    record = recorder.lines[2][0]
    assert set(record.seconds) == {"data", "forward_backward", "optimizer", "validation"}
    assert record.tokens > recorder.lines[1][0].tokens
    assert recorder.lines[-1][0].tokens == state.tokens


def test_without_validation_the_last_step_is_saved(ranks: Ranks, data: Path) -> None:
    recorder = Recorder()
    state = course(ranks, data, recorder, steps=5)
    assert [event for event in recorder.events if event.startswith("save")] == ["save 2", "save 4", "save 5"]
    assert state.best.step is None


def test_patience_ends_the_run_with_a_save(ranks: Ranks, data: Path) -> None:
    recorder = Recorder(lambda number: 1.0 + number)
    judge = Judge(metric="loss", patience=2)
    state = course(ranks, data, recorder, steps=20, validate_every=2, save_every=100, judge=judge)
    assert state.stopped_early
    assert (state.step, state.best.step) == (6, 2)
    assert recorder.events[-2:] == ["record 6", "save 6"]
    again = Recorder(lambda number: 0.0)
    assert course(ranks, data, again, steps=20, state=state).step == 6
    assert again.events == []


def test_a_poisoned_step_is_recorded_and_never_saved(ranks: Ranks, data: Path) -> None:
    recorder = Recorder()
    strategy, loss = tiny_strategy(ranks, lora=True)
    calls = iter(range(100))
    loss.register_forward_hook(times(lambda: float("nan") if next(calls) // 2 == 3 else 1.0))
    source = make_source(data, ranks, packs=2, max_steps=9)
    with pytest.raises(NonFinite, match="step 4: the loss is not a finite number"):
        train(strategy, source, settings(save_every=1), recorder.hooks(), TrainState(), StopFlag())
    assert recorder.events[-3:] == ["record 3", "save 3", "record 4"]
    assert not np.isfinite(recorder.lines[-1][0].loss)
    assert all(torch.isfinite(weight).all() for weight in weights_of(strategy).values())


def poisoned(
    ranks: Ranks, data: Path, recorder: Recorder, bad: set[int], *, steps: int = 9, **changes: object
) -> TrainState:
    """A course in which the steps ``bad`` have a loss that is not a number."""
    strategy, loss = tiny_strategy(ranks, lora=True)
    calls = iter(range(100))
    loss.register_forward_hook(times(lambda: float("nan") if next(calls) // 2 + 1 in bad else 1.0))
    source = make_source(data, ranks, packs=2, max_steps=steps)
    hooks = replace(recorder.hooks(), rollback=recorder.rollback)
    return train(strategy, source, settings(**changes), hooks, TrainState(), StopFlag())


def test_a_skipped_step_is_told_counted_and_passed_over(ranks: Ranks, data: Path) -> None:
    recorder = Recorder()
    state = poisoned(ranks, data, recorder, {2, 3, 6}, policy=FaultPolicy(nonfinite="skip"))
    assert (state.step, state.faults, state.faults_in_row, state.rollbacks) == (9, 3, 0, 0)
    assert len(state.losses.recent) == 6, "no spike is measured against what is not a number"
    assert [record.step for record, _ in recorder.lines] == list(range(1, 10))
    assert recorder.warnings[-1].startswith("step 6: the loss is not a finite number")
    assert recorder.warnings[-1].endswith("the step is skipped (3 so far)")


@pytest.mark.parametrize(
    ("bad", "limits", "step", "got"),
    [({1, 3, 5}, {"most": 2}, 5, "3 in this run, 1 in a row"), ({1, 2}, {"most_in_row": 1}, 2, "2 in this run, 2 in")],
)
def test_too_many_faults_stop_the_run(
    ranks: Ranks, data: Path, bad: set[int], limits: dict[str, int], step: int, got: str
) -> None:
    with pytest.raises(TrainingFault, match=f"step {step}: too many steps could not be taken") as fault:
        poisoned(ranks, data, Recorder(), bad, policy=FaultPolicy(nonfinite="skip", **limits))  # type: ignore[arg-type]
    assert fault.value.problems[0].got.startswith(got)


def test_without_a_checkpoint_there_is_nothing_to_go_back_to(ranks: Ranks, data: Path) -> None:
    recorder = Recorder()
    with pytest.raises(NonFinite, match="step 1: the loss is not a finite number"):
        poisoned(ranks, data, recorder, {1}, policy=FaultPolicy(nonfinite="rollback"))
    assert recorder.events == ["rollback", "record 1"]


def test_a_rollback_is_saved_at_once(ranks: Ranks, data: Path) -> None:
    recorder = Recorder()
    recorder.older = TrainState(step=2)
    recorder.older.losses.recent = [7.0]
    state = poisoned(ranks, data, recorder, {3}, steps=3, policy=FaultPolicy(nonfinite="rollback"), save_every=100)
    assert recorder.events == ["record 1", "record 2", "rollback", "record 3", "save 3"]
    assert (state.step, state.rollbacks, state.losses.recent) == (3, 1, [7.0])


def test_a_spike_can_be_skipped_before_its_step(ranks: Ranks, data: Path) -> None:
    strategy, _ = tiny_strategy(ranks, lora=True)
    before = weights_of(strategy)
    recorder, state = Recorder(), TrainState()
    state.losses.recent = [0.01] * 8
    source = make_source(data, ranks, packs=2, max_steps=1)
    chosen = settings(spike_factor=4.0, spike_window=8, policy=FaultPolicy(spike="skip"))
    end = train(strategy, source, chosen, recorder.hooks(), state, StopFlag())
    assert all(torch.equal(weight, before[name]) for name, weight in weights_of(strategy).items())
    assert (end.step, end.faults, end.losses.spikes, end.losses.recent) == (1, 1, 1, [0.01] * 8)
    assert recorder.warnings[0].startswith("step 1: loss spike: 4.")


def test_a_spike_is_told_and_counted(ranks: Ranks, data: Path) -> None:
    recorder = Recorder()
    state = TrainState()
    state.losses.recent = [0.01] * 8
    end = course(ranks, data, recorder, steps=2, state=state, spike_factor=4.0, spike_window=8)
    assert end.losses.spikes == 2
    assert len(recorder.warnings) == 2
    assert recorder.warnings[0].startswith("step 1: loss spike: 4.")
    assert recorder.warnings[0].endswith("times the median of the last steps")


def test_a_spike_stops_the_run_after_a_checkpoint_if_asked(ranks: Ranks, data: Path) -> None:
    recorder = Recorder()
    state = TrainState()
    state.losses.recent = [0.01] * 8
    with pytest.raises(TrainingFault, match="step 1: loss spike") as fault:
        course(
            ranks,
            data,
            recorder,
            state=state,
            spike_factor=4.0,
            spike_window=8,
            policy=FaultPolicy(spike="stop"),
            save_every=100,
        )
    assert recorder.events == ["record 1", "save 1"]
    assert fault.value.problems[0].allowed == "at most 4 times 0.01 (guard.spike_factor)"


def test_a_failed_save_is_tried_again_and_only_the_last_one_is_fatal(ranks: Ranks, data: Path) -> None:
    recorder = Recorder(fail=2)
    course(ranks, data, recorder, steps=6)
    assert [e for e in recorder.events if e.startswith("save")] == ["save 2 failed", "save 4 failed", "save 6"]
    assert recorder.warnings[0].startswith("step 2: a checkpoint could not be written")
    assert "training goes on and will try again" in recorder.warnings[0]
    with pytest.raises(SaveFailed):
        course(ranks, data, Recorder(fail=3), steps=6)


def test_a_request_to_stop_saves_and_leaves(ranks: Ranks, data: Path) -> None:
    recorder = Recorder()
    stop = StopFlag()
    with stop:
        os.kill(os.getpid(), signal.SIGUSR1)
        with pytest.raises(StoppedInGoodOrder, match="stopped after step 1; the state is saved") as stopped:
            course(ranks, data, recorder, stop=stop)
    assert stopped.value.exit_code == 75
    assert recorder.events == ["record 1", "save 1"]


def test_a_request_at_the_last_step_lets_the_run_finish(ranks: Ranks, data: Path) -> None:
    recorder = Recorder()
    stop = StopFlag()
    with stop:
        os.kill(os.getpid(), signal.SIGTERM)
        assert course(ranks, data, recorder, steps=1, stop=stop).step == 1


def test_a_validation_that_was_due_at_the_stop_is_made_up_for(ranks: Ranks, data: Path) -> None:
    """The run stops at once; the resumed one validates first and writes the line that was held back."""
    stop, first = StopFlag(), Recorder(lambda number: 3.0)
    state = TrainState()
    with stop:
        os.kill(os.getpid(), signal.SIGTERM)
        with pytest.raises(StoppedInGoodOrder):
            course(ranks, data, first, state=state, stop=stop, validate_every=1)
    assert first.events == ["save 1"]
    assert state.pending is not None
    second = Recorder(lambda number: 2.0)
    end = course(ranks, data, second, steps=2, state=state, validate_every=1)
    assert second.events == ["validate", "record 1", "validate", "record 2", "save 2"]
    assert second.lines[0][0].step == 1
    assert (end.pending, end.best.step) == (None, 1)


def test_dropout_is_on_again_after_a_validation(ranks: Ranks, data: Path) -> None:
    strategy, loss = tiny_strategy(ranks, lora=True, dropout=0.1)
    recorder = Recorder()

    def validate() -> dict[str, float]:
        loss.eval()
        return {"loss": 1.0}

    modes: list[bool] = []
    loss.register_forward_hook(lambda module, inputs, output: modes.append(module.training))
    source = make_source(data, ranks, packs=2, max_steps=3)
    hooks = replace(recorder.hooks(), validate=validate)
    train(strategy, source, settings(validate_every=1), hooks, TrainState(), StopFlag())
    assert modes == [True] * 6


# -- the whole course in files -------------------------------------------------------------------------------------


def test_the_files_of_a_course(ranks: Ranks, folder: Path) -> None:
    _, state, warnings = train_run(Run(folder=str(folder), epochs=2.0, keep=1), ranks)
    lines = read_metrics(folder)
    assert [line["step"] for line in lines] == list(range(1, state.step + 1))
    assert [line["step"] for line in lines if "val_loss" in line] == [*range(4, state.step, 4), state.step]
    assert lines[-1]["tokens"] == state.tokens
    assert lines[-1]["epoch"] == pytest.approx(2.0)
    kept = published(folder / "checkpoints")
    assert verify(kept[0]).state.best == state.best
    assert {state.step, state.best.step} == {int(path.name[-8:]) for path in kept}
    assert warnings == []
    assert json.loads((kept[0] / "manifest.json").read_text())["identity"] == "0123456789"


def test_bfloat16_follows_float32(ranks: Ranks, data: Path) -> None:
    """Full fine-tuning in mixed precision: fp32 weights, 16-bit products; close to fp32, and not equal."""
    source = make_source(data, ranks, packs=2)
    losses: list[list[float]] = []
    for dtype in (torch.float32, torch.bfloat16):
        strategy, _ = tiny_strategy(ranks, lora=False, dtype=dtype, lr=1e-3)
        steps = list(source.steps(0))[:8]
        losses.append([
            step_of(source, strategy, each).loss for each in steps
        ])  # fmt: skip
        assert {parameter.dtype for parameter in strategy.trainable.values()} == {torch.float32}
    difference = np.abs(np.array(losses[0]) - np.array(losses[1]))
    assert 0 < difference.max() < 0.05
    assert difference.mean() < 0.01
