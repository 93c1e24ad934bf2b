"""``python -m trainer.prepare RUN_DIR``: everything about data, once, in one CPU process before any rank starts.

Ranks that tokenise make each other wait into a timeout, and may disagree. Here the rows are read, gated, split,
tokenised and counted, the base model is resolved, the compute dtype is decided; ``prepared.json`` then says all of it
and ranks only open files. Tokens are kept by content, so a second call finds them.
"""

import shutil
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import msgspec
import torch
from transformers import PreTrainedTokenizerBase

from trainer import console
from trainer.config import Config
from trainer.data.account import say_rows, say_tokens
from trainer.data.chat import ChatEncoder
from trainer.data.planned import PlannedSchedule, planned_schedule
from trainer.data.rows import Rows, gather_rows, rows_digest
from trainer.data.scheduling import packs_by_time, row_key, save_row, schedule_options, training_schedule
from trainer.data.splits import SplitName, check_frozen, freeze
from trainer.data.templates import ChatTemplate, choose_template
from trainer.data.timing import cost_ratio
from trainer.data.tokenized import (
    Tokenized,
    TokenOptions,
    content_key,
    examples_path,
    find_tokens,
    make_tokens,
)
from trainer.errors import ConfigError, RunError
from trainer.markers import Marker, write_marker
from trainer.memory import folder_shape
from trainer.model.added_tokens import with_added_tokens
from trainer.model.load import load_tokenizer, matmul_shape, read_config, resolve_base, resolve_dtype
from trainer.paths import RunFolder, fresh_folder, write_atomic
from trainer.plan import RunPlan, load_plan, stage_inputs
from trainer.samples import BaseModel, Prepared
from trainer_kernels import TokenArena

FORMAT = 1
TINY_TEXTS = 2000
"""Training rows that the tokenizer of ``builtin:tiny`` is trained on."""
_DEALT = {
    "micro": "those that take about equally long together, because ranks wait for each other in every micro-batch",
    "step": "about the same sum to each, because ranks wait for each other once per step",
}
_CONTEXT_KEYS = ("max_position_embeddings", "n_positions", "max_sequence_length", "seq_length")


def prepare(folder: RunFolder) -> Prepared:
    """Do the stage ``prepare`` of the run in ``folder`` and leave its marker.

    Raises:
        UserError: data, template, model or run folder; the message says what to do.
        OSError: no space.
    """
    started = time.monotonic()
    plan = _read_plan(folder)
    config, cache = plan.config, Path(plan.cache_dir)

    rows = gather_rows(config.data, config.task, cache=cache)
    splits_sha256 = _freeze(rows, folder, seed=config.data.split_seed)
    say_rows(rows)

    base = _resolve_base(config, rows, cache)
    context = _context(Path(base.directory))
    _check_capacity(config.packing.tokens, context)
    dtype, reason = _decide_dtype(folder, config.model.dtype, plan.device, base)
    console.say(f"base model {base.name}, {base.parameters:,} parameters, computing in {dtype} ({reason})")

    tokenizer = load_tokenizer(base.directory, trust_remote_code=config.model.trust_remote_code)
    template = _choose_template(config, rows, tokenizer)
    tokens = _tokenize(rows, tokenizer, template, config, Path(base.directory), cache)
    say_tokens(tokens, template, tokenizer)

    _check_prompts(tokens, context, config.task.max_new_tokens)
    _save_tokenizer(folder, tokenizer, template, pad=tokens.report.pad_token_id, context=context)
    prepared = _describe(folder, plan, rows, base, tokens, dtype=(dtype, reason), splits_sha256=splits_sha256)
    schedule = _schedule(folder, plan, prepared)
    write_atomic(folder.launch / "schedule.json", msgspec.json.format(msgspec.json.encode(schedule), indent=2))
    write_atomic(folder.prepared_json, msgspec.json.format(msgspec.json.encode(prepared), indent=2))
    write_marker(folder, _marker(plan, prepared, schedule, seconds=time.monotonic() - started))
    return prepared


def _read_plan(folder: RunFolder) -> RunPlan:
    try:
        return load_plan(folder.plan_json.read_bytes())
    except OSError as fault:
        raise RunError(
            "this is not a run folder",
            where=str(folder.plan_json),
            got=fault.strerror or str(fault),
            allowed="a folder with a plan.json",
            do="start it with: python -m trainer prepare ...",
        ) from None


# ---- rows and model


def _freeze(rows: Rows, folder: RunFolder, *, seed: int) -> str:
    """Write who is in which split, before limits, or refuse rows that differ from those the run began with."""
    path = _splits_file(folder)
    if path.is_file():
        check_frozen(rows.gated, path)
    return freeze(rows.gated, path, seed=seed)


def _splits_file(folder: RunFolder) -> Path:
    return folder.root / "splits.json"


