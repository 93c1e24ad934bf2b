"""A model without numbers, and its numbers row by row out of the safetensors files.

With these two a rank that owns a part of every weight never holds the whole: the modules are made on torch's meta
device, cut, and only then filled, each rank with its own rows. Files are read at the place where the rows are and not
mapped, because mapped pages count as memory of the process. What no file has (the frequencies of rotary embeddings) is
computed by transformers, as it does after loading.

Only models whose files name their tensors as their modules do can be read like this; ``plan_slices`` says why not.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PreTrainedModel

from trainer.model.attention import IMPLEMENTATION, refuse_config, register
from trainer.model.folder import read_config, read_header

ReadSlice = Callable[[str, int, int], torch.Tensor]
DTYPES = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """Where the numbers of a tensor are: ``offset`` bytes into ``file``, the last dimension first."""

    file: Path
    offset: int
    shape: tuple[int, ...]
    dtype: torch.dtype

    def read(self, start: int, length: int, dtype: torch.dtype) -> torch.Tensor:
        """``length`` elements of the flattened tensor from ``start`` on, as 1-D ``dtype`` on the CPU.

        Raises:
            OSError: the file ends before they do.
        """
        values = torch.empty(length, dtype=self.dtype)
        if length:
            place = values.view(torch.uint8).numpy().data
            with self.file.open("rb", buffering=0) as opened:
                opened.seek(self.offset + start * self.dtype.itemsize)
                while place:
                    read = opened.readinto(place)
                    if not read:
                        raise OSError(f"{self.file} is shorter than its header says")
                    place = place[read:]
        return values.to(dtype)


def stored_tensors(directory: Path) -> dict[str, StoredTensor]:
    """Name to place of every floating-point tensor in the safetensors files of ``directory``."""
    found: dict[str, StoredTensor] = {}
    for file in sorted(directory.glob("*.safetensors")):
        tensors, begin = read_header(file)
        for name, entry in tensors.items():
            if entry["dtype"] in DTYPES:
                place = begin + entry["data_offsets"][0]
                found[name] = StoredTensor(file, place, tuple(entry["shape"]), DTYPES[entry["dtype"]])
    return found


def without_numbers(directory: Path, dtype: torch.dtype) -> PreTrainedModel | None:
    """The model of ``directory`` on the meta device, in ``dtype``, with packed attention; what is no weight is real.

    None where it has buffers that transformers does not compute by itself.
    """
    register()
    refuse_config(read_config(directory))
    config = AutoConfig.from_pretrained(str(directory), local_files_only=True)
    with torch.device("meta"):
        made = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=IMPLEMENTATION)
    model = cast(PreTrainedModel, made).eval()
    if (directory / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(str(directory))
    return model if all(_computed(model, module) for module in model.modules()) else None


def plan_slices(model: PreTrainedModel, stored: Mapping[str, StoredTensor]) -> dict[str, StoredTensor] | str:
    """Name of every parameter of ``model`` to where its numbers are; or why they cannot be read in slices, in words.

    Of names that share a parameter (tied embeddings) all lead to the one that is stored.
    """
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    wanted = {name for group in names.values() for name in group}
    other = sorted(set(model.state_dict()) - wanted)
    if other:
        return f"{other[0]} is stored and is no weight"
    places: dict[str, StoredTensor] = {}
    for group in names.values():
        place = next((stored[name] for name in group if name in stored), None)
        shape = tuple(model.get_parameter(group[0]).shape)
        if place is None or place.shape != shape:
            return f"the files have no {group[0]} of the shape {list(shape)}"
        places |= dict.fromkeys(group, place)
    return places


def parameter_names(model: nn.Module) -> dict[int, str]:
    """Identity of every parameter of ``model`` to its name; take it before adapters are put on."""
    return {id(parameter): name for name, parameter in model.named_parameters()}


def slice_reader(module: nn.Module, names: Mapping[int, str], places: Mapping[str, StoredTensor]) -> ReadSlice:
    """What reads the numbers of the parameters of ``module`` that are on the meta device, in their dtype.

    ``names``: of the base in it, from ``parameter_names``. Its result takes (name in ``module``, first element, number
    of elements), also when ``module`` has been cut since.
    """
    found = {
        name: (places[names[id(parameter)]], parameter.dtype)
        for name, parameter in module.named_parameters()
        if parameter.is_meta
    }

    def read(name: str, start: int, length: int) -> torch.Tensor:
        place, dtype = found[name]
        return place.read(start, length, dtype)

    return read


@contextmanager
def standing_in(model: nn.Module) -> Iterator[None]:
    """Weights of ``model`` on the meta device pass for weights on the CPU: adapters are made there, with numbers.

    peft moves new adapters to where the weights are, and on the meta device they would lose their initial values. A
    stand-in is one zero that is seen as many. Afterwards the same parameters are back; whether they are trained is
    taken over from the stand-ins.
    """
    places = [(module, name, p) for module in model.modules() for name, p in module._parameters.items()]
    pending = [(module, name, p) for module, name, p in places if p is not None and p.is_meta]
    others = {
        id(p): nn.Parameter(torch.zeros((), dtype=p.dtype).expand(p.shape), p.requires_grad) for _, _, p in pending
    }
    for module, name, parameter in pending:
        module._parameters[name] = others[id(parameter)]
    try:
        yield
    finally:
        for module, name, parameter in pending:
            parameter.requires_grad = others[id(parameter)].requires_grad
            module._parameters[name] = parameter


def _computed(model: PreTrainedModel, module: nn.Module) -> bool:
    """Give the buffers of ``module`` their numbers; False where some stay without."""
    empty = [name for name, buffer in module.named_buffers(recurse=False) if buffer.is_meta]
    for name in empty:
        buffer = cast(torch.Tensor, module._buffers[name])
        if not buffer.is_floating_point():
            return False
        module._buffers[name] = torch.full_like(buffer, torch.nan, device="cpu")
    if empty:
        model._init_weights(module)
    return not any(bool(cast(torch.Tensor, module._buffers[name]).isnan().any()) for name in empty)
