"""Steps that are not taken and states that are gone back to, under every strategy: the course is that of replicas."""

from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
from train_fixtures import Run, make_data, read_metrics, run_ranks, with_data

from trainer.distributed.strategy import StrategyName
from trainer.train.guard import NonFiniteAction

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]

ZERO: list[StrategyName] = ["zero1", "zero2", "zero3"]
OTHERS: list[StrategyName] = ["fsdp", *(ZERO if find_spec("deepspeed") is not None else [])]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_data(tmp_path_factory.mktemp("data"))


@pytest.mark.parametrize("asynchronous", [True, False])
@pytest.mark.parametrize("action", ["skip", "rollback"])
def test_every_strategy_passes_over_a_faulty_step_alike(
    tmp_path: Path, data: Path, action: NonFiniteAction, asynchronous: bool
) -> None:
    """Step 7 is poisoned on rank 1, in the first of two micro-batches; the checkpoint before is that of step 4."""
    run = Run(folder="", world_size=2, packs=4, lr=1e-3, max_steps=12, poison_at=7, poison_rank=1, nonfinite=action)
    curves: dict[str, list[float]] = {}
    for name in ("ddp", *OTHERS):
        folder = with_data(tmp_path / name, data)
        ended = run_ranks(replace(run, folder=str(folder), strategy=name, asynchronous=asynchronous))
        assert [code for code, _ in ended] == [0, 0], "\n".join(output for _, output in ended)
        lines = read_metrics(folder)
        assert [line["loss"] == "nan" for line in lines] == [step == 7 for step in range(1, 13)], name
        curves[name] = [line["loss"] for line in lines if line["step"] != 7]
    for name in OTHERS:
        assert np.abs(np.array(curves[name]) - np.array(curves["ddp"])).max() <= 1e-5, name
