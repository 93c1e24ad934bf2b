"""Answers to held-out prompts: batched, left padded, greedy.

Scores are only worth something when a batch gives the answers that single rows would give. So everything that decides
an answer is set here: the generation config is our own (a base model's ``repetition_penalty`` or ``temperature`` does
not leak in), padding is on the left with a mask, what all prompts begin with is computed once, and batches depend on
the examples alone, so that one rank and many run the same batches. Nothing of the model is changed when this returns.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from math import ceil
from typing import Protocol, cast

import torch
from torch import nn
from transformers.cache_utils import Cache
from transformers.configuration_utils import PreTrainedConfig
from transformers.generation.configuration_utils import GenerationConfig
from transformers.generation.utils import GenerationMixin
from transformers.modeling_utils import PreTrainedModel

from trainer.errors import DataError, ModelError
from trainer.model.compiling import without_compiling
from trainer.model.prefix import SharedPrefix, padded_prompts, shared_prefix
from trainer.samples import EvaluationExample, Prediction


class GeneratingModel(Protocol):
    """What is used here of a transformers causal language model."""

    config: PreTrainedConfig
    generation_config: GenerationConfig | None

    def generate(
        self,
        inputs: torch.Tensor,
        *,
        attention_mask: torch.Tensor,
        past_key_values: Cache | None,
        synced_gpus: bool,
    ) -> object:
        """Prompt and new token ids, int64 [rows, prompt + new]."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationSettings:
    """What decides an answer: ``stop_token_ids`` end it, ``max_new_tokens`` bounds it, ``pad_token_id`` fills rows."""

    max_new_tokens: int
    stop_token_ids: tuple[int, ...]
    pad_token_id: int


def generate(
    model: nn.Module,
    examples: Sequence[EvaluationExample],
    *,
    max_new_tokens: int,
    stop_token_ids: Sequence[int],
    pad_token_id: int,
    batch_tokens: int,
    decode: Callable[[list[int]], str],
    device: torch.device | str,
    compute: Callable[[], AbstractContextManager[object]] = nullcontext,
    on_answered: Callable[[int], None] = lambda rows: None,
    rank: int = 0,
    world_size: int = 1,
    in_step: bool = False,
) -> list[Prediction]:
    """Answer ``examples`` greedily; with ``world_size`` ranks, the share of ``rank``.

    Args:
        model: a causal language model, bare or inside wrappers (peft, DDP) that leave its modules in place.
        examples: prompts that end with the template's generation prompt.
        max_new_tokens: longest answer, in tokens.
        stop_token_ids: an answer ends with the first of these; it stays in ``Prediction.token_ids``, not in the text.
        pad_token_id: fills rows; masked, so its value does not matter to the answers.
        batch_tokens: most tokens of one batch, padding and room for the answers included; a row alone may exceed it.
        decode: token ids of an answer, without the stop token, to text.
        device: where the model is.
        compute: makes the context of each batch, for example ``torch.autocast``.
        on_answered: told after each batch how many rows of this share have their answer.
        rank: which share of the batches to run.
        world_size: number of shares. Every share runs whole batches of the same division, so the answers do not depend
            on it; ``in_order`` puts the shares together.
        in_step: all ranks make the same number of forward passes, because the model's layers talk in them; a rank that
            has done its share answers a batch again, and that answer is not used.

    Returns:
        One prediction per example of this share, in the order of ``examples``.

    Raises:
        DataError: an empty prompt, or a prompt that leaves no room for the answer in the model's positions.
        ModelError: there is no generating model inside ``model``.
    """
    settings = GenerationSettings(
        max_new_tokens=max_new_tokens, stop_token_ids=tuple(stop_token_ids), pad_token_id=pad_token_id
    )
    inner = generating_model(model)
    _check_prompts(inner, examples, max_new_tokens)
    lengths = [len(example.prompt_ids) for example in examples]
    batches = make_batches(lengths, batch_tokens=batch_tokens, max_new_tokens=max_new_tokens)
    mine = batches[rank::world_size]
    idle = ceil(len(batches) / world_size) - len(mine) if in_step else 0
    found: dict[int, Prediction] = {}
    with _ready_to_generate(model, inner, settings):
        with compute():
            # Of all examples, not of this share: the answers must not depend on the number of ranks.
            prefix = shared_prefix(cast(nn.Module, inner), [example.prompt_ids for example in examples], device)
        for number, rows in enumerate([*mine, *batches[-1:] * idle]):
            with compute():
                prompts = [examples[row].prompt_ids for row in rows]
                answers = _generate_batch(inner, prompts, prefix, pad_token_id, device, in_step=in_step)
            if number >= len(mine):
                continue
            for row, answer in zip(rows, answers, strict=True):
                found[row] = _prediction(examples[row].id, answer, settings.stop_token_ids, decode)
            on_answered(len(found))
    return [found[row] for row in sorted(found)]


