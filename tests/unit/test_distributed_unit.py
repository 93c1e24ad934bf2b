"""The strategy for one process, seeds, and everything that is checked at the start (two ranks: tests/distributed)."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from train_fixtures import tiny_loss

from trainer.distributed import ranks as ranks_module
from trainer.distributed.fragments import adam_state
from trainer.distributed.plain import Plain
from trainer.distributed.ranks import LaunchedAs, Ranks, launched_as, start_ranks
from trainer.distributed.seeds import seed_all
from trainer.distributed.strategy import Strategy, make_strategy
from trainer.errors import RunError, TrainingFault
from trainer.train.optim import make_optimizer


@pytest.fixture(scope="module")
def ranks() -> Ranks:
    return start_ranks(device="cpu", world_size=1)


def adamw(module: nn.Module) -> torch.optim.Optimizer:
    return make_optimizer(module, lr=1e-2, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0)


def linear(ranks: Ranks, clip_norm: float = 0.0) -> tuple[Strategy, nn.Linear]:
    torch.manual_seed(0)
    module = nn.Linear(3, 2)
    strategy = make_strategy("single", ranks, dtype=torch.float32, clip_norm=clip_norm)
    strategy.prepare(module, adamw)
    return strategy, module


# -- the launcher's variables --------------------------------------------------------------------------------------


def test_without_a_launcher_there_is_one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranks_module, "ENVIRONMENT", {})
    assert launched_as() == LaunchedAs(rank=0, local_rank=0, world_size=1)


def test_the_launchers_variables_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranks_module, "ENVIRONMENT", {"RANK": "5", "LOCAL_RANK": "1", "WORLD_SIZE": "8"})
    assert launched_as() == LaunchedAs(rank=5, local_rank=1, world_size=8)


@pytest.mark.parametrize("given", [{"RANK": "0"}, {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "two"}])
def test_half_a_launcher_is_refused(monkeypatch: pytest.MonkeyPatch, given: dict[str, str]) -> None:
    monkeypatch.setattr(ranks_module, "ENVIRONMENT", given)
    with pytest.raises(RunError, match="the launcher's variables are incomplete") as fault:
        launched_as()
    assert "RANK=0" in fault.value.problems[0].got


def test_another_number_of_processes_than_planned_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranks_module, "ENVIRONMENT", {})
    with pytest.raises(RunError, match="planned for another number of processes") as fault:
        start_ranks(device="cpu", world_size=2)
    assert fault.value.problems[0].got == "1 started"


def test_a_gpu_that_is_not_there_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(RunError, match="there is no GPU for this rank"):
        start_ranks(device="cuda", world_size=1)


def test_a_group_of_one_started_by_a_launcher_is_no_group(monkeypatch: pytest.MonkeyPatch) -> None:
    variables = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "OTHER": "stays"}
    monkeypatch.setattr(ranks_module, "ENVIRONMENT", variables)
    assert start_ranks(device="cpu", world_size=1).world_size == 1
    assert variables == {"OTHER": "stays"}


def test_accelerate_that_starts_something_else_is_noticed(ranks: Ranks) -> None:
    with pytest.raises(TrainingFault, match="accelerate did not start what was planned") as fault:
        ranks_module._check_group(ranks, "cpu", 2)
    assert fault.value.problems[0].got == "NO with 1 ranks on cpu"
    with pytest.raises(TrainingFault, match="with 1 ranks on cuda"):
        ranks_module._check_group(ranks, "cuda", 1)


# -- agreeing with oneself -----------------------------------------------------------------------------------------


def test_one_rank_agrees_with_itself(ranks: Ranks) -> None:
    values = torch.tensor([1.5, 2.0])
    assert torch.equal(ranks.sum_over_ranks(values), values)
    assert ranks.gather("x") == ["x"]
    ranks.same_on_all_ranks("abc", what="nothing")
    ranks.barrier()


def test_ranks_that_differ_are_named(ranks: Ranks, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Ranks, "gather", lambda self, value: [value, "other", value, "third"])
    with pytest.raises(TrainingFault, match="the ranks do not have the same plan") as fault:
        ranks.same_on_all_ranks("mine", what="plan")
    assert fault.value.problems[0].got == "rank 0 mine, rank 1 other, rank 3 third"


# -- seeds ---------------------------------------------------------------------------------------------------------


def draw() -> tuple[float, float]:
    return float(torch.rand(())), float(np.random.random())


def test_the_same_parts_give_the_same_noise_and_others_do_not() -> None:
    seen = set()
    for parts in [(0,), (0, 0), (0, 1), (1, 0), (0, 1, 2), (0, 2, 1), (2**40, 1)]:
        seed_all(*parts)
        first = draw()
        seed_all(*parts)
        assert draw() == first
        seen.add(first)
    assert len(seen) == 7


@pytest.mark.parametrize(("parts", "wanted"), [((5, 3, 7), 0.04914356042374968), ((2**40, 1), 0.8839814678254124)])
def test_a_run_that_an_older_version_began_goes_on_with_its_noise(parts: tuple[int, ...], wanted: float) -> None:
    seed_all(*parts)
    assert float(np.random.random()) == wanted


# -- plain strategy ------------------------------------------------------------------------------------------------


def test_the_gradient_is_clipped_to_the_norm_and_the_norm_before_is_reported(ranks: Ranks) -> None:
    strategy, module = linear(ranks, clip_norm=1.0)
    module.weight.grad = torch.full((2, 3), 3.0)
    module.bias.grad = torch.full((2,), 4.0)
    before = (6 * 9.0 + 2 * 16.0) ** 0.5
    assert float(strategy.clip()) == pytest.approx(before)
    assert float(torch.cat([module.weight.grad.flatten(), module.bias.grad]).norm()) == pytest.approx(1.0, abs=1e-5)


def test_clip_norm_zero_only_measures(ranks: Ranks) -> None:
    strategy, module = linear(ranks)
    module.weight.grad, module.bias.grad = torch.full((2, 3), 1e6), torch.zeros(2)
    assert float(strategy.clip()) == pytest.approx(6**0.5 * 1e6)
    assert torch.equal(module.weight.grad, torch.full((2, 3), 1e6))


def test_a_step_clears_the_gradients(ranks: Ranks) -> None:
    strategy, module = linear(ranks)
    before = module.weight.detach().clone()
    with strategy.micro_batch(last=True):
        strategy.backward(module(torch.ones(1, 3)).sum())
    strategy.step()
    assert module.weight.grad is None
    assert not torch.equal(module.weight.detach(), before)
    assert not strategy.may_overflow
    assert strategy.scaler_state() == {}


def test_fragments_are_live_views_of_weights_and_optimizer(ranks: Ranks) -> None:
    strategy, module = linear(ranks)
    (weight, bias) = strategy.fragments(saving=False)
    assert (weight.name, weight.start, weight.shape, weight.length) == ("weight", 0, (2, 3), 6)
    assert bias.shape == (2,)
    with torch.no_grad():
        weight.tensors["param"].fill_(7.0)
        weight.tensors["exp_avg"].fill_(0.5)
    weight.step.fill_(3)
    strategy.refresh()
    assert torch.equal(module.weight.detach(), torch.full((2, 3), 7.0))
    state = strategy.optimizer.state[module.weight]
    assert torch.equal(state["exp_avg"], torch.full((2, 3), 0.5))
    assert float(state["step"]) == 3.0


def test_state_made_before_the_first_step_is_what_adamw_makes(ranks: Ranks) -> None:
    """If it were not, a checkpoint before a parameter's first gradient would change the run."""
    (early, module), (late, other) = linear(ranks), linear(ranks)
    list(early.fragments(saving=True))
    for strategy, each in ((early, module), (late, other)):
        for _ in range(2):
            strategy.backward(each(torch.ones(1, 3)).pow(2).sum())
            strategy.step()
    for mine, fresh in zip(early.fragments(saving=True), late.fragments(saving=True), strict=True):
        assert torch.equal(mine.step, fresh.step)
        assert (mine.step.device, mine.step.dtype) == (fresh.step.device, fresh.step.dtype)
        assert all(torch.equal(mine.tensors[key], fresh.tensors[key]) for key in mine.tensors)


