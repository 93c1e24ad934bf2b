"""Plans of layouts on a machine with four GPUs, and the shape of a model that is worth dividing."""

from pathlib import Path

import pytest

from trainer.compose import compose
from trainer.errors import ConfigError, Problem
from trainer.layout import Devices
from trainer.memory import ModelShape
from trainer.plan import RunPlan, make_plan

GPUS = Devices(gpus=4, cores=8)
LLAMA_8B = ModelShape(
    hidden=4096,
    layers=32,
    heads=32,
    kv_heads=8,
    head_dim=128,
    intermediate=14336,
    vocabulary=128256,
    tied=False,
    max_positions=8192,
)


def planned(home: Path, *overrides: str, devices: Devices = GPUS) -> RunPlan:
    (home / "my.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')
    config = compose(["model=tiny", "data.train=my.jsonl", *overrides], config_dir=None, cwd=home)
    return make_plan(config, devices=devices, cwd=home)


def refused(home: Path, *overrides: str, devices: Devices = GPUS) -> Problem:
    with pytest.raises(ConfigError) as caught:
        planned(home, *overrides, devices=devices)
    (problem,) = caught.value.problems
    return problem
