"""Names that a config may use for models, data and metrics, and what kind of thing a name is."""

from trainer.config import TaskName

BUILTIN_MODELS = ("builtin:smollm2-135m-instruct", "builtin:tiny")
HUB_DATA = "hub:"
METRICS: dict[TaskName, tuple[str, ...]] = {
    "classification": ("loss", "exact_match", "accuracy", "macro_f1", "valid_labels"),
    "extraction": ("loss", "exact_match", "token_f1"),
    "summary": ("loss", "exact_match", "rouge1", "rouge2", "rougeL"),
    "chat": ("loss", "exact_match", "token_f1"),
    "text": ("loss",),
}
"""What ``eval.metric`` may be, by task. ``loss`` is better when lower, everything else when higher."""


def is_hub_model(path: str) -> bool:
    """Say whether ``model.path`` can only be a Hub id: no built-in name, and not written like a folder."""
    written_like_folder = path.startswith(("/", ".", "~")) or path.count("/") > 1 or path.endswith("/")
    return not path.startswith("builtin:") and not written_like_folder
