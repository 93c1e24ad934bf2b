"""How much memory a rank will need, estimated before anything is loaded.

First version: right within tens of percent for decoder-only models with gated MLPs (Llama, Qwen, Mistral, SmolLM,
Gemma), which is enough to say that a 7B model does not fit before it was downloaded into a queue slot. What cannot be
known (a Hub model that is not on disk, another architecture) is None and printed as unknown, never guessed.
"""

import json
import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, cast

from trainer_launch.zero import BUCKET, ZeroSpec

StrategyName = Literal["single", "ddp", "fsdp", "zero1", "zero2", "zero3"]
LOSS_CHUNK = 1024
LOGITS_AT_ONCE = 2**30
NF4_BITS = 4 + 8 / 64 + 32 / (64 * 256)
"""Bits of a weight in nf4: a scale of 8 bits for 64 weights, and one of 32 bits for 256 scales (arXiv 2305.14314)."""
BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
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


@dataclass(frozen=True, slots=True, kw_only=True)
class Shards:
    """How fsdp divides a model among ``ranks``.

    ``keep_layers``: gathered layers are kept from the forward to the backward pass. ``whole_gradients``: micro-batches
    add up gradients of all trained weights on every rank. ``gather_for_generation``: every rank holds the whole model
    while answers are generated. ``offload``: what a rank owns is in main memory and not counted. ``sliced``: a
    rank reads its own rows from the files, and the whole model is never there.
    """

    ranks: int
    keep_layers: bool
    whole_gradients: bool
    gather_for_generation: bool
    offload: bool = False
    sliced: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryEstimate:
    """Bytes on one rank at the peak of an optimizer step. ``logits`` are those of one chunk of the loss.

    ``communication``: gradient buckets of DDP and ZeRO; what fsdp and ZeRO-3 gather, and the buffers they gather and
    reduce through. ``loading``, ``generating``: all that a rank holds at another time, when the whole model is there
    before it is cut, and when it is gathered to generate; 0: never more than in a step. ``trainable`` and ``total``
    count weights.
    """

    parameters: int
    gradients: int
    optimizer: int
    activations: int
    logits: int
    communication: int
    trainable: int
    total: int
    loading: int = 0
    generating: int = 0

    @property
    def step(self) -> int:
        """The sum: activations and logits are at their largest when everything else is there as well."""
        parts = (self.parameters, self.gradients, self.optimizer, self.activations, self.logits, self.communication)
        return sum(parts)

    @property
    def peak(self) -> int:
        """The most at any time of a run."""
        return max(self.step, self.loading, self.generating)


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


def folder_parameters(folder: Path) -> int | None:
    """Count the weights in the safetensors files of a folder by their headers; None when there are none to read.

    The header is a little-endian uint64 length and that many bytes of JSON: ``{tensor: {dtype, shape, ...}}``
    (https://github.com/huggingface/safetensors#format).
    """
    total = 0
    for file in sorted(folder.glob("*.safetensors")):
        try:
            with file.open("rb") as handle:
                (length,) = struct.unpack("<Q", handle.read(8))
                if length > file.stat().st_size:
                    return None
                header: dict[str, dict[str, list[int]]] = json.loads(handle.read(length))
            total += sum(math.prod(tensor["shape"]) for name, tensor in header.items() if name != "__metadata__")
        except (OSError, ValueError, KeyError, struct.error):
            return None
    return total or None


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


def estimate(
    shape: ModelShape,
    *,
    method: Literal["full", "lora"],
    dtype: str,
    capacity: int,
    strategy: StrategyName,
    shards: Shards | None = None,
    zero: ZeroSpec | None = None,
    gather_for_generation: bool = False,
    adapter_parameters: int = 0,
    frozen_parameters: int = 0,
    quantized: bool = False,
    traversed_layers: int | None = None,
    checkpointing: bool = False,
    loss_chunk: int = LOSS_CHUNK,
) -> MemoryEstimate:
    """Estimate one rank's memory for micro-batches of ``capacity`` tokens.

    Full: weights, gradients and AdamW's two moments are float32, 16 bytes per weight, and autocast keeps a 16-bit copy
    of the linears (ZeRO, arXiv 1910.02054, section 3.1, counts the same states). LoRA: the base is held in the compute
    dtype without gradients; adapters cost those 16 bytes. DDP adds flat gradient buckets as large as the gradients;
    FSDP (``shards``) is counted in ``_sharded``, ZeRO (``zero``, ``gather_for_generation``) in ``_divided``.
    ``quantized`` (LoRA): the linears of the base in ``NF4_BITS``, and one of them at a time in the compute dtype.
    ``frozen_parameters`` of full fine-tuning have neither gradients nor moments. ``traversed_layers``: those that the
    gradient passes through, from the lowest adapter up; None: all.
    """
    size = BYTES[dtype]
    if method == "full":
        total, trainable = shape.parameters, shape.parameters - frozen_parameters
        copies = shape.layers * shape.layer_parameters * size if size < 4 else 0
        parameters = 4 * total + copies
    else:
        total, trainable = shape.parameters + adapter_parameters, adapter_parameters
        parameters = size * shape.parameters + 4 * adapter_parameters
        if quantized:
            largest = max(inputs * outputs for inputs, outputs in shape.linears.values())
            linears = shape.layers * (shape.layer_parameters - 2 * shape.hidden)
            parameters += size * largest - round(linears * (size - NF4_BITS / 8))
    through = shape.layers if traversed_layers is None else traversed_layers
    whole = MemoryEstimate(
        parameters=parameters,
        gradients=4 * trainable,
        optimizer=8 * trainable,
        activations=activation_bytes(shape, tokens=capacity, size=size, layers=through, checkpointing=checkpointing),
        logits=2 * 4 * min(loss_chunk, capacity) * shape.vocabulary,
        communication=4 * trainable if strategy == "ddp" else 0,
        trainable=trainable,
        total=total,
    )
    stored = 4 * total if method == "full" else parameters
    if zero is not None:
        casts = (parameters - stored) // (shape.layers if checkpointing else 1)
        return _divided(shape, whole, zero, stored=stored, casts=casts, gathers=gather_for_generation)
    if shards is None:
        return whole
    return _sharded(shape, whole, shards, stored=stored, size=size, adapter_parameters=adapter_parameters)


