"""The stage ``baseline`` of a rank: what the base model answers, measured once for all runs that ask it the same.

A sweep of a hundred runs, or a second run with another learning rate, would measure the same untrained model again:
minutes of generation for figures that cannot differ. They are kept in ``run.cache`` under a digest of everything they
depend on, the program's own code among it. A result there is whole (a folder that was renamed into its place) or it is
not there; deleting it costs the time to measure again.
"""

import os
import shutil
from pathlib import Path

import torch

from trainer.distributed.strategy import Strategy
from trainer.errors import DataError
from trainer.evaluate.score import Evaluation, load_answers, load_evaluation
from trainer.fingerprint import code_digest, digest, file_digest
from trainer.model.loss import PackedLoss
from trainer.paths import fresh_folder, fsync_directory, fsync_file, write_atomic
from trainer.rank.job import Job, Summary
from trainer.rank.testing import evaluate_on_test

FOLDER = "baselines"
ZERO_SHOT = "zero_shot"
SUFFIXES = (".predictions.jsonl", ".json")
"""Of the files of one evaluation; the figures last, so that they never stand without their rows."""


def measure_baseline(job: Job, loss: PackedLoss, strategy: Strategy | None = None) -> Summary:
    """Measure the base without tuning, or copy what was measured of it before; returns the marker's summary.

    ``strategy``: as for ``evaluate_on_test``.
    """
    if ZERO_SHOT not in job.plan.config.eval.baselines:
        return {}
    place = baseline_place(job)
    found = job.ranks.gather(_copied(job, place) if job.ranks.is_first else None)[0]
    if found is not None:
        job.say(f"baseline: from the cache ({place})")
        return found
    summary = evaluate_on_test(job, ZERO_SHOT, loss, strategy)
    if job.ranks.is_first and job.prepared.test is not None:
        _publish(job.folder.evaluation, place)
    return summary


def baseline_place(job: Job) -> Path:
    """The folder in the cache for the baseline of this model on these rows; the same on all ranks.

    Neither seed nor anything of the training is in its name. Everything that an answer or a loss depends on is: the
    base and its dtype, 4 bits, tokens and rows of the test split, how answers are generated and scored, the device.
    """
    config, prepared, test = job.plan.config, job.prepared, job.prepared.test
    on_gpu = torch.cuda.get_device_name(job.ranks.device) if job.plan.device == "cuda" else "cpu"
    parts = [
        code_digest(),
        str(torch.__version__),
        on_gpu,
        prepared.base.sha256,
        prepared.dtype,
        config.method.quantize,
        config.packing.capacity,
        None if test is None else test.arena_sha256,
        file_digest(Path(prepared.test_examples)) if prepared.test_examples else "",
        prepared.labels,
        prepared.stop_token_ids,
        prepared.pad_token_id,
        config.task,
        config.eval.batch_tokens,
    ]
    return Path(job.plan.cache_dir) / FOLDER / digest(parts)[:16]


def _copied(job: Job, place: Path) -> Summary | None:
    """Bring what is in ``place`` into the run; None: there is nothing, or nothing that can be read."""
    try:
        evaluation, _ = load_evaluation(place, ZERO_SHOT), load_answers(place, ZERO_SHOT)
        for suffix in SUFFIXES:
            write_atomic(job.folder.evaluation / f"{ZERO_SHOT}{suffix}", (place / f"{ZERO_SHOT}{suffix}").read_bytes())
    except (DataError, FileNotFoundError):
        if place.is_dir():
            job.warn(f"what is kept of the baseline cannot be read, and is measured again: {place}")
        return None
    return _summary(evaluation)


def _summary(evaluation: Evaluation) -> Summary:
    loss = {} if evaluation.loss is None else {"loss": evaluation.loss}
    return {"rows": evaluation.rows, **loss, **evaluation.metrics}


def _publish(evaluation: Path, place: Path) -> None:
    """Put the files of the evaluation into ``place``, all or none; another run may do the same at the same time."""
    place.parent.mkdir(parents=True, exist_ok=True)
    staged = fresh_folder(place.parent, ".staged-")
    for suffix in SUFFIXES:
        shutil.copyfile(evaluation / f"{ZERO_SHOT}{suffix}", staged / f"{ZERO_SHOT}{suffix}")
        fsync_file(staged / f"{ZERO_SHOT}{suffix}")
    shutil.rmtree(place, ignore_errors=True)  # only there if it could not be read
    try:
        os.rename(staged, place)
        fsync_directory(place.parent)
    except OSError:  # somebody else was faster, and measured the same
        shutil.rmtree(staged, ignore_errors=True)
