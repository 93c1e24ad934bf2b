"""What a rank measures on held-out rows: loss and answers, shared among the ranks, and the gate at the end."""

import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial

from torch import nn

from trainer.console import ProgressReport, progress
from trainer.data.batches import held_out_batches
from trainer.distributed.strategy import Strategy
from trainer.errors import RunError, TrainingFault
from trainer.evaluate.generate import generate, in_order
from trainer.evaluate.loss import HeldOutLoss, held_out_loss
from trainer.evaluate.score import Evaluation, save_evaluation, score
from trainer.markers import read_marker
from trainer.model.load import load_tokenizer
from trainer.model.loss import PackedLoss
from trainer.model.precision import compute_context
from trainer.rank.job import Job, Summary, open_arena, read_examples
from trainer.samples import EvaluationExample, Prediction, SplitInfo


def evaluate_on_test(job: Job, who: str, loss: PackedLoss, strategy: Strategy | None = None) -> Summary:
    """Loss and scores on the frozen test split into ``evaluation/<who>.json``; returns the marker's summary.

    ``strategy``: the one that ``loss`` was prepared by; None: by none, every rank has the whole model.
    """
    config, test = job.plan.config, job.prepared.test
    if test is None:
        job.say(f"{who}: there is no test split, nothing is measured")
        return {"rows": 0}
    start = time.monotonic()
    job.say(f"{who}: measuring {test.rows} test rows")
    held_out = measure_loss(job, loss, test)
    examples = read_examples(job.prepared.test_examples) if config.task.name != "text" else []
    with progress(f"{who}: answers", len(examples)) as bar:
        shown = partial(_show_answered, job, bar, len(examples))
        predictions = answer(job, loss, examples, strategy, on_answered=shown)
    scores = score(config.task.name, examples, predictions, job.prepared.labels) if examples else None
    metrics = scores.metrics if scores else {"perplexity": held_out.perplexity}
    evaluation = Evaluation(
        who=who,
        task=config.task.name,
        rows=test.rows,
        metrics=metrics,
        by_slice=scores.by_slice if scores else {},
        loss=held_out.mean,
        targets=held_out.targets,
        seconds=time.monotonic() - start,
    )
    if job.ranks.is_first:
        save_evaluation(job.folder.evaluation, evaluation, examples, predictions)
    job.say(f"{who}: loss {held_out.mean:.4f}, " + ", ".join(f"{n} {v:.4f}" for n, v in metrics.items()))
    return {"rows": test.rows, "loss": held_out.mean, **metrics}


def measure_loss(job: Job, loss: PackedLoss, split: SplitInfo | None) -> HeldOutLoss:
    """Token-weighted loss over a split; every rank measures its share."""
    if split is None:
        raise RunError("there is no such split to measure", got="none", do="give data.validation and data.test")
    batches = held_out_batches(
        open_arena(split),
        capacity=job.plan.config.packing.tokens,
        rank=job.ranks.rank,
        world_size=job.ranks.world_size,
        device=job.ranks.device,
        pad_token_id=job.prepared.pad_token_id,
    )
    return held_out_loss(loss, batches, job.ranks.sum_over_ranks)


def answer(
    job: Job,
    loss: PackedLoss,
    examples: Sequence[EvaluationExample],
    strategy: Strategy | None = None,
    *,
    on_answered: Callable[[int], None] = lambda rows: None,
) -> list[Prediction]:
    """The model's answers to ``examples``, of which every rank generates its share; ``strategy`` as above."""
    if not examples:
        return []
    with nullcontext() if strategy is None else strategy.gathered():
        share = generate_here(
            job,
            loss.model,
            examples,
            on_answered=on_answered,
            rank=job.ranks.rank,
            world_size=job.ranks.world_size,
            in_step=strategy is not None and strategy.in_step,
        )
    return in_order(examples, job.ranks.gather(share))


def generate_here(
    job: Job,
    model: nn.Module,
    examples: Sequence[EvaluationExample],
    *,
    compute: Callable[[], AbstractContextManager[object]] | None = None,
    on_answered: Callable[[int], None] = lambda rows: None,
    rank: int = 0,
    world_size: int = 1,
    in_step: bool = False,
) -> list[Prediction]:
    """Greedy answers to the share of ``rank``, where the weights of ``model`` are.

    ``compute``: makes the context of a forward pass; None: autocast to the run's dtype.
    """
    device = next(model.parameters()).device
    tokenizer = load_tokenizer(job.prepared.tokenizer)

    def decode(ids: list[int]) -> str:
        return str(tokenizer.decode(ids, skip_special_tokens=True))

    return generate(
        model,
        examples,
        max_new_tokens=job.plan.config.task.max_new_tokens,
        stop_token_ids=job.prepared.stop_token_ids,
        pad_token_id=job.prepared.pad_token_id,
        batch_tokens=job.plan.config.eval.batch_tokens,
        decode=decode,
        device=device,
        compute=compute or partial(compute_context, device, job.compute_dtype),
        on_answered=on_answered,
        rank=rank,
        world_size=world_size,
        in_step=in_step,
    )


def _show_answered(job: Job, bar: ProgressReport, total: int, rows: int) -> None:
    """Show how far all ranks are by how far the first one is."""
    if job.ranks.is_first:
        bar.update(min(rows * job.ranks.world_size, total))


def check_gate(job: Job) -> None:
    """Compare the best validation loss with ``eval.max_loss``; the evaluation is already written.

    Raises:
        TrainingFault: it is above, or there is none to compare.
    """
    allowed = job.plan.config.eval.max_loss
    if allowed is None:
        return
    marker = read_marker(job.folder, "train")
    best = marker.summary.get("best_loss") if marker is not None else None
    if not isinstance(best, float) or best > allowed:
        raise TrainingFault(
            "the run does not pass its gate: the validation loss of the best checkpoint is too high",
            where="eval.max_loss",
            got=f"{best:.4f}" if isinstance(best, float) else "no validation loss",
            allowed=f"at most {allowed:g}",
            do="see evaluation/ and metrics.jsonl (nothing was exported); change the recipe, or a wrong gate",
        )
