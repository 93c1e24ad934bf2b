"""Run folders as runs leave them, for those who look at runs: without torch, in milliseconds."""

import json
import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import msgspec

from trainer.config import Config
from trainer.cost.ledger import Spell, append
from trainer.fingerprint import digest
from trainer.markers import STAGES, Marker, write_marker
from trainer.paths import RunFolder
from trainer.plan import RunPlan, dump_plan
from trainer.train.checkpoint.format import FORMAT, FileInfo, Manifest, checkpoint_path, file_digest
from trainer.train.guard import Best
from trainer.train.state import TrainState

LABELS = ("indemnity", "governing law", "termination", "warranty")
ROWS = 189
TEST = "5" * 64


def plan_of(folder: RunFolder, config: Config | None = None) -> RunPlan:
    return RunPlan(
        format=1,
        identity="0123456789",
        name="clauses",
        run_dir=str(folder.root),
        cache_dir=str(folder.root / "cache"),
        config=config or Config(),
        model_fingerprint="m" * 64,
        data_fingerprint="d" * 64,
        nodes=1,
        processes=1,
        world_size=1,
        device="cpu",
        threads=1,
        strategy="single",
        batch_packs=2,
        accumulation=2,
        code_version="0.1.0",
    )


def checkpoint(folder: RunFolder, step: int, *, best: int) -> Path:
    path = checkpoint_path(folder.checkpoints, step)
    path.mkdir(parents=True)
    weights = path / "rank0.safetensors"
    weights.write_bytes(bytes(1000))
    manifest = Manifest(
        format=FORMAT,
        step=step,
        identity="0123456789",
        base="b" * 64,
        world_size=2,
        state=TrainState(step=step, best=Best(value=1.0, step=best)),
        shapes={},
        files={weights.name: FileInfo(1000, file_digest(weights))},
    )
    sealed = replace(manifest, sha256=digest(manifest))
    (path / "manifest.json").write_bytes(msgspec.json.encode(sealed))
    return path


def finished_run(
    root: Path,
    config: Config | None = None,
    *,
    name: str = "clauses",
    identity: str = "0123456789",
    right: float = 0.8,
    steps: int = 120,
    seed: int = 0,
    answer: str = "",
) -> RunFolder:
    """A whole run of the demo's shape. ``right``: share of right answers; ``answer``: what wrong ones say."""
    folder, noise = RunFolder(root), random.Random(seed)
    root.mkdir(parents=True)
    plan = replace(plan_of(folder, config), name=name, identity=identity)
    folder.plan_json.write_bytes(dump_plan(plan))
    lines = [_step(step, steps, noise, best=2.0 * (1 - right)) for step in range(1, steps + 1)]
    folder.metrics_jsonl.write_text("".join(json.dumps(line) + "\n" for line in lines))
    write_test(folder, "zero_shot", [noise.random() < 0.05 for _ in range(ROWS)], answer=answer)
    write_test(folder, "tuned", [noise.random() < right for _ in range(ROWS)], answer=answer)
    for number, stage in enumerate(STAGES):
        summary: dict[str, float | int | str] = {"steps": steps, "best_loss": 0.21} if stage == "train" else {}
        finished = f"2026-11-23T10:0{number}:00+00:00"
        marker = Marker(stage=stage, inputs="i", seconds=40.0 * number + 3.5, finished=finished, summary=summary)
        write_marker(folder, marker)
    checkpoint(folder, steps // 2, best=steps // 2)
    checkpoint(folder, steps, best=steps // 2)
    write_ledger(folder)
    folder.done.write_text(f"{identity}\n")
    return folder


def write_test(folder: RunFolder, who: str, right: Sequence[bool], *, answer: str = "", test: str = TEST) -> None:
    """An evaluation with one label a row; a wrong answer is ``answer``, or another label."""
    folder.evaluation.mkdir(exist_ok=True)
    label = [LABELS[row % len(LABELS)] for row in range(len(right))]
    told = [label[row] if right[row] else answer or LABELS[(row + 1) % len(LABELS)] for row in range(len(right))]
    lines = [
        {"id": f"row{row}", "text": told[row], "answer": label[row], "label": label[row], "correct": right[row]}
        | {"stopped": True, "token_ids": [1, 2, 3]}
        for row in range(len(right))
    ]
    (folder.evaluation / f"{who}.predictions.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    share = sum(right) / len(right)
    by_label = {
        name: {"rows": float(label.count(name)), "exact_match": _share(right, label, name)} for name in set(label)
    }
    scores = {
        "who": who,
        "task": "classification",
        "rows": len(right),
        "metrics": {"exact_match": share, "macro_f1": share * 0.97, "stopped": 1.0},
        "by_slice": {"label": by_label},
        "loss": 5.1 if who == "zero_shot" else 0.22,
        "targets": 900,
        "seconds": 36.0,
    }
    (folder.evaluation / f"{who}.json").write_text(json.dumps(scores))
    (folder.root / "splits.json").write_text(json.dumps({"format": 1, "seed": 0, "test": {"sha256": test}}))


def write_ledger(folder: RunFolder) -> None:
    """Two ranks on two GPUs that were stopped once, and the stages of one process."""
    for began in ("2026-11-23T10:00:00+00:00", "2026-11-23T12:00:00+00:00"):
        for rank in range(2):
            for stage, seconds in (("start", 30.0), ("train", 1800.0), ("evaluate", 240.0)):
                spell = Spell(
                    stage=stage,
                    began=began,
                    rank=rank,
                    seconds=seconds,
                    gpus=1,
                    gpu="NVIDIA H100 80GB HBM3",
                    core_seconds=1.1 * seconds,
                    gpu_joules=420.0 * seconds,
                    gpu_meter="counter",
                )
                append(folder.rank_ledger(rank), spell)
    prepare = Spell(stage="prepare", began="2026-11-23T09:59:00+00:00", rank=-1, seconds=20.0, core_seconds=35.0)
    append(folder.driver_ledger, prepare)


def _step(step: int, steps: int, noise: random.Random, *, best: float) -> dict[str, object]:
    loss = best + 3.0 * 0.96**step + 0.05 * noise.random()
    line: dict[str, object] = {
        "step": step,
        "loss": loss,
        "lr": 2e-4 * (1 - step / steps),
        "grad_norm": 0.5 + noise.random(),
        "tokens_per_second": 540.0 + 30 * noise.random(),
        "tokens": 2048 * step,
        "targets": 128,
        "epoch": 3 * step / steps,
        "seconds": {"data": 0.01, "forward_backward": 3.2, "optimizer": 0.1},
        "memory_gb": 1.83,
    }
    return line | ({"val_loss": loss + 0.1, "val_accuracy": 1 - loss / 4} if step % (steps // 10) == 0 else {})


def _share(right: Sequence[bool], labels: Sequence[str], name: str) -> float:
    rows = [row for row, label in enumerate(labels) if label == name]
    return sum(right[row] for row in rows) / len(rows)
