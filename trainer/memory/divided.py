"""One process's memory shared out among ranks, as each strategy does: DDP, fsdp and the three stages of ZeRO."""

from dataclasses import dataclass, replace
from typing import Literal

from trainer.memory.loss_chunk import LOSS_CHUNK
from trainer.memory.shape import ModelShape
from trainer.memory.step import (
    BYTES,
    FLOAT32,
    NF4_BITS,
    Adapter,
    MemoryEstimate,
    Weights,
    count_weights,
    forward_of,
    one_process,
)
from trainer_launch.zero import BUCKET, ZeroSpec

StrategyName = Literal["single", "ddp", "fsdp", "zero1", "zero2", "zero3"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Shards:
    """How fsdp divides a model among ``ranks``.

    ``keep_layers``: gathered layers are kept from the forward to the backward pass. ``whole_gradients``: micro-batches
    add up gradients of all trained weights on every rank. ``gather_for_generation``: every rank holds the whole model
    while answers are generated. ``offload``: what a rank owns is in main memory. ``sliced``: a rank reads its own rows
    from the files, and the whole model is never there.
    """

    ranks: int
    keep_layers: bool
    whole_gradients: bool
    gather_for_generation: bool
    offload: bool = False
    sliced: bool = False


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
    adapter: Adapter | None = None,
    frozen_layers: int = 0,
    frozen_embeddings: bool = False,
    lowest_layer: int = 0,
    checkpointing: bool = False,
    loss_chunk: int = LOSS_CHUNK,
    accumulation: int = 2,
    device: Literal["cpu", "cuda"] = "cuda",
    compiled: bool = False,
    repeats_keys: bool = False,
    quantized: bool = False,
    added_tokens: bool = False,
    sliced: bool = False,
) -> MemoryEstimate:
    """Estimate one rank's memory for micro-batches of ``capacity`` tokens in the compute ``dtype``.

    Full: weights are float32, and autocast keeps a 16-bit copy of the matrices; the first ``frozen_layers`` layers and
    the ``frozen_embeddings`` have neither gradients nor moments. LoRA (``adapter``): the base is held in the compute
    dtype, ``quantized`` with its linears in 4 bits, without gradients; the gradient passes through all layers from
    ``lowest_layer`` up. Rows of ``added_tokens`` are put into a copy of the output layer, which gets a gradient. DDP
    adds flat gradient buckets as large as the gradients; FSDP (``shards``) and ZeRO (``zero``,
    ``gather_for_generation``) divide; ``sliced``: no rank of ZeRO-3 ever has the whole model while it is loaded.
    ``accumulation``: micro-batches of a rank in a step.
    """
    size = BYTES[dtype]
    frozen = frozen_layers * shape.layer_parameters + (shape.embedding_parameters if frozen_embeddings else 0)
    tuned = adapter if method == "lora" else None
    weights = count_weights(shape, size=size, adapter=tuned, frozen=frozen, linear_bits=NF4_BITS if quantized else None)
    if added_tokens and method == "lora":
        weights = replace(weights, head_copy=size * shape.vocabulary * shape.hidden)
    if shards is not None:  # layers are gathered in the compute dtype: autocast copies none of them
        weights = replace(weights, copies=0)
    trained, through = (
        _reached_by_adapter(shape, adapter, lowest_layer)
        if method == "lora"
        else _reached_by_all(shape, frozen_layers, frozen_embeddings)
    )
    whole = one_process(
        shape,
        weights,
        forward_of(method=method, size=size, device=device, compiled=compiled, repeats_keys=repeats_keys),
        capacity=capacity,
        accumulation=accumulation,
        chunk=loss_chunk,
        adapter=tuned,
        trained_layers=trained,
        passed_layers=through - trained,
        checkpointing=checkpointing,
        head_trained=added_tokens if method == "lora" else not frozen_embeddings,
    )
    if strategy == "ddp":
        return replace(whole, communication=FLOAT32 * weights.trainable)
    if zero is not None:
        return _by_zero(shape, whole, weights, zero, gathers=gather_for_generation, sliced=sliced)
    if shards is not None:
        return _by_fsdp(shape, whole, weights, shards, size=size, adapter=tuned)
    return whole


