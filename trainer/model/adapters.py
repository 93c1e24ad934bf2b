"""Which weights are trained: low-rank adapters through peft, or the whole model less what is frozen.

peft belongs to this module alone, so that the rest of the code sees modules and parameters. Names are spelt out here
(``all-linear`` becomes ``q_proj, k_proj, ...``) because the adapter's config has to say what it changes, and because a
name that matches nothing must be an error and not a smaller adapter.

Adapters are kept in float32 on a base in 16 bits. peft would then lift every activation to float32 around each adapter;
with that switched off and the forward pass under autocast, the small matrices are cast instead.
"""

import json
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.trainable_tokens import TrainableTokensLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import set_peft_model_state_dict
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn
from transformers import PreTrainedModel

from trainer.errors import ModelError, nearest
from trainer.layout import adapted_layers

ALL_LINEAR = "all-linear"
ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
TOKEN_ROWS = "trainable_tokens_delta"
"""In the name of the rows that peft trains of a matrix of embeddings. They replace the matrix's own."""


def inner_model(model: nn.Module) -> PreTrainedModel:
    """The transformers model, with or without adapters around it."""
    if isinstance(model, PeftModel):
        return cast(PreTrainedModel, model.get_base_model())
    if isinstance(model, PreTrainedModel):
        return model
    raise TypeError(f"expected a transformers model or a PeftModel, got {type(model).__name__}")


def attach_lora(
    model: PreTrainedModel,
    *,
    rank: int,
    alpha: float,
    dropout: float = 0.0,
    targets: Sequence[str] = (ALL_LINEAR,),
    layers: range | None = None,
    rslora: bool = False,
    dora: bool = False,
    tokens: Sequence[int] = (),
) -> PeftModel:
    """A new low-rank adapter (arXiv 2106.09685) on ``model``, whose own weights are frozen.

    ``targets``: suffixes of linear modules (``q_proj``, ``mlp.down_proj``) or ``all-linear``, which is every linear
    module but the output layer. ``layers``: decoder layers that get one. Initial values come from torch's generator.
    ``tokens``: ids whose rows of embeddings and output layer are trained as well.

    Raises:
        ModelError: unknown target, no layer left, or a target that cannot be adapted.
    """
    names = expand_targets(model, targets)
    stack, count = decoder_layers(model)
    chosen: list[int] | None = None
    if layers is not None:
        if not len(layers) or layers[0] < 0 or layers[-1] >= count:
            raise ModelError("no such decoder layers", where="method.layers", got=layers, allowed=f"0 to {count - 1}")
        chosen = list(layers)
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=rank,
        lora_alpha=cast(int, alpha),  # peft's annotation; it multiplies with it
        lora_dropout=dropout,
        target_modules=names,
        layers_to_transform=chosen,
        layers_pattern=stack if chosen is not None else None,
        use_rslora=rslora,
        use_dora=dora,
        trainable_token_indices=_token_rows(model, tokens),
    )
    return _without_input_casts(_wrap(model, config))


def continue_lora(model: PreTrainedModel, folder: Path, tokens: Sequence[int] = ()) -> PeftModel:
    """Load the adapter in ``folder`` onto ``model`` for further training; its rank, targets and scale are used.

    ``tokens``: ids that were added to the vocabulary of ``model``; the adapter has to bring their rows.

    Raises:
        ModelError: not an adapter folder, not LoRA, pickled weights, made for another base model or other tokens.
    """
    config = read_adapter_config(folder)
    weights = folder / ADAPTER_WEIGHTS
    if not weights.is_file():
        found = sorted(path.name for path in folder.iterdir())
        raise ModelError(
            "the adapter folder has no safetensors weights",
            where=str(folder),
            got=", ".join(found),
            allowed=ADAPTER_WEIGHTS,
            do="save the adapter with safe_serialization=True (pickled weights can run code and are not read)",
        )
    lora = cast(LoraConfig, LoraConfig.from_pretrained(str(folder)))
    lora.inference_mode = False
    _check_adapter_targets(model, lora, folder)
    _check_adapter_tokens(lora, folder, tokens)
    lora.base_model_name_or_path = None  # peft would remark that the base is here and not where it was then
    adapted = _wrap(model, lora)
    try:
        tensors = load_file(weights)
    except SafetensorError as error:
        raise ModelError(
            "the adapter's weights are damaged", where=str(weights), got=error, do="copy the adapter folder again"
        ) from error
    try:
        result = set_peft_model_state_dict(adapted, tensors)
    except RuntimeError as error:
        raise _other_base(folder, str(config.get("base_model_name_or_path")), str(error)) from error
    own = {name for name, _ in adapted.named_parameters() if "lora_" in name or TOKEN_ROWS in name}  # tied ones once
    missing = [name for name in result.missing_keys if name in own]
    if missing or result.unexpected_keys:
        different = [*missing, *result.unexpected_keys]
        raise _other_base(
            folder, str(config.get("base_model_name_or_path")), f"{len(different)} tensors, first {different[0]}"
        )
    return _without_input_casts(adapted)


