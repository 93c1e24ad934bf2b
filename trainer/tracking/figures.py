"""What trackers are told, as plain names and numbers: rows by step, and facts of the whole run.

Numbers and config only. Texts of rows, labels and values of slices are data and stay here, unless they are asked for
(``texts.py``).
"""

from collections.abc import Iterator, Mapping
from typing import Any, cast

import msgspec

from trainer.markers import STAGES, read_marker
from trainer.paths import RunFolder
from trainer.plan import RunPlan
from trainer.records import Record
from trainer.redaction import redact

NOT_FINITE = ("nan", "inf", "-inf")
"""How ``metrics.jsonl`` writes what JSON has no number for."""
OF_LINEAGE = ("format", "created", "name", "identity", "dtype", "dtype_reason", "stop_token_ids", "world_size")
OF_BASE = ("name", "revision", "sha256", "license", "attribution", "parameters")
SOURCE = ("name", "location", "sha256", "rows", "revision", "license", "attribution")


def row_of(record: Record) -> dict[str, float]:
    """The figures of one step: ``train/loss``, ``val/loss``, ``seconds/optimizer``."""
    row: dict[str, float] = {}
    for name, value in _numbers(record):
        if name == "step":
            continue
        if name.startswith("val_"):
            row[f"val/{name.removeprefix('val_')}"] = value
        else:
            row[name if "/" in name else f"train/{name}"] = value
    return row


def as_in_sweep_files(figures: Mapping[str, float]) -> dict[str, float]:
    """Those of ``figures`` (a row or a summary) that a sweep may be judged by, as its file calls them.

    ``val_loss`` of a row is that of its step; of a summary, that of the best checkpoint, as for any other sweep.
    """
    found: dict[str, float] = {}
    for name, value in figures.items():
        for prefix, own in (("val/", "val_"), ("best/", "val_"), ("test/tuned/", "test_")):
            if name.startswith(prefix) and name not in ("best/step", "test/tuned/rows"):
                found[own + name.removeprefix(prefix)] = value
    return found


def _numbers(record: Mapping[str, object]) -> Iterator[tuple[str, float]]:
    for name, value in record.items():
        if isinstance(value, dict):
            below = cast("dict[str, object]", value)
            yield from ((f"{name}/{inner}", number) for inner, number in _numbers(below))
        elif isinstance(value, int | float) or value in NOT_FINITE:
            yield name, float(cast("float | str", value))


def config_of(plan: RunPlan) -> dict[str, Any]:
    """The composed config, and what the plan made of it, without secrets."""
    made = {"identity": plan.identity, "world_size": plan.world_size, "device": plan.device, "strategy": plan.strategy}
    made |= {"batch_packs": plan.batch_packs, "accumulation": plan.accumulation, "code_version": plan.code_version}
    return redacted({**msgspec.to_builtins(plan.config), "plan": made})


def summary_of(folder: RunFolder) -> dict[str, float]:
    """Figures of the whole run: ``test/tuned/accuracy``, ``best/loss``, ``stage_seconds/train``."""
    found: dict[str, float] = {}
    for stage in STAGES:
        marker = read_marker(folder, stage)
        if marker is None:
            continue
        found[f"stage_seconds/{stage}"] = marker.seconds
        if stage == "train":
            found |= {name.replace("_", "/", 1): value for name, value in _numbers(marker.summary) if "best_" in name}
    for path in sorted(folder.evaluation.glob("*.json")):
        record = msgspec.json.decode(path.read_bytes(), type=dict[str, Any])
        who, metrics = record.get("who", path.stem), record.get("metrics", {})
        figures = {**metrics, "loss": record.get("loss"), "rows": record.get("rows")}
        found |= {f"test/{who}/{name}": value for name, value in _numbers(figures)}
    return found


def lineage_of(folder: RunFolder) -> dict[str, Any]:
    """Where the result came from: hashes, revisions, licences, counts, code, packages; empty before the end."""
    if not folder.lineage_json.is_file():
        return {}
    lineage = msgspec.json.decode(folder.lineage_json.read_bytes(), type=dict[str, Any])
    data = lineage["data"]
    told = {name: lineage[name] for name in OF_LINEAGE if name in lineage}
    told["base"] = _only(lineage["base"], OF_BASE)
    told["sources"] = [_only(source, SOURCE) for source in data["sources"]]
    told |= {"splits": data["splits"], "splits_sha256": data["splits_sha256"]}
    told |= {"exports": lineage["exports"], "environment": lineage["environment"]}
    return redacted(told)


def _only(values: Mapping[str, Any], names: tuple[str, ...]) -> dict[str, Any]:
    return {name: values[name] for name in names if name in values}


def redacted(value: Any) -> Any:
    """``value`` with every secret in its texts replaced, at any depth."""
    if isinstance(value, str):
        return redact(value)
    if isinstance(value, dict):
        return {key: redacted(part) for key, part in cast("dict[str, Any]", value).items()}
    if isinstance(value, list):
        return [redacted(part) for part in cast("list[Any]", value)]
    return value
