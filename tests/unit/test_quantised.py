"""A base in 4 bits: that it trains as LoRA on the numbers it stands for does, and stays as it was loaded."""

import importlib
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from model_fixtures import llama, pack
from plan_fixtures import planned, refused
from safetensors.torch import save_file
from torch import nn
from transformers import PreTrainedModel

from trainer.drive.overview import method_text
from trainer.errors import ModelError, RunError, TrainingFault
from trainer.layout import Devices
from trainer.memory import TINY
from trainer.model import quantised
from trainer.model.adapters import attach_lora, count_parameters, trainable_parameters
from trainer.model.load import load_model
from trainer.model.loss import PackedLoss
from trainer.model.quantised import check_quantised, quantisation_config, quantised_layers
from trainer.plan import estimate_memory

needs_bitsandbytes = pytest.mark.skipif(
    find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed (.[qlora])"
)
LINEAR = 2 * 7


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path, model = tmp_path_factory.mktemp("base"), llama()
    model.config.save_pretrained(path)
    save_file(model.state_dict(), path / "model.safetensors", metadata={"format": "pt"})
    return path


def dequantised(folder: Path, base: PreTrainedModel, dtype: torch.dtype) -> PreTrainedModel:
    """The plain model whose linear layers are the numbers that ``base`` stands for."""
    functional = cast(Any, importlib.import_module("bitsandbytes")).functional
    plain = load_model(folder, dtype=dtype)
    for name, module in quantised_layers(base).items():
        weight = cast(Any, module).weight
        cast(nn.Linear, plain.get_submodule(name)).weight.data.copy_(
            functional.dequantize_4bit(weight.data, weight.quant_state)
        )
    return plain


def adapted(base: PreTrainedModel, dtype: torch.dtype, **options: object) -> PackedLoss:
    torch.manual_seed(0)
    model = attach_lora(base, rank=4, alpha=8.0, **options)  # type: ignore[arg-type]
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.copy_(0.02 * torch.randn(parameter.shape, generator=generator))
    return PackedLoss(model, chunk=16, compute_dtype=dtype)


def learn(loss: PackedLoss) -> tuple[float, dict[str, torch.Tensor]]:
    """Loss and gradients of one pack."""
    loss.train()
    loss.zero_grad()
    value = loss(pack())
    value.backward()
    gradients = {name: cast(torch.Tensor, p.grad).clone() for name, p in trainable_parameters(loss).items()}
    return float(value.detach()), gradients


@needs_bitsandbytes
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "options", [{}, {"dora": True, "rslora": True}, {"tokens": [5, 9]}], ids=["lora", "dora", "tokens"]
)
def test_it_trains_bit_by_bit_as_its_numbers_in_full(
    folder: Path, dtype: torch.dtype, options: dict[str, object]
) -> None:
    base = load_model(folder, dtype=dtype, quantize="nf4")
    plain = dequantised(folder, base, dtype)
    assert len(quantised_layers(base)) == LINEAR
    (loss, found), (expected, wanted) = (learn(adapted(one, dtype, **options)) for one in (base, plain))
    assert loss == expected
    assert set(found) == set(wanted)
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    assert {gradient.dtype for gradient in found.values()} == {torch.float32}


