"""The model of a rank: the base, checked on the spot, and what is trained on top of it."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import cast

import torch
from torch import nn
from torch.optim import Optimizer

from trainer.distributed.fsdp import Sharding
from trainer.distributed.seeds import seed_all
from trainer.distributed.strategy import Strategy, make_strategy
from trainer.distributed.zero import whole_size
from trainer.memory import loss_chunk
from trainer.model.adapters import (
    attach_lora,
    continue_lora,
    count_parameters,
    decoder_layer_modules,
    enable_activation_checkpointing,
    freeze,
    inner_model,
    parse_layers,
)
from trainer.model.compiling import compile_layers, should_compile
from trainer.model.device import free_memory
from trainer.model.load import load_model
from trainer.model.loss import LogitsVia, PackedLoss
from trainer.model.quantised import check_layers, quantised_layers
from trainer.model.selfcheck import probe_batch, self_check
from trainer.plan import zero_spec
from trainer.rank.job import Job, Summary, open_arena
from trainer.train.optim import make_optimizer

ROOM = 0.8
"""Share of the free memory of a device that a second copy of the model may take."""
PROBES = 4
"""Documents that the self-check looks at."""


def load_base(job: Job, device: torch.device | None = None, *, plain: bool = False) -> nn.Module:
    """The base on ``device`` (None: this rank's): float32 when all of it is trained, else in the compute dtype.

    Its linear layers are in 4 bits where the config says so, unless it has to be ``plain``.
    """
    config, device = job.plan.config, device or job.ranks.device
    quantize = None if plain else config.method.quantize
    weights = torch.float32 if config.method.name == "full" else job.compute_dtype
    trusted = config.model.trust_remote_code
    held = f"{weights}, linear layers in {quantize}" if quantize else str(weights)
    job.say(f"loading {job.prepared.base.name}: weights {held}, computing in {job.prepared.dtype}")
    model = load_model(
        job.prepared.base.directory, dtype=weights, trust_remote_code=trusted, quantize=quantize, device=device
    )
    return cast(nn.Module, model).to(device)


def probe_documents(job: Job) -> list[list[int]]:
    """The first few documents of the run."""
    arena = open_arena(job.prepared.train)
    return [arena.document(number)[0].tolist() for number in range(min(PROBES, arena.num_documents))]


def check_model(job: Job, model: nn.Module) -> LogitsVia:
    """Run the self-check on documents of the run; returns how the loss has to make its logits."""
    report = self_check(
        model,
        probe_documents(job),
        pad_token_id=job.prepared.pad_token_id,
        compute_dtype=job.compute_dtype,
        device=job.ranks.device,
    )
    for line in report.lines():
        job.say(line)
    return report.logits_via


def packed_loss(job: Job, model: nn.Module, logits_via: LogitsVia, *, compiled: bool = False) -> PackedLoss:
    """The module that is measured; ``compiled``, and trained."""
    config, vocabulary = job.plan.config, inner_model(model).config.get_text_config().vocab_size
    return PackedLoss(
        model,
        chunk=loss_chunk(job.plan.strategy, job.plan.device, config.packing.tokens, vocabulary),
        logits_via=logits_via,
        compute_dtype=job.compute_dtype,
        neftune_alpha=config.optim.neftune_alpha,
        compiled=compiled,
    )


def trained_loss(job: Job, model: nn.Module, logits_via: LogitsVia) -> PackedLoss:
    """The module that is trained, on top of the base ``model``; its layers are compiled where that pays."""
    trained = make_trainable(job, model)
    config = job.plan.config
    quantised = config.method.quantize is not None
    compiled, why = should_compile(config.model.compile, job.ranks.device, job.plan.strategy, quantised=quantised)
    job.say(f"torch.compile: {f'{compile_layers(trained)} layers' if compiled else 'off'} ({why})")
    return packed_loss(job, trained, logits_via, compiled=compiled)


def make_trainable(job: Job, model: nn.Module) -> nn.Module:
    """Adapters on a frozen base, or the base itself less what is frozen."""
    trained = _with_adapters(job, model)
    if job.plan.checkpointing:
        enable_activation_checkpointing(trained)
    mine, every = count_parameters(trained)
    job.say(f"training {mine:,} of {every:,} parameters ({100 * mine / every:.2f} %)")
    return trained


def _with_adapters(job: Job, model: nn.Module) -> nn.Module:
    method, inner = job.plan.config.method, inner_model(model)
    tokens = job.prepared.base.added_tokens
    if method.name == "full":
        freeze(inner, method.freeze_layers, method.freeze_embeddings)
        trained = model
    elif method.adapter is not None:
        trained = continue_lora(inner, Path(method.adapter), tokens)
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
            tokens=tokens,
        )
    return trained


def planned_strategy(
    job: Job, loss: PackedLoss, read: Callable[[str, int, int], torch.Tensor] | None = None
) -> Strategy:
    """The strategy of the plan around ``loss``, prepared; ``read``: numbers of what has none yet (``Sharding``)."""
    parallel = job.plan.parallel
    sharding = None
    if job.plan.strategy == "fsdp":
        sharding = Sharding(
            layers=decoder_layer_modules(inner_model(loss.model)),
            reshard_after_forward=parallel.reshard_after_forward,
            reduce_every_micro_batch=parallel.reduce_every_micro_batch,
            gather_for_generation=parallel.gather_for_generation,
            ranks=parallel.shard_ranks,
            offload=parallel.offload_parameters,
            read=read,
        )
    strategy = make_strategy(
        job.plan.strategy,
        job.ranks,
        dtype=job.compute_dtype,
        clip_norm=job.plan.config.optim.clip_norm,
        sharding=sharding,
        zero=zero_spec(job.plan),
        gather_for_generation=parallel.gather_for_generation,
        read=read,
    )
    strategy.prepare(loss, optimizer_maker(job))
    if (kind := job.plan.config.method.quantize) is not None:
        check_layers(quantised_layers(loss), kind, job.compute_dtype)
    return strategy


def whole_model(job: Job, strategy: Strategy, loss: PackedLoss) -> PackedLoss | None:
    """The trained model in one piece, on rank 0, to be used up; None on the others. All ranks call this.

    Where ranks own shards, rank 0 loads the base again and gets what was trained, one parameter at a time, in the dtype
    in which it was trained. It is put into the main memory where the device has no room for it. So it does where the
    base was in 4 bits: what is exported stands on the base as it was published.
    """
    quantised = job.plan.config.method.quantize is not None
    if strategy.replicated and not quantised:
        return loss if job.ranks.is_first else None
    job.say("putting the adapter onto the plain base" if quantised else "putting the shards together on rank 0")
    copy = _plain_copy(job, loss) if job.ranks.is_first else None
    places = {} if copy is None else dict(copy.named_parameters())
    with torch.no_grad():
        for name, tensor in strategy.full_parameters():
            if tensor is not None:
                places[name].copy_(tensor)
    return copy


def cost_of_quantising(job: Job, trained: PackedLoss, exported: PackedLoss) -> Summary:
    """Say how far ``exported``, on the plain base, is from the model that was ``trained`` on a base in 4 bits.

    By the loss per token of a few documents of the run. Nothing where the base was not in 4 bits.
    """
    if job.plan.config.method.quantize is None:
        return {}
    figures: dict[str, float] = {}
    for name, model in (("loss_4bit", trained), ("loss_exported", exported)):
        batch = probe_batch(probe_documents(job), next(model.parameters()).device)
        with torch.no_grad():
            figures[name] = float(model.eval()(batch)) / batch.num_targets
    job.warn(
        "the adapter was trained on a base in 4 bits and is exported for, and merged into, the base as published: "
        f"loss {figures['loss_4bit']:.4f} on a few documents in training, {figures['loss_exported']:.4f} as exported"
    )
    return {**figures}


def _plain_copy(job: Job, loss: PackedLoss) -> PackedLoss:
    """The base with adapters, if there are any, as this rank had it before the strategy cut it."""
    needed, device = sum(whole_size(p) * p.element_size() for p in loss.parameters()), job.ranks.device
    if job.plan.config.method.quantize is not None:
        needed = job.prepared.base.parameters * job.compute_dtype.itemsize
    if device.type != "cpu" and needed > ROOM * free_memory(device):
        job.warn(f"the whole model ({needed / 1e9:.1f} GB) has no room beside the shards: it is exported from the CPU")
        device = torch.device("cpu")
    whole = _with_adapters(job, load_base(job, device, plain=True))
    return packed_loss(job, whole, loss.logits_via)


def optimizer_maker(job: Job) -> Callable[[nn.Module], Optimizer]:
    """AdamW with the numbers of the config."""
    optim = job.plan.config.optim
    return partial(make_optimizer, lr=optim.lr, betas=optim.betas, eps=optim.eps, weight_decay=optim.weight_decay)
