"""Which figures a run reports, by name, and which of them a trial is judged by."""

from trainer.config import Config
from trainer.rules.names import METRICS

VALIDATION = "val_"
TEST = "test_"


def reported_figures(config: Config, *, with_answers: bool | None = None) -> list[str]:
    """Names of the validation figures (``val_loss``) and of the final ones on the test split (``test_loss``).

    ``with_answers``: as if validation rows were answered and scored (``eval.generate_rows``).
    """
    data, task = config.data, config.task.name
    scores = [name for name in METRICS[task] if name != "loss"]
    scores += ["stopped"] if task != "text" else []
    answers = config.eval.generate_rows > 0 if with_answers is None else with_answers
    found: list[str] = []
    if data.kind != "files" or data.validation or data.validation_share > 0:
        found += [f"{VALIDATION}loss", *(f"{VALIDATION}{name}" for name in scores if answers)]
    if data.kind != "files" or data.test or data.test_share > 0:
        final = scores if task != "text" else ["perplexity"]
        found += [f"{TEST}loss", *(f"{TEST}{name}" for name in final)]
    return found
