"""Memory before anything is loaded: exact where it can be counted, None where it cannot be known."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from trainer.memory import (
    SMOLLM2_135M,
    TINY,
    Adapter,
    Forward,
    MemoryEstimate,
    activation_bytes,
    estimate,
    folder_shape,
    lora_parameters,
    read_shape,
)

LLAMA = {
    "hidden_size": 576,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "intermediate_size": 1536,
    "vocab_size": 49152,
    "tie_word_embeddings": True,
    "max_position_embeddings": 8192,
}


def test_a_config_gives_the_shape_and_the_exact_number_of_weights() -> None:
    shape = read_shape(LLAMA)
    assert shape == SMOLLM2_135M
    assert shape is not None
    assert shape.parameters == 134_515_008
    assert replace(shape, tied=False).parameters == 134_515_008 + 49152 * 576
    assert read_shape({"text_config": LLAMA}) == shape


def test_the_tiny_model_is_as_large_as_transformers_makes_it() -> None:
    assert TINY.parameters == 2048 * 64 + 2 * (2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 192 + 2 * 64) + 64


@pytest.mark.parametrize(
    "change",
    [
        {"hidden_size": None},
        {"num_hidden_layers": 0},
        {"vocab_size": "many"},
        {"is_encoder_decoder": True},
        {"num_local_experts": 8},
    ],
)
def test_other_architectures_are_unknown(change: dict[str, Any]) -> None:
    assert read_shape({**LLAMA, **change}) is None


def test_defaults_of_a_config() -> None:
    config = {key: LLAMA[key] for key in LLAMA if key not in ("num_key_value_heads", "tie_word_embeddings")}
    shape = read_shape(config)
    assert shape is not None
    assert (shape.kv_heads, shape.tied, shape.head_dim) == (9, False, 64)
    wide = read_shape({**LLAMA, "head_dim": 128})
    assert wide is not None
    assert wide.linears["q_proj"] == (576, 9 * 128)


def test_a_folder_without_a_usable_config_is_unknown(tmp_path: Path) -> None:
    assert folder_shape(tmp_path) is None
    (tmp_path / "config.json").write_text("{")
    assert folder_shape(tmp_path) is None
    (tmp_path / "config.json").write_text("[]")
    assert folder_shape(tmp_path) is None
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    assert folder_shape(tmp_path) == SMOLLM2_135M


def test_adapter_weights() -> None:
    per_layer = 8 * ((576 + 576) * 2 + (576 + 192) * 2 + (576 + 1536) * 3)
    assert lora_parameters(SMOLLM2_135M, rank=8, targets=["all-linear"], adapted_layers=30) == 30 * per_layer
    assert lora_parameters(SMOLLM2_135M, rank=8, targets=["all-linear"], adapted_layers=15) == 15 * per_layer
    assert lora_parameters(SMOLLM2_135M, rank=2, targets=["k_proj", "other"], adapted_layers=1) == 2 * (576 + 192)
    assert lora_parameters(SMOLLM2_135M, rank=2, targets=["k_proj"], adapted_layers=1, dora=True) == 2 * 768 + 192


def lora(**changed: Any) -> MemoryEstimate:
    count = lora_parameters(SMOLLM2_135M, rank=8, targets=["all-linear"], adapted_layers=30)
    adapter = Adapter(rank=8, linears=frozenset(SMOLLM2_135M.linears), layers=30, parameters=count)
    given = {"method": "lora", "dtype": "bfloat16", "capacity": 1024, "strategy": "single", "adapter": adapter}
    return estimate(SMOLLM2_135M, **{**given, **changed})


def full(**changed: Any) -> MemoryEstimate:
    given = {"method": "full", "dtype": "float32", "capacity": 1024, "strategy": "single"}
    return estimate(SMOLLM2_135M, **{**given, **changed})


LAYER_LINEARS = SMOLLM2_135M.layer_parameters - 2 * 576


def test_full_fine_tuning_costs_sixteen_bytes_per_weight() -> None:
    weights = SMOLLM2_135M.parameters
    whole = full()
    assert whole.parameters + whole.gradients + whole.optimizer == 16 * weights
    assert (whole.trainable, whole.total, whole.communication, whole.copies) == (weights, weights, 0, 0)
    mixed = full(dtype="bfloat16", strategy="ddp")
    assert (mixed.parameters, mixed.copies) == (4 * weights, 2 * 30 * LAYER_LINEARS)
    assert mixed.communication == 4 * weights
    frozen = full(frozen_layers=10, frozen_embeddings=True)
    left = weights - 10 * SMOLLM2_135M.layer_parameters - SMOLLM2_135M.embedding_parameters
    assert frozen.gradients + frozen.optimizer == 12 * left


def test_lora_holds_the_base_once_in_the_compute_dtype() -> None:
    found = lora()
    assert found.parameters == 2 * SMOLLM2_135M.parameters + 4 * found.trainable
    assert found.gradients + found.optimizer == 12 * found.trainable
    assert found.copies == 2 * found.trainable


def test_a_base_in_four_bits_costs_its_scales_and_one_matrix_in_the_compute_dtype() -> None:
    spared = lora().parameters - lora(quantized=True).parameters
    bits = 16 - (4 + 8 / 64 + 32 / (64 * 256))
    assert spared == pytest.approx(30 * LAYER_LINEARS * bits / 8 - 2 * 576 * 1536, abs=1)


def test_what_adds_up_and_what_takes_turns() -> None:
    found = full(dtype="bfloat16")
    always = found.parameters + found.optimizer + found.batches
    passing = found.copies + found.activations + max(found.logits, found.working)
    assert found.step == found.peak == always + passing + found.gradients
    alone = full(dtype="bfloat16", accumulation=1)
    assert alone.step == always + max(passing, found.gradients + found.working)
    assert replace(alone, loading=10**12).peak == replace(alone, generating=10**12).peak == 10**12


def test_activations_grow_with_tokens_and_shrink_with_checkpointing() -> None:
    forward = Forward(size=2, residual=4)

    def bytes_of(tokens: int = 1024, layers: int = 30, checkpointing: bool = False) -> tuple[int, int]:
        return activation_bytes(
            SMOLLM2_135M, forward, tokens=tokens, trained_layers=layers, checkpointing=checkpointing
        )

    assert bytes_of(2048)[0] == 2 * bytes_of(1024)[0]
    positions = 1024 * 2 * 4 * 64
    assert bytes_of(layers=15)[0] - positions == (bytes_of()[0] - positions) // 2
    kept, again = bytes_of(checkpointing=True)
    assert kept == 30 * 1024 * 576 * 4 + positions
    assert again == (bytes_of()[0] - positions) // 30


def test_only_what_the_gradient_passes_keeps_activations() -> None:
    every, upper = lora().activations, lora(lowest_layer=15).activations
    assert upper < 0.51 * every
    few = Adapter(rank=8, linears=frozenset({"q_proj", "v_proj"}), layers=30, parameters=1)
    assert lora(adapter=few).activations < every
    bottom = replace(few, linears=frozenset(SMOLLM2_135M.linears), layers=10)
    passed = lora(adapter=bottom).activations
    assert upper < passed < every, "the layers above the adapters are passed, and save less than adapted ones"
    assert full(frozen_layers=15, frozen_embeddings=True).activations < 0.51 * full().activations
    assert 0.51 * full().activations < full(frozen_layers=15).activations < full().activations


def test_a_compiled_layer_saves_less_and_a_gpu_without_grouped_heads_more() -> None:
    assert lora(compiled=True).activations < lora().activations
    assert full(dtype="bfloat16", compiled=True).activations < full(dtype="bfloat16").activations
    repeated = lora(repeats_keys=True).activations - lora().activations
    assert repeated == 30 * 1024 * 2 * 2 * (9 - 3) * 64
    assert lora(repeats_keys=True, device="cpu").activations == lora(device="cpu").activations


def test_the_loss_costs_a_chunk_of_logits_and_the_gradient_of_a_trained_output_layer() -> None:
    def of(capacity: int, **changed: Any) -> int:
        given = {"method": "full", "dtype": "float32", "strategy": "single", "loss_chunk": 1024}
        return estimate(TINY, **{**given, "capacity": capacity, **changed}).logits

    around, head = 4 * (2 * 64 + 1 + 2 * 64), 4 * 2048 * 64
    assert of(64) == 12 * 64 * 2048 + head + 64 * around
    assert of(4096) == 12 * 1024 * 2048 + 2 * head + 4096 * around, "more than one chunk: their sum as well"
    assert of(64, compiled=True) == 8 * 64 * 2048 + head + 64 * around
    assert of(64, frozen_embeddings=True) == 12 * 64 * 2048 + 64 * around
