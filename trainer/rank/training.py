"""The stage ``train`` of a rank: the config's numbers, the data and the files around the loop."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from math import ceil
from pathlib import Path

import numpy as np

from trainer.console import ProgressReport, progress
from trainer.data.batches import TrainingBatches
from trainer.data.scheduling import read_row, row_key, schedule_options, training_schedule
from trainer.data.timing import WARM_UP, measured_ratio
from trainer.data.tokenized import origins_path
from trainer.distributed.strategy import Strategy
from trainer.errors import NeedsPerson, RunError
from trainer.evaluate.report import loss_curve
from trainer.evaluate.score import score
from trainer.markers import read_marker
from trainer.model.loss import PackedLoss
from trainer.rank.job import Job, Summary, open_arena, read_examples
from trainer.rank.testing import answer, measure_loss
from trainer.samples import SplitInfo
from trainer.train.checkpoint.behind import Saver
from trainer.train.checkpoint.fence import Fence, claim_together
from trainer.train.checkpoint.format import Checkpoint, DamagedCheckpoint, checkpoint_path, verify
from trainer.train.checkpoint.publish import retain
from trainer.train.checkpoint.resume import find_agreed, find_resumable, load
from trainer.train.guard import FaultPolicy, Judge
from trainer.train.loop import Hooks, Settings, train
from trainer.train.metrics import MetricsFile, StepRecord
from trainer.train.optim import lr_schedule
from trainer.train.state import TrainState

VALIDATIONS = 10
"""About so many validations in a run whose config does not say how often."""


def do_training(job: Job, strategy: Strategy, loss: PackedLoss) -> Summary:
    """Train from the newest good checkpoint to the end; returns the marker's summary."""
    source = training_batches(job)
    source.check()
    settings = loop_settings(job, source.num_steps)
    fence = claim_together(job.ranks, job.folder.checkpoints)
    found = find_agreed(job.ranks, job.folder.checkpoints, lambda: newest_checkpoint(job))
    state = TrainState() if found is None else load(strategy, found)
    if found is not None:
        there = found.manifest.world_size
        moved = f", which {there} rank(s) wrote" if there != job.ranks.world_size else ""
        job.say(f"continuing after step {state.step} of {source.num_steps} from {found.path.name}{moved}")
    metrics = MetricsFile(job.folder.metrics_jsonl, still_ours=fence.check, warn=job.warn)
    if job.ranks.is_first:
        metrics.continue_after(state.step - (state.pending is not None))
    saver = make_saver(job, strategy, fence, metrics)

    def boundary(phase: str, step: int) -> None:
        job.watchdog.enter(phase, step)
        saver.check()

    with progress("train", source.num_steps, start=state.step) as bar:
        hooks = Hooks(
            validate=partial(validate, job, strategy, loss) if job.prepared.validation else None,
            save=lambda state, required: saver.save(state, required=required),
            record=partial(record_step, job, metrics, bar),
            warn=job.warn,
            boundary=boundary,
            rollback=partial(roll_back, job, strategy, saver),
        )
        began = state.step
        with moving(job, strategy):
            try:
                state = train(strategy, source, settings, hooks, state, job.stop)
            finally:
                job.watchdog.enter("saving", state.step)
                saver.leave()
    summary = training_summary(state)
    if job.ranks.is_first:
        loss_curve(job.folder.metrics_jsonl, job.folder.curve_png, title=job.plan.name)
        summary |= suggest_cost_ratio(job, source, metrics, began)
    return summary


def suggest_cost_ratio(job: Job, source: TrainingBatches, metrics: MetricsFile, began: int) -> Summary:
    """Say what the steps since ``began`` say about the time of packs. For the next run: this one's packs are fixed."""
    records = [(step, seconds) for step, seconds in metrics.step_seconds() if step > began + WARM_UP]
    table = np.array([(*source.work(step - 1), seconds) for step, seconds in records], np.float64).reshape(-1, 3)
    found = measured_ratio(table[:, 0], table[:, 1], table[:, 2])
    if found is None:
        return {}
    job.say(
        f"measured over {found.steps} steps: packing.cost_ratio={found.ratio:.2g} (+-{found.error:.1g}) describes this "
        "model on this machine; for another run with packing.cost=time"
    )
    return {"measured_cost_ratio": found.ratio}


def training_batches(job: Job) -> TrainingBatches:
    """This rank's share of the training data."""
    arena = open_arena(job.prepared.train)
    options = schedule_options(job.plan, cost_ratio=job.prepared.cost_ratio)
    recorded = read_row(job.folder.schedule_npz, key=row_key(job.prepared.train.arena_sha256, options))
    if recorded is None:
        job.say(f"no record of these packs in {job.folder.schedule_npz}: packing every epoch now")
    return TrainingBatches(
        arena,
        training_schedule(arena.lengths, arena.targets, options, recorded),
        capacity=options.capacity,
        rank=job.ranks.rank,
        device=job.ranks.device,
        pad_token_id=job.prepared.pad_token_id,
        origin_of=lambda document: origin_of(job.prepared.train, document),
    )


def origin_of(split: SplitInfo, document: int) -> str:
    """File and row of a document of the training arena. Reads a file: for messages only."""
    origins = origins_path(Path(split.arena).parent, "train").read_text("utf-8").splitlines()
    return origins[document]


