"""The stage ``export``: adapter and merged model, with answers by which a copy of each is recognised."""

import dataclasses
import shutil
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any, cast

from transformers import PreTrainedModel

from trainer.export.golden import (
    GOLDEN_PROMPTS,
    choose_golden,
    golden_prompts,
    narrow,
    openings,
    price_of_rounding,
    widen,
)
from trainer.export.inference import Inference, make_inference
from trainer.export.weights import export_adapter, export_merged, merge
from trainer.model.device import free_memory
from trainer.model.loss import PackedLoss
from trainer.model.precision import compute_context, torch_dtype
from trainer.rank.job import Job, Summary, open_arena, read_examples
from trainer.rank.testing import generate_here
from trainer.samples import EvaluationExample


def write_exports(job: Job, loss: PackedLoss) -> Summary:
    """``export/adapter`` and ``export/merged`` of a whole model; merging uses it up.

    A merged model can only be compared with the adapter in it, so that one is always written (``merged_from``).
    """
    config, base = job.plan.config, job.prepared.base
    chosen, tokenizer = held_out_prompts(job), Path(job.prepared.tokenizer)
    inference = describe_inference(job, loss, chosen)
    model = cast(Any, loss.model)  # a PeftModel with LoRA, else a PreTrainedModel
    summary: Summary = {}
    shutil.rmtree(job.folder.merged_from, ignore_errors=True)
    if config.method.name == "lora" and (config.export.adapter or config.export.merged):
        adapter = export_adapter(
            model,
            job.folder.adapter if config.export.adapter else job.folder.merged_from,
            tokenizer=tokenizer,
            inference=inference,
            base_reference=base.name if base.revision else base.published or base.directory,
            base_revision=base.revision,
        )
        if config.export.adapter:
            summary["adapter_mb"] = adapter.size / 1e6
    if config.export.merged:
        whole = merge(model)
        merged = export_merged(
            whole,
            job.folder.merged,
            tokenizer=tokenizer,
            inference=describe_merged(job, whole, inference, chosen),
            base_directory=Path(base.directory),
            dtype=job.compute_dtype,
            max_shard_gb=config.export.max_shard_gb,
        )
        summary["merged_mb"] = merged.size / 1e6
    return summary


def held_out_prompts(job: Job) -> list[EvaluationExample]:
    """What the exports are asked: validation rows, or where there are none openings of training documents."""
    prepared = job.prepared
    examples = read_examples(prepared.validation_examples)
    if not examples:  # test rows stay out of what is handed on
        arena = open_arena(prepared.validation or prepared.train)
        documents = (arena.document(number) for number in range(min(GOLDEN_PROMPTS, arena.num_documents)))
        examples = openings([(ids.tolist(), learnt.tolist()) for ids, learnt in documents])
    return choose_golden(examples)


def describe_inference(job: Job, loss: PackedLoss, chosen: Sequence[EvaluationExample]) -> Inference:
    """How the export wants to be asked, with answers of the trained model to recognise it by."""
    base, prepared = job.prepared.base, job.prepared
    answers = generate_here(job, loss.model, chosen)
    device = next(loss.parameters()).device
    golden_dtype = widen(loss.model, free_memory(device))
    if golden_dtype != "float32":
        job.warn(f"there is no room for the weights in float32: exports are compared in {golden_dtype}, less sharply")
    golden = golden_prompts(loss.model, chosen, answers, compute=_computing(job, golden_dtype))
    return make_inference(
        base_name=base.name,
        base_revision=base.revision,
        base_sha256=base.sha256,
        dtype=prepared.dtype,
        dtype_reason=prepared.dtype_reason,
        max_length=prepared.train.longest,
        system=job.plan.config.data.system,
        max_new_tokens=job.plan.config.task.max_new_tokens,
        stop_token_ids=prepared.stop_token_ids,
        pad_token_id=prepared.pad_token_id,
        tokenizer=Path(prepared.tokenizer),
        golden_dtype=golden_dtype,
        golden=golden,
    )


def describe_merged(
    job: Job, whole: PreTrainedModel, trained: Inference, chosen: Sequence[EvaluationExample]
) -> Inference:
    """``trained``, with the answers of ``whole`` in the dtype it is stored in, and what that changed.

    Answers are computed in that dtype as a reader of the files would, log-probabilities in ``trained.golden_dtype``.
    """
    narrow(whole, job.compute_dtype)
    answers = generate_here(job, whole, chosen, compute=nullcontext)
    if trained.golden_dtype == "float32":
        whole.float()
    compute = _computing(job, trained.golden_dtype)
    golden = golden_prompts(whole, chosen, answers, compute=compute)
    price = price_of_rounding(whole, trained.golden, golden, compute=compute)
    return dataclasses.replace(trained, golden=golden, rounding=price)


def _computing(job: Job, dtype: str) -> Callable[[], AbstractContextManager[object]]:
    return partial(compute_context, job.ranks.device, torch_dtype(dtype))
