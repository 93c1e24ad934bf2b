"""The estimate beside what really happens: what autograd saves, what torch allocates, weights of a real model."""

from dataclasses import replace
from typing import Any

import memory as bench
import pytest
import torch
from memory import SHAPES, Trial
from transformers import LlamaConfig, LlamaForCausalLM

from trainer.memory import ModelShape

# torch.compile still uses what torch has deprecated itself (torch.jit in torch/utils/mkldnn.py; see test_compiling.py).
pytestmark = [
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning"),
    pytest.mark.filterwarnings("ignore:.torch.jit.*is deprecated:DeprecationWarning"),
]
WIDE = replace(SHAPES["tiny"], hidden=64, intermediate=512, heads=4, kv_heads=4, head_dim=32, vocabulary=2048)
PARTS = "aot_eager_decomp_partition"
"""torch.compile's own division of a layer into forward and backward pass, without generating code for it."""


def trial(method: Any, dtype: Any, **changed: Any) -> Trial:
    return Trial(**{"shape": SHAPES["tiny"], "method": method, "dtype": dtype, "tokens": 512, **changed})


def saved(of: Trial) -> int:
    """Bytes that autograd saves in a forward pass up to the last norm, without weights."""
    loss, batch = bench.make(of)
    own = {tensor.untyped_storage().data_ptr() for tensor in (*loss.parameters(), *loss.buffers())}
    found: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in own:
            found[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    context = torch.autocast("cpu", dtype=getattr(torch, of.dtype), enabled=of.dtype != "float32")
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), context:
        loss._hidden(batch)
    return sum(tensor.untyped_storage().nbytes() for tensor in found.values())


SAVED = [
    trial("full", "float32"),
    trial("full", "bfloat16"),
    trial("full", "bfloat16", shape=WIDE),
    trial("full", "float32", checkpointing=True),
    trial("lora", "float32"),
    trial("lora", "bfloat16"),
    trial("lora", "bfloat16", shape=WIDE),
    trial("lora", "bfloat16", checkpointing=True),
    trial("lora", "bfloat16", targets=("q_proj", "v_proj")),
    trial("full", "bfloat16", backend=PARTS),
    trial("lora", "bfloat16", backend=PARTS),
]


@pytest.mark.parametrize(
    "of",
    [pytest.param(of, marks=[pytest.mark.slow] if of.backend == PARTS else []) for of in SAVED],
    ids=lambda of: f"{of.method}-{of.dtype}-{of.shape.hidden}-{of.checkpointing}-{of.backend}",
)
def test_what_autograd_saves_for_three_more_layers(of: Trial) -> None:
    """A difference, so that what is around the layers does not count."""
    more = replace(of, shape=replace(of.shape, layers=6))
    counted = saved(more) - saved(of)
    small, large = of.estimated(), more.estimated()
    copies = 0 if of.checkpointing else large.copies - small.copies
    assert large.activations - small.activations + copies == pytest.approx(counted, rel=0.03)


def test_layers_below_the_lowest_adapter_save_nothing() -> None:
    every, upper = trial("lora", "bfloat16"), trial("lora", "bfloat16", from_layer=2)
    third = saved(upper) / saved(every)
    assert upper.estimated().activations / every.estimated().activations == pytest.approx(third, rel=0.1)
    assert third < 0.45


PEAKS = [
    trial("full", "float32"),
    trial("full", "bfloat16"),
    trial("full", "bfloat16", micro_batches=1),
    trial("full", "bfloat16", shape=replace(WIDE, vocabulary=8192)),
    trial("full", "bfloat16", checkpointing=True, tokens=1024),
    trial("lora", "float32", checkpointing=True, tokens=1024),
    trial("lora", "bfloat16"),
    trial("lora", "bfloat16", checkpointing=True, shape=WIDE),
]


@pytest.mark.parametrize(
    "of", PEAKS, ids=lambda of: f"{of.method}-{of.dtype}-{of.shape.hidden}-{of.checkpointing}-{of.micro_batches}"
)
def test_what_a_step_allocates(of: Trial) -> None:
    """The whole optimizer step on a CPU; the goal on a GPU is the same 10 %."""
    assert of.estimated().step == pytest.approx(bench.allocated_in_step(of), rel=0.1)


@pytest.mark.parametrize("shape", [SHAPES["1b"], replace(SHAPES["3b"], tied=False)], ids=["tied", "untied"])
def test_weights_are_counted_as_transformers_makes_them(shape: ModelShape) -> None:
    config = LlamaConfig(
        vocab_size=shape.vocabulary,
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        tie_word_embeddings=shape.tied,
    )
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    assert shape.parameters == sum(parameter.numel() for parameter in model.parameters())


def test_the_bench_prints_a_row(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    peak = bench.allocated_in_step(bench.trial_of("lora:tiny:512", "cpu", eager=False))
    monkeypatch.setattr(bench, "in_process_of_its_own", lambda *_, **__: peak)
    monkeypatch.setattr("sys.argv", ["memory.py", "--device", "cpu", "--cases", "lora:tiny:512"])
    bench.main()
    head, row = capsys.readouterr().out.splitlines()
    assert head.split() == ["case", "measured", "estimated", "ratio"]
    assert 0.9 < float(row.split()[-1]) < 1.1
    assert bench.table_row("x", None, 10**9).split() == ["x", "failed", "1.0", "GB"]
    with pytest.raises(SystemExit, match="not a case"):
        bench.trial_of("full:9b:1", "cuda", eager=False)