def _reached_by_adapter(shape: ModelShape, adapter: Adapter | None, lowest_layer: int) -> tuple[int, int]:
    """How many layers are trained, and through how many the gradient passes."""
    through = shape.layers - lowest_layer
    return min(through, 0 if adapter is None else adapter.layers), through


def _reached_by_all(shape: ModelShape, frozen_layers: int, frozen_embeddings: bool) -> tuple[int, int]:
    """As ``_reached_by_adapter``, for full fine-tuning."""
    trained = shape.layers - frozen_layers
    return trained, trained if frozen_embeddings else shape.layers


def _by_fsdp(
    shape: ModelShape, whole: MemoryEstimate, weights: Weights, shards: Shards, *, size: int, adapter: Adapter | None
) -> MemoryEstimate:
    """Divide what ``whole`` counts among the ranks, and add what fsdp gathers (``trainer/distributed/fsdp.py``).

    A layer is gathered in the compute dtype of ``size`` bytes. At the peak one layer computes, the next one has been
    gathered, and a third place is the flat buffer that it came through; embeddings and output layer are gathered as
    they are stored for the whole micro-batch. Gradients are reduced in float32 from the largest of these groups,
    through one more buffer of its size; with ``whole_gradients`` those of all trained weights are on every rank until
    the last micro-batch.
    """
    outer_weights = shape.embedding_parameters + shape.hidden
    outer = outer_weights * (size if adapter is not None else FLOAT32)
    adapters = 0 if adapter is None else adapter.parameters // shape.layers
    layer = size * (shape.layer_parameters + adapters)
    gathered = outer + layer * ((shape.layers if shards.keep_layers else 2) + 1)
    largest = adapters or min(weights.trainable, max(shape.layer_parameters, outer_weights))
    unreduced = FLOAT32 * (weights.trainable if shards.whole_gradients else largest)
    owned = [-(-size // shards.ranks) for size in (weights.stored, whole.optimizer, whole.gradients)]
    parameters, optimizer, gradients = (0, 0, 0) if shards.offload else owned
    return replace(
        whole,
        parameters=parameters,
        gradients=unreduced + gradients,
        optimizer=optimizer,
        communication=gathered + FLOAT32 * largest,
        loading=0 if shards.sliced else weights.stored,
        generating=parameters + optimizer + outer + layer * shape.layers if shards.gather_for_generation else 0,
        offloaded=sum(owned) if shards.offload else 0,
        adds_up=True,
    )


def _by_zero(
    shape: ModelShape, whole: MemoryEstimate, weights: Weights, zero: ZeroSpec, *, gathers: bool, sliced: bool
) -> MemoryEstimate:
    """Divide what ``whole`` counts as the stage of ``zero`` does (``trainer/distributed/zero.py``).

    The masters are a copy of the owned part. Stage 1 has whole gradients, and its part of them once more; stage 2 its
    part, twice where micro-batches add up. All reduce through a bucket; stage 3 gathers the largest module and what is
    fetched ahead. What is offloaded is in main memory.
    """
    ranks, trained = zero.world_size, FLOAT32 * weights.trainable
    share, part = -(-trained // ranks), -(-weights.stored // ranks)
    gradients = {1: trained + share, 2: share * (2 if zero.accumulation > 1 else 1), 3: share}[zero.stage]
    if zero.offload_optimizer:
        gradients = trained if zero.stage == 1 else 0
    optimizer = 0 if zero.offload_optimizer else 3 * share
    offloaded = 4 * share if zero.offload_optimizer else 0
    if zero.stage < 3:
        return replace(
            whole,
            gradients=gradients,
            optimizer=optimizer,
            communication=FLOAT32 * BUCKET,
            loading=weights.stored + trained + share,
            offloaded=offloaded,
            adds_up=True,
        )
    largest = max(shape.vocabulary * shape.hidden, shape.layer_parameters)
    ahead = (2 * BUCKET + largest) * weights.stored // weights.total
    parameters = 0 if zero.offload_parameters else part
    return replace(
        whole,
        parameters=parameters,
        gradients=gradients,
        optimizer=optimizer,
        communication=FLOAT32 * BUCKET + min(weights.stored, ahead),
        loading=0 if sliced else weights.stored + part,
        generating=parameters + optimizer + weights.stored if gathers else 0,
        offloaded=offloaded + (part if zero.offload_parameters else 0),
        adds_up=True,
    )
