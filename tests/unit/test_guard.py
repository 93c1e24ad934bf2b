"""The guards: signals, values that are not finite, spikes, the best checkpoint and patience."""

import os
import signal

import pytest

from trainer.errors import StoppedInGoodOrder, TrainingFault
from trainer.train.guard import STOP_SIGNALS, Best, Judge, LossHistory, StopFlag, non_finite

NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_a_signal_raises_the_flag_and_nothing_else(number: signal.Signals) -> None:
    with StopFlag() as stop:
        assert not stop.is_up()
        os.kill(os.getpid(), number)
        os.kill(os.getpid(), number)
        assert stop.is_up()
        assert stop.cause == number.name


def test_the_handlers_of_before_come_back() -> None:
    before = [signal.getsignal(number) for number in STOP_SIGNALS]
    with StopFlag():
        assert [signal.getsignal(number) for number in STOP_SIGNALS] != before
    assert [signal.getsignal(number) for number in STOP_SIGNALS] == before


def test_at_once_a_signal_ends_the_stage() -> None:
    with StopFlag() as stop:
        with (
            pytest.raises(StoppedInGoodOrder, match="stopped on SIGTERM in the stage 'baseline'") as stopped,
            stop.at_once("baseline"),
        ):
            os.kill(os.getpid(), signal.SIGTERM)
        assert stopped.value.exit_code == 75
        with pytest.raises(StoppedInGoodOrder, match="in the stage 'evaluate'"), stop.at_once("evaluate"):
            pytest.fail("a stage began after the request to stop")


def describe(rank: int, micro_batch: int) -> str:
    return f"r{rank}m{micro_batch}"


def test_finite_values_are_no_fault() -> None:
    assert non_finite(3, [[1.0, 2.0], [0.0, 5.0]], 1.0, describe) is None


@pytest.mark.parametrize("value", [NAN, INF, -INF])
def test_a_loss_that_is_not_finite_is_named_with_its_rank_and_documents(value: float) -> None:
    fault = non_finite(3, [[1.0, 2.0], [1.0, value]], NAN, describe)
    assert fault is not None
    assert not fault.only_gradient
    assert str(fault).startswith("step 3: the loss is not a finite number")
    assert fault.problems[0].got == f"{value} on rank 1, micro-batch 2 of 2; documents: r1m1"
    assert "The step was not taken" in fault.problems[0].do


def test_many_bad_losses_are_counted() -> None:
    fault = non_finite(3, [[NAN, NAN], [1.0, NAN]], NAN, describe)
    assert fault is not None
    assert "rank 0, micro-batch 1 of 2 (the first of 3); documents: r0m0" in fault.problems[0].got


def test_a_gradient_that_is_not_finite_names_all_documents_of_the_step() -> None:
    fault = non_finite(3, [[1.0], [1.0]], INF, describe)
    assert fault is not None
    assert fault.only_gradient
    assert str(fault).startswith("step 3: the gradient is not a finite number")
    assert fault.problems[0].got.endswith("documents: r0m0; r1m0")


def test_a_spike_is_measured_against_the_median_of_the_window() -> None:
    history = LossHistory()
    for loss in [2.0, 1.0, 2.0, 9.0, 2.0, 2.0, 2.0, 2.0]:
        history.add(loss, factor=4.0, window=8)
    assert history.spikes == 1
    assert history.add(7.9, factor=4.0, window=8) is None
    assert history.add(8.1, factor=4.0, window=8) == 2.0
    assert history.spikes == 2
    assert len(history.recent) == 8


def test_there_is_no_verdict_on_the_first_losses() -> None:
    history = LossHistory()
    assert [history.add(loss, factor=2.0, window=16) for loss in (1.0, 100.0, 1.0, 1.0)] == [None] * 4
    assert history.add(100.0, factor=2.0, window=16) == 1.0


def test_near_zero_a_multiple_of_the_median_is_noise() -> None:
    history = LossHistory(recent=[0.001] * 8)
    assert history.add(0.05, factor=4.0, window=8) is None
    assert history.add(0.2, factor=4.0, window=8) == 0.001


def test_factor_zero_only_remembers() -> None:
    history = LossHistory(recent=[1.0] * 8)
    assert history.add(1000.0, factor=0.0, window=8) is None
    assert history.recent[-1] == 1000.0


def observe(judge: Judge, values: list[float]) -> tuple[Best, list[bool]]:
    best = Best()
    return best, [judge.observe(best, step, {judge.metric: value}) for step, value in enumerate(values, 1)]


def test_a_loss_gets_better_downwards_and_a_score_upwards() -> None:
    best, better = observe(Judge(metric="loss"), [3.0, 2.0, 2.5, 1.0])
    assert (best.value, best.step, better) == (1.0, 4, [True, True, False, True])
    best, better = observe(Judge(metric="exact_match"), [0.3, 0.2, 0.5, 0.5])
    assert (best.value, best.step, better) == (0.5, 3, [True, False, True, False])


def test_equal_scores_are_told_apart_by_the_loss() -> None:
    judge, best = Judge(metric="accuracy"), Best()
    better = [judge.observe(best, step, {"accuracy": 0.0, "loss": loss}) for step, loss in enumerate([5.0, 4.0, 4.5])]
    assert better == [True, True, False]
    assert (best.step, best.figures["loss"], best.stale) == (1, 4.0, 2)


def test_patience_counts_validations_without_improvement() -> None:
    judge = Judge(metric="loss", patience=2)
    best, _ = observe(judge, [3.0, 2.0, 2.5])
    assert not judge.gives_up(best)
    judge.observe(best, 4, {"loss": 2.0})
    assert judge.gives_up(best)
    assert not Judge(metric="loss").gives_up(best)


def test_a_small_improvement_is_the_best_but_does_not_buy_patience() -> None:
    judge = Judge(metric="loss", patience=2, min_improvement=0.5)
    best, better = observe(judge, [3.0, 2.9, 2.8])
    assert better == [True, True, True]
    assert best.step == 3
    assert judge.gives_up(best)
    creeping, _ = observe(judge, [3.0, 2.7, 2.4])
    assert creeping.stale == 0, "two small improvements together are one that counts"


@pytest.mark.parametrize("figures", [{}, {"accuracy": 1.0}, {"loss": NAN}])
def test_a_figure_that_cannot_be_compared_is_a_fault(figures: dict[str, float]) -> None:
    with pytest.raises(TrainingFault, match=r"step 5: the validation has no usable figure 'loss'") as fault:
        Judge(metric="loss").observe(Best(), 5, figures)
    expected = ", ".join(f"{name}={value}" for name, value in figures.items()) or "no figures"
    assert fault.value.problems[0].got == expected
