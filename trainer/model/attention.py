"""Attention that keeps the documents of a pack apart, without flash-attn.

transformers lets one register an attention function and a mask function under a name. Its own ways to isolate packed
documents are either a dense T x T mask, or silently off as soon as a KV cache or a mask is present. Here the batch says
explicitly that it is packed, and a model that loses that message on the way to its layers is refused:

* ``packed_arguments`` hands the model the document boundaries (``cu_seq_lens_*``, transformers' names) and, as the
  mask, a 4-D marker. transformers returns a mask of four dimensions as it is, so no T x T mask is built, and the layers
  receive both.
* A layer that gets the marker without boundaries belongs to a model that drops them: error, not leakage.
* Without marker and boundaries (generation, single documents, padded batches) attention and mask are those of ``sdpa``.

On a GPU in 16 bits the kernel is torch's own ``varlen_attn``; elsewhere one SDPA call per document. What ran is in the
report of the self-check.
"""

import inspect
from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention.varlen import varlen_attn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from trainer.batch import Batch
from trainer.errors import ModelError

IMPLEMENTATION = "trimtab_packed"
"""The name under which transformers knows this attention."""
AttentionFunction = Callable[..., tuple[torch.Tensor, torch.Tensor | None]]
MARKER_SHAPE = (1, 1, 1, 1)
VARLEN_NAMES = frozenset(inspect.signature(varlen_attn).parameters)
"""What this torch's ``varlen_attn`` takes; read here and not in a layer, which may be traced by torch.compile."""


def register(name: str = IMPLEMENTATION, function: AttentionFunction | None = None) -> None:
    """Make packed attention known to transformers as ``name``. Doing it twice does nothing."""
    AttentionInterface.register(name, function or packed_attention)
    AttentionMaskInterface.register(name, sdpa_mask)


def packed_arguments(batch: Batch) -> dict[str, Any]:
    """What a transformers model is called with, besides its tokens, to see the documents of ``batch`` apart."""
    return {
        "attention_mask": torch.ones(MARKER_SHAPE, dtype=torch.bool, device=batch.input_ids.device),
        "position_ids": batch.position_ids,
        "cu_seq_lens_q": batch.cu_seqlens,
        "cu_seq_lens_k": batch.cu_seqlens,
        "max_length_q": batch.max_seqlen,
        "max_length_k": batch.max_seqlen,
        "use_cache": False,
    }


def packed_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    cu_seq_lens_q: torch.Tensor | None = None,
    cu_seq_lens_k: torch.Tensor | None = None,
    max_length_q: int | None = None,
    max_length_k: int | None = None,
    **options: Any,
) -> tuple[torch.Tensor, None]:
    """Causal attention of one layer, in transformers' calling convention.

    ``query`` [B, Hq, T, D], ``key`` and ``value`` [B, Hkv, T, D] with Hq a multiple of Hkv; returns [B, T, Hq, D].
    Packed when ``cu_seq_lens_q`` int32 [k+1] is given; then B is 1 and the k segments never see each other.
    ``sliding_window`` W: a token sees itself and the W-1 tokens before it.

    Raises:
        ModelError: the model asks for attention that is not implemented, or lost the boundaries on the way.
    """
    _refuse_unknown_attention(module, options)
    marked = attention_mask is not None and attention_mask.shape == MARKER_SHAPE and cu_seq_lens_q is None
    if cu_seq_lens_q is None:
        # A real mask of this shape exists: one row of one token. A packed batch that short has nothing to isolate.
        if marked and query.shape[2] > 1:
            raise _cannot_serve(module, "its layers do not receive the keyword arguments given to the model")
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **options
        )
    if attention_mask is not None and attention_mask.shape != MARKER_SHAPE:
        raise _cannot_serve(module, "it makes an attention mask of its own besides the document boundaries")
    if query.dtype != value.dtype:  # autocast with float32 weights: rotary factors lift query and key to float32
        query, key = query.to(value.dtype), key.to(value.dtype)
    if uses_varlen_kernel(query.device, query.dtype):
        if dropout:
            raise _cannot_serve(module, f"varlen_attn has no dropout and the model wants attention_dropout={dropout}")
        length = max_length_q if max_length_q is not None else query.shape[2]
        return _varlen(query, key, value, cu_seq_lens_q, length, sliding_window, scaling), None
    return _per_document(query, key, value, cu_seq_lens_q, sliding_window, scaling, dropout), None