def loop_settings(job: Job, steps: int) -> Settings:
    """What the loop goes by, out of the config."""
    config = job.plan.config
    optim, every = config.optim, config.eval.every or ceil(steps / VALIDATIONS)
    factor = lr_schedule(optim.schedule, steps=steps, warmup=optim.warmup, min_ratio=optim.min_lr_ratio)
    return Settings(
        seed=config.run.seed,
        lr=lambda step: optim.lr * factor(step),
        validate_every=every,
        save_every=config.checkpoint.every or every,
        judge=Judge(
            metric=config.eval.metric, patience=config.eval.patience, min_improvement=config.eval.min_improvement
        ),
        spike_factor=config.guard.spike_factor,
        spike_window=config.guard.spike_window,
        policy=FaultPolicy(
            nonfinite=config.guard.nonfinite_action,
            spike=config.guard.spike_action,
            most=config.guard.max_faults,
            most_in_row=config.guard.max_faults_in_row,
        ),
    )


def validate(job: Job, strategy: Strategy, loss: PackedLoss) -> Mapping[str, float]:
    """Token-weighted loss of the validation split, and scores of its first rows if the config asks for them."""
    config = job.plan.config
    figures = {"loss": measure_loss(job, loss, job.prepared.validation).mean}
    if config.eval.generate_rows:
        examples = read_examples(job.prepared.validation_examples)[: config.eval.generate_rows]
        predictions = answer(job, loss, examples, strategy)
        figures |= score(config.task.name, examples, predictions, job.prepared.labels).metrics
    return figures


@contextmanager
def moving(job: Job, strategy: Strategy) -> Iterator[None]:
    """Every forward pass of the block is a move for those who watch."""
    handle = strategy.inner.register_forward_pre_hook(lambda *_: job.watchdog.move())
    try:
        yield
    finally:
        handle.remove()


def make_saver(job: Job, strategy: Strategy, fence: Fence, metrics: MetricsFile) -> Saver:
    """What publishes the state, and then deletes what need not be kept."""
    config = job.plan.config.checkpoint
    verified = set[int]()
    if job.plan.waits_for_saves:
        job.warn(f"the training waits for its saves: {job.plan.waits_for_saves}")

    def delete_old(state: TrainState) -> None:
        verified.add(state.step)
        retain(fence, keep=config.keep, best=state.best.step, verified=verified)

    return Saver(
        strategy,
        fence,
        job.ranks.aside() if config.asynchronous and not job.plan.waits_for_saves else None,
        identity=job.plan.identity,
        base=job.prepared.base.sha256,
        before=metrics.sync,
        after=delete_old,
        warn=job.warn,
    )


def roll_back(job: Job, strategy: Strategy, saver: Saver) -> TrainState | None:
    """Fill weights and optimizer from the newest good checkpoint; None: there is none yet."""
    saver.finish()
    found = find_agreed(job.ranks, job.folder.checkpoints, lambda: newest_checkpoint(job))
    return None if found is None else load(strategy, found)


def record_step(
    job: Job, metrics: MetricsFile, bar: ProgressReport, record: StepRecord, figures: Mapping[str, float]
) -> None:
    """One line in ``metrics.jsonl`` and one on the terminal."""
    if not job.ranks.is_first:
        return
    metrics.append(record, figures)
    words = [f"loss {record.loss:.4f}", f"{record.tokens_per_second:,.0f} tokens/s"]
    if figures:
        job.say(f"step {record.step}: " + ", ".join(f"val_{name} {value:.4f}" for name, value in figures.items()))
    bar.update(record.step, ", ".join(words))


def training_summary(state: TrainState) -> Summary:
    """Figures of a finished training for its marker; ``best_loss`` is what the gate looks at."""
    summary: Summary = {"steps": state.step, "tokens": state.tokens}
    if state.losses.recent:
        summary["loss"] = state.losses.recent[-1]
    if state.best.step is not None:
        summary["best_step"] = state.best.step
        summary |= {f"best_{name}": value for name, value in state.best.figures.items()}
    if state.losses.spikes:
        summary["spikes"] = state.losses.spikes
    if state.faults:
        summary |= {"steps_not_taken": state.faults, "rollbacks": state.rollbacks}
    if state.stopped_early:
        summary["ended"] = "early: no improvement for eval.patience validations"
    return summary


def newest_checkpoint(job: Job) -> Checkpoint | None:
    """Where training goes on."""
    return find_resumable(
        job.folder.checkpoints, identity=job.plan.identity, base=job.prepared.base.sha256, warn=job.warn
    )


def best_checkpoint(job: Job) -> Checkpoint:
    """The result of training: the best checkpoint by ``eval.metric``, the last one where there is no validation.

    Raises:
        RunError: nothing was trained yet.
        NeedsPerson: the best one is damaged.
    """
    found = find_agreed(job.ranks, job.folder.checkpoints, lambda: _find_best(job))
    if found is None:
        raise RunError(
            "there is no trained model in this run",
            where=str(job.folder.checkpoints),
            got="no checkpoint",
            do=f"train first: python -m trainer train {job.folder.root}",
        )
    return found


def _find_best(job: Job) -> Checkpoint | None:
    newest = newest_checkpoint(job)
    if newest is None:
        return None
    step = _result_step(job, newest)
    if step == newest.manifest.step:
        return newest
    path = checkpoint_path(job.folder.checkpoints, step)
    try:
        return Checkpoint(path, verify(path))
    except DamagedCheckpoint as fault:
        raise NeedsPerson(
            "the best checkpoint of this run cannot be trusted",
            where=str(path),
            got=fault.problems[0].got,
            do=f"restore it, or remove {path.parent} and {job.folder.stages / 'train.json'} to train anew",
        ) from fault


def _result_step(job: Job, newest: Checkpoint) -> int:
    """The step that training ended with as its best, or else its last.

    The marker knows it best: when the newest checkpoint is damaged, an older one tells of the best before it.
    """
    marker = read_marker(job.folder, "train")
    if marker is not None:
        step = marker.summary.get("best_step", marker.summary.get("steps"))
        if isinstance(step, int):
            return step
    return newest.manifest.state.best.step or newest.manifest.step
