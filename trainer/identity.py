"""The identity of a run: all that its training depends on, and nothing else: a command finds its run again."""

from dataclasses import asdict
from typing import Any, cast

from trainer.config import Config
from trainer.fingerprint import digest
from trainer.layout import batch_packs
from trainer.rules.added_tokens import added_tokens

FORMAT = 1
"""Counted up when what a run does changes, so that an old one is not continued as if it were a new one."""


def identity_parts(config: Config, of_model: str, of_data: str) -> dict[str, Any]:
    """Return everything that the result of training depends on, as plain values.

    Left out on purpose: where and how it runs (parallel, launch, ``model.activation_checkpointing``,
    ``model.compile``, cache and run folder), what happens afterwards (export, baselines, ``eval.max_loss``,
    ``data.max_test_rows``, result slices), what only guards it (guard, checkpoint, ``data.max_dropped_share``), and the
    code. Kept of ``eval`` is what chooses the best checkpoint or ends training early: another ``eval.metric`` or
    ``eval.patience`` is another result.
    Fields that have no effect beside others are left out as well, so that they cannot split one run in two.
    """
    sections = cast("dict[str, dict[str, Any]]", asdict(config))
    model, data, method, optim = sections["model"], sections["data"], sections["method"], sections["optim"]
    dropped = [
        "train",
        "validation",
        "test",
        "mixture",
        "revision",
        "slice_columns",
        "max_test_rows",
        "max_dropped_share",
    ]
    if config.data.over_long != "split":
        dropped.append("split_overlap")
    lora = config.method.name == "lora"
    silent = [
        "adapter",
        *(["quantize"] if config.method.quantize is None else []),
    ]  # null: the runs of before there was it
    of_method = [name for name in method if name not in silent and name.startswith("freeze_") != lora]
    return {
        "format": FORMAT,
        "model": {
            "content": of_model,
            **{name: model[name] for name in ("dtype", "trust_remote_code")},
            **added_tokens(config),
        },
        "data": {"content": of_data, **{name: value for name, value in data.items() if name not in dropped}},
        "task": {"name": config.task.name, "labels": config.task.labels},
        "method": {name: method[name] for name in of_method},
        "optim": {
            **{name: value for name, value in optim.items() if name not in ("batch_packs", "batch_tokens")},
            "batch_packs": batch_packs(config),
        },
        "packing": sections["packing"],
        "eval": _selection(config),
        "run": {"seed": config.run.seed},
    }


def _selection(config: Config) -> dict[str, Any]:
    """Return what chooses the best checkpoint and the end of training."""
    evaluation = config.eval
    parts: dict[str, Any] = {"every": evaluation.every, "metric": evaluation.metric}
    if evaluation.patience is not None:
        parts |= {"patience": evaluation.patience}
    if evaluation.min_improvement:
        parts |= {"min_improvement": evaluation.min_improvement}
    if evaluation.metric != "loss":
        parts |= {"generate_rows": evaluation.generate_rows, "max_new_tokens": config.task.max_new_tokens}
    return parts


def identity_of(config: Config, of_model: str, of_data: str) -> str:
    """Return the first ten hex digits of the digest of ``identity_parts``."""
    return digest(identity_parts(config, of_model, of_data))[:10]


def flatten(parts: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested ``parts`` by their dotted names; the pairs of ``columns`` are one value."""
    flat: dict[str, Any] = {}
    for name, value in parts.items():
        if isinstance(value, dict) and name != "columns":
            flat |= flatten(cast("dict[str, Any]", value), f"{prefix}{name}.")
        else:
            flat[prefix + name] = value
    return flat
