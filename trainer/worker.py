"""One rank of a run, from top to bottom: ``python -m trainer.worker RUN_DIR --stages baseline,train,evaluate,export``.

Every rank does the same; rank 0 also writes what exists once. The launcher only has to set RANK, LOCAL_RANK and
WORLD_SIZE, so torchrun and ``accelerate launch`` start it as well. A stage whose marker is current is skipped.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from trainer.console import run_and_leave
from trainer.distributed.preflight import MEET_SECONDS
from trainer.distributed.ranks import start_ranks
from trainer.distributed.strategy import Strategy
from trainer.fingerprint import digest
from trainer.markers import BY_RANKS, is_current
from trainer.model.loss import PackedLoss
from trainer.paths import RunFolder
from trainer.plan import stage_inputs
from trainer.rank.baseline import measure_baseline
from trainer.rank.exports import write_exports
from trainer.rank.job import Job, read_inputs, watched
from trainer.rank.model import (
    check_model,
    cost_of_quantising,
    load_base,
    packed_loss,
    planned_strategy,
    trained_loss,
    whole_model,
)
from trainer.rank.sliced import Skeleton, loading, say_peaks, sharded_loss, skeleton
from trainer.rank.spending import open_book
from trainer.rank.testing import check_gate, evaluate_on_test
from trainer.rank.training import best_checkpoint, do_training
from trainer.train.checkpoint.resume import load
from trainer.train.guard import StopFlag


def main() -> NoReturn:
    """Do the stages that are asked for and not done; the exit codes are those of ``errors.py``."""
    parser = argparse.ArgumentParser(prog="python -m trainer.worker", description="One rank of a prepared run.")
    parser.add_argument("run_dir", type=Path)
    parser.add_argument("--stages", default=",".join(BY_RANKS), help="comma separated, default: %(default)s")
    arguments = parser.parse_args()
    folder = RunFolder(arguments.run_dir.resolve())
    run_and_leave(lambda: work(folder, arguments.stages.split(",")), logs=str(folder.logs))


def work(folder: RunFolder, stages: Sequence[str]) -> None:
    """One rank's whole life.

    Raises:
        TrimtabError: whatever ends the run; every kind has its exit code.
    """
    plan, prepared = read_inputs(folder, stages)
    with StopFlag() as stop:
        ranks = start_ranks(
            device=plan.device,
            world_size=plan.world_size,
            threads=plan.threads,
            meet_seconds=plan.config.launch.meet_seconds or MEET_SECONDS,
            traces=folder.logs,
        )
        book = open_book(folder, ranks)
        try:
            ranks.same_on_all_ranks(digest([plan, prepared]), what="plan.json and prepared.json")
            todo = ranks.gather(
                [s for s in BY_RANKS if s in stages and not is_current(folder, s, stage_inputs(plan, s))]
            )
            if todo[0]:
                with watched(folder, plan, ranks) as watchdog:
                    job = Job(
                        folder=folder,
                        plan=plan,
                        prepared=prepared,
                        ranks=ranks,
                        stop=stop,
                        watchdog=watchdog,
                        book=book,
                    )
                    do_stages(job, todo[0])
                    watchdog.enter("leaving", 0)
        finally:
            book.close()
            ranks.close()


def do_stages(job: Job, todo: Sequence[str]) -> None:
    """Base model, self-check, baseline; then what is trained on top of it, and its evaluation and export."""
    base = skeleton(job)
    loaded = load_whole(job, todo) if base is None else load_in_slices(job, todo, base)
    if loaded is None:
        return
    loss, strategy = loaded
    if "train" in todo:
        with job.stage("train") as summary:
            summary |= do_training(job, strategy, loss)
    with job.loading():
        load(strategy, best_checkpoint(job), weights_only=True)
    if "evaluate" in todo:
        with job.stage("evaluate") as summary:
            summary |= evaluate_on_test(job, "tuned", loss, strategy)
    check_gate(job)
    if "export" in todo:
        with job.stage("export") as summary:
            if job.plan.config.export.nothing:
                job.say("export: nothing, as export.adapter=false export.merged=false say")
                return
            whole = whole_model(job, strategy, loss)
            if whole is not None:
                summary |= cost_of_quantising(job, loss, whole)
                summary |= write_exports(job, whole)
        say_peaks(job)


def load_whole(job: Job, todo: Sequence[str]) -> tuple[PackedLoss, Strategy] | None:
    """Every rank loads the base, which is measured, and the strategy takes what is trained on top of it.

    None where nothing but the baseline is to be done.
    """
    with job.loading(), loading(job):
        model = load_base(job)
        logits_via = check_model(job, model)
    if "baseline" in todo:
        with job.stage("baseline") as summary:
            summary |= measure_baseline(job, packed_loss(job, model, logits_via))
    if set(todo) <= {"baseline"}:
        return None
    with job.loading(), loading(job, "made ready to train"):  # DeepSpeed, if it is used, makes its masters here
        loss = trained_loss(job, model, logits_via)
        return loss, planned_strategy(job, loss)


def load_in_slices(job: Job, todo: Sequence[str], base: Skeleton) -> tuple[PackedLoss, Strategy] | None:
    """The same where no rank ever has the whole base: a new adapter changes nothing, so it is measured with it."""
    with job.loading(), loading(job):
        loss, strategy = sharded_loss(job, base)
    if "baseline" in todo:
        with job.stage("baseline") as summary:
            summary |= measure_baseline(job, loss, strategy)
    return None if set(todo) <= {"baseline"} else (loss, strategy)


if __name__ == "__main__":
    main()
