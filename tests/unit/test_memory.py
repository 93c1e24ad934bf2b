"""Memory before anything is loaded: exact where it can be counted, None where it cannot be known."""

import json
import struct
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from trainer.memory import (
    SMOLLM2_135M,
    TINY,
    activation_bytes,
    estimate,
    folder_parameters,
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


def test_weights_are_counted_from_safetensors_headers(tmp_path: Path) -> None:
    def write(name: str, header: dict[str, Any], length: int | None = None) -> None:
        raw = json.dumps(header).encode()
        (tmp_path / name).write_bytes(struct.pack("<Q", len(raw) if length is None else length) + raw)

    assert folder_parameters(tmp_path) is None
    write("a.safetensors", {"__metadata__": {"format": "pt"}, "x": {"shape": [3, 4]}, "scale": {"shape": []}})
    write("b.safetensors", {"y": {"shape": [5]}})
    assert folder_parameters(tmp_path) == 3 * 4 + 1 + 5
    write("b.safetensors", {"y": {"shape": [5]}}, length=10**15)
    assert folder_parameters(tmp_path) is None
    (tmp_path / "b.safetensors").write_bytes(b"short")
    assert folder_parameters(tmp_path) is None
    write("b.safetensors", {"y": {"size": [5]}})
    assert folder_parameters(tmp_path) is None


def test_adapter_weights() -> None:
    per_layer = 8 * ((576 + 576) * 2 + (576 + 192) * 2 + (576 + 1536) * 3)
    assert lora_parameters(SMOLLM2_135M, rank=8, targets=["all-linear"], adapted_layers=30) == 30 * per_layer
    assert lora_parameters(SMOLLM2_135M, rank=8, targets=["all-linear"], adapted_layers=15) == 15 * per_layer
    assert lora_parameters(SMOLLM2_135M, rank=2, targets=["k_proj", "other"], adapted_layers=1) == 2 * (576 + 192)
    assert lora_parameters(SMOLLM2_135M, rank=2, targets=["k_proj"], adapted_layers=1, dora=True) == 2 * 768 + 192


def test_full_fine_tuning_costs_sixteen_bytes_per_weight() -> None:
    weights = SMOLLM2_135M.parameters
    whole = estimate(SMOLLM2_135M, method="full", dtype="float32", capacity=1024, strategy="single")
    assert whole.parameters + whole.gradients + whole.optimizer == 16 * weights
    assert (whole.trainable, whole.total, whole.communication) == (weights, weights, 0)
    mixed = estimate(SMOLLM2_135M, method="full", dtype="bfloat16", capacity=1024, strategy="ddp")
    assert mixed.parameters == 4 * weights + 2 * 30 * SMOLLM2_135M.layer_parameters
    assert mixed.communication == 4 * weights
    frozen = estimate(
        SMOLLM2_135M, method="full", dtype="float32", capacity=1024, strategy="single", frozen_parameters=weights // 2
    )
    assert frozen.gradients + frozen.optimizer == 12 * (weights - weights // 2)


def test_lora_holds_the_base_once_in_the_compute_dtype() -> None:
    adapter = lora_parameters(SMOLLM2_135M, rank=8, targets=["all-linear"], adapted_layers=30)
    lora = estimate(
        SMOLLM2_135M, method="lora", dtype="bfloat16", capacity=1024, strategy="single", adapter_parameters=adapter
    )
    assert lora.parameters == 2 * SMOLLM2_135M.parameters + 4 * adapter
    assert lora.gradients + lora.optimizer == 12 * adapter
    assert lora.trainable == adapter
    assert lora.peak == lora.parameters + lora.gradients + lora.optimizer + lora.activations + lora.logits


def test_activations_grow_with_tokens_and_shrink_with_checkpointing() -> None:
    def bytes_of(tokens: int = 1024, layers: int = 30, checkpointing: bool = False) -> int:
        return activation_bytes(SMOLLM2_135M, tokens=tokens, size=2, layers=layers, checkpointing=checkpointing)

    assert bytes_of(2048) == 2 * bytes_of(1024)
    assert bytes_of(layers=15) == bytes_of() // 2
    assert bytes_of(checkpointing=True) == 30 * 1024 * 576 * 2 + bytes_of(layers=1)


def test_only_the_layers_that_the_gradient_passes_keep_activations() -> None:
    def activations(traversed: int | None) -> int:
        return estimate(
            SMOLLM2_135M,
            method="lora",
            dtype="bfloat16",
            capacity=1024,
            strategy="single",
            adapter_parameters=1,
            traversed_layers=traversed,
        ).activations

    assert activations(15) == activations(None) // 2


def test_one_chunk_of_logits_with_its_gradient() -> None:
    small = estimate(TINY, method="full", dtype="float32", capacity=64, strategy="single", loss_chunk=1024)
    large = estimate(TINY, method="full", dtype="float32", capacity=4096, strategy="single", loss_chunk=1024)
    assert small.logits == 2 * 4 * 64 * 2048
    assert large.logits == 2 * 4 * 1024 * 2048