def _resolve_base(config: Config, rows: Rows, cache: Path) -> BaseModel:
    texts = [
        text
        for row in rows.splits.train[:TINY_TEXTS]
        for text in (row.text, *(message.content for message in row.messages))
        if text
    ]
    model = config.model
    base = resolve_base(
        model.path,
        revision=model.revision,
        cache=cache,
        trust_remote_code=model.trust_remote_code,
        tiny_texts=texts,
        seed=config.run.seed,
    )
    if not (model.add_tokens or model.add_special_tokens):
        return base
    return with_added_tokens(base, cache, tokens=model.add_tokens, special=model.add_special_tokens)


def _context(directory: Path) -> int | None:
    """Read the longest text, in tokens, that the model was made for; None when its config does not say."""
    described = read_config(directory)
    inner = described.get("text_config")
    for part in (described, inner if isinstance(inner, dict) else {}):
        for key in _CONTEXT_KEYS:
            if isinstance(part.get(key), int):
                return part[key]
    return None


def _check_capacity(capacity: int, context: int | None) -> None:
    if context is not None and capacity > context:
        raise ConfigError(
            "a pack would hold longer documents than the model was made for",
            where="packing.capacity",
            got=capacity,
            allowed=f"at most {context} for this model",
            do=f"packing.capacity={context}",
        )


def _decide_dtype(folder: RunFolder, requested: str, device: str, base: BaseModel) -> tuple[str, str]:
    """Resolve the compute dtype; a run that was prepared before keeps what was measured then."""
    if requested == "auto" and folder.prepared_json.is_file():
        before = msgspec.json.decode(folder.prepared_json.read_bytes(), type=_Decided)
        return before.dtype, before.dtype_reason
    hidden, intermediate = matmul_shape(base.directory)
    return resolve_dtype(requested, torch.device(device), hidden_size=hidden, intermediate_size=intermediate)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Decided:
    """What an earlier ``prepared.json`` of the run decided."""

    dtype: str
    dtype_reason: str


# ---- tokens


def _choose_template(config: Config, rows: Rows, tokenizer: PreTrainedTokenizerBase) -> ChatTemplate | None:
    """Return the chat template, or None when every row is plain text."""
    if not any(row.messages for _, split in rows.splits.items() for row in split):
        return None
    own = tokenizer.chat_template
    return choose_template(config.model.chat_template, own, tokenizer.get_vocab(), cwd=Path.cwd())


def _tokenize(
    rows: Rows,
    tokenizer: PreTrainedTokenizerBase,
    template: ChatTemplate | None,
    config: Config,
    tokenizer_folder: Path,
    cache: Path,
) -> Tokenized:
    data, task = config.data, config.task
    options = TokenOptions(
        capacity=config.packing.tokens,
        over_long=data.over_long,
        overlap=data.split_overlap,
        loss_on=data.loss_on,
        max_dropped_share=data.max_dropped_share,
        answers=task.name != "text",
        classes=task.name == "classification",
    )
    digests = {name: rows_digest(split) for name, split in rows.splits.items()}
    key = content_key(digests, template.text if template else "", tokenizer_folder, options)
    found = find_tokens(cache, key, warn=console.warn)
    if found is not None:
        return found
    encoder = ChatEncoder(tokenizer, template, loss_on=data.loss_on)
    total = sum(len(split) for _, split in rows.splits.items())
    with console.progress("tokenise", total) as bar:
        return make_tokens(rows.splits, encoder, options, cache=cache, key=key, on_progress=bar.update)


def _check_prompts(tokens: Tokenized, context: int | None, max_new_tokens: int) -> None:
    """Refuse held-out prompts that leave no room in the model's context for the answer."""
    longest = tokens.report.longest_prompt
    if context is not None and longest + max_new_tokens > context:
        raise ConfigError(
            "a held-out prompt and its answer do not fit into the model's context",
            where="task.max_new_tokens",
            got=f"{longest} tokens of prompt and {max_new_tokens} new ones",
            allowed=f"{context} together",
            do="set packing.capacity lower with data.over_long=drop, or task.max_new_tokens lower",
        )


def _save_tokenizer(
    folder: RunFolder,
    tokenizer: PreTrainedTokenizerBase,
    template: ChatTemplate | None,
    *,
    pad: int,
    context: int | None,
) -> None:
    """Write the tokenizer as it is used: with the template that was rendered and the pad token that was chosen."""
    if template is not None:
        tokenizer.chat_template = template.text
    tokenizer.pad_token = tokenizer.convert_ids_to_tokens(pad)
    tokenizer.padding_side = "left"
    if context is not None:
        tokenizer.model_max_length = context
    final = _tokenizer_folder(folder)
    stage = fresh_folder(folder.root, ".tokenizer.")
    try:
        tokenizer.save_pretrained(stage)
        shutil.rmtree(final, ignore_errors=True)
        stage.rename(final)
    finally:
        shutil.rmtree(stage, ignore_errors=True)


