"""A frozen base in 4 bits (QLoRA, arXiv 2305.14314): how it is loaded, and proof that it is what was asked for.

The linear layers of the decoder are held as nf4, 64 weights to a scale, the scales in 8 bits themselves; embeddings,
norms and the output layer stay in the compute dtype. transformers and bitsandbytes do the work, one tensor at a time
while the files are read. What they leave to chance is settled here:

* On CPUs with AVX512-BF16, bitsandbytes packs a weight anew at its first forward pass in evaluation mode: in place,
  with coarser scales, and in a form that has no gradient. The next training step would run through it and teach the
  lower layers nothing, without a word. That is switched off (``keep_trainable``).
* Whether a layer is in 4 bits is read off its weight, not off a setting (``check_quantised``).
"""

from collections.abc import Mapping
from importlib.util import find_spec
from typing import Any, Literal, cast

import torch
from torch import nn
from transformers import BitsAndBytesConfig, PreTrainedModel

from trainer.errors import ModelError, RunError, TrainingFault

Quantisation = Literal["nf4"]


def quantisation_config(kind: Quantisation, compute_dtype: torch.dtype) -> BitsAndBytesConfig:
    """How transformers has to load the base: linear layers as ``kind``, products in ``compute_dtype``.

    Raises:
        RunError: bitsandbytes is not installed here.
    """
    if find_spec("bitsandbytes") is None:
        raise RunError(
            "bitsandbytes cannot be imported on this machine",
            where="method.quantize",
            got=kind,
            allowed="null, or the packages that the run was planned with",
            do="pip install -c constraints.txt -e '.[qlora]', or method=lora",
        )
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=kind,
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=compute_dtype,
    )


def keep_trainable(model: PreTrainedModel) -> None:
    """Keep the 4-bit layers of ``model`` in the form that gradients pass through (see the module's text)."""
    for module in quantised_layers(model).values():
        cast(Any, module).support_avx512bf16_for_cpu = False


def quantised_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Name to module of the linear layers of ``model`` whose weights are in 4 bits."""
    return {name: module for name, module in model.named_modules() if hasattr(module, "quant_state")}


def check_quantised(model: PreTrainedModel, kind: Quantisation, compute_dtype: torch.dtype) -> None:
    """Check that the linear layers of ``model`` are in 4 bits, all but the output layer, and nothing else is.

    Raises:
        ModelError: there is no linear layer to hold in 4 bits.
        TrainingFault: one is not as planned; the message says what it is.
    """
    head = model.get_output_embeddings()
    linear = {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear) and m is not head}
    if not linear:
        raise ModelError(
            "this model has no linear layers that can be held in 4 bits",
            where="method.quantize",
            got=f"{type(model).__name__} with {kind}",
            allowed="null",
            do="method=lora",
        )
    check_layers(linear, kind, compute_dtype)
    for name, parameter in model.named_parameters():
        if name.removesuffix(".weight") not in linear and not parameter.is_floating_point():
            raise _otherwise(name, str(parameter.dtype), str(compute_dtype))


def check_layers(layers: Mapping[str, nn.Module], kind: Quantisation, compute_dtype: torch.dtype) -> None:
    """Check that each of ``layers`` is in 4 bits, as planned; also once a strategy has had its hands on them.

    Raises:
        TrainingFault: one is not.
    """
    for name, module in layers.items():
        wanted = f"{kind} with scales in 8 bits, frozen, products in {compute_dtype}"
        if (got := _describe(cast(Any, module))) != wanted:
            raise _otherwise(name, got, wanted)


def _describe(module: Any) -> str:
    weight, state = module.weight, getattr(module.weight, "quant_state", None)
    if state is None or weight.dtype != torch.uint8:
        return f"a {type(weight).__name__} in {weight.dtype}"
    scales = "8 bits" if state.nested else "float32"
    frozen = "trained" if weight.requires_grad else "frozen"
    return f"{state.quant_type} with scales in {scales}, {frozen}, products in {module.compute_dtype}"


def _otherwise(name: str, got: str, allowed: str) -> TrainingFault:
    return TrainingFault(
        "the base was not quantised as planned",
        where=name,
        got=got,
        allowed=allowed,
        do="report this together with env.json of the run",
    )
