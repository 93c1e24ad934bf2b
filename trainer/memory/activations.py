"""What a forward pass leaves for the backward pass, operation by operation of a Llama layer.

Counted is what torch's autograd really saves for the layers of transformers, not what a paper says it could save: under
autocast each of q, k and v saves a 16-bit copy of its own of a float32 input, a norm saves its input in float32, a
frozen matrix saves nothing, a compiled layer recomputes what is cheap. ``tests/unit/test_memory_measured.py`` counts
the tensors that autograd saves, and holds them against this.
"""

from dataclasses import dataclass
from typing import Literal

from trainer.memory.shape import LINEAR_NAMES, ModelShape

Kernel = Literal["varlen", "sdpa", "plain"]
FLOAT32 = 4
ALL_LINEAR = frozenset(LINEAR_NAMES)
ON_NORMED_INPUT = frozenset({"q_proj", "k_proj", "v_proj"})
ON_NORMED_MIDDLE = frozenset({"gate_proj", "up_proj"})


@dataclass(frozen=True, slots=True, kw_only=True)
class Forward:
    """How a layer computes. ``size``: bytes of a number in the compute dtype; ``residual``: of one between the layers,
    which is float32 where the embeddings are.

    ``kernel``: ``varlen`` is the GPU's in 16 bits; ``sdpa`` one call per document, which also saves its output;
    ``plain`` the CPU's in bfloat16, which does not. ``repeats_keys``: keys and values are repeated for every query head
    (``varlen`` before torch 2.13). ``compiled``: through torch.compile.
    """

    size: int
    residual: int
    kernel: Kernel = "varlen"
    repeats_keys: bool = False
    compiled: bool = False


def layer_bytes(
    shape: ModelShape, forward: Forward, *, linears: frozenset[str], norms: bool, rank: int | None = None
) -> int:
    """Bytes that one layer saves per token.

    ``linears``: those that need their input, because they or an adapter on them are trained; ``norms``: those of the
    layer are trained; ``rank``: of adapters on ``linears``, None where the linears themselves are trained.
    """
    mixed = forward.residual == FLOAT32 and forward.size < FLOAT32
    computed = _linear_inputs(shape, forward, linears, own_casts=mixed and not forward.compiled)
    computed += _attention(shape, forward, with_output_input="o_proj" in linears)
    computed += (2 if forward.compiled else 3) * shape.intermediate  # gate, up, and eager the activated gate
    computed += 0 if rank is None else rank * len(linears)
    in_float32 = 2 + (shape.heads if forward.kernel != "plain" else 0)  # the norms' factors, the log-sum-exp
    if not forward.compiled:
        in_float32 += 2 * shape.hidden * (2 if norms else 1)
    elif mixed:  # the stream before the layer; behind attention what is added to it
        in_float32, computed = in_float32 + shape.hidden, computed + shape.hidden
    else:
        computed += 2 * shape.hidden
    return forward.size * computed + FLOAT32 * in_float32


def _linear_inputs(shape: ModelShape, forward: Forward, linears: frozenset[str], *, own_casts: bool) -> int:
    """Numbers saved as inputs of linears, without that of ``o_proj``; ``own_casts``: one copy for each linear."""
    count = 0
    for names in (ON_NORMED_INPUT, ON_NORMED_MIDDLE):
        needed = len(names & linears)
        count += shape.hidden * (needed if own_casts else min(needed, 1))
    return count + (shape.intermediate if "down_proj" in linears else 0)


def _attention(shape: ModelShape, forward: Forward, *, with_output_input: bool) -> int:
    """Numbers saved by attention, and as the input of ``o_proj``: for ``varlen`` that is attention's saved output."""
    queries, keys = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    count = queries + 2 * (queries if forward.repeats_keys else keys)
    if forward.kernel == "varlen":
        return count + queries
    return count + (queries if forward.kernel == "sdpa" else 0) + (queries if with_output_input else 0)


def outer_bytes(shape: ModelShape, forward: Forward, *, norms: bool) -> int:
    """Bytes per token around the loss: the last norm, its output at the learnt positions, and that one's gradient."""
    norm = FLOAT32 * (shape.hidden * (2 if norms else 1) + 1)
    return norm + 2 * forward.residual * shape.hidden


def activation_bytes(
    shape: ModelShape,
    forward: Forward,
    *,
    tokens: int,
    trained_layers: int,
    passed_layers: int = 0,
    linears: frozenset[str] = ALL_LINEAR,
    rank: int | None = None,
    checkpointing: bool = False,
) -> tuple[int, int]:
    """Bytes that are kept until the backward pass, and bytes that come on top while it is in one layer.

    ``trained_layers``: with trained weights (``rank`` None) or adapters on ``linears``; ``passed_layers``: frozen ones
    that the gradient passes through; the layers below keep nothing. With ``checkpointing`` only the input of each layer
    is kept, and one layer is computed again. Sines and cosines of the positions are kept once for all layers.
    """
    trained = layer_bytes(shape, forward, linears=linears, norms=rank is None, rank=rank)
    passed = layer_bytes(shape, forward, linears=frozenset(), norms=False)
    positions = 2 * forward.residual * shape.head_dim
    if not checkpointing:
        return tokens * (positions + trained_layers * trained + passed_layers * passed), 0
    inputs = (trained_layers + passed_layers) * forward.residual * shape.hidden
    again = trained if trained_layers else passed
    return tokens * (positions + inputs), tokens * again


def backward_bytes(shape: ModelShape, forward: Forward, *, tokens: int) -> int:
    """Bytes that the backward pass of a layer needs for a moment, in its MLP: gradients of gate, up and their product.

    The product itself is given back before the last of them is made.
    """
    return tokens * (2 * forward.size * shape.intermediate + 2 * forward.residual * shape.hidden)
