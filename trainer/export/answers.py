"""Does a model answer as recorded? Tolerances, and the verdict about one export folder.

All figures here were measured on SmolLM2-135M, on a CPU, over the five likeliest tokens of each place, unlikely ones
among them.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import torch
from transformers import GenerationConfig

from trainer.errors import TrainingFault
from trainer.export.comparison import MEAN_SHARE, Comparison
from trainer.export.golden import answer_log_probs, differences_from, worst_and_mean
from trainer.export.inference import GoldenPrompt, Inference

SAME_WEIGHTS = 0.002
"""Largest allowed difference of a log-probability (nats) in float32 between a model and its reloaded copy.

After the built-in LoRA job 0; the base without the adapter 15.6.
"""
ROUNDED: dict[str, float] = {"float32": SAME_WEIGHTS, "bfloat16": 2.0, "float16": 0.1}
"""Where a merge is proved by nothing else: the largest allowed difference between trained and rounded model.

Of right merges in bfloat16: LoRA on the top half of the layers 0.08 to 0.12 (mean 0.02), full fine-tuning 0.41 (0.05),
LoRA on all 30 layers 2.0 (0.16) after 12 steps and 2.9 (0.14) after two, when the update is hardly larger than a step
of bfloat16; merged and kept in float32 0.00003. An adapter that is lost makes 12 to 15 (3.4 to 5.8).
"""
IN_16_BITS: dict[str, float] = {"bfloat16": 2.0, "float16": 0.1}
"""The same where there was no memory for float32, and all was computed in this dtype. bfloat16: 0.75, mean 0.09."""
NEAR_TIE: dict[str, float] = {"float32": 0.0005, "bfloat16": 0.5, "float16": 0.025}
"""Two tokens this near to each other may change places in an answer that is computed in this dtype."""


def judge(
    name: str,
    folder: Path,
    inference: Inference,
    answers: Sequence[Sequence[int]],
    found: Sequence[torch.Tensor],
    *,
    tolerance: float,
    without: Sequence[torch.Tensor] = (),
) -> Comparison:
    """Log-probabilities first (they say how far off), then answers. ``without``: differences of the base alone."""
    worst, mean = worst_and_mean(found)
    base_worst, base_mean = worst_and_mean(without) if without else (None, None)
    if worst > tolerance or mean > tolerance * MEAN_SHARE:
        where = max(range(len(found)), key=lambda row: found[row].max().item())
        raise differs(
            folder,
            f"log-probabilities differ by up to {worst:.4g} ({inference.golden[where].id}), {mean:.4g} on average",
            f"up to {tolerance:g}, {tolerance * MEAN_SHARE:g} on average; computed in {inference.golden_dtype}, "
            f"stored in {inference.dtype}",
        )
    ties = 0
    for golden, answer in zip(inference.golden, answers, strict=True):
        if answer != golden.generated_ids:
            _allow_near_tie(folder, golden, answer, NEAR_TIE[inference.dtype])
            ties += 1
    return Comparison(
        name=name,
        prompts=len(answers),
        equal=len(answers) - ties,
        near_ties=ties,
        stopped=sum(bool(answer) and answer[-1] in inference.stop_token_ids for answer in answers),
        difference=worst,
        mean=mean,
        tolerance=tolerance,
        base_difference=base_worst,
        base_mean=base_mean,
    )


def differences(model: torch.nn.Module, inference: Inference, device: torch.device) -> list[torch.Tensor]:
    """Per prompt, float32 [n * 5]: how far each recorded log-probability is off; NaN counts as infinitely far.

    Where the recorded ones were computed in float32, ``model`` is widened to it, which changes no value.
    """
    if inference.golden_dtype == "float32":
        model.float()
    found: list[torch.Tensor] = []
    for prompt in inference.golden:
        now = answer_log_probs(model, prompt.prompt_ids, prompt.generated_ids, device)
        found.append(differences_from(prompt, now))
    return found


def greedy_answer(model: torch.nn.Module, folder: Path, golden: GoldenPrompt, device: torch.device) -> list[int]:
    """What ``generate`` answers with the folder's own generation config."""
    prompt = torch.tensor([golden.prompt_ids], dtype=torch.int64, device=device)
    config = GenerationConfig.from_pretrained(str(folder))
    output = cast(Any, model).generate(
        input_ids=prompt, attention_mask=torch.ones_like(prompt), generation_config=config
    )
    return output[0, prompt.shape[1] :].tolist()


def _allow_near_tie(folder: Path, golden: GoldenPrompt, answer: Sequence[int], tolerance: float) -> None:
    """Accept another token only where the recorded model itself hardly preferred its own."""
    pairs = zip(answer, golden.generated_ids, strict=False)
    place = next((place for place, (now, then) in enumerate(pairs) if now != then), None)
    if place is not None:
        known = dict(zip(golden.top_ids[place], golden.top_log_probs[place], strict=True))
        chosen, other = known.get(golden.generated_ids[place]), known.get(answer[place])
        if chosen is not None and other is not None and abs(chosen - other) <= tolerance:
            return
    raise differs(
        folder,
        f"{golden.id}: answered {list(answer)}, first different at token {place}",
        f"the recorded answer {golden.generated_ids}",
    )


def differs(folder: Path, got: str, allowed: str) -> TrainingFault:
    """The fault of an export in ``folder`` that is not what it was written from."""
    return TrainingFault(
        "the export does not answer like the model it was written from",
        where=str(folder),
        got=got,
        allowed=allowed,
        do="do not ship it; run `python -m trainer export` on this run again, and report it if that does not help",
    )
