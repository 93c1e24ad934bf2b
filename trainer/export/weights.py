"""The trained weights as files that other programs read: an adapter, a whole model, or both.

Two folders, because one cannot be both: an adapter folder with a ``config.json`` in it no longer loads as an adapter,
and servers want a whole model. Each folder is written beside its final name and renamed when it is complete and its
tensors have been compared with the base model, so that a folder that is there is a folder that is whole.

Number format. An adapter keeps the float32 in which it was trained (it is small). A merged or fully tuned model is
stored in the dtype it was trained and evaluated in: base and update are added in float32 and rounded once, which is
what ``tensors.py`` expects to find.
"""

import errno
import shutil
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch
from peft import PeftModel, get_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from torch import nn
from transformers import PreTrainedModel

from trainer.errors import RunError, TrainingFault
from trainer.export.golden import narrow
from trainer.export.inference import (
    Inference,
    bos_token_id,
    generation_config,
    load_plain_tokenizer,
    write_serving_files,
)
from trainer.export.stored import read_tensor, shapes_on_disk, tensor_files, weight_files
from trainer.model.quiet import without_importing_deepspeed, without_progress_bars
from trainer.paths import fresh_folder, fsync_directory, fsync_file

HEADROOM_BYTES = 64_000_000
"""Tokenizer, config and the rest beside the weights."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Exported:
    """What was written: ``tensors`` and ``parameters`` in ``size`` bytes of weight files, stored in ``dtype``.

    ``untouched``: adapter modules whose update is exactly zero (they learnt nothing); 0 for a whole model.
    """

    folder: Path
    tensors: int
    parameters: int
    size: int
    dtype: str
    untouched: int


def export_adapter(
    model: PeftModel, folder: Path, *, tokenizer: Path, inference: Inference, base_reference: str, base_revision: str
) -> Exported:
    """Write the adapter alone, in peft's format.

    Args:
        model: the trained model; it is not changed.
        folder: published here, replacing what was there.
        tokenizer: folder of the tokenizer and template that were trained with.
        inference: goes beside the weights.
        base_reference: Hub id or folder from which a reader loads the base.
        base_revision: commit of a Hub id, or "".

    Raises:
        TrainingFault: an update that is zero everywhere, or not finite.
        RunError: no space.
    """
    state = cast(dict[str, torch.Tensor], get_peft_model_state_dict(model, save_embedding_layers=False))
    untouched = check_adapter(state)
    require_free_space(folder.parent, _bytes(state.values()))

    def fill(stage: Path) -> None:
        config = model.peft_config["default"]
        config.base_model_name_or_path = base_reference
        config.revision = base_revision or None
        model.save_pretrained(str(stage), save_embedding_layers=False)
        (stage / "README.md").unlink(missing_ok=True)  # peft's empty form; the card is rendered from the lineage
        write_serving_files(stage, tokenizer=tokenizer, inference=inference)

    publish(folder, fill)
    return Exported(
        folder=folder,
        tensors=len(state),
        parameters=sum(tensor.numel() for tensor in state.values()),
        size=_size(folder),
        dtype=_name(next(iter(state.values())).dtype),
        untouched=untouched,
    )


def export_merged(
    model: PreTrainedModel,
    folder: Path,
    *,
    tokenizer: Path,
    inference: Inference,
    base_directory: Path,
    dtype: torch.dtype,
    max_shard_gb: float,
) -> Exported:
    """Write a whole model that needs neither peft nor this project. Converts ``model`` to ``dtype``: do it last.

    Args:
        model: fully tuned, or what ``merge`` made.
        folder: published here, replacing what was there.
        tokenizer: folder of the tokenizer and template that were trained with.
        inference: goes beside the weights.
        base_directory: the base model, to compare names and shapes of tensors with.
        dtype: of the stored weights.
        max_shard_gb: largest weight file, in 10^9 bytes.

    Raises:
        TrainingFault: no weight differs from the base, or the tensors are not those of the base.
        RunError: no space.
    """
    narrow(model, dtype)
    require_free_space(folder.parent, _bytes(model.parameters()))
    model.config.use_cache = True
    model.generation_config = generation_config(inference, bos_token_id(load_plain_tokenizer(tokenizer)))

    def fill(stage: Path) -> None:
        with without_progress_bars(), without_importing_deepspeed():
            model.save_pretrained(str(stage), max_shard_size=f"{round(max_shard_gb * 1000)}MB")
        write_serving_files(stage, tokenizer=tokenizer, inference=inference)
        compare_with_base(stage, base_directory, model)
        require_change(stage, base_directory)

    publish(folder, fill)
    return Exported(
        folder=folder,
        tensors=len(shapes_on_disk(folder)),
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        size=_size(folder),
        dtype=_name(dtype),
        untouched=0,
    )


def check_adapter(state: Mapping[str, torch.Tensor]) -> int:
    """Check an adapter's tensors; returns how many modules have an update of exactly zero.

    A LoRA update is B A with B zero at the start, so a B of zeros has learnt nothing.

    Raises:
        TrainingFault: no tensors, a value that is not finite, or every B is zero.
    """
    broken = [name for name, tensor in state.items() if not torch.isfinite(tensor).all()]
    if broken:
        raise TrainingFault(
            "the adapter has weights that are not finite numbers",
            got=f"{len(broken)} of {len(state)} tensors, first {broken[0]}",
            do="start again from a checkpoint before they broke, with a lower optim.lr",
        )
    updates = {name: tensor for name, tensor in state.items() if ".lora_B" in name or ".lora_embedding_B" in name}
    untouched = [name for name, tensor in updates.items() if not tensor.any()]
    if len(untouched) == len(updates):
        raise TrainingFault(
            "the adapter changes nothing: the export would be the base model",
            got=f"{len(updates)} LoRA modules, all with B = 0",
            allowed="at least one that has learnt something",
            do="look at metrics.jsonl: a grad_norm of 0 or a learning rate of 0 means that nothing was trained",
        )
    return len(untouched)


def compare_with_base(folder: Path, base_directory: Path, model: PreTrainedModel) -> None:
    """Compare names and shapes of the tensors on disk with those of the base, and their number with the model's.

    Names that share one tensor (tied embeddings) may be stored once here and twice there.

    Raises:
        TrainingFault: a tensor that the base has not, another shape, or elements that were not written.
    """
    written, base = shapes_on_disk(folder), shapes_on_disk(base_directory)
    tied = _tied_names(model)
    foreign = sorted(name for name in written if name not in base and name not in tied)
    reshaped = sorted(name for name in written if name in base and base[name] != written[name])
    if foreign or reshaped:
        name = (foreign + reshaped)[0]
        raise TrainingFault(
            "the exported tensors are not those of the base model",
            where=str(folder),
            got=f"{len(foreign)} with other names, {len(reshaped)} with other shapes; first {name} "
            f"{written[name]}, base {base.get(name)}",
            allowed="the names and shapes of the base",
            do="report this with the name of the base model",
        )
    expected = sum(tensor.numel() for tensor in model.state_dict().values()) - _shared_elements(model)
    got = sum(_elements(shape) for shape in written.values())
    if got < expected:
        raise TrainingFault(
            "some weights were not written",
            where=str(folder),
            got=f"{got} elements in files",
            allowed=f"{expected}, as in the model",
            do="report this with the name of the base model",
        )


def require_change(folder: Path, base_directory: Path) -> None:
    """Check that at least one stored tensor differs from the base's, in the stored dtype.

    Raises:
        TrainingFault: none does.
    """
    base = tensor_files(base_directory)
    for name, file in tensor_files(folder).items():
        if name in base:
            tensor = read_tensor(file, name)
            if not torch.equal(read_tensor(base[name], name).to(tensor.dtype), tensor):
                return
    raise TrainingFault(
        "the exported model is the base model, bit by bit",
        where=str(folder),
        got="no tensor differs",
        allowed="at least one that training changed by more than the rounding of the stored dtype",
        do="train longer or with a higher optim.lr, or set model.dtype=float32: a small update can vanish in 16 bits",
    )


def require_free_space(folder: Path, needed: int, *, free: Callable[[Path], int] | None = None) -> None:
    """Refuse to start a write that cannot end: ``needed`` bytes of weights and some headroom.

    Raises:
        RunError: less is free.
    """
    folder.mkdir(parents=True, exist_ok=True)
    available = shutil.disk_usage(folder).free if free is None else free(folder)
    if available < needed + HEADROOM_BYTES:
        raise RunError(
            "no space for the export",
            where=str(folder),
            got=f"{available / 1e9:.2f} GB free",
            allowed=f"at least {(needed + HEADROOM_BYTES) / 1e9:.2f} GB",
            do="free some space and start the same command again, or set export.merged=false",
        )


def publish(folder: Path, fill: Callable[[Path], None]) -> None:
    """Let ``fill`` write a folder beside ``folder``, make it durable, and put it in the place of ``folder``.

    Whatever ``fill`` raises, ``folder`` stays as it was and the partial folder is removed; so are those that a killed
    process left.

    Raises:
        RunError: the disk is full.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    for stale in folder.parent.glob(f".{folder.name}.*"):
        shutil.rmtree(stale)
    stage = fresh_folder(folder.parent, f".{folder.name}.partial-")
    try:
        fill(stage)
        for file in stage.rglob("*"):
            if file.is_file():
                fsync_file(file)
        fsync_directory(stage)
        if folder.exists():
            folder.rename(stage.with_name(f".{folder.name}.old"))
        stage.rename(folder)
        fsync_directory(folder.parent)
        shutil.rmtree(folder.parent / f".{folder.name}.old", ignore_errors=True)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise RunError(
            "the disk is full; the export was not published",
            where=str(folder),
            got=error,
            do="free some space and start the same command again",
        ) from error
    finally:
        shutil.rmtree(stage, ignore_errors=True)