def test_another_optimizer_is_refused(ranks: Ranks) -> None:
    module = nn.Linear(3, 2)
    strategy = make_strategy("single", ranks, dtype=torch.float32, clip_norm=0.0)
    strategy.prepare(module, lambda m: torch.optim.SGD(m.parameters(), lr=0.1, momentum=0.9))
    strategy.backward(module(torch.ones(1, 3)).sum())
    strategy.step()
    with pytest.raises(TrainingFault, match="this optimizer's state is not AdamW's") as fault:
        adam_state(strategy.optimizer, strategy.trainable["weight"])
    assert fault.value.problems[0].got == "momentum_buffer"


def test_replicas_sum_their_gradients_in_the_last_micro_batch_only(ranks: Ranks, tmp_path: Path) -> None:
    """Without that every result is the same, only slower: nothing else would notice."""
    strategy = Plain(ranks, dtype=torch.float32, clip_norm=0.0)
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        replica = DistributedDataParallel(nn.Linear(3, 2))
        strategy._module = replica
        seen: list[bool] = []
        for last in (False, False, True):
            with strategy.micro_batch(last=last):
                seen.append(replica.require_backward_grad_sync)
        assert seen == [False, False, True]
    finally:
        torch.distributed.destroy_process_group()


def test_whole_parameters_and_the_module_itself(ranks: Ranks) -> None:
    strategy, module = linear(ranks)
    whole = dict(strategy.full_parameters())
    assert list(whole) == ["weight", "bias"]
    assert whole["bias"] is not None
    with strategy.gathered() as inner:
        assert inner is module is strategy.inner is strategy.module


