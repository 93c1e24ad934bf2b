"""What the keys of ``tracking`` say together: a key of a tracker that is not used has no effect."""

from collections.abc import Iterator

from trainer.config import Config
from trainer.errors import Problem
from trainer.rules.problems import no_effect

OF_WANDB = ("entity", "tags", "notes", "wandb_mode")
NAMED = ("project", "name", "group")
OF_ANY = ("upload", "sample_seconds", "finish_seconds")


def tracking_rules(config: Config) -> Iterator[Problem]:
    """Yield keys of trackers that are not used, and weights that nobody takes or that are not exported."""
    tracking = config.tracking
    if not tracking.to:
        names = (*OF_WANDB, *NAMED, *OF_ANY, "tensorboard_dir")
        yield from no_effect("tracking", tracking, names, "no tracker", "tracking=wandb, or remove it")
        return
    if not tracking.wandb:
        yield from no_effect("tracking", tracking, OF_WANDB, "tracking.wandb=false", "add wandb, or remove it")
    if not (tracking.wandb or tracking.trackio):
        yield from no_effect("tracking", tracking, NAMED, "tensorboard alone", "add wandb or trackio, or remove it")
    if not tracking.tensorboard:
        without = "tracking.tensorboard=false"
        yield from no_effect("tracking", tracking, ("tensorboard_dir",), without, "add tensorboard, or remove it")
    if "weights" in tracking.upload and not tracking.wandb:
        yield Problem(
            what="only wandb takes weights",
            where="tracking.upload",
            got=f"weights with {', '.join(tracking.to)}",
            allowed="text",
            do="add wandb, or remove it",
        )
    if "weights" in tracking.upload and not (config.export.adapter or config.export.merged):
        yield Problem(
            what="there will be no weights to send",
            where="tracking.upload",
            got="weights with export.adapter=false and export.merged=false",
            do="export one of them, or remove it",
        )
    for key, value in (("project", tracking.project), ("name", tracking.name), ("group", tracking.group)):
        if value is not None and not value.strip():
            yield Problem(what="is empty", where=f"tracking.{key}", got=repr(value), do="give a name, or remove it")