def uses_varlen_kernel(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether packs on this device and in this dtype go through ``varlen_attn`` (else one SDPA call per document)."""
    return device.type == "cuda" and dtype in (torch.bfloat16, torch.float16)


def describe(device: torch.device, dtype: torch.dtype) -> str:
    """The path that a pack takes here, in words, for the report."""
    if uses_varlen_kernel(device, dtype):
        return "torch.nn.attention.varlen"
    return f"one SDPA call per document ({device.type}, {str(dtype).removeprefix('torch.')})"


@torch.compiler.disable(reason="the lengths of the documents are different in every pack")
def _per_document(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    boundaries: torch.Tensor,
    window: int | None,
    scaling: float | None,
    dropout: float,
) -> torch.Tensor:
    """[1, H, T, D] -> [1, T, H, D], one SDPA call for each segment between the int32 ``boundaries``, but empty ones.

    ``split`` and not slices: the gradient of a split is one concatenation, that of n slices n full-size tensors.
    """
    grouped = query.shape[1] != key.shape[1]
    lengths = [length for length in cast(list[int], boundaries.diff().tolist()) if length]
    outputs: list[torch.Tensor] = []
    documents = zip(query.split(lengths, 2), key.split(lengths, 2), value.split(lengths, 2), strict=True)
    for length, (q, k, v) in zip(lengths, documents, strict=True):
        mask = None if window is None or length <= window else _window_mask(length, window, query.device)
        if mask is None and dropout == 0 and _plain_backward_is_faster(q):
            outputs.append(cast(torch.Tensor, _PlainBackward.apply(q, k, v, scaling)).transpose(1, 2))
            continue
        output = F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, dropout_p=dropout, is_causal=mask is None, scale=scaling, enable_gqa=grouped
        )
        outputs.append(output.transpose(1, 2))
    return torch.cat(outputs, dim=1)


PLAIN_BACKWARD_LENGTH = 1024


def _plain_backward_is_faster(query: torch.Tensor) -> bool:
    """Short documents in bfloat16 on a CPU: see ``_PlainBackward``. Longer ones would need n x n memory."""
    return query.device.type == "cpu" and query.dtype == torch.bfloat16 and query.shape[2] <= PLAIN_BACKWARD_LENGTH


class _PlainBackward(torch.autograd.Function):
    """Causal SDPA whose gradient comes from plain matrix products, made again in the backward pass.

    The backward pass of torch's CPU kernel does not use the bfloat16 instructions: 70 ms against 40 ms a layer for 8
    documents of 175 to 330 tokens, 9 heads of 64 (one core with avx512_bf16); 5 to 8 % of a whole LoRA step of
    SmolLM2-135M. In float32 torch's own is the faster one.
    """

    @staticmethod
    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float | None
    ) -> torch.Tensor:
        """[1, Hq, n, D], [1, Hkv, n, D] twice -> [1, Hq, n, D]."""
        ctx.save_for_backward(query, key, value)
        ctx.scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
        grouped = query.shape[1] != key.shape[1]
        return F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scaling, enable_gqa=grouped)

    @staticmethod
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, gradient: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, None]:
        """Gradients of query, key and value. The heads of a group stand below each other in one product."""
        query, key, value = (tensor.detach().requires_grad_() for tensor in ctx.saved_tensors)
        groups, length = key.shape[1], key.shape[2]
        repeats = query.shape[1] // groups
        with torch.enable_grad():
            rows = query[0].reshape(groups, repeats * length, -1)
            bias = _causal_bias(length, repeats, query.dtype).expand(groups, -1, -1)
            scores = torch.baddbmm(bias, rows, key[0].transpose(1, 2), alpha=ctx.scaling)
            output = torch.bmm(scores.softmax(-1), value[0]).view(query.shape)
        query_gradient, key_gradient, value_gradient = torch.autograd.grad(output, (query, key, value), gradient)
        return query_gradient, key_gradient, value_gradient, None


@lru_cache(maxsize=64)
def _causal_bias(length: int, repeats: int, dtype: torch.dtype) -> torch.Tensor:
    """[repeats * length, length]: 0 where a token may look, -inf where not. Shared by all layers of a pass."""
    future = torch.ones(length, length, dtype=torch.bool).triu(1)
    return torch.zeros(length, length, dtype=dtype).masked_fill(future, float("-inf")).repeat(repeats, 1)


@lru_cache(maxsize=64)
def _window_mask(length: int, window: int, device: torch.device) -> torch.Tensor:
    """bool [length, length]: causal, and not further back than ``window`` - 1. Shared by all layers of a pass."""
    index = torch.arange(length, device=device)
    distance = index[:, None] - index[None, :]
    return (distance >= 0) & (distance < window)


def _varlen(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    boundaries: torch.Tensor,
    longest: int,
    window: int | None,
    scaling: float | None,
) -> torch.Tensor:
    """[1, H, T, D] -> [1, T, H, D] through torch's variable-length flash attention."""
    q, k, v = (tensor[0].transpose(0, 1) for tensor in (query, key, value))
    arguments = varlen_options(VARLEN_NAMES, grouped=q.shape[1] != k.shape[1], window=window, scaling=scaling)
    if q.shape[1] != k.shape[1] and "enable_gqa" not in VARLEN_NAMES:
        repeats = q.shape[1] // k.shape[1]
        k, v = k.repeat_interleave(repeats, dim=1), v.repeat_interleave(repeats, dim=1)
    output = varlen_attn(q, k, v, boundaries, boundaries, longest, longest, **arguments)
    return cast(torch.Tensor, output).unsqueeze(0)


def varlen_options(
    accepted: frozenset[str], *, grouped: bool, window: int | None, scaling: float | None
) -> Mapping[str, Any]:
    """Keyword arguments for causal ``varlen_attn``. Its signature moves between releases: ``accepted`` are its names.

    Raises:
        ModelError: this torch's ``varlen_attn`` cannot do what the model needs.
    """
    arguments: dict[str, Any] = {}
    if "window_size" in accepted:  # (left, right); -1: without limit
        arguments["window_size"] = (-1, 0) if window is None else (window - 1, 0)
    elif window is None and "is_causal" in accepted:
        arguments["is_causal"] = True
    else:
        raise ModelError(
            "torch.nn.attention.varlen of this torch has no sliding window",
            got=f"torch {torch.__version__}, window {window}",
            do="install torch>=2.11, or choose a model without sliding-window attention",
        )
    if scaling is not None:
        if "scale" not in accepted:
            raise ModelError(
                "torch.nn.attention.varlen of this torch has no scale",
                got=f"torch {torch.__version__}, scale {scaling}",
                do="install torch>=2.11",
            )
        arguments["scale"] = scaling
    if grouped and "enable_gqa" in accepted:
        arguments["enable_gqa"] = True
    return arguments


def _refuse_unknown_attention(module: nn.Module, options: Mapping[str, Any]) -> None:
    """Options that change the result and that no kernel here implements."""
    for name, words in (
        ("softcap", "its attention scores are soft-capped"),
        ("s_aux", "it has attention sinks"),
        ("position_bias", "it adds a position bias to its attention scores"),
    ):
        if options.get(name) is not None:
            raise _cannot_serve(module, words)
    if options.get("is_causal") is False:
        raise _cannot_serve(module, "its attention is not causal")


def refuse_config(config: Mapping[str, Any]) -> None:
    """Refuse, before any weight is read, a model whose ``config.json`` asks for attention not implemented here.

    Raises:
        ModelError: soft-capped scores or chunked attention.
    """
    for key, words in (
        ("attn_logit_softcapping", "its attention scores are soft-capped"),
        ("attention_chunk_size", "its attention is chunked"),
    ):
        if config.get(key):
            raise ModelError(
                f"this model cannot be trained on packed documents: {words}",
                where="model.path",
                got=f"{key}={config[key]} in a {config.get('model_type', 'model')} config",
                do="choose a model with plain or sliding-window causal attention",
            )


def _cannot_serve(module: nn.Module, words: str) -> ModelError:
    return ModelError(
        f"this model cannot be trained on packed documents: {words}",
        got=type(module).__name__,
        do="choose a model with plain or sliding-window causal attention that uses transformers' attention interface",
    )
