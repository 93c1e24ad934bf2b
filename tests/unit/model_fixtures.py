"""Tiny models and packs made in the process, for the tests of trainer/model and whoever else needs one."""

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from transformers import (
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from trainer.batch import Batch
from trainer.model.attention import IMPLEMENTATION, register
from trainer.model.selfcheck import probe_batch

CPU = torch.device("cpu")
VOCABULARY = 128
LENGTHS = (7, 1, 33, 64, 15)
SHAPE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
    # Ten times the usual spread: in a fresh model attention hardly moves the logits, and a leak would be hard to see.
    "initializer_range": 0.2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def _prepared(make: Callable[[], PreTrainedModel]) -> PreTrainedModel:
    register()
    torch.manual_seed(0)
    model = make()
    model.set_attn_implementation(IMPLEMENTATION)
    model.config.use_cache = False
    return model.float()


def llama(**changes: object) -> PreTrainedModel:
    """Llama with grouped heads."""
    return _prepared(lambda: LlamaForCausalLM(LlamaConfig(**{**SHAPE, **changes})))  # pyright: ignore


def qwen3() -> PreTrainedModel:
    """Qwen3: norms on queries and keys, tied output layer."""
    return _prepared(lambda: Qwen3ForCausalLM(Qwen3Config(**SHAPE, tie_word_embeddings=True)))  # pyright: ignore


def mistral() -> PreTrainedModel:
    """Mistral that sees 9 tokens back at most."""
    return _prepared(lambda: MistralForCausalLM(MistralConfig(**SHAPE, sliding_window=9)))  # pyright: ignore


def granite() -> PreTrainedModel:
    """Granite: logits are divided."""
    return _prepared(lambda: GraniteForCausalLM(GraniteConfig(**SHAPE, logits_scaling=8.0)))  # pyright: ignore


def cohere() -> PreTrainedModel:
    """Cohere: logits are multiplied."""
    return _prepared(lambda: CohereForCausalLM(CohereConfig(**SHAPE, logit_scale=0.0625)))  # pyright: ignore


def gemma2(*, attention_cap: float | None) -> PreTrainedModel:
    """Gemma 2: soft-capped logits, and soft-capped attention scores unless ``attention_cap`` is None."""
    config = Gemma2Config(
        **SHAPE,  # pyright: ignore
        final_logit_softcapping=3.0,
        attn_logit_softcapping=attention_cap,  # pyright: ignore
        sliding_window=9,
    )
    return _prepared(lambda: Gemma2ForCausalLM(config))


def documents(lengths: Sequence[int] = LENGTHS, seed: int = 0) -> list[list[int]]:
    """Random token ids from 3 on."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, VOCABULARY, (n,), generator=generator).tolist() for n in lengths]


def pack(lengths: Sequence[int] = LENGTHS, seed: int = 0) -> Batch:
    """A pack of random documents in which everything is learnt."""
    return probe_batch(documents(lengths, seed), CPU)


def without_targets(batch: Batch) -> Batch:
    """The same pack with nothing to learn."""
    return Batch(
        input_ids=batch.input_ids,
        labels=torch.full_like(batch.labels, -100),
        position_ids=batch.position_ids,
        cu_seqlens=batch.cu_seqlens,
        boundaries=batch.boundaries,
        max_seqlen=batch.max_seqlen,
        num_tokens=batch.num_tokens,
        num_targets=0,
    )


def gradients(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Gradients by name; every trainable parameter must have one."""
    found: dict[str, torch.Tensor] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None, f"{name} has no gradient"
            found[name] = parameter.grad.clone()
    model.zero_grad()
    return found


def save(model: PreTrainedModel, folder: Path) -> Path:
    """Write a model folder with a stand-in for the tokenizer."""
    model.save_pretrained(folder)
    (folder / "tokenizer.json").write_text("{}", "utf-8")
    return folder


def assert_near(value: torch.Tensor, reference: torch.Tensor, *, largest: float, mean: float) -> None:
    """Bound the largest and the mean difference: a wrong token hides in the mean, a small shift in the largest."""
    difference = (value.detach().double() - reference.detach().double()).abs()
    assert value.shape == reference.shape
    assert float(difference.max()) <= largest, f"largest difference {float(difference.max()):.2e} > {largest:g}"
    assert float(difference.mean()) <= mean, f"mean difference {float(difference.mean()):.2e} > {mean:g}"
