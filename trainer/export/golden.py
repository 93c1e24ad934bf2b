"""Answers of a model in memory by which a copy of it is recognised, and what storing it in 16 bits changes about them.

*Golden prompts* are token ids of real prompts, what the model answered, and the log-probabilities it gave to the
likeliest tokens on the way. They go into ``inference.json``; ``verify.py`` compares a copy with them.

The trained model and what is stored of it are two things: in 16 bits rounding alone moves log-probabilities by up to 3
nats, more than many a mistake does. So the stored model is measured as well, in memory, after rounding and before
anything is written. A copy of the files has to meet *those* figures within float32's own noise; how far they are from
the trained model's is reported as the price of the number format.
"""

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import nn

from trainer.errors import ModelError
from trainer.export.comparison import Rounding
from trainer.export.inference import GoldenPrompt
from trainer.samples import EvaluationExample, Prediction

GOLDEN_PROMPTS = 8
LIKELIEST = 5
"""Tokens per position whose log-probability is kept."""
MAY_USE = 0.8
"""Share of the free memory that float32 copies of the weights may take."""


def choose_golden(examples: Sequence[EvaluationExample], count: int = GOLDEN_PROMPTS) -> list[EvaluationExample]:
    """``count`` of the held-out ``examples``, spread evenly over them; all of them where there are fewer.

    Raises:
        ModelError: no examples.
    """
    if not examples:
        raise ModelError(
            "an export cannot be checked without prompts",
            got="0 held-out examples",
            allowed="at least one",
            do="give data.validation, or raise data.validation_share",
        )
    if len(examples) <= count:
        return list(examples)
    return [examples[index * len(examples) // count] for index in range(count)]


def widen(model: nn.Module, available: int) -> str:
    """Convert ``model`` to float32 in place if that fits, and return the name of the dtype it then computes in.

    Widening changes no value, so what is merged and stored afterwards is the same. Rounding in 16 bits hides errors: on
    SmolLM2-135M it moves log-probabilities by up to 0.9 nats, in float32 by 0.0001.

    Args:
        model: the trained model.
        available: bytes that may be used.
    """
    weights = [*model.parameters(), *model.buffers()]
    narrow = {tensor.dtype for tensor in weights if tensor.is_floating_point()} - {torch.float32}
    more = sum(tensor.numel() * (4 - tensor.element_size()) for tensor in weights if tensor.is_floating_point())
    if more > available * MAY_USE:
        return str(min(narrow, key=str)).removeprefix("torch.")
    model.float()
    return "float32"


def golden_prompts(
    model: nn.Module,
    chosen: Sequence[EvaluationExample],
    answers: Sequence[Prediction],
    *,
    compute: Callable[[], AbstractContextManager[object]] = nullcontext,
) -> list[GoldenPrompt]:
    """What ``model`` answered to the ``chosen`` examples, with the log-probabilities on the way.

    Args:
        model: in memory; called with ``input_ids`` int64 [1, n].
        chosen: held-out rows (validation rows: the export carries them).
        answers: the model's greedy answers to them, in their order.
        compute: makes the context of a forward pass, for example autocast.

    Raises:
        ModelError: log-probabilities that are not finite.
    """
    device = next(model.parameters()).device
    golden: list[GoldenPrompt] = []
    for example, answer in zip(chosen, answers, strict=True):
        with compute():
            log_probs = answer_log_probs(model, example.prompt_ids, answer.token_ids, device)
        top = log_probs.topk(min(LIKELIEST, log_probs.shape[-1]), dim=-1)
        values: list[list[float]] = top.values.tolist()
        if not all(math.isfinite(value) for row in values for value in row):
            raise ModelError("the trained model gives log-probabilities that are not finite", where=example.id)
        golden.append(
            GoldenPrompt(
                id=example.id,
                prompt_ids=list(example.prompt_ids),
                generated_ids=list(answer.token_ids),
                stopped=answer.stopped,
                text=answer.text,
                top_ids=top.indices.tolist(),
                top_log_probs=values,
            )
        )
    return golden


def narrow(model: nn.Module, dtype: torch.dtype) -> None:
    """Convert what is stored of ``model`` to ``dtype``, in place: parameters and those buffers that go into files.

    Other buffers stay: ``nn.Module.to`` would round the frequencies of rotary positions too, and a reader has them in
    float32.
    """
    stored = set(model.state_dict())
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if name in stored and tensor.is_floating_point():
            tensor.data = tensor.data.to(dtype)


def price_of_rounding(
    model: nn.Module,
    trained: Sequence[GoldenPrompt],
    rounded: Sequence[GoldenPrompt],
    *,
    compute: Callable[[], AbstractContextManager[object]] = nullcontext,
) -> Rounding:
    """How far the rounded ``model`` is from the trained one, along the trained one's answers.

    Args:
        model: with rounded weights, computing in the dtype of ``trained``'s log-probabilities.
        trained: answers of the trained model.
        rounded: those of the rounded one, to the same prompts in the same order.
        compute: as for ``golden_prompts``.
    """
    device = next(model.parameters()).device
    differences: list[torch.Tensor] = []
    for golden in trained:
        with compute():
            log_probs = answer_log_probs(model, golden.prompt_ids, golden.generated_ids, device)
        differences.append(differences_from(golden, log_probs))
    largest, mean = worst_and_mean(differences)
    same = sum(one.generated_ids == other.generated_ids for one, other in zip(trained, rounded, strict=True))
    return Rounding(difference=largest, mean=mean, answers=len(trained), same_answers=same)


def differences_from(golden: GoldenPrompt, log_probs: torch.Tensor) -> torch.Tensor:
    """float32 [n * 5]: how far each recorded log-probability is off in ``log_probs`` [n, V]; NaN is infinitely far."""
    off = log_probs.gather(1, torch.tensor(golden.top_ids)) - torch.tensor(golden.top_log_probs)
    return off.abs().nan_to_num(nan=math.inf).flatten()


def worst_and_mean(differences: Sequence[torch.Tensor]) -> tuple[float, float]:
    """Over all prompts together."""
    together = torch.cat(list(differences))
    return together.max().item(), together.mean().item()


def openings(documents: Sequence[tuple[Sequence[int], Sequence[bool]]]) -> list[EvaluationExample]:
    """Prompts out of training documents (token ids, and which of them are learnt), for runs without validation rows.

    A conversation is asked with everything before its first answer. A plain text, which is learnt from its second token
    on, with its first half, at most 32 tokens.
    """
    found: list[EvaluationExample] = []
    for number, (ids, learnt) in enumerate(documents, 1):
        first = next((place for place, is_learnt in enumerate(learnt) if is_learnt), 1)
        length = first if first > 1 else max(1, min(32, len(ids) // 2))
        if len(ids):
            found.append(EvaluationExample(id=f"document {number}", prompt_ids=list(ids[:length]), answer=""))
    return found


def answer_log_probs(
    model: nn.Module, prompt_ids: Sequence[int], answer_ids: Sequence[int], device: torch.device
) -> torch.Tensor:
    """Log-probabilities float32 [len(answer_ids), V] of the next token before each token of the answer.

    One row, no padding, no cache: the simplest forward pass there is, so that two models can be compared by it.
    """
    ids = torch.tensor([[*prompt_ids, *answer_ids]], dtype=torch.int64, device=device)
    was_training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with torch.no_grad():
            logits = model(input_ids=ids, use_cache=False).logits[0]
    finally:
        for module in was_training:
            module.training = True
    before = len(prompt_ids) - 1
    return torch.log_softmax(logits[before : before + len(answer_ids)].float(), dim=-1).cpu()