def read_adapter_config(folder: Path) -> dict[str, Any]:
    """``adapter_config.json`` of a LoRA adapter.

    Raises:
        ModelError: no such file, unreadable, or another kind of adapter.
    """
    path = folder / ADAPTER_CONFIG
    if not path.is_file():
        raise ModelError(
            "no adapter here",
            where=str(folder),
            got=f"no {ADAPTER_CONFIG}",
            do="give the folder export/adapter of a run",
        )
    try:
        config = json.loads(path.read_text("utf-8"))
    except ValueError as error:
        raise ModelError("the adapter's config is not JSON", where=str(path), got=error) from error
    if config.get("peft_type") != "LORA":
        raise ModelError(
            "this adapter cannot be continued", where=str(path), got=config.get("peft_type"), allowed="peft_type LORA"
        )
    return config


def parse_layers(text: str, count: int) -> range:
    """``15:``, ``:8``, ``4:12``, ``-10:`` of ``count`` decoder layers: Python's slices, but never clipped.

    For a model whose layers nobody could count when the run was planned.

    Raises:
        ModelError: not of that form, outside the model, or empty.
    """
    found = adapted_layers(text, count)
    if found is None:
        raise ModelError(
            "are no layers of this model",
            where="method.layers",
            got=text,
            allowed=f"layers 0 to {count - 1}: '15:', ':8', '4:12' or '-10:'",
        )
    return found


def freeze(model: PreTrainedModel, layers: int, embeddings: bool) -> None:
    """Full fine-tuning: train everything but the first ``layers`` decoder layers and, if asked, the embeddings.

    A tied output layer is frozen with the embeddings.

    Raises:
        ModelError: more layers than the model has.
    """
    stack = decoder_layer_modules(model)
    if not 0 <= layers <= len(stack):
        allowed = f"0 to {len(stack)}"
        raise ModelError("no such decoder layers", where="method.freeze_layers", got=layers, allowed=allowed)
    model.requires_grad_(True)
    for layer in stack[:layers]:
        layer.requires_grad_(False)
    if embeddings:
        cast(nn.Module, model.get_input_embeddings()).requires_grad_(False)


def enable_activation_checkpointing(model: nn.Module) -> None:
    """Recompute each decoder layer in the backward pass instead of keeping its activations.

    Raises:
        ModelError: the model's code does not offer it.
    """
    try:
        with warnings.catch_warnings():  # renamed in the middle of transformers 5; this name works in all of 5
            warnings.filterwarnings("ignore", message=".*gradient_checkpointing_enable", category=FutureWarning)
            inner_model(model).gradient_checkpointing_enable({"use_reentrant": False})
    except ValueError as error:
        raise ModelError(
            "this model has no activation checkpointing",
            where="model.activation_checkpointing",
            got=type(inner_model(model)).__name__,
            do="set model.activation_checkpointing=false and a smaller packing.capacity",
        ) from error


def decoder_layers(model: PreTrainedModel) -> tuple[str, int]:
    """Name (below the decoder) and number of the decoder layers.

    Raises:
        ModelError: no list of as many modules as the config has layers.
    """
    count = int(model.config.get_text_config().num_hidden_layers)
    decoder = cast(nn.Module, model.get_decoder())
    for name, module in decoder.named_children():
        if isinstance(module, nn.ModuleList) and len(module) == count:
            return name, count
    raise ModelError(
        "cannot find the decoder layers of this model", got=type(model).__name__, do="leave method.layers unset"
    )


def decoder_layer_modules(model: PreTrainedModel) -> list[nn.Module]:
    """The decoder layers, first to last.

    Raises:
        ModelError: see ``decoder_layers``.
    """
    stack, _ = decoder_layers(model)
    return list(cast(nn.ModuleList, cast(nn.Module, model.get_decoder()).get_submodule(stack)))


def linear_names(model: PreTrainedModel) -> list[str]:
    """Last parts of the names of all linear modules but the output layer, in the model's order."""
    head = model.get_output_embeddings()
    found = (name for name, module in model.named_modules() if isinstance(module, nn.Linear) and module is not head)
    return list(dict.fromkeys(name.rsplit(".", 1)[-1] for name in found))