def make_batches(lengths: Sequence[int], *, batch_tokens: int, max_new_tokens: int) -> list[list[int]]:
    """Rows of similar length together, longest first (a batch that does not fit in memory fails at once).

    A batch of ``k`` rows whose longest prompt has ``n`` tokens holds ``k * (n + max_new_tokens) <= batch_tokens``
    tokens, or one row.
    """
    order = sorted(range(len(lengths)), key=lambda row: (-lengths[row], row))
    batches: list[list[int]] = []
    start = 0
    while start < len(order):
        width = lengths[order[start]] + max_new_tokens
        stop = start + max(1, batch_tokens // width)
        batches.append(order[start:stop])
        start = stop
    return batches


def in_order(examples: Sequence[EvaluationExample], shares: Sequence[Sequence[Prediction]]) -> list[Prediction]:
    """Put the predictions of all ranks into the order of ``examples``.

    Raises:
        DataError: an example without a prediction, or two examples with one id.
    """
    by_id = {prediction.id: prediction for share in shares for prediction in share}
    lost = [example.id for example in examples if example.id not in by_id]
    if lost or len({example.id for example in examples}) != len(examples):
        raise DataError(
            "the predictions of the ranks do not cover the examples one to one",
            got=f"{len(lost)} of {len(examples)} examples without one, first {lost[:3]}",
            allowed="one prediction per example, and examples with different ids",
            do="give every evaluation row its own id",
        )
    return [by_id[example.id] for example in examples]


def generating_model(model: nn.Module) -> GeneratingModel:
    """The transformers model inside ``model``; LoRA layers sit in its modules, so its ``generate`` uses them.

    Raises:
        ModelError: none of the modules can generate.
    """
    for module in model.modules():
        if isinstance(module, PreTrainedModel) and isinstance(module, GenerationMixin):
            return cast(GeneratingModel, module)
    raise ModelError(
        "this model cannot generate",
        got=type(model).__name__,
        allowed="a transformers causal language model",
        do="load the model with AutoModelForCausalLM, or use task=text, which needs no answers",
    )


def _check_prompts(inner: GeneratingModel, examples: Sequence[EvaluationExample], max_new_tokens: int) -> None:
    """Refuse prompts that cannot be answered as asked."""
    positions = inner.config.to_dict().get("max_position_embeddings")
    for example in examples:
        if not example.prompt_ids:
            raise DataError(
                "an evaluation example has an empty prompt",
                where=example.id,
                got="0 tokens",
                allowed="at least one token",
                do="remove the row, or give it a question",
            )
        needed = len(example.prompt_ids) + max_new_tokens
        if isinstance(positions, int) and needed > positions:
            raise DataError(
                "an evaluation prompt leaves no room for its answer",
                where=example.id,
                got=f"{len(example.prompt_ids)} prompt tokens + task.max_new_tokens={max_new_tokens} = {needed}",
                allowed=f"at most {positions} tokens (the model's max_position_embeddings)",
                do="shorten the row, or lower task.max_new_tokens",
            )


def _greedy(settings: GenerationSettings) -> GenerationConfig:
    """Plain greedy decoding: every field that could change an answer has its neutral value."""
    return GenerationConfig(
        max_new_tokens=settings.max_new_tokens,
        do_sample=False,
        num_beams=1,
        repetition_penalty=1.0,
        use_cache=True,
        eos_token_id=list(settings.stop_token_ids),
        pad_token_id=settings.pad_token_id,
    )


@contextmanager
def _ready_to_generate(outer: nn.Module, inner: GeneratingModel, settings: GenerationSettings) -> Iterator[None]:
    """Evaluation mode, our generation config, nothing compiled; all as it was afterwards, module by module."""
    was_training = [module for module in outer.modules() if module.training]
    was_config = inner.generation_config
    outer.eval()
    # transformers fills what a config leaves open from the model's own, so the model's own has to go.
    inner.generation_config = _greedy(settings)
    try:
        with torch.no_grad(), without_compiling():
            yield
    finally:
        inner.generation_config = was_config
        for module in was_training:
            module.training = True


def _generate_batch(
    inner: GeneratingModel,
    prompts: Sequence[Sequence[int]],
    prefix: SharedPrefix,
    pad_token_id: int,
    device: torch.device | str,
    *,
    in_step: bool,
) -> list[list[int]]:
    """New token ids per row, still with whatever follows a stop token."""
    input_ids, attention_mask = padded_prompts(prompts, prefix.ids, pad_token_id)
    output = inner.generate(
        input_ids.to(device),
        attention_mask=attention_mask.to(device),
        past_key_values=prefix.for_rows(len(prompts)),
        synced_gpus=in_step,
    )
    if not isinstance(output, torch.Tensor):
        raise TypeError(f"generate returned {type(output).__name__}; a tensor of token ids was expected")
    return output[:, input_ids.shape[1] :].tolist()


def _prediction(
    example: str, answer: list[int], stop_token_ids: Sequence[int], decode: Callable[[list[int]], str]
) -> Prediction:
    """Cut ``answer`` after its first stop token; the text is what comes before it."""
    end = next((place for place, token in enumerate(answer) if token in stop_token_ids), None)
    if end is None:
        return Prediction(id=example, text=decode(answer), token_ids=answer, stopped=False)
    return Prediction(id=example, text=decode(answer[:end]), token_ids=answer[: end + 1], stopped=True)
