"""Rules of what is asked of the model, and how its answers are measured."""

from collections.abc import Iterator
from dataclasses import asdict

from trainer.config import Config
from trainer.errors import Problem
from trainer.rules.names import METRICS
from trainer.rules.problems import changed, no_effect, not_among


def task_rules(config: Config) -> Iterator[Problem]:
    """Yield what is wrong with the labels."""
    task = config.task
    if task.labels and task.name != "classification":
        yield from no_effect("task", task, ("labels",), f"task.name={task.name}", "task=classification, or remove it")
    repeated = sorted({label for label in task.labels if task.labels.count(label) > 1})
    if repeated:
        yield Problem(what="names a label twice", where="task.labels", got=", ".join(repeated), do="name each once")
    if len(set(task.labels)) == 1:
        yield Problem(
            what="one label leaves nothing to choose",
            where="task.labels",
            got=task.labels[0],
            allowed="two labels or more, or [] for those of the training rows",
            do="add the others",
        )


def generation_rules(config: Config) -> Iterator[Problem]:
    """Yield a problem if not even one answer fits into a batch."""
    longest = config.task.max_new_tokens
    if config.task.name != "text" and config.eval.batch_tokens <= longest:
        yield Problem(
            what="not even one answer fits into a batch of generation",
            where="eval.batch_tokens",
            got=f"{config.eval.batch_tokens} with task.max_new_tokens={longest}",
            allowed=f"more than {longest}, and the longest prompt on top",
            do="raise eval.batch_tokens",
        )


def validation_rules(config: Config) -> Iterator[Problem]:
    """Yield what is wrong with what is measured during training, and with what that needs."""
    evaluation = config.eval
    metrics = METRICS[config.task.name]
    if evaluation.metric not in metrics:
        what = f"is not measured for task.name={config.task.name}"
        otherwise = "choose one of these"
        yield not_among(what, where="eval.metric", got=evaluation.metric, allowed=metrics, otherwise=otherwise)
    elif evaluation.metric != "loss" and evaluation.generate_rows == 0:
        yield Problem(
            what="needs answers, and none are generated during training",
            where="eval.generate_rows",
            got="0",
            allowed=f"1 or more with eval.metric={evaluation.metric}",
            do="eval.generate_rows=100",
        )
    if config.task.name == "text" and evaluation.generate_rows:
        yield from no_effect("eval", evaluation, ("generate_rows",), "task.name=text", "remove it")
    if evaluation.patience is None:
        yield from no_effect("eval", evaluation, ("min_improvement",), "eval.patience=null", "add eval.patience")
    if len(set(evaluation.baselines)) != len(evaluation.baselines):
        yield Problem(
            what="names a baseline twice", where="eval.baselines", got=str(evaluation.baselines), do="remove one"
        )
    if not _has_validation(config):
        given = asdict(evaluation)
        for name in changed(evaluation, ("patience", "max_loss", "generate_rows", "metric", "every")):
            yield Problem(
                what="needs validation rows, and there are none",
                where=f"eval.{name}",
                got=f"data.validation_share=0 and data.validation=[] with eval.{name}={given[name]}",
                allowed="a share above 0, or data.validation",
                do="data.validation_share=0.05",
            )


def _has_validation(config: Config) -> bool:
    """Say whether the run will have validation rows."""
    data = config.data
    return data.kind != "files" or bool(data.validation) or data.validation_share > 0
