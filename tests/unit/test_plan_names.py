"""Names that the driver knows without importing their owners are the owners' names."""

from typing import get_args

import pytest

from trainer.config import LEGAL_TASKS, TaskName
from trainer.data.legal import tasks as legal
from trainer.evaluate.score import score
from trainer.rules.names import METRICS
from trainer.samples import EvaluationExample, Prediction

EXAMPLE = EvaluationExample(id="1", prompt_ids=[1], answer="yes", label="yes")
PREDICTION = Prediction(id="1", text="yes", token_ids=[1], stopped=True)


@pytest.mark.parametrize("task", [task for task in get_args(TaskName) if task != "text"])
def test_metrics_are_those_that_the_scorers_measure(task: TaskName) -> None:
    measured = score(task, [EXAMPLE], [PREDICTION], ["yes", "no"]).metrics
    assert {"loss", *measured} == {"stopped", *METRICS[task]}


def test_text_has_loss_alone() -> None:
    assert METRICS["text"] == ("loss",)
    assert set(METRICS) == set(get_args(TaskName))


def test_legal_tasks_are_those_that_are_derived() -> None:
    assert set(LEGAL_TASKS) == set(legal.INSTRUCTIONS)
