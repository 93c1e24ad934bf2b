"""Twenty steps of our loop against transformers' own Trainer on the same packs.

The peer shares nothing with us but the initial weights and the tokens: its loss, its counting of targets over the
accumulation, its AdamW, its schedule, its clipping, and transformers' own isolation of packed documents (an sdpa mask
made from position ids) instead of our attention. The gradient norm is compared too: a wrong scale of the loss hides
behind Adam.
"""

import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader
from train_fixtures import make_arena, make_source, tiny_loss, tiny_strategy
from transformers import Trainer, TrainingArguments

from trainer.data.batches import TrainingBatches
from trainer.distributed.ranks import Ranks, start_ranks
from trainer.train.loop import train_step
from trainer.train.metrics import StepTimer
from trainer.train.optim import lr_schedule

STEPS = 20
PACKS = 2
LR = 1e-3
CLIP = 0.5


@pytest.fixture(scope="module")
def ranks() -> Ranks:
    return start_ranks(device="cpu", world_size=1)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory, ranks: Ranks) -> TrainingBatches:
    folder = tmp_path_factory.mktemp("data")
    make_arena(folder / "train")
    return make_source(folder, ranks, packs=PACKS, max_steps=STEPS)


class Peer(Trainer):
    """Hands the packs out in their order and keeps what is otherwise rounded for the log."""

    def __init__(self, packs: list[dict[str, torch.Tensor]], **options: Any) -> None:
        self.packs = packs
        self.losses: list[float] = []
        self.norms: list[float] = []
        super().__init__(**options)

    def get_train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(self.packs, batch_size=1, shuffle=False, collate_fn=lambda rows: rows[0])  # type: ignore[arg-type]

    def training_step(self, *arguments: Any, **named: Any) -> torch.Tensor:
        loss = super().training_step(*arguments, **named)
        self.losses.append(float(loss))
        return loss

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        norm: Any = super()._get_grad_norm(model, grad_norm=grad_norm)
        self.norms.append(float(norm))
        return norm


def their_packs(source: TrainingBatches) -> Iterator[dict[str, torch.Tensor]]:
    """Our packs in the form that transformers expects: it shifts the labels itself."""
    for planned in source.steps(0):
        for documents in planned.documents:
            batch = source.load(documents)
            labels = torch.full_like(batch.labels, -100)
            labels[:, 1:] = batch.labels[:, :-1]
            yield {"input_ids": batch.input_ids, "labels": labels, "position_ids": batch.position_ids}


def their_course(source: TrainingBatches, folder: Path, *, lora: bool) -> tuple[np.ndarray, np.ndarray]:
    model = tiny_loss(lora=lora).model
    inner = model.get_base_model() if lora else model  # type: ignore[operator]
    inner.set_attn_implementation("sdpa")  # type: ignore[operator]
    inner.config.use_cache = False  # type: ignore[union-attr]  # with a cache, documents of a pack see each other
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=STEPS,
        per_device_train_batch_size=1,
        gradient_accumulation_steps=PACKS,
        learning_rate=LR,
        lr_scheduler_type="cosine",
        warmup_steps=2,
        weight_decay=0.0,
        max_grad_norm=CLIP,
        use_cpu=True,
        report_to=[],
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )
    peer = Peer(list(their_packs(source)), model=model, args=arguments)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what the peer warns about is not ours
        peer.train()
    return np.array(peer.losses).reshape(STEPS, PACKS).sum(axis=1), np.array(peer.norms)


def our_course(source: TrainingBatches, ranks: Ranks, *, lora: bool) -> tuple[np.ndarray, np.ndarray]:
    strategy, _ = tiny_strategy(ranks, lora=lora, lr=LR, clip_norm=CLIP, weight_decay=0.0)
    strategy.module.train()
    factor = lr_schedule("cosine", steps=STEPS, warmup=0.1)
    outcomes = [
        train_step(
            strategy,
            source,
            planned,
            source.load,
            lr=LR * factor(planned.index),
            seed=0,
            stop=lambda: False,
            timer=StepTimer(),
        )
        for planned in source.steps(0)
    ]
    return np.array([outcome.loss for outcome in outcomes]), np.array([outcome.grad_norm for outcome in outcomes])


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_twenty_steps_equal_those_of_transformers(
    source: TrainingBatches, ranks: Ranks, tmp_path: Path, lora: bool
) -> None:
    our_loss, our_norm = our_course(source, ranks, lora=lora)
    their_loss, their_norm = their_course(source, tmp_path, lora=lora)
    assert our_loss.shape == their_loss.shape == our_norm.shape == their_norm.shape == (STEPS,)
    assert our_loss[-1] < our_loss[0] - (0.05 if lora else 0.3), "there is something to compare only if it learns"
    assert our_norm.max() > CLIP, "clipping takes part"
    loss, norm = np.abs(our_loss - their_loss), np.abs(our_norm - their_norm) / their_norm
    assert loss.max() <= 1e-5
    assert loss.mean() <= 2e-6
    assert norm.max() <= 1e-4
    assert norm.mean() <= 1e-5
