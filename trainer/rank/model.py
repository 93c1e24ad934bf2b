"""The model of a rank: the base, checked on the spot, and what is trained on top of it."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import cast

import torch
from torch import nn
from torch.optim import Optimizer

from trainer.distributed.seeds import seed_all
from trainer.model.adapters import (
    attach_lora,
    continue_lora,
    count_parameters,
    enable_activation_checkpointing,
    freeze,
    inner_model,
    parse_layers,
)
from trainer.model.load import load_model
from trainer.model.loss import LogitsVia, PackedLoss
from trainer.model.selfcheck import self_check
from trainer.rank.job import Job, open_arena
from trainer.train.optim import make_optimizer

PROBES = 4
"""Documents that the self-check looks at."""


def load_base(job: Job) -> nn.Module:
    """The base on the device: float32 when all of it is trained, else in the compute dtype."""
    config = job.plan.config
    weights = torch.float32 if config.method.name == "full" else job.compute_dtype
    trusted = config.model.trust_remote_code
    job.say(f"loading {job.prepared.base.name}: weights {weights}, computing in {job.prepared.dtype}")
    model = load_model(job.prepared.base.directory, dtype=weights, trust_remote_code=trusted)
    return cast(nn.Module, model).to(job.ranks.device)


def check_model(job: Job, model: nn.Module) -> LogitsVia:
    """Run the self-check on documents of the run; returns how the loss has to make its logits."""
    arena = open_arena(job.prepared.train)
    probes = [arena.document(number)[0].tolist() for number in range(min(PROBES, arena.num_documents))]
    report = self_check(
        model,
        probes,
        pad_token_id=job.prepared.pad_token_id,
        compute_dtype=job.compute_dtype,
        device=job.ranks.device,
    )
    for line in report.lines():
        job.say(line)
    return report.logits_via


def packed_loss(job: Job, model: nn.Module, logits_via: LogitsVia) -> PackedLoss:
    """The module that is trained and measured."""
    alpha = job.plan.config.optim.neftune_alpha
    return PackedLoss(model, logits_via=logits_via, compute_dtype=job.compute_dtype, neftune_alpha=alpha)


def make_trainable(job: Job, model: nn.Module) -> nn.Module:
    """Adapters on a frozen base, or the base itself less what is frozen."""
    method, inner = job.plan.config.method, inner_model(model)
    if method.name == "full":
        freeze(inner, method.freeze_layers, method.freeze_embeddings)
        trained = model
    elif method.adapter is not None:
        trained = continue_lora(inner, Path(method.adapter))
    else:
        seed_all(job.plan.config.run.seed)
        layers = (
            parse_layers(method.layers, inner.config.get_text_config().num_hidden_layers) if method.layers else None
        )
        trained = attach_lora(
            inner,
            rank=method.rank,
            alpha=method.alpha,
            dropout=method.dropout,
            targets=method.targets,
            layers=layers,
            rslora=method.rslora,
            dora=method.dora,
        )
    if job.plan.config.model.activation_checkpointing:
        enable_activation_checkpointing(trained)
    mine, every = count_parameters(trained)
    job.say(f"training {mine:,} of {every:,} parameters ({100 * mine / every:.2f} %)")
    return trained


def optimizer_maker(job: Job) -> Callable[[nn.Module], Optimizer]:
    """AdamW with the numbers of the config."""
    optim = job.plan.config.optim
    return partial(make_optimizer, lr=optim.lr, betas=optim.betas, eps=optim.eps, weight_decay=optim.weight_decay)
