"""The learning rate is a pure function of the step, and weight decay spares what it should."""

import math

import pytest
import torch
from torch import nn
from train_fixtures import tiny_loss, tiny_model
from transformers import get_scheduler

from trainer.train.optim import ScheduleName, lr_schedule, make_optimizer, undecayed, warmup_steps


@pytest.mark.parametrize("name", ["linear", "cosine"])
def test_follows_the_scheduler_of_transformers_step_by_step(name: ScheduleName) -> None:
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler = get_scheduler(name, optimizer, num_warmup_steps=3, num_training_steps=20)
    factor = lr_schedule(name, steps=20, warmup=0.15)
    for step in range(20):
        assert factor(step) == optimizer.param_groups[0]["lr"]
        optimizer.step()
        scheduler.step()


def test_any_step_can_be_asked_for_in_any_order() -> None:
    factor = lr_schedule("cosine", steps=50, warmup=0.1)
    assert [factor(step) for step in (40, 3, 40)] == [factor(40), factor(3), factor(40)]
    assert factor(40) != factor(3)


def test_warm_up_starts_at_zero_and_reaches_the_peak() -> None:
    factor = lr_schedule("constant", steps=20, warmup=0.1)
    assert [factor(step) for step in (0, 1, 2, 19)] == [0.0, 0.5, 1.0, 1.0]
    assert warmup_steps(21, 0.1) == math.ceil(2.1)


def test_no_warm_up_starts_at_the_peak() -> None:
    assert lr_schedule("cosine", steps=20)(0) == 1.0


@pytest.mark.parametrize("name", ["constant", "linear", "cosine", "warmup_stable_decay"])
def test_min_ratio_is_a_floor_after_the_warm_up_and_leaves_the_warm_up_alone(name: ScheduleName) -> None:
    with_floor = lr_schedule(name, steps=40, warmup=0.1, min_ratio=0.25)
    without = lr_schedule(name, steps=40, warmup=0.1)
    for step in range(40):
        expected = without(step) if step < 4 else 0.25 + 0.75 * without(step)
        assert with_floor(step) == pytest.approx(expected, abs=1e-12)
    assert with_floor(39) >= 0.25


def test_warmup_stable_decay_is_flat_and_then_comes_down() -> None:
    factor = lr_schedule("warmup_stable_decay", steps=100, warmup=0.1)
    assert {factor(step) for step in range(10, 80)} == {1.0}
    tail = [factor(step) for step in range(81, 100)]
    assert tail == sorted(tail, reverse=True)
    assert tail[-1] < 0.1


@pytest.mark.parametrize("steps", [1, 2, 3])
@pytest.mark.parametrize("name", ["constant", "linear", "cosine", "warmup_stable_decay"])
def test_very_short_runs_have_finite_factors(name: ScheduleName, steps: int) -> None:
    factor = lr_schedule(name, steps=steps, warmup=0.03)
    assert all(0.0 <= factor(step) <= 1.0 for step in range(steps))


def test_decay_spares_norms_biases_and_embeddings() -> None:
    spared = undecayed(tiny_model())
    assert "model.embed_tokens.weight" in spared
    assert "model.norm.weight" in spared
    assert "model.layers.0.input_layernorm.weight" in spared
    assert "model.layers.0.mlp.up_proj.weight" not in spared
    assert "lm_head.weight" not in spared


def test_an_output_layer_tied_to_the_embeddings_is_spared_too() -> None:
    model = tiny_model()
    model.lm_head.weight = model.model.embed_tokens.weight
    optimizer = make_optimizer(model, lr=1e-3, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
    shared = model.lm_head.weight
    groups = [g["weight_decay"] for g in optimizer.param_groups if any(p is shared for p in g["params"])]
    assert groups == [0.0]


def test_the_optimizer_has_the_trainable_parameters_once_and_nothing_frozen() -> None:
    module = tiny_loss(lora=True)
    optimizer = make_optimizer(module, lr=1e-3, betas=(0.9, 0.95), eps=1e-6, weight_decay=0.1)
    held = [id(p) for group in optimizer.param_groups for p in group["params"]]
    assert sorted(held) == sorted(id(p) for p in module.parameters() if p.requires_grad)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1]
    assert optimizer.defaults["betas"] == (0.9, 0.95)
    assert optimizer.defaults["eps"] == 1e-6


def test_decay_pulls_matrices_and_leaves_norms() -> None:
    model = tiny_model()
    optimizer = make_optimizer(model, lr=0.5, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.1)
    named = dict(model.named_parameters())
    matrix, norm = named["model.layers.0.mlp.up_proj.weight"], named["model.norm.weight"]
    before = matrix.detach().clone(), norm.detach().clone()
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    torch.testing.assert_close(matrix.detach(), before[0] * 0.95)
    assert torch.equal(norm.detach(), before[1])
