"""The section ``tracking``: where a run's figures are shown besides its own folder."""

from dataclasses import dataclass, field
from typing import Literal

from trainer.config.bounds import NonNegative, Positive

TrackerName = Literal["wandb", "tensorboard", "trackio"]


@dataclass(slots=True, kw_only=True)
class TrackingConfig:
    """Trackers that a process beside the training feeds from the run folder. ``tracking=wandb``,
    ``tracking=[wandb,tensorboard]`` and ``tracking=none`` choose them. Not part of a run's identity."""

    wandb: bool = False
    """Weights & Biases (the extra ``wandb``)."""
    tensorboard: bool = False
    """TensorBoard event files (the extra ``tensorboard``)."""
    trackio: bool = False
    """Trackio, on this machine only (a package of its own; docs/tracking.md)."""
    project: str = "trimtab"
    """wandb, trackio: project."""
    entity: str | None = None
    """wandb: user or team; null: your default one."""
    name: str | None = None
    """wandb, trackio: how the run is called; null: ``run.name``, a dash, and its identity."""
    group: str | None = None
    """wandb, trackio: runs of one group are shown together."""
    tags: list[str] = field(default_factory=list[str])
    """wandb: tags."""
    notes: str | None = None
    """wandb: a remark."""
    upload: list[Literal["text", "weights"]] = field(default_factory=list[Literal["text", "weights"]])
    """What is sent besides numbers and config. ``text``: predictions of the test rows, with the answers, as tables.
    ``weights``: the export, as a versioned artifact (wandb)."""
    wandb_mode: Literal["online", "offline"] = "online"
    """wandb: ``offline`` writes into the run folder, for ``python -m trainer sync`` or ``wandb sync``. WANDB_MODE does
    the same."""
    tensorboard_dir: str | None = None
    """tensorboard: where the event files go; null: ``tracking/tensorboard`` in the run folder."""
    sample_seconds: Positive = 15.0
    """Seconds between looks at GPUs, CPUs and memory (``tracking/system.jsonl``)."""
    finish_seconds: NonNegative = 30.0
    """Seconds after the end of the run in which the rest is sent; what is left is for ``python -m trainer sync``."""

    @property
    def to(self) -> list[TrackerName]:
        """The trackers that were chosen."""
        chosen: dict[TrackerName, bool] = {
            "wandb": self.wandb,
            "tensorboard": self.tensorboard,
            "trackio": self.trackio,
        }
        return [name for name, wanted in chosen.items() if wanted]
