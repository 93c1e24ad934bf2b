"""Is every tensor of a merged model what base and adapter make of it? The proof that log-probabilities cannot give.

Rounding a whole model to 16 bits moves log-probabilities by up to 2 nats, which is more than many a mistake in merging
does. But rounding is known: what has to be in the files is base + update, added in float32 and rounded once. So the
tensors are compared themselves, one after the other. peft makes the update (scale, rsLoRA, DoRA's magnitudes) from the
adapter's own config, on a model without weights; only one tensor of the base is in memory at a time.

* A tensor without an adapter is the base's, bit by bit, in the stored dtype.
* So is one of embeddings, less the rows of tokens that were added, which are the adapter's, rounded.
* A tensor with an adapter is base + update, rounded. The sum is known up to float32's own rounding (another device adds
  in another order), so the stored number has to lie between the roundings of the two ends of that narrow interval.
  Nearly everywhere they are the same number. An allowance of one step of the stored dtype would not do: in bfloat16 the
  whole update is often smaller than a step, and a lost adapter would pass.
"""

import math
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from peft.utils import set_peft_model_state_dict
from safetensors.torch import load_file
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from trainer.errors import TrainingFault
from trainer.export.comparison import TensorComparison
from trainer.export.stored import read_tensor, shapes_on_disk, tensor_files

SLACK = 4.0
"""How far float32 may be off in base + update: this many of its epsilons (2^-23) of the largest number in the sum.

Measured on SmolLM2-135M after LoRA of rank 16 on all layers, against the same sums in float64: 1.5 epsilons at most; of
106 million numbers 21 were rounded to a neighbour, and 15,000 have two right answers with this slack. The process that
merged and the one that verifies, on one CPU, with one thread or two, agreed bit by bit. A scale that is wrong by 0.1 %
is seen in every adapted tensor.
"""
TOKEN_ROWS = "trainable_tokens_delta"
ADAPTER_PARTS = (".lora_A.", ".lora_B.", ".lora_embedding_A", ".lora_embedding_B", ".lora_magnitude_vector",
                 f".token_adapter.{TOKEN_ROWS}")  # fmt: skip


def compare_tensors(
    merged: Path,
    base_directory: Path,
    adapter: Path,
    *,
    dtype: torch.dtype,
    device: torch.device,
    trust_remote_code: bool = False,
) -> TensorComparison:
    """Compare the files of ``merged`` with base + adapter, tensor by tensor.

    Args:
        merged: folder of the merged model.
        base_directory: folder of the base that was trained on.
        adapter: folder of the adapter in peft's format.
        dtype: that the base had in training and that the merged weights are stored in.
        device: where the sums are computed; needs room for a few float32 copies of the largest adapted tensor.
        trust_remote_code: for bases with code of their own.

    Raises:
        TrainingFault: a tensor is missing, foreign, of another shape or dtype, or not what base and adapter make.
        ModelError: no safetensors in one of the folders.
    """
    state = load_file(adapter / "adapter_model.safetensors", device=str(device))
    foreign = sorted(name for name in state if not _is_understood(name))
    if foreign:
        return _not_compared(f"the adapter also holds {foreign[0]}, which is no low-rank update")
    skeleton = _without_weights(base_directory, trust_remote_code)
    own_names, tied = set(skeleton.state_dict()), _tied_names(skeleton)
    rows = _added_rows(adapter, state, tied)
    base, written = tensor_files(base_directory), tensor_files(merged)
    origin = _origins(merged, base_directory, own_names, tied)
    layers = _adapted_layers(skeleton, adapter, state, device)
    unplaced = sorted(set(layers) - set(written))
    if unplaced:
        return _not_compared(f"the base stores {unplaced[0]} under another name")
    wrong: list[str] = []
    most = 0.0
    for name, file in written.items():
        stored, original = read_tensor(file, name), read_tensor(base[origin[name]], origin[name])
        problem = _wrong_dtype(stored, original, dtype)
        if not problem and name in layers:
            problem, steps = _compare_adapted(stored.to(device), original.to(device, dtype), layers[name])
            most = max(most, steps)
        elif not problem and not torch.equal(_with_rows(original.to(stored.dtype), rows.get(name)), stored):
            problem = "is not the base's, with the rows of the tokens that were added" if name in rows else ""
            problem = problem or "is not the base's, and has no adapter"
        if problem:
            wrong.append(f"{name} {problem}")
    if wrong:
        raise _not_the_sum(merged, f"{len(wrong)} of {len(written)} tensors; first {wrong[0]}")
    return TensorComparison(compared=len(written), adapted=len(layers), steps=most)


