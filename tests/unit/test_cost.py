"""What a run costs is the sum of all that was written down, and says what was measured and what was assumed."""

from dataclasses import replace
from pathlib import Path

import pytest
from look_fixtures import plan_of

from trainer.config import Config
from trainer.config.cost import CostConfig
from trainer.cost.ledger import Account, Spell
from trainer.cost.sums import Cost, Factors, cost_of
from trainer.markers import STAGES
from trainer.paths import RunFolder
from trainer.plan import flat_identity, stage_inputs

RANK = Spell(stage="train", began="2026-01-01T00:00:00+00:00", rank=0, seconds=1800.0, gpus=1, gpu="H100")
FACTORS = Factors(gpu_watts=None, cpu_watts_per_core=5.0, pue=1.5, carbon_g_per_kwh=400.0)


def cost(*spells: Spell, factors: Factors = FACTORS) -> Cost:
    found = cost_of(Account(list(spells)), factors)
    assert found is not None
    return found


def test_nothing_written_down_is_not_nothing_spent() -> None:
    assert cost_of(Account([]), FACTORS) is None


def test_ranks_restarts_and_repeated_stages_add_up() -> None:
    again = replace(RANK, began="2026-01-02T00:00:00+00:00", seconds=900.0)
    found = cost(RANK, replace(RANK, rank=1), again, replace(again, rank=1), replace(again, stage="evaluate"))
    assert found.gpu_hours == pytest.approx((2 * 1800 + 3 * 900) / 3600)
    assert found.stages["train"].gpu_seconds == 2 * 1800 + 2 * 900
    assert found.stages["train"].starts == 2
    assert found.stages["evaluate"].starts == 1
    assert list(found.stages) == ["train", "evaluate"]
    assert found.gpus == ["H100"]


def test_measured_energy_becomes_co2_by_the_stated_factors() -> None:
    found = cost(replace(RANK, gpu_joules=1.8e6, gpu_meter="counter", cpu_joules=1.8e6, core_seconds=7200.0))
    assert found.together.estimated == 0.0  # a socket that says what it uses counts once
    assert found.kwh == pytest.approx(1.0)
    assert found.kwh_building == pytest.approx(1.5)
    assert found.co2_g == pytest.approx(600.0)
    assert found.measured_share == 1.0
    assert found.whole_sockets
    assert not found.sampled_power


def test_cpu_energy_is_assumed_by_the_core_where_no_socket_says_it() -> None:
    found = cost(Spell(stage="prepare", began="x", rank=-1, seconds=10.0, core_seconds=7200.0))
    assert found.together.estimated == 7200.0 * 5.0
    assert (found.measured_share, found.core_hours, found.gpu_hours) == (0.0, 2.0, 0.0)
    assert not found.whole_sockets


def test_a_gpu_that_did_not_say_drew_what_the_others_drew() -> None:
    """A rank that was killed and one whose driver was silent for a while do not make the whole unknown."""
    told = replace(RANK, gpu_joules=1800.0 * 500, core_seconds=0.0)
    found = cost(told, replace(RANK, seconds=900.0), factors=replace(FACTORS, gpu_watts=9999.0))
    assert found.together.measured == 1800.0 * 500
    assert found.together.estimated == 900.0 * 500


def test_no_gpu_says_anything_and_a_figure_is_given() -> None:
    found = cost(RANK, factors=replace(FACTORS, gpu_watts=700.0))
    assert found.together.estimated == 1800.0 * 700
    assert found.measured_share == 0.0


def test_unknown_energy_is_unknown_and_not_a_part_of_it() -> None:
    found = cost(replace(RANK, core_seconds=100.0))
    assert found.together.unknown_gpu_seconds == 1800.0
    assert (found.kwh, found.kwh_building, found.co2_g) == (None, None, None)
    assert found.gpu_hours == 0.5, "the hours are known"


def test_a_price_is_shown_when_it_is_given() -> None:
    assert cost(RANK).price is None
    assert cost(RANK, factors=replace(FACTORS, price_per_gpu_hour=3.0)).price == 1.5


def test_power_that_was_read_now_and_then_is_named() -> None:
    assert cost(replace(RANK, gpu_joules=5.0, gpu_meter="power")).sampled_power


def test_factors_are_the_fields_of_the_config() -> None:
    config = CostConfig()
    assert {name: getattr(config, name) for name in CostConfig.__slots__} == {
        name: getattr(Factors(), name) for name in Factors.__slots__
    }


def test_factors_change_nothing_but_the_card() -> None:
    folder = RunFolder(Path("run"))
    before = plan_of(folder)
    after = plan_of(folder, Config(cost=CostConfig(pue=1.0, carbon_g_per_kwh=56.0)))
    changed = [stage for stage in STAGES if stage_inputs(before, stage) != stage_inputs(after, stage)]
    assert changed == ["card"]
    assert flat_identity(before) == flat_identity(after)
