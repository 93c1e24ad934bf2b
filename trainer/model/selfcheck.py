"""Before the first step: does this model, on this machine, compute what the training relies on?

Three things can be wrong without any error, and all have been seen: documents of a pack that attend to each other, an
output layer whose scaling the chunked loss does not know, and left-padded batches that generate other text than single
rows. Each is compared here on the real model with a few short documents of the run's own data.

Differences are relative: the norm of the difference over the norm of the reference (less its mean). Rounding
in bfloat16 gives up to 0.06 (SmolLM2-135M, 30 layers), documents that see each other 0.86.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, cast

import torch
from torch import nn
from transformers import GenerationConfig
from transformers.cache_utils import DynamicCache

from trainer.batch import Batch
from trainer.errors import ModelError, TrainingFault
from trainer.model.adapters import inner_model
from trainer.model.attention import IMPLEMENTATION, describe, packed_arguments, packed_attention, register
from trainer.model.loss import IGNORED, LogitsVia, PackedLoss
from trainer.model.precision import compute_context
from trainer.model.prefix import padded_prompts, shared_prefix

PROBE_DOCUMENTS = 4
PROBE_TOKENS = 64
GENERATED = 2
SHARED_PROBE = 8
"""Tokens that the probe prompts of generation begin with."""
TOLERANCE: dict[torch.dtype, float] = {torch.float32: 1e-3, torch.bfloat16: 0.1, torch.float16: 2e-2}
"""Largest relative difference of logits that is rounding, by compute dtype."""
LOSS_TOLERANCE: dict[torch.dtype, float] = {torch.float32: 1e-5, torch.bfloat16: 5e-3, torch.float16: 1e-3}
"""The same for the loss: there both sides start from the same hidden states."""
RECORDING = f"{IMPLEMENTATION}_recorded"


@dataclass(frozen=True, slots=True, kw_only=True)
class SelfCheck:
    """What was compared. The differences are relative norms, ``loss`` a relative difference of two numbers.

    ``logits_via`` is the way of the loss that agrees with the model, to be given to ``PackedLoss``.
    """

    isolation: float
    loss: float
    generation: float
    tolerance: float
    logits_via: LogitsVia
    attention: str

    def lines(self) -> list[str]:
        """The report, one line each."""
        head = "the output layer and its scaling" if self.logits_via == "head" else "the model's own head, not chunked"
        return [
            f"attention: {self.attention}",
            f"self-check (relative differences, allowed {self.tolerance:g}): packed against single documents "
            f"{self.isolation:.1e}, loss against the model's own logits {self.loss:.1e} (via {head}), "
            f"left-padded against single generation {self.generation:.1e}",
        ]


def self_check(
    model: nn.Module,
    documents: Sequence[Sequence[int]],
    *,
    pad_token_id: int,
    compute_dtype: torch.dtype,
    device: torch.device,
) -> SelfCheck:
    """Compare packed with single, chunked with full, padded with single, on a few of ``documents`` (token ids).

    ``model`` is on ``device``; its mode (training or not) is kept, its state is not changed.

    Raises:
        TrainingFault: a difference beyond rounding, with its name and size.
        ModelError: the model's attention does not take part in packing.
    """
    register()
    probes = probe_documents(documents)
    tolerance = TOLERANCE[compute_dtype]
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad(), compute_context(device, compute_dtype):
            batch = probe_batch(probes, device)
            single = torch.cat([_single_logits(model, document, device) for document in probes])
            packed = _packed_logits(model, batch)
            isolation = relative_difference(packed, single)
            _refuse(isolation, tolerance, "the logits of packed documents", "those of each document alone")
            logits_via, loss = _check_loss(model, batch, packed, compute_dtype)
            generation = _check_generation(model, unlike_lengths(probes), pad_token_id, device)
            _refuse(generation, tolerance, "logits generated in a left-padded batch", "those of single rows")
    finally:
        model.train(was_training)
    return SelfCheck(
        isolation=isolation,
        loss=loss,
        generation=generation,
        tolerance=tolerance,
        logits_via=logits_via,
        attention=describe(device, compute_dtype),
    )


def probe_documents(documents: Sequence[Sequence[int]]) -> list[list[int]]:
    """Four short documents of unlike lengths, cut out of the first few of ``documents``.

    Raises:
        ValueError: fewer than four tokens in all.
    """
    tokens = [token for document in documents[:PROBE_DOCUMENTS] for token in list(document)[:PROBE_TOKENS]]
    if len(tokens) < PROBE_DOCUMENTS:
        raise ValueError(f"the self-check needs at least {PROBE_DOCUMENTS} tokens, got {len(tokens)}")
    # Unlike lengths, also where the data has one length only; a repeated length could hide a shifted boundary.
    shares = (0.4, 0.1, 0.3, 0.2)
    ends = [round(share * len(tokens)) for share in accumulate(shares)]
    pieces = [tokens[start:end] for start, end in zip([0, *ends[:-1]], ends, strict=True)]
    return [piece for piece in pieces if piece]


def unlike_lengths(documents: Sequence[list[int]]) -> list[list[int]]:
    """The shortest and the longest of ``documents``: the most padding for the least work."""
    ordered = sorted(documents, key=len)
    return [ordered[0], ordered[-1]]


def probe_batch(documents: Sequence[Sequence[int]], device: torch.device) -> Batch:
    """A pack of ``documents`` in which every token but the first of each is learnt."""
    boundaries = [0, *accumulate(len(document) for document in documents)]
    labels = [label for document in documents for label in [*list(document)[1:], IGNORED]]

    def row(values: Sequence[int]) -> torch.Tensor:
        return torch.tensor([list(values)], dtype=torch.int64, device=device)

    return Batch(
        input_ids=row([token for document in documents for token in document]),
        labels=row(labels),
        position_ids=row([position for document in documents for position in range(len(document))]),
        cu_seqlens=torch.tensor(boundaries, dtype=torch.int32, device=device),
        boundaries=tuple(boundaries),
        max_seqlen=max(len(document) for document in documents),
        num_tokens=boundaries[-1],
        num_targets=sum(label != IGNORED for label in labels),
    )


def relative_difference(value: torch.Tensor, reference: torch.Tensor) -> float:
    """Norm of the difference over the norm of ``reference`` less its mean; infinite when ``value`` is not finite."""
    value, reference = value.double(), reference.double()
    scale = (reference - reference.mean()).norm().clamp_min(torch.finfo(torch.float32).tiny)
    difference = float((value - reference).norm() / scale)
    return difference if difference == difference else float("inf")


def _single_logits(model: nn.Module, document: Sequence[int], device: torch.device) -> torch.Tensor:
    ids = torch.tensor([list(document)], dtype=torch.int64, device=device)
    return inner_model(model)(input_ids=ids, use_cache=False).logits[0]


def _packed_logits(model: nn.Module, batch: Batch) -> torch.Tensor:
    """Logits [T, V] of the pack, and proof that every attention layer came through our function with its window.

    The probe documents are shorter than any window, so a window that gets lost would not show in the logits.
    """
    inner = inner_model(model)
    windows: list[int | None] = []

    def recorded(module: nn.Module, *args: Any, **options: Any) -> tuple[torch.Tensor, None]:
        windows.append(options.get("sliding_window"))
        return packed_attention(module, *args, **options)

    register(RECORDING, recorded)
    inner.set_attn_implementation(RECORDING)
    try:
        logits = inner(input_ids=batch.input_ids, **packed_arguments(batch)).logits[0]
    finally:
        inner.set_attn_implementation(IMPLEMENTATION)
    expected = expected_windows(inner.config.get_text_config().to_dict())
    if windows != expected:
        raise ModelError(
            "this model cannot be trained on packed documents: its layers do not all use the attention they were given",
            where="model.path",
            got=f"{type(inner).__name__}: attention windows {_shorten(windows)}",
            allowed=f"as its config says: {_shorten(expected)}",
            do="choose a model with plain or sliding-window causal attention that uses transformers' attention "
            "interface",
        )
    return logits


def expected_windows(config: dict[str, Any]) -> list[int | None]:
    """The sliding window (None: none) of each attention layer, from a text config as a dictionary."""
    layers = int(config["num_hidden_layers"])
    window = config.get("sliding_window")
    kinds = config.get("layer_types")
    if kinds is None:
        uses = window if config.get("use_sliding_window", True) else None
        return [uses] * layers
    return [window if kind == "sliding_attention" else None for kind in kinds]


def _check_loss(model: nn.Module, batch: Batch, logits: torch.Tensor, dtype: torch.dtype) -> tuple[LogitsVia, float]:
    """Which way of the loss gives the cross-entropy of the model's own ``logits`` [T, V], and how nearly."""
    expected = torch.nn.functional.cross_entropy(logits.float(), batch.labels[0], ignore_index=IGNORED, reduction="sum")
    # A small chunk, so that the cuts between chunks are compared too.
    chunk = max(1, batch.num_targets // 3)
    differences: dict[LogitsVia, float] = {}
    for via in cast(tuple[LogitsVia, ...], ("head", "model")):
        loss = PackedLoss(model, chunk=chunk, logits_via=via, compute_dtype=dtype).eval()(batch)
        differences[via] = float((loss - expected).abs() / expected.abs().clamp_min(1e-6))
        if differences[via] <= LOSS_TOLERANCE[dtype]:
            return via, differences[via]
    raise TrainingFault(
        "the self-check failed: the chunked loss is not the cross-entropy of the model's own logits",
        got=", ".join(f"relative difference {value:.2e} via {via}" for via, value in differences.items()),
        allowed=f"{LOSS_TOLERANCE[dtype]:g}",
        do="report the model's name: its output layer does something this version does not know",
    )


def _check_generation(
    model: nn.Module, documents: Sequence[Sequence[int]], pad_token_id: int, device: torch.device
) -> float:
    """Relative difference of the logits of generated tokens, in a batch as evaluation makes it against single rows.

    The documents get a common beginning, so that the way through ``SharedPrefix`` is the one that is compared. A later
    token is only compared while the earlier ones agree: two nearly equal logits may be ordered by rounding.
    """
    beginning = list(max(documents, key=len))[:SHARED_PROBE]
    prompts = [[*beginning, *document] for document in documents]
    prefix = shared_prefix(model, prompts, device, shortest=1)
    ids, mask = padded_prompts(prompts, prefix.ids, pad_token_id)
    batched_ids, batched = _generate(model, ids, mask, pad_token_id, device, prefix.for_rows(len(prompts)))
    padded: list[torch.Tensor] = []
    alone: list[torch.Tensor] = []
    for index, prompt in enumerate(prompts):
        ids, single = _generate(model, *padded_prompts([prompt], [], pad_token_id), pad_token_id, device)
        for step in range(GENERATED):
            padded.append(batched[step][index])
            alone.append(single[step][0])
            if int(ids[0, step]) != int(batched_ids[index, step]):
                break
    return relative_difference(torch.stack(padded), torch.stack(alone))


def _generate(
    model: nn.Module,
    ids: torch.Tensor,
    mask: torch.Tensor,
    pad_token_id: int,
    device: torch.device,
    cache: DynamicCache | None = None,
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Greedy tokens int64 [B, GENERATED] and their logits, a list of [B, V]."""
    inner = inner_model(model)
    options = GenerationConfig(
        max_new_tokens=GENERATED,
        min_new_tokens=GENERATED,
        do_sample=False,
        pad_token_id=pad_token_id,
        output_logits=True,
        return_dict_in_generate=True,
        use_cache=True,
    )
    output = cast(Any, inner).generate(
        input_ids=ids.to(device), attention_mask=mask.to(device), past_key_values=cache, generation_config=options
    )
    return output.sequences[:, ids.shape[1] :], list(output.logits)


def _refuse(difference: float, tolerance: float, what: str, other: str) -> None:
    if difference <= tolerance:
        return
    raise TrainingFault(
        f"the self-check failed: {what} differ from {other}",
        got=f"relative difference {difference:.2e}",
        allowed=f"{tolerance:g}",
        do="training would learn something else than the data says: choose another model, or report this one",
    )


def _shorten(windows: Sequence[int | None]) -> str:
    kinds = sorted({str(window) for window in windows})
    return f"{len(windows)} layers with {', '.join(kinds) or 'none'}"
