"""A run folder with a plan, made in-process, and a stand-in for its base model, for tests of ``trainer.prepare``."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from trainer.compose import compose
from trainer.paths import RunFolder, write_atomic
from trainer.plan import Devices, dump_plan, make_plan


def planned(tmp_path: Path, *overrides: str) -> RunFolder:
    """Compose and plan a run on one CPU core below ``tmp_path`` and write its plan.json."""
    where = [f"run.root={tmp_path}/runs", f"run.cache={tmp_path}/cache", "launch.device=cpu", "model.dtype=float32"]
    config = compose([*where, *overrides], config_dir=None, cwd=tmp_path)
    plan = make_plan(config, devices=Devices(gpus=0, cores=1), cwd=tmp_path)
    folder = RunFolder(Path(plan.run_dir))
    write_atomic(folder.plan_json, dump_plan(plan))
    return folder


def write_rows(path: Path, rows: Sequence[Mapping[str, object]]) -> Path:
    """Write ``rows`` as JSON lines."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def question(number: int, answer: str = "payment") -> dict[str, object]:
    """A short row; every number asks something else."""
    return {"prompt": f"Clause {number}: the buyer pays within {number} days.", "completion": f"{answer} {number}"}
