"""Rules of what is trained: the model, which of its weights, and in what steps."""

import re
from collections.abc import Iterator

from trainer.config import Config, MethodConfig
from trainer.errors import Problem
from trainer.rules.names import BUILTIN_MODELS, is_hub_model
from trainer.rules.problems import no_effect, not_among

_LORA_ONLY = ("rank", "alpha", "dropout", "targets", "layers", "rslora", "dora", "adapter", "quantize")
_FROM_ADAPTER = ("rank", "alpha", "targets", "layers", "rslora", "dora")
_FULL_ONLY = ("freeze_layers", "freeze_embeddings")
_PARALLEL_ONLY: tuple[tuple[tuple[str, ...], tuple[str, ...]], ...] = (
    (("fsdp",), ("reshard_after_forward", "reduce_every_micro_batch", "shard_ranks")),
    (("fsdp", "zero3"), ("gather_for_generation", "offload_parameters")),
    (("zero1", "zero2", "zero3"), ("offload_optimizer",)),
    (("zero3",), ("keep_whole_below",)),
)
"""Ways of sharing the work, and the settings that only they have."""
_LAYERS = re.compile(r"\s*-?\d*\s*:\s*-?\d*\s*")


def model_rules(config: Config) -> Iterator[Problem]:
    """Yield what is wrong with the model's path, and settings that do not go with a path of that kind."""
    model = config.model
    builtin = model.path.startswith("builtin:")
    if builtin and model.path not in BUILTIN_MODELS:
        otherwise = "choose one of these, a folder, or a Hub id"
        yield not_among(
            "unknown built-in model", where="model.path", got=model.path, allowed=BUILTIN_MODELS, otherwise=otherwise
        )
    if model.revision is not None and not is_hub_model(model.path):
        yield Problem(
            what="has no effect: only Hub models have revisions",
            where="model.revision",
            got=f"{model.revision} with model.path={model.path}",
            allowed="null",
            do="remove it, or give a Hub id in model.path",
        )
    if model.trust_remote_code and is_hub_model(model.path) and model.revision is None:
        yield Problem(
            what="runs code that anybody may change tomorrow",
            where="model.trust_remote_code",
            got="true without model.revision",
            allowed="true with a pinned revision",
            do="set model.revision to the commit you have read",
        )
    if model.chat_template is not None and config.task.name == "text":
        yield from no_effect("model", model, ("chat_template",), "task.name=text", "remove it")


def method_rules(config: Config) -> Iterator[Problem]:
    """Yield what is wrong with full fine-tuning or adapters, and settings of the other of the two."""
    method = config.method
    if method.name == "full":
        do = "method=lora, or remove it (an experiment that sets it: ~method.KEY)"
        yield from no_effect("method", method, _LORA_ONLY, "method.name=full", do)
        if config.export.adapter and not config.export.merged:
            yield Problem(
                what="would leave no weights: full fine-tuning has no adapter",
                where="export.merged",
                got="false",
                allowed="true, or export.adapter=false as well: then nothing is exported",
                do="export=merged, or export=none",
            )
        return
    yield from no_effect("method", method, _FULL_ONLY, "method.name=lora", "method=full, or remove it")
    if method.adapter is not None:
        do = "remove it: the adapter brings its own"
        yield from no_effect("method", method, _FROM_ADAPTER, "method.adapter given", do)
    if not method.targets:
        yield Problem(
            what="no module would get an adapter",
            where="method.targets",
            got="[]",
            allowed="module names, or all-linear",
            do="method.targets=[all-linear]",
        )
    if "all-linear" in method.targets and len(method.targets) > 1:
        yield Problem(
            what="says both all and some",
            where="method.targets",
            got=", ".join(method.targets),
            allowed="all-linear alone, or names",
            do="remove all-linear, or everything else",
        )
    yield from _layer_range(method)


def _layer_range(method: MethodConfig) -> Iterator[Problem]:
    if method.layers is not None and not _LAYERS.fullmatch(method.layers):
        yield Problem(
            what="is not a range of layers",
            where="method.layers",
            got=method.layers,
            allowed="'15:' (from 15 on), ':8', '4:12', '-10:' (the last ten)",
            do='quote it in YAML: layers: "15:"',
        )


def packing_rules(config: Config) -> Iterator[Problem]:
    """Yield settings of packing by time that go with packing by tokens."""
    if config.packing.cost == "tokens":
        do = "packing.cost=time, or remove it"
        yield from no_effect("packing", config.packing, ("cost_ratio",), "packing.cost=tokens", do)


def parallel_rules(config: Config) -> Iterator[Problem]:
    """Yield settings of another way of sharing the work, and a dtype that this one cannot train in."""
    parallel = config.parallel
    for names, settings in _PARALLEL_ONLY:
        if parallel.name not in names:
            do = " or ".join(f"parallel={name}" for name in names) + ", or remove it"
            yield from no_effect("parallel", parallel, settings, f"parallel.name={parallel.name}", do)
    if parallel.name == "zero3" and config.model.compile:
        yield Problem(
            what="cannot be combined with zero3, which gathers the weights of a layer piece by piece while it runs",
            where="model.compile",
            got="true with parallel=zero3",
            allowed="false, or null",
            do="remove it, or parallel=fsdp",
        )
    if parallel.name not in ("auto", "ddp") and config.model.dtype == "float16":
        yield Problem(
            what=f"cannot be trained by {parallel.name}: float16 needs a loss scale, which it does not have",
            where="model.dtype",
            got=f"float16 with parallel={parallel.name}",
            allowed="auto, bfloat16, float32",
            do="model.dtype=bfloat16, or parallel=ddp",
        )


def optim_rules(config: Config) -> Iterator[Problem]:
    """Yield what is wrong with the size of a batch and the course of the learning rate."""
    optim = config.optim
    capacity = config.packing.tokens
    if optim.batch_packs is not None and optim.batch_tokens is not None:
        yield Problem(
            what="two answers to how large a batch is",
            where="optim.batch_tokens",
            got=f"batch_packs={optim.batch_packs} and batch_tokens={optim.batch_tokens}",
            allowed="one of them",
            do="set the other one to null: optim.batch_packs=null",
        )
    elif optim.batch_tokens is not None and optim.batch_tokens % capacity:
        below = optim.batch_tokens // capacity * capacity
        yield Problem(
            what="is not a whole number of packs",
            where="optim.batch_tokens",
            got=f"{optim.batch_tokens} with packing.capacity={capacity}",
            allowed=f"a multiple of {capacity}",
            do="optim.batch_tokens=" + " or ".join(str(fitting) for fitting in (below, below + capacity) if fitting),
        )
    if optim.schedule == "constant":
        yield from no_effect("optim", optim, ("min_lr_ratio",), "optim.schedule=constant", "remove it")