def test_nothing_to_train_is_refused(ranks: Ranks) -> None:
    strategy = make_strategy("single", ranks, dtype=torch.float32, clip_norm=0.0)
    with pytest.raises(TrainingFault, match="there is nothing to train"):
        strategy.prepare(nn.Linear(2, 2).requires_grad_(False), adamw)


def test_trainable_parameters_in_16_bits_are_refused(ranks: Ranks) -> None:
    strategy = make_strategy("single", ranks, dtype=torch.bfloat16, clip_norm=0.0)
    with pytest.raises(TrainingFault, match="trainable parameters have to be float32") as fault:
        strategy.prepare(nn.Linear(2, 2).to(torch.bfloat16), adamw)
    assert fault.value.problems[0].got == "torch.bfloat16 in 2 of 2, first weight"


def test_a_wrapping_that_was_not_planned_is_refused(ranks: Ranks, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(type(ranks.accelerator), "prepare_model", lambda self, module: nn.Sequential(module))
    strategy = make_strategy("single", ranks, dtype=torch.float32, clip_norm=0.0)
    with pytest.raises(TrainingFault, match="accelerate did not wrap the model as planned") as fault:
        strategy.prepare(nn.Linear(2, 2), adamw)
    assert (fault.value.problems[0].got, fault.value.problems[0].allowed) == ("Sequential", "Linear")


def test_a_strategy_that_does_not_fit_the_group_is_refused(ranks: Ranks) -> None:
    with pytest.raises(RunError, match="does not fit the number of ranks") as fault:
        make_strategy("ddp", ranks, dtype=torch.float32, clip_norm=0.0)
    assert fault.value.problems[0].got == "ddp with 1 ranks"


def test_use_before_prepare_is_a_defect(ranks: Ranks) -> None:
    with pytest.raises(RuntimeError, match=re.escape("used before prepare()")):
        _ = Plain(ranks, dtype=torch.float32, clip_norm=0.0).module


# -- float16 -------------------------------------------------------------------------------------------------------


def test_float16_scales_the_loss_and_gives_back_unscaled_gradients(ranks: Ranks) -> None:
    plain, module = linear(ranks)
    scaled = make_strategy("single", ranks, dtype=torch.float16, clip_norm=0.0)
    torch.manual_seed(0)
    other = nn.Linear(3, 2)
    scaled.prepare(other, adamw)
    for strategy, each in ((plain, module), (scaled, other)):
        strategy.backward(each(torch.ones(1, 3)).sum())
    assert other.weight.grad is not None
    assert float(other.weight.grad.abs().max()) > 1000
    torch.testing.assert_close(scaled.clip(), plain.clip())
    torch.testing.assert_close(other.weight.grad, module.weight.grad)


def test_float16_overflow_skips_the_update_and_lowers_the_scale(ranks: Ranks) -> None:
    strategy = make_strategy("single", ranks, dtype=torch.float16, clip_norm=0.0)
    module = nn.Linear(3, 2)
    strategy.prepare(module, adamw)
    before = module.weight.detach().clone()
    strategy.backward(module(torch.ones(1, 3)).sum() * float("inf"))
    assert not torch.isfinite(strategy.clip())
    assert strategy.may_overflow
    scale = strategy.scaler_state()["scale"]
    strategy.step()
    assert torch.equal(module.weight.detach(), before)
    lowered = strategy.scaler_state()
    assert lowered["scale"] == scale / 2
    fresh = make_strategy("single", ranks, dtype=torch.float16, clip_norm=0.0)
    fresh.prepare(nn.Linear(3, 2), adamw)
    fresh.load_scaler_state(lowered)
    assert fresh.scaler_state() == lowered
    fresh.load_scaler_state(lowered | {"scale": 1.0})
    assert not fresh.may_overflow


def test_a_loss_scale_means_nothing_to_other_dtypes(ranks: Ranks) -> None:
    strategy, _ = linear(ranks)
    strategy.load_scaler_state({"scale": 2.0})
    assert strategy.scaler_state() == {}


def test_lora_names_are_stable(ranks: Ranks) -> None:
    strategy = make_strategy("single", ranks, dtype=torch.float32, clip_norm=0.0)
    strategy.prepare(tiny_loss(lora=True), adamw)
    assert all(".lora_" in name and not name.startswith("module.") for name in strategy.trainable)