def merged_weight(layer: LoraLayer, weight: torch.Tensor) -> torch.Tensor:
    """What peft makes of ``weight`` (float32, on the adapter's device) with the adapter of ``layer``: float32.

    ``layer`` gets ``weight`` for the time of the merge, is without weights again afterwards, and cannot be used twice.
    """
    base = cast(nn.Linear, layer.get_base_layer())
    nothing = base.weight
    base.weight = nn.Parameter(weight.clone(), requires_grad=False)
    try:
        layer.merge(safe_merge=True)
        return base.weight.detach()
    except ValueError:  # not finite
        return torch.full_like(weight, math.nan)
    finally:
        base.weight = nothing


def _compare_adapted(stored: torch.Tensor, base: torch.Tensor, layer: LoraLayer) -> tuple[str, float]:
    """What is wrong ("" if nothing), and the largest difference in steps of the stored dtype."""
    before = base.float()
    exact = merged_weight(layer, before)
    terms = torch.maximum(before.abs(), exact.abs())
    slack = SLACK * torch.finfo(torch.float32).eps * torch.maximum(terms, (exact - before).abs().max())
    low, high = (exact - slack).to(stored.dtype), (exact + slack).to(stored.dtype)
    right = (low <= stored) & (stored <= high) & stored.isfinite()
    steps = _steps(stored.float(), exact.to(stored.dtype).float(), terms, stored.dtype)
    if right.all():
        return "", steps
    expected = exact.to(stored.dtype)
    if torch.equal(stored, base) and not torch.equal(expected, base):
        return "is the base's: its update is lost", steps
    off = int((~right).sum())
    return f"differs in {off} of {right.numel()} numbers, by up to {steps:.3g} steps of {_name(stored.dtype)}", steps


def _steps(stored: torch.Tensor, expected: torch.Tensor, terms: torch.Tensor, dtype: torch.dtype) -> float:
    """The largest difference of two float32 tensors, in distances between neighbours in ``dtype``.

    At the size of the terms and not of their sum: where they cancel out, a rounding of theirs is many steps of the sum.
    """
    info = torch.finfo(dtype)
    exponents = torch.frexp(torch.maximum(terms, stored.abs()).clamp(min=info.smallest_normal)).exponent
    steps = torch.ldexp((stored - expected).abs(), 1 - exponents) / info.eps
    return steps.nan_to_num(nan=math.inf).max().item()


def _origins(merged: Path, base_directory: Path, own: set[str], tied: Mapping[str, set[str]]) -> dict[str, str]:
    """Name of every tensor of ``merged`` to its name in the base: the same, or one that shares its tensor.

    A tensor of the base that the model itself does not know (an old checkpoint's buffers) may be gone.
    """
    written, base = shapes_on_disk(merged), shapes_on_disk(base_directory)
    origins = {name: next((one for one in (name, *tied.get(name, ())) if one in base), "") for name in written}
    extra = sorted(name for name, origin in origins.items() if not origin)
    missing = sorted(name for name in set(base) & own - set(written) if not tied.get(name, set()) & set(written))
    reshaped = sorted(name for name, origin in origins.items() if origin and base[origin] != written[name])
    if extra or missing or reshaped:
        raise _not_the_sum(
            merged,
            f"{len(missing)} tensors missing, {len(extra)} that the base has not, {len(reshaped)} of another shape; "
            f"first {(missing + extra + reshaped)[0]}",
        )
    return origins


def _without_weights(base_directory: Path, trust_remote_code: bool) -> PreTrainedModel:
    """The base's modules, with shapes and no numbers."""
    config = AutoConfig.from_pretrained(str(base_directory), local_files_only=True, trust_remote_code=trust_remote_code)
    with torch.device("meta"):
        return cast(PreTrainedModel, AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code))