def _tokenizer_folder(folder: RunFolder) -> Path:
    return folder.root / "tokenizer"


# ---- what the ranks and the driver read


def _describe(
    folder: RunFolder,
    plan: RunPlan,
    rows: Rows,
    base: BaseModel,
    tokens: Tokenized,
    *,
    dtype: tuple[str, str],
    splits_sha256: str,
) -> Prepared:
    train = tokens.split("train")
    if train is None:
        raise AssertionError("a folder of tokens without training rows is never published")
    return Prepared(
        format=FORMAT,
        inputs=stage_inputs(plan, "prepare"),
        base=base,
        tokenizer=str(_tokenizer_folder(folder)),
        dtype=dtype[0],
        dtype_reason=dtype[1],
        pad_token_id=tokens.report.pad_token_id,
        stop_token_ids=tokens.report.stop_token_ids,
        labels=rows.labels,
        train=train,
        validation=tokens.split("validation"),
        test=tokens.split("test"),
        validation_examples=_copy_examples(folder, tokens, "validation"),
        test_examples=_copy_examples(folder, tokens, "test"),
        splits_file=str(_splits_file(folder)),
        splits_sha256=splits_sha256,
        sources=rows.sources,
        dropped=[*rows.dropped, *tokens.report.dropped],
        truncated=tokens.report.truncated,
        sample=tokens.report.sample,
        cost_ratio=_cost_ratio(plan, base),
    )


def _copy_examples(folder: RunFolder, tokens: Tokenized, name: SplitName) -> str:
    """Put the held-out prompts into the run folder, where they outlive the cache; "" when there are none."""
    source = examples_path(tokens.folder, name)
    if not source.is_file():
        return ""
    target = folder.evaluation / source.name
    write_atomic(target, source.read_bytes())
    return str(target)


def _schedule(folder: RunFolder, plan: RunPlan, prepared: Prepared) -> PlannedSchedule:
    """Pack all epochs, record for the ranks what came out, and describe it."""
    arena = TokenArena.open(prepared.train.arena)
    options = schedule_options(plan, cost_ratio=prepared.cost_ratio)
    schedule = training_schedule(arena.lengths, arena.targets, options)
    save_row(folder.schedule_npz, schedule.row, key=row_key(prepared.train.arena_sha256, options))
    ratio = options.cost_ratio or _model_ratio(plan, prepared.base)
    planned = planned_schedule(schedule, arena, ratio=ratio, by_time=packs_by_time(arena.lengths, options))
    if prepared.cost_ratio and not planned.by_time:
        console.warn(
            f"a document of {prepared.train.longest} tokens takes longer than a pack of {options.capacity} may: "
            "packs are filled by tokens, and the packs of a step are dealt to the ranks by time, "
            + _DEALT[options.sync]
        )
    return planned


def _cost_ratio(plan: RunPlan, base: BaseModel) -> float:
    """By how much packs are filled by time: as configured, or from the shape of the base."""
    packing = plan.config.packing
    if packing.cost == "tokens":
        return 0.0
    ratio = packing.cost_ratio or _model_ratio(plan, base)
    if ratio is None:
        raise ConfigError(
            "the time of a document cannot be told from this architecture",
            where="packing.cost_ratio",
            got="null with packing.cost=time",
            allowed="a number above 0, in 1 / tokens",
            do="set packing.cost_ratio (about 1e-4 for 0.1 B parameters, 2e-5 for 8 B), or packing.cost=tokens",
        )
    return ratio


def _model_ratio(plan: RunPlan, base: BaseModel) -> float | None:
    shape = folder_shape(Path(base.directory))
    return None if shape is None else cost_ratio(shape, frozen_base=plan.config.method.name == "lora")


def _marker(plan: RunPlan, prepared: Prepared, schedule: PlannedSchedule, *, seconds: float) -> Marker:
    return Marker(
        stage="prepare",
        inputs=prepared.inputs,
        seconds=round(seconds, 3),
        finished=datetime.now(UTC).isoformat(timespec="seconds"),
        summary={
            "train rows": prepared.train.rows,
            "documents": prepared.train.documents,
            "tokens": prepared.train.tokens,
            "packs": schedule.packs,
            "steps": schedule.steps,
            "dropped": sum(item.count for item in prepared.dropped),
        },
    )


def main(arguments: Sequence[str]) -> int:
    """Prepare the run folder that ``arguments`` names.

    Raises:
        RunError: not exactly one folder is named; otherwise as ``prepare``.
    """
    if len(arguments) != 1:
        raise RunError(
            "prepare works on one run folder",
            got=" ".join(arguments) or "none",
            allowed="python -m trainer.prepare RUN_DIR",
            do="python -m trainer prepare ... makes the folder and prepares it",
        )
    prepare(RunFolder(Path(arguments[0]).resolve()))
    return 0


if __name__ == "__main__":
    sys.exit(console.run_and_report(lambda: main(sys.argv[1:])))