@needs_bitsandbytes
def test_an_evaluation_leaves_it_as_it_was(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On some CPUs bitsandbytes would pack the weights for inference, and the next step would have no gradients."""
    functional = cast(Any, importlib.import_module("bitsandbytes")).nn.modules
    monkeypatch.setattr(functional, "has_avx512bf16", lambda: True)
    loss = adapted(load_model(folder, dtype=torch.bfloat16, quantize="nf4"), torch.bfloat16)
    before, gradients = learn(loss)
    with torch.no_grad():
        assert float(loss.eval()(pack())) == before
    again, same = learn(loss)
    assert again == before
    assert all(torch.equal(same[name], gradient) for name, gradient in gradients.items())


@needs_bitsandbytes
def test_only_linear_layers_are_in_4_bits(folder: Path) -> None:
    base = load_model(folder, dtype=torch.bfloat16, quantize="nf4")
    kinds = {name: p.dtype for name, p in base.named_parameters()}
    assert {n for n, kind in kinds.items() if kind == torch.uint8} == {f"{n}.weight" for n in quantised_layers(base)}
    assert {kind for name, kind in kinds.items() if "norm" in name or "embed" in name} == {torch.bfloat16}
    assert kinds["lm_head.weight"] == torch.bfloat16
    assert count_parameters(base)[1] == count_parameters(load_model(folder, dtype=torch.bfloat16))[1]


@needs_bitsandbytes
@pytest.mark.parametrize(
    ("spoil", "got"),
    [
        (lambda m: setattr(m.weight.quant_state, "nested", False), "nf4 with scales in float32, frozen"),
        (lambda m: setattr(m.weight.quant_state, "quant_type", "fp4"), "fp4 with scales in 8 bits"),
        (lambda m: setattr(m, "compute_dtype", torch.float16), "products in torch.float16"),
        (lambda m: setattr(m, "weight", nn.Parameter(torch.zeros(2, 2))), "a Parameter in torch.float32"),
    ],
    ids=["scales", "kind", "dtype", "whole"],
)
def test_what_is_not_as_planned_is_named(folder: Path, spoil: Callable[[Any], None], got: str) -> None:
    base = load_model(folder, dtype=torch.float32, quantize="nf4")
    name, module = list(quantised_layers(base).items())[3]
    spoil(module)
    with pytest.raises(TrainingFault, match="was not quantised as planned") as caught:
        check_quantised(base, "nf4", torch.float32)
    (problem,) = caught.value.problems
    assert problem.where == name
    assert got in problem.got


def test_a_model_without_linear_layers_is_refused() -> None:
    class Bare(nn.Module):
        def get_output_embeddings(self) -> None:
            return None

    with pytest.raises(ModelError, match="no linear layers that can be held in 4 bits"):
        check_quantised(cast(Any, Bare()), "nf4", torch.float32)


def test_without_bitsandbytes_it_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    problem = refused(tmp_path, "method=qlora", devices=Devices(gpus=4, cores=8, bitsandbytes=False))
    assert (problem.what, problem.where) == ("needs bitsandbytes, which is not installed", "method.quantize")
    assert problem.do == "pip install -c constraints.txt -e '.[qlora]', or method=lora"
    monkeypatch.setattr(quantised, "find_spec", lambda name: None)
    with pytest.raises(RunError, match="bitsandbytes cannot be imported"):
        quantisation_config("nf4", torch.float32)


def test_the_plan_names_it_and_other_runs_stay_what_they_are(tmp_path: Path) -> None:
    plan, plain = planned(tmp_path, "method=qlora"), planned(tmp_path)
    assert plan.identity != plain.identity
    assert method_text(plan) == "lora, rank 16, on a base in 4 bits (nf4)"
    assert method_text(plain) == "lora, rank 16"
    assert planned(tmp_path, "method.quantize=null").identity == plain.identity
    problem = refused(tmp_path, "method=full", "method.quantize=nf4")
    assert (problem.what, problem.where) == ("has no effect with method.name=full", "method.quantize")
    assert refused(tmp_path, "method=qlora", "model.compile=true").where == "model.compile"


def test_the_plan_counts_4_bits(tmp_path: Path) -> None:
    words = ("launch.processes=1", "model.dtype=bfloat16")
    plain, four = (estimate_memory(planned(tmp_path, f"method={name}", *words)) for name in ("lora", "qlora"))
    assert plain is not None
    assert four is not None
    linears, one_in_full = TINY.layers * (TINY.layer_parameters - 2 * TINY.hidden), 2 * TINY.intermediate * TINY.hidden
    spared = plain.parameters - four.parameters + one_in_full
    assert spared == pytest.approx(linears * (16 - 4.127) / 8, rel=1e-4)
