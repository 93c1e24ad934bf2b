"""A tiny base, a tuned model on it, and what an export needs besides; and a whole run folder as the stages leave it."""

import dataclasses
import json
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

import msgspec
import torch
from look_fixtures import plan_of
from peft import PeftModel
from transformers import PreTrainedModel

from trainer.config import Config
from trainer.evaluate.generate import generate
from trainer.export.golden import golden_prompts, narrow, price_of_rounding
from trainer.export.inference import Inference, load_plain_tokenizer, make_inference
from trainer.export.weights import Exported, export_merged, merge
from trainer.markers import Marker, write_marker
from trainer.model.adapters import attach_lora
from trainer.model.builtin import tiny
from trainer.model.load import load_model
from trainer.paths import RunFolder
from trainer.plan import RunPlan, dump_plan
from trainer.samples import BaseModel, EvaluationExample, Prediction, Prepared, SourceInfo, SplitInfo

TEXTS = [
    "Licensee shall indemnify the Licensor against all claims.",
    "This agreement is governed by the laws of the State of Ohio.",
    "Either party may terminate this agreement upon notice.",
]
PAD, STOP = 0, 2
NEW_TOKENS = 6


def base_folder(cache: Path) -> Path:
    return tiny(cache, TEXTS, seed=1)


def examples(folder: Path, count: int = 3) -> list[EvaluationExample]:
    tokenizer = load_plain_tokenizer(folder)
    found: list[EvaluationExample] = []
    for row in range(count):
        messages = [{"role": "user", "content": TEXTS[row % len(TEXTS)] + " Again." * (row // len(TEXTS))}]
        encoded = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)
        found.append(EvaluationExample(id=f"row{row}", prompt_ids=list(encoded["input_ids"]), answer="x"))  # type: ignore[index]
    return found


def tuned_full(folder: Path) -> PreTrainedModel:
    """Every weight a little off, as after full fine-tuning."""
    model = load_model(folder, dtype=torch.float32)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.05)
    return model


def tuned_lora(folder: Path, *, dtype: torch.dtype = torch.float32, **options: object) -> PeftModel:
    """An adapter that has learnt something, on a base in ``dtype``: B is not zero."""
    torch.manual_seed(4)
    model = attach_lora(load_model(folder, dtype=dtype), rank=4, alpha=8.0, **options)  # type: ignore[arg-type]
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return model


def answers(model: torch.nn.Module, rows: Sequence[EvaluationExample]) -> list[Prediction]:
    return generate(
        model,
        rows,
        max_new_tokens=NEW_TOKENS,
        stop_token_ids=[STOP],
        pad_token_id=PAD,
        batch_tokens=4096,
        decode=lambda ids: " ".join(map(str, ids)),
        device="cpu",
    )


def inference_of(model: torch.nn.Module, folder: Path, *, count: int = 3, **changes: object) -> Inference:
    rows = examples(folder, count)
    golden = golden_prompts(model, rows, answers(model, rows))
    settings: dict[str, object] = {
        "base_name": "builtin:tiny",
        "base_revision": "",
        "base_sha256": "ab" * 32,
        "dtype": "float32",
        "dtype_reason": "as configured",
        "max_length": 64,
        "system": None,
        "max_new_tokens": NEW_TOKENS,
        "stop_token_ids": [STOP],
        "pad_token_id": PAD,
        "tokenizer": folder,
        "golden_dtype": "float32",
        "golden": golden,
    }
    return make_inference(**(settings | changes))  # type: ignore[arg-type]


def merged_export(
    model: PeftModel | PreTrainedModel, folder: Path, base: Path, *, dtype: torch.dtype = torch.float32
) -> Exported:
    """``folder`` as the export stage writes it; uses ``model`` up."""
    trained = inference_of(model, base, dtype=str(dtype).removeprefix("torch."))
    whole = merge(model)
    narrow(whole, dtype)
    given = answers(whole, examples(base))
    golden = golden_prompts(whole.float(), examples(base), given)  # type: ignore[operator]
    price = price_of_rounding(whole, trained.golden, golden)
    return export_merged(
        whole,
        folder,
        tokenizer=base,
        inference=dataclasses.replace(trained, golden=golden, rounding=price),
        base_directory=base,
        dtype=dtype,
        max_shard_gb=5.0,
    )


def prepared_of(base: Path) -> Prepared:
    split = {"documents": 4, "tokens": 200, "targets": 20, "longest": 64, "arena": "arena", "arena_sha256": "5" * 64}
    return Prepared(
        format=1,
        inputs="i" * 64,
        base=BaseModel(
            name="builtin:tiny",
            directory=str(base),
            revision="",
            sha256="ab" * 32,
            license="apache-2.0",
            attribution="A randomly initialised model.",
            parameters=200_000,
        ),
        tokenizer=str(base),
        dtype="float32",
        dtype_reason="as configured",
        pad_token_id=PAD,
        stop_token_ids=[STOP],
        labels=[],
        train=SplitInfo(rows=4, **split),  # type: ignore[arg-type]
        validation=None,
        test=SplitInfo(rows=3, **split),  # type: ignore[arg-type]
        validation_examples="",
        test_examples="",
        splits_file="",
        splits_sha256="5" * 64,
        sources=[SourceInfo(name="rows", location="rows.jsonl", sha256="6" * 64, rows=7, license="CC0-1.0")],
        dropped=[],
        truncated=0,
        sample="",
    )


def write_run(folder: RunFolder, base: Path, config: Config | None = None) -> RunPlan:
    """What the stages before verify and card leave, without the export."""
    plan = plan_of(folder, config)
    folder.root.mkdir(parents=True, exist_ok=True)
    folder.plan_json.write_bytes(dump_plan(plan))
    folder.prepared_json.write_bytes(msgspec.json.encode(prepared_of(base)))
    environment = {
        "python": "3.11.9",
        "cpu": "a CPU",
        "cores": 2,
        "device": "cpu",
        "host": "h",
        "packages": {"torch": "2.13.0"},
    }
    folder.env_json.write_text(
        json.dumps(environment | {"code": {"version": "0.1.0", "commit": "c" * 40, "dirty": True}})
    )
    lines = [
        {"step": step, "loss": 3.0 - step, "tokens": 100 * step, "epoch": step / 2, "tokens_per_second": 50.0 * step}
        for step in (1, 2)
    ]
    lines[1]["val_loss"] = 1.5
    folder.metrics_jsonl.write_text("".join(json.dumps(line) + "\n" for line in lines))
    folder.evaluation.mkdir(exist_ok=True)
    for who, value in (("zero_shot", 0.0), ("tuned", 0.5)):
        figures = {"who": who, "task": "chat", "rows": 4, "metrics": {"exact_match": value, "stopped": 1.0}}
        rest = {"by_slice": {}, "loss": 2.0 - value, "targets": 20, "seconds": 1.0}
        (folder.evaluation / f"{who}.json").write_text(json.dumps(figures | rest))
    finished = datetime(2026, 5, 1, 12, tzinfo=UTC).isoformat()
    write_marker(folder, Marker(stage="train", inputs="t", seconds=12.0, finished=finished, summary={"steps": 2}))
    return plan
