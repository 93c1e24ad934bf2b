"""One process's memory in an optimizer step, by component: what is there all the time, and the largest moment.

Three moments compete. In the loss all activations are kept and logits are there; in the backward pass of the last layer
logits have gone and the layer's gradients of activations are there (with checkpointing also the layer itself, computed
again); when the last gradient is made, activations have gone and all gradients are there.
"""

from dataclasses import dataclass
from typing import Literal

from trainer.memory.activations import (
    ALL_LINEAR,
    FLOAT32,
    Forward,
    Kernel,
    activation_bytes,
    backward_bytes,
    outer_bytes,
)
from trainer.memory.loss_chunk import loss_bytes
from trainer.memory.shape import ModelShape

BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
NF4_BITS = 4 + 8 / 64 + 32 / (64 * 256)
"""Bits of a weight in nf4: a scale of 8 bits for 64 weights, and one of 32 bits for 256 scales (arXiv 2305.14314)."""
BATCH_BYTES = 3 * 8 + 4 * 4
"""Of a token: ids, labels and positions in int64, and four compact batches of int32 on their way."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Adapter:
    """A low-rank adapter: on ``linears`` of ``layers`` layers with ``parameters`` weights in all."""

    rank: int
    linears: frozenset[str]
    layers: int
    parameters: int


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryEstimate:
    """Bytes on one rank at the peak of an optimizer step.

    ``parameters``: weights as they are stored; ``copies``: those in 16 bits that autocast makes of float32 weights.
    ``activations`` are kept for the backward pass. ``logits``: of one chunk of the loss, with what is there just then:
    hidden states, and the output layer's copy and gradient. ``working``: what the backward pass of one layer needs for
    itself; with checkpointing that layer too. The larger of the two counts. ``communication``: gradient buckets of DDP
    and ZeRO; what fsdp and ZeRO-3 gather, and the buffers they gather and reduce through. ``batches``: the micro-batch
    and those made ahead. ``loading``, ``generating``: all that a rank holds at another time, when the whole model is
    there before it is cut, and when it is gathered to generate; 0: never more than in a step. ``offloaded``: what the
    rank has in main memory instead. ``adds_up``: gradients of an earlier micro-batch are there beside activations; else
    one comes as the other goes. ``trainable`` and ``total`` count weights.
    """

    parameters: int
    gradients: int
    optimizer: int
    activations: int
    logits: int
    communication: int
    trainable: int
    total: int
    copies: int = 0
    working: int = 0
    batches: int = 0
    loading: int = 0
    generating: int = 0
    offloaded: int = 0
    adds_up: bool = True

    @property
    def step(self) -> int:
        """The most that is there at once; of ``logits`` and ``working`` the larger one."""
        always = self.parameters + self.optimizer + self.communication + self.batches
        passing = self.copies + self.activations + max(self.logits, self.working)
        together = passing + self.gradients if self.adds_up else max(passing, self.gradients + self.working)
        return always + together

    @property
    def peak(self) -> int:
        """The most at any time of a run."""
        return max(self.step, self.loading, self.generating)


@dataclass(frozen=True, slots=True, kw_only=True)
class Weights:
    """Weights of a model as training holds them: counts, and bytes of the whole.

    ``stored``: bytes of all of them. ``copies``: bytes of autocast's 16-bit copies
    of trained float32 matrices of the layers; ``head_copy``: of the output layer.
    """

    trainable: int
    total: int
    stored: int
    copies: int
    head_copy: int


def count_weights(
    shape: ModelShape, *, size: int, adapter: Adapter | None, frozen: int = 0, linear_bits: float | None = None
) -> Weights:
    """Count a model's weights as they are stored. ``adapter`` None: all are trained, in float32, but ``frozen`` ones.

    With an adapter the base is frozen and in the compute dtype of ``size`` bytes; ``linear_bits``: bits per weight of
    the layers' linears where they are stored otherwise, and the largest of them is there in the compute dtype as well.
    """
    linears = shape.layers * (shape.layer_parameters - 2 * shape.hidden)
    mixed = size < FLOAT32
    if adapter is None:
        head = shape.vocabulary * shape.hidden
        return Weights(
            trainable=shape.parameters - frozen,
            total=shape.parameters,
            stored=FLOAT32 * shape.parameters,
            copies=size * linears if mixed else 0,
            head_copy=size * head if mixed else 0,
        )
    base = size * shape.parameters
    if linear_bits is not None:
        largest = max(inputs * outputs for inputs, outputs in shape.linears.values())
        base += size * largest - round(linears * (size - linear_bits / 8))
    return Weights(
        trainable=adapter.parameters,
        total=shape.parameters + adapter.parameters,
        stored=base + FLOAT32 * adapter.parameters,
        copies=size * adapter.parameters if mixed else 0,
        head_copy=0,
    )


def one_process(
    shape: ModelShape,
    weights: Weights,
    forward: Forward,
    *,
    capacity: int,
    accumulation: int,
    chunk: int,
    adapter: Adapter | None,
    passed_layers: int,
    trained_layers: int,
    checkpointing: bool,
    head_trained: bool,
) -> MemoryEstimate:
    """Memory of one process that has everything: AdamW's two moments and gradients in float32 for all trained weights.

    ZeRO (arXiv 1910.02054, section 3.1) counts the same 16 bytes per weight.
    """
    kept, again = activation_bytes(
        shape,
        forward,
        tokens=capacity,
        trained_layers=trained_layers,
        passed_layers=passed_layers,
        linears=ALL_LINEAR if adapter is None else adapter.linears,
        rank=None if adapter is None else adapter.rank,
        checkpointing=checkpointing,
    )
    copies = weights.copies // max(1, trained_layers + passed_layers) if checkpointing else weights.copies
    # A compiled layer casts inside its graph; eager casts stay in autocast's cache until the forward pass is over.
    cached = 0 if forward.compiled else weights.copies - copies
    logits = loss_bytes(
        shape, chunk=chunk, tokens=capacity, size=forward.size, compiled=forward.compiled, head_trained=head_trained
    )
    around = capacity * outer_bytes(shape, forward, norms=adapter is None)
    return MemoryEstimate(
        parameters=weights.stored,
        copies=copies,
        gradients=FLOAT32 * weights.trainable,
        optimizer=2 * FLOAT32 * weights.trainable,
        activations=kept,
        logits=logits + around + cached + weights.head_copy,
        working=again + backward_bytes(shape, forward, tokens=capacity),
        communication=0,
        batches=BATCH_BYTES * capacity,
        trainable=weights.trainable,
        total=weights.total,
        adds_up=accumulation > 1,
    )


def forward_of(
    *, method: Literal["full", "lora"], size: int, device: Literal["cpu", "cuda"], compiled: bool, repeats_keys: bool
) -> Forward:
    """How a layer computes on ``device``: which attention kernel, and what runs between the layers."""
    kernel: Kernel = "sdpa" if size == FLOAT32 else "varlen" if device == "cuda" else "plain"
    residual = FLOAT32 if method == "full" else size
    return Forward(
        size=size, residual=residual, kernel=kernel, repeats_keys=repeats_keys and kernel == "varlen", compiled=compiled
    )