def merge(model: PeftModel | PreTrainedModel) -> PreTrainedModel:
    """One plain model, in the memory that it already occupies: adapters are added to their base in float32.

    Raises:
        TrainingFault: a merged weight is not finite.
    """
    if not isinstance(model, PeftModel):
        return model
    try:
        for module in model.modules():
            if isinstance(module, LoraLayer):
                _merge_in_float32(module)
        with warnings.catch_warnings():  # what is merged already is only unwrapped
            warnings.filterwarnings("ignore", message="All adapters are already merged")
            return cast(PreTrainedModel, model.merge_and_unload(progressbar=False, safe_merge=True))
    except ValueError as error:
        raise TrainingFault(
            "merging the adapter gave weights that are not finite numbers",
            got=error,
            do="set model.dtype to bfloat16 or float32 if it is float16; export.adapter=true is not affected",
        ) from error


def _merge_in_float32(layer: LoraLayer) -> None:
    """Merge one layer; the sum is rounded once. peft would round the update to a narrow base's dtype before adding."""
    base = layer.get_base_layer()
    if not isinstance(base, nn.Linear):  # nothing else gets an adapter here; peft merges what came with a foreign one
        return
    dtype = base.weight.dtype
    base.weight.data = base.weight.data.float()
    layer.merge(safe_merge=True)
    base.weight.data = base.weight.data.to(dtype)


def _tied_names(model: PreTrainedModel) -> set[str]:
    """Names that share their tensor with another name."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return {name for group in names.values() if len(group) > 1 for name in group}


def _shared_elements(model: PreTrainedModel) -> int:
    """Elements that ``state_dict`` lists a second time because two names share a tensor."""
    listed = sum(parameter.numel() for _, parameter in model.named_parameters(remove_duplicate=False))
    return listed - sum(parameter.numel() for parameter in model.parameters())


def _elements(shape: Iterable[int]) -> int:
    count = 1
    for size in shape:
        count *= size
    return count


def _bytes(tensors: Iterable[torch.Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _size(folder: Path) -> int:
    return sum(file.stat().st_size for file in weight_files(folder))


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