def _sharded(
    shape: ModelShape, whole: MemoryEstimate, shards: Shards, *, stored: int, size: int, adapter_parameters: int
) -> MemoryEstimate:
    """Divide what ``whole`` counts among the ranks, and add what fsdp gathers (``trainer/distributed/fsdp.py``).

    ``stored``: bytes of all weights as they are stored, without copies that autocast makes. A layer is gathered in the
    compute dtype of ``size`` bytes. At the peak one layer computes, the next one has been gathered, and a third place
    is the flat buffer that it came through; embeddings and output layer are gathered as they are stored for the whole
    micro-batch. Gradients are reduced in float32 from the largest of these groups, through one more buffer of its size;
    with ``whole_gradients`` those of all trained weights are on every rank until the last micro-batch.
    """
    outer_weights = shape.embedding_parameters + shape.hidden
    outer = outer_weights * (stored - 4 * adapter_parameters) // shape.parameters
    adapters = adapter_parameters // shape.layers
    layer = size * (shape.layer_parameters + adapters)
    gathered = outer + layer * ((shape.layers if shards.keep_layers else 2) + 1)
    largest = adapters or min(whole.trainable, max(shape.layer_parameters, outer_weights))
    unreduced = 4 * (whole.trainable if shards.whole_gradients else largest)
    parts = [0 if shards.offload else -(-size // shards.ranks) for size in (stored, whole.optimizer, whole.gradients)]
    parameters, optimizer, gradients = parts
    return replace(
        whole,
        parameters=parameters,
        gradients=unreduced + gradients,
        optimizer=optimizer,
        communication=gathered + 4 * largest,
        loading=0 if shards.sliced else stored,
        generating=parameters + optimizer + outer + layer * shape.layers if shards.gather_for_generation else 0,
    )


def _divided(
    shape: ModelShape, whole: MemoryEstimate, zero: ZeroSpec, *, stored: int, casts: int, gathers: bool
) -> MemoryEstimate:
    """Divide what ``whole`` counts as the stage of ``zero`` does (``trainer/distributed/zero.py``).

    ``stored``: bytes of all weights as they are stored; ``casts``: of the 16-bit copies that the graph keeps of them.
    The masters are a copy of the owned part. Stage 1 has whole gradients, and its part of them once more; stage 2 its
    part, twice where micro-batches add up. All reduce through a bucket; stage 3 gathers the largest module and what is
    fetched ahead. What is offloaded is not counted: it is in main memory.
    """
    ranks, trained = zero.world_size, 4 * whole.trainable
    share, part = -(-trained // ranks), -(-stored // ranks)
    gradients = {1: trained + share, 2: share * (2 if zero.accumulation > 1 else 1), 3: share}[zero.stage]
    if zero.offload_optimizer:
        gradients = trained if zero.stage == 1 else 0
    optimizer = 0 if zero.offload_optimizer else 3 * share
    if zero.stage < 3:
        return replace(
            whole, gradients=gradients, optimizer=optimizer, communication=4 * BUCKET, loading=stored + trained + share
        )
    largest = max(shape.vocabulary * shape.hidden, shape.layer_parameters)
    ahead = (2 * BUCKET + largest) * stored // whole.total
    parameters = 0 if zero.offload_parameters else part
    return replace(
        whole,
        parameters=parameters + casts,
        gradients=gradients,
        optimizer=optimizer,
        communication=4 * BUCKET + min(stored, ahead),
        loading=stored + part,
        generating=parameters + optimizer + stored if gathers else 0,
    )


def loss_chunk(strategy: StrategyName, device: Literal["cpu", "cuda"], capacity: int, vocabulary: int) -> int:
    """Return how many positions of a pack are projected to the vocabulary at once.

    On a GPU as many as have ``LOGITS_AT_ONCE`` bytes of 16-bit logits: large products, and a small part of its memory.
    Under zero3 all: it gathers the output layer for each chunk, and ranks whose packs have other numbers of chunks
    would wait for each other forever.
    """
    if strategy == "zero3":
        return capacity
    return max(LOSS_CHUNK, LOGITS_AT_ONCE // (2 * vocabulary)) if device == "cuda" else LOSS_CHUNK


def activation_bytes(shape: ModelShape, *, tokens: int, size: int, layers: int, checkpointing: bool) -> int:
    """Estimate what the backward pass finds saved: per token and layer, what each operation of a Llama layer keeps.

    Counted as in arXiv 2205.05198, section 4.1, with attention that never stores its score matrix: input, normalised
    input and float32 copy of both norms; queries, keys, values, the attention's output and its float32 log-sum-exp;
    gate, up, activated gate and their product. With checkpointing: the input of every layer, and one layer in full.
    ``layers`` are those the gradient passes through (layers below the lowest adapter keep nothing).
    """
    queries, keys = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    in_compute_dtype = 4 * shape.hidden + 2 * queries + 2 * keys + 4 * shape.intermediate
    in_float32 = 2 * shape.hidden + shape.heads
    per_layer = tokens * (size * in_compute_dtype + 4 * in_float32)
    if checkpointing:
        return layers * tokens * shape.hidden * size + per_layer
    return layers * per_layer