def _adapted_layers(
    skeleton: PreTrainedModel, adapter: Path, state: dict[str, torch.Tensor], device: torch.device
) -> dict[str, LoraLayer]:
    """Name of every adapted weight to its layer, which holds the adapter's numbers and none of the base's."""
    config = cast(LoraConfig, LoraConfig.from_pretrained(str(adapter)))
    config.trainable_token_indices = None  # whole rows, which need no sum
    state = {name: tensor for name, tensor in state.items() if TOKEN_ROWS not in name}
    config.base_model_name_or_path = None  # peft would remark that the base is here and not where it was then
    with warnings.catch_warnings():  # peft asks transformers for a property under its old name
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing", category=FutureWarning)
        model = cast(PeftModel, get_peft_model(cast(Any, skeleton), config, low_cpu_mem_usage=True)).eval()
    modules = cast(nn.Module, model.get_base_model()).named_modules()
    layers = {f"{name}.weight": module for name, module in modules if isinstance(module, LoraLayer)}
    for layer in layers.values():  # peft moves an adapter to where its base is
        cast(nn.Linear, layer.get_base_layer()).weight = nn.Parameter(torch.empty(0, device=device))
    try:
        found = set_peft_model_state_dict(model, state, low_cpu_mem_usage=True)
    except RuntimeError as error:
        raise _not_the_sum(adapter, f"an adapter for other shapes: {str(error)[:400]}") from error
    empty = sorted(name for name, one in model.named_parameters() if ".lora_" in name and one.is_meta)
    if found.unexpected_keys or empty:
        raise _not_the_sum(
            adapter,
            f"{len(found.unexpected_keys)} adapter tensors that belong nowhere, {len(empty)} missing; "
            f"first {[*found.unexpected_keys, *empty][0]}",
        )
    return layers


Rows = tuple[list[int], torch.Tensor]
"""Ids of tokens, and their rows [n, H]."""


def _added_rows(adapter: Path, state: Mapping[str, torch.Tensor], tied: Mapping[str, set[str]]) -> dict[str, Rows]:
    """Name of every matrix of which the adapter replaces rows, under all its names, to those rows."""
    config = cast(LoraConfig, LoraConfig.from_pretrained(str(adapter)))
    indices = cast(dict[str, list[int]], config.trainable_token_indices or {})
    found: dict[str, Rows] = {}
    for name, ids in indices.items():
        key = f"base_model.model.{name}.token_adapter.{TOKEN_ROWS}"
        if key not in state or len(state[key]) != len(ids):
            raise _not_the_sum(adapter, f"no {len(ids)} rows of added tokens for {name}")
        own = f"{name}.weight"
        found |= dict.fromkeys((own, *tied.get(own, ())), (list(ids), state[key].cpu()))
    return found


def _with_rows(matrix: torch.Tensor, rows: Rows | None) -> torch.Tensor:
    if rows is None:
        return matrix
    ids, values = rows
    return matrix.index_copy(0, torch.tensor(ids), values.to(matrix.dtype))


def _is_understood(name: str) -> bool:
    return any(part in name for part in ADAPTER_PARTS) and not name.endswith(".bias")


def _tied_names(model: PreTrainedModel) -> dict[str, set[str]]:
    """Each name that shares its tensor with others -> those others."""
    groups: dict[int, set[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        groups.setdefault(id(parameter), set()).add(name)
    return {name: group - {name} for group in groups.values() for name in group if len(group) > 1}


def _wrong_dtype(stored: torch.Tensor, original: torch.Tensor, dtype: torch.dtype) -> str:
    """Weights are stored in ``dtype``; what is no floating-point number stays as it was."""
    expected = dtype if original.is_floating_point() else original.dtype
    return "" if stored.dtype == expected else f"is stored in {_name(stored.dtype)} instead of {_name(expected)}"


def _not_compared(reason: str) -> TensorComparison:
    return TensorComparison(compared=0, adapted=0, steps=0.0, not_compared=reason)


def _not_the_sum(folder: Path, got: str) -> TrainingFault:
    return TrainingFault(
        "the merged model is not base plus adapter",
        where=str(folder),
        got=got,
        allowed="the base's tensors; those with an adapter plus its update, added in float32 and rounded once",
        do="do not ship it; run `python -m trainer export` on this run again, and report it if that does not help",
    )


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
