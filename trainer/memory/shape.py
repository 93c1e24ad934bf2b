"""The sizes of a model, read out of its config.json before anything of it is loaded.

What cannot be known (a Hub model that is not on disk, another architecture) is None, never guessed.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import cast

LINEAR_NAMES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelShape:
    """Sizes of a decoder-only model with gated MLPs. ``max_positions``: longest text it was made for, in tokens."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocabulary: int
    tied: bool
    max_positions: int

    @property
    def linears(self) -> dict[str, tuple[int, int]]:
        """``{name: (inputs, outputs)}`` of the linear modules of one layer."""
        queries, keys = self.heads * self.head_dim, self.kv_heads * self.head_dim
        return {
            "q_proj": (self.hidden, queries),
            "k_proj": (self.hidden, keys),
            "v_proj": (self.hidden, keys),
            "o_proj": (queries, self.hidden),
            "gate_proj": (self.hidden, self.intermediate),
            "up_proj": (self.hidden, self.intermediate),
            "down_proj": (self.intermediate, self.hidden),
        }

    @property
    def layer_parameters(self) -> int:
        """Weights of one decoder layer: its linears and two norms."""
        return sum(inputs * outputs for inputs, outputs in self.linears.values()) + 2 * self.hidden

    @property
    def embedding_parameters(self) -> int:
        """Weights of the input embedding, and of the output layer where it is not tied to it."""
        return self.vocabulary * self.hidden * (1 if self.tied else 2)

    @property
    def parameters(self) -> int:
        """All weights."""
        return self.embedding_parameters + self.layers * self.layer_parameters + self.hidden


SMOLLM2_135M = ModelShape(
    hidden=576, layers=30, heads=9, kv_heads=3, head_dim=64, intermediate=1536, vocabulary=49152, tied=True,
    max_positions=8192,
)  # fmt: skip

TINY = ModelShape(
    hidden=64, layers=2, heads=4, kv_heads=2, head_dim=16, intermediate=192, vocabulary=2048, tied=True,
    max_positions=2048,
)  # fmt: skip


def read_shape(config: Mapping[str, object]) -> ModelShape | None:
    """Return the shape that a ``config.json`` of a Llama-like model describes; None for one that does not.

    A mixture of experts and an encoder-decoder are not Llama-like; neither is a config that lacks a size.
    """
    nested = config.get("text_config")
    if isinstance(nested, Mapping):
        config = cast("Mapping[str, object]", nested)
    if config.get("is_encoder_decoder") or any("expert" in name for name in config):
        return None
    names = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "vocab_size")
    sizes = [config.get(name) for name in names]
    hidden, layers, heads, intermediate, vocabulary = (size if isinstance(size, int) else 0 for size in sizes)
    if min(hidden, layers, heads, intermediate, vocabulary) < 1:
        return None
    kv_heads, head_dim = config.get("num_key_value_heads"), config.get("head_dim")
    positions, tied = config.get("max_position_embeddings"), config.get("tie_word_embeddings")
    return ModelShape(
        hidden=hidden,
        layers=layers,
        heads=heads,
        kv_heads=kv_heads if isinstance(kv_heads, int) else heads,
        head_dim=head_dim if isinstance(head_dim, int) else hidden // heads,
        intermediate=intermediate,
        vocabulary=vocabulary,
        tied=tied is True,
        max_positions=positions if isinstance(positions, int) else 0,
    )


def folder_shape(folder: Path) -> ModelShape | None:
    """Return the shape of the model in a local folder; None when its config.json is missing, damaged or different."""
    try:
        config: object = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return read_shape(cast("Mapping[str, object]", config)) if isinstance(config, dict) else None


def lora_parameters(
    shape: ModelShape, *, rank: int, targets: list[str], adapted_layers: int, dora: bool = False
) -> int:
    """Count adapter weights: ``rank * (inputs + outputs)`` per linear (arXiv 2106.09685), with DoRA + ``outputs``.

    Names that are no linear of a Llama-like layer count nothing.
    """
    names = LINEAR_NAMES if "all-linear" in targets else tuple(name for name in LINEAR_NAMES if name in targets)
    per_layer = sum(
        rank * (inputs + outputs) + (outputs if dora else 0)
        for name, (inputs, outputs) in shape.linears.items()
        if name in names
    )
    return per_layer * adapted_layers