def expand_targets(model: PreTrainedModel, targets: Sequence[str]) -> list[str]:
    """``targets`` with ``all-linear`` spelt out, each checked to name at least one linear module.

    Raises:
        ModelError: a name that matches nothing, nothing at all, or a tied output layer.
    """
    names = linear_names(model)
    linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    head = next((name for name, module in model.named_modules() if module is model.get_output_embeddings()), "")
    chosen: dict[str, None] = {}
    for target in targets:
        if target == ALL_LINEAR:
            chosen.update(dict.fromkeys(names))
            continue
        matched = [name for name in linear if name == target or name.endswith(f".{target}")]
        if not matched:
            raise ModelError(
                "no linear module of this model has that name",
                where="method.targets",
                got=target,
                allowed=", ".join([ALL_LINEAR, *names]),
                do=nearest(target, names),
            )
        if head in matched and _is_tied(model):
            raise ModelError(
                "the output layer shares its weights with the embeddings and cannot have an adapter of its own",
                where="method.targets",
                got=target,
                allowed=", ".join([ALL_LINEAR, *names]),
            )
        chosen[target] = None
    if not chosen:
        raise ModelError("no module is left to train", where="method.targets", got="[]", allowed=", ".join(names))
    return list(chosen)


def _is_tied(model: PreTrainedModel) -> bool:
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    return head is not None and cast(nn.Linear, head).weight is cast(nn.Embedding, embedding).weight


def _check_adapter_targets(model: PreTrainedModel, lora: LoraConfig, folder: Path) -> None:
    targets = lora.target_modules
    if isinstance(targets, str) or targets is None:  # a regular expression: the tensors decide
        return
    linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    absent = [target for target in sorted(targets) if not any(n == target or n.endswith(f".{target}") for n in linear)]
    if absent:
        raise _other_base(folder, str(lora.base_model_name_or_path), f"no modules {', '.join(absent)} in this model")


def _check_adapter_tokens(lora: LoraConfig, folder: Path, tokens: Sequence[int]) -> None:
    rows = lora.trainable_token_indices or []
    known = sorted({token for of in (rows.values() if isinstance(rows, dict) else [rows]) for token in of})
    if known != sorted(tokens):
        raise ModelError(
            "the adapter has rows for other tokens than are added to the vocabulary",
            where="model.add_tokens",
            got=f"ids {sorted(tokens)}",
            allowed=f"ids {known}, which {folder} was trained with",
            do="give the same model.add_tokens and model.add_special_tokens as in its run, or method.adapter=null",
        )


def _token_rows(model: PreTrainedModel, tokens: Sequence[int]) -> dict[str, list[int]] | None:
    """What peft trains rows of, by module: the embeddings, and an output layer that does not share their tensor."""
    if not tokens:
        return None
    wanted = [model.get_input_embeddings(), *([] if _is_tied(model) else [model.get_output_embeddings()])]
    return {name: list(tokens) for name, module in model.named_modules() if any(module is one for one in wanted)}


def added_rows(model: nn.Module) -> dict[str, tuple[nn.Parameter, list[int]]]:
    """Name of a matrix of the base (``model.embed_tokens.weight``) to the rows that are trained of it, and their ids.

    The rows are float32 [len(ids), H]. A tied output layer has none of its own.
    """
    found: dict[str, tuple[nn.Parameter, list[int]]] = {}
    for name, module in inner_model(model).named_modules():
        if isinstance(module, TrainableTokensLayer) and module.tied_adapter is None:
            for adapter, rows in module.trainable_tokens_delta.items():
                found[f"{name.removesuffix('.token_adapter')}.weight"] = (rows, module.token_indices[adapter])
    return found


def _other_base(folder: Path, base: str, detail: str) -> ModelError:
    return ModelError(
        "the adapter was made for another base model",
        where=str(folder),
        got=detail[:400],
        allowed=f"the base it was trained on: {base}",
        do="set model.path to that base, or train a new adapter (method.adapter=null)",
    )


def _wrap(model: PreTrainedModel, config: LoraConfig) -> PeftModel:
    with warnings.catch_warnings():  # peft asks transformers for a property under its old name
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing", category=FutureWarning)
        return cast(PeftModel, get_peft_model(model, config))


def _without_input_casts(model: PeftModel) -> PeftModel:
    """Switch off peft's float32 copies of activations; from now on forward passes run under ``compute_context``.

    For good and not with peft's context manager: activation checkpointing runs layers again in the backward pass, when
    the context is gone. Adapters themselves stay float32.
    """
    for module in model.modules():
        if isinstance(module, BaseTunerLayer):
            module.cast_input_dtype_enabled = False  # pyright: ignore[reportArgumentType]  (set by peft.helpers too)
    return model


def trainable_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Name to parameter of everything that is trained, in the model's order."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def count_parameters(model: nn.Module) -> tuple[int, int]:
    """(trained, all) parameters; a tied matrix counts once, and what is in 4 bits by what it stands for."""
    sizes = [(_elements(parameter), parameter.requires_grad) for parameter in model.parameters()]
    return sum(size for size, trained in sizes if trained), sum(size for size, _ in sizes)


def _elements(parameter: nn.Parameter) -> int:
    """Two weights of 4 bits are one byte; bitsandbytes keeps the shape of the whole beside them."""
    state = getattr(parameter, "quant_state", None)
    return parameter.numel() if state is None else state.shape.numel()
