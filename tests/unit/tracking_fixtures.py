"""A run folder as a training leaves it, and the process beside it, without any training."""

import json
from pathlib import Path

from plan_fixtures import planned

from trainer.drive.tracked import Beside
from trainer.layout import Devices
from trainer.paths import RunFolder, write_atomic
from trainer.plan import RunPlan, dump_plan


def make_run(home: Path, *overrides: str) -> tuple[RunFolder, RunPlan]:
    """A planned run with nothing in its folder but the plan."""
    home.mkdir(exist_ok=True)
    words = ("launch.device=cpu", f"run.dir={home / 'run'}", *overrides)
    plan = planned(home, *words, devices=Devices(gpus=0, cores=2))
    folder = RunFolder(Path(plan.run_dir))
    write_atomic(folder.plan_json, dump_plan(plan))
    return folder, plan


def write_steps(folder: RunFolder, last: int) -> None:
    """``metrics.jsonl`` until ``last``, in a new file, as a resume leaves it. The loss of step 2 is not finite."""
    lines = [
        {"step": step, "loss": "nan" if step == 2 else 1 / step, "lr": 0.1, "seconds": {"data": 0.5}}
        for step in range(1, last + 1)
    ]
    write_atomic(folder.metrics_jsonl, "".join(f"{json.dumps(line)}\n" for line in lines))


def track(folder: RunFolder, plan: RunPlan, code: int = 0) -> None:
    """The process beside a run that ends with ``code``."""
    beside = Beside(folder, plan)
    beside.start()
    beside.ends_with(code)
    beside.finish()
