"""Every tensor of a merged model is base plus adapter, rounded once; one wrong number is enough to refuse it."""

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from export_fixtures import TEXTS, base_folder, inference_of, tuned_lora
from safetensors.torch import load_file, save_file

from trainer.errors import TrainingFault
from trainer.export.comparison import TensorComparison
from trainer.export.tensors import compare_tensors
from trainer.export.weights import export_adapter, export_merged, merge
from trainer.model import builtin

CPU = torch.device("cpu")
BFLOAT16 = torch.bfloat16
ADAPTED = "model.layers.1.mlp.up_proj.weight"
UNTOUCHED = "model.layers.1.input_layernorm.weight"


@dataclasses.dataclass(frozen=True)
class Made:
    """Folders; tests damage copies."""

    base: Path
    adapter: Path
    merged: Path


def make(root: Path, base: Path, *, dtype: torch.dtype = BFLOAT16, widened: bool = True, **options: object) -> Made:
    """Export as a run does: the base is held in ``dtype``, and widened before the merge where there is room."""
    model = tuned_lora(base, dtype=dtype, **options)  # type: ignore[arg-type]
    inference = inference_of(tuned_lora(base, **options), base)  # type: ignore[arg-type]
    adapter, merged = root / "adapter", root / "merged"
    export_adapter(model, adapter, tokenizer=base, inference=inference, base_reference=str(base), base_revision="")
    if widened:
        model.float()
    export_merged(
        merge(model),
        merged,
        tokenizer=base,
        inference=inference,
        base_directory=base,
        dtype=dtype,
        max_shard_gb=5.0,
    )
    return Made(base=base, adapter=adapter, merged=merged)


def compare(made: Made, dtype: torch.dtype = BFLOAT16) -> TensorComparison:
    return compare_tensors(made.merged, made.base, made.adapter, dtype=dtype, device=CPU)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return base_folder(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="module")
def exported(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Made:
    return make(tmp_path_factory.mktemp("export"), base)


@pytest.fixture
def made(exported: Made, tmp_path: Path) -> Made:
    return Made(*(Path(shutil.copytree(one, tmp_path / one.name)) for one in dataclasses.astuple(exported)))


@pytest.mark.parametrize("dtype", [torch.float32, BFLOAT16, torch.float16])
@pytest.mark.parametrize(
    ("options", "adapted"),
    [
        ({}, 14),
        ({"rslora": True}, 14),
        ({"dora": True}, 14),
        ({"targets": ["q_proj", "down_proj"], "layers": range(1, 2)}, 2),
    ],
    ids=["lora", "rslora", "dora", "some layers"],
)
def test_what_was_merged_is_bit_equal(base: Path, tmp_path: Path, options, adapted, dtype):
    made = make(tmp_path, base, dtype=dtype, **options)
    assert compare(made, dtype) == TensorComparison(compared=20, adapted=adapted, steps=0.0)


@pytest.mark.parametrize("options", [{}, {"dora": True}], ids=["lora", "dora"])
def test_a_merge_without_room_for_float32_is_rounded_once_as_well(base: Path, tmp_path: Path, options):
    assert compare(make(tmp_path, base, widened=False, **options)).steps == 0.0


def change(name: str, how: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Made], None]:
    """Change one tensor of the merged model."""

    def damage(made: Made) -> None:
        tensors = load_file(made.merged / "model.safetensors")
        tensors[name] = how(tensors[name]).contiguous()
        save_file(tensors, made.merged / "model.safetensors", metadata={"format": "pt"})

    return damage


def steps(count: int, numbers: int = 1) -> Callable[[torch.Tensor], torch.Tensor]:
    """The first ``numbers`` numbers, ``count`` representable numbers further from zero."""

    def move(tensor: torch.Tensor) -> torch.Tensor:
        bits = tensor.flatten().view(torch.int16).clone()
        bits[:numbers] += count
        return bits.view(tensor.dtype).view(tensor.shape)

    return move


def lose_update(made: Made) -> None:
    original = load_file(made.base / "model.safetensors")[ADAPTED].to(BFLOAT16)
    change(ADAPTED, lambda tensor: original)(made)


def lose_adapter(made: Made) -> None:
    tensors = {name: tensor.to(BFLOAT16) for name, tensor in load_file(made.base / "model.safetensors").items()}
    save_file(tensors, made.merged / "model.safetensors", metadata={"format": "pt"})


def drop(made: Made) -> None:
    tensors = load_file(made.merged / "model.safetensors")
    del tensors[ADAPTED]
    save_file(tensors, made.merged / "model.safetensors", metadata={"format": "pt"})


def add(made: Made) -> None:
    tensors = load_file(made.merged / "model.safetensors")
    save_file(tensors | {"extra": torch.ones(2)}, made.merged / "model.safetensors", metadata={"format": "pt"})


def use_other_base(made: Made) -> None:
    other = builtin.tiny(made.base.parent / "other", TEXTS, seed=2)
    shutil.copy(other / "model.safetensors", made.base / "model.safetensors")


def scale(factor: float) -> Callable[[Made], None]:
    def damage(made: Made) -> None:
        path = made.adapter / "adapter_config.json"
        config = json.loads(path.read_text())
        path.write_text(json.dumps(config | {"lora_alpha": config["lora_alpha"] * factor}))

    return damage


def lose_adapter_tensor(made: Made) -> None:
    tensors = load_file(made.adapter / "adapter_model.safetensors")
    del tensors["base_model.model.model.layers.1.mlp.up_proj.lora_B.weight"]
    save_file(tensors, made.adapter / "adapter_model.safetensors")


def move_adapter_tensor(made: Made) -> None:
    tensors = load_file(made.adapter / "adapter_model.safetensors")
    name = "base_model.model.model.layers.{}.mlp.up_proj.lora_B.weight"
    tensors[name.format(7)] = tensors[name.format(1)].clone()
    save_file(tensors, made.adapter / "adapter_model.safetensors")


def widen_adapter_tensor(made: Made) -> None:
    tensors = load_file(made.adapter / "adapter_model.safetensors")
    name = "base_model.model.model.layers.1.mlp.up_proj.lora_B.weight"
    tensors[name] = torch.cat([tensors[name], tensors[name]])
    save_file(tensors, made.adapter / "adapter_model.safetensors")


ONE = "1 of 20 tensors; first "


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (change(ADAPTED, steps(1)), f"{ONE}{ADAPTED} differs in 1 of 12288 numbers, by up to .* steps of bfloat16"),
        (change(ADAPTED, steps(3, 5)), f"{ONE}{ADAPTED} differs in 5 of 12288 numbers, by up to 3 steps of bfloat16"),
        (change(ADAPTED, lambda old: old * float("nan")), f"{ONE}{ADAPTED} differs in 12288 of 12288 .* inf steps"),
        (
            change(ADAPTED, lambda old: old.to(torch.float16)),
            f"{ONE}{ADAPTED} is stored in float16 instead of bfloat16",
        ),
        (change(ADAPTED, lambda old: old.T), f"0 tensors missing, 0 .*, 1 of another shape; first {ADAPTED}"),
        (change(UNTOUCHED, steps(1)), f"{ONE}{UNTOUCHED} is not the base's, and has no adapter"),
        (lose_update, f"{ONE}{ADAPTED} is the base's: its update is lost"),
        (lose_adapter, "14 of 20 tensors; first .* is the base's: its update is lost"),
        (drop, f"1 tensors missing, 0 that the base has not, 0 of another shape; first {ADAPTED}"),
        (add, "0 tensors missing, 1 that the base has not, 0 of another shape; first extra"),
        (use_other_base, r"1[5-9] of 20 tensors; first model\.embed_tokens.weight is not the base's"),
        (scale(1.001), "14 of 20 tensors; first .* differs in .* by up to 1 steps of bfloat16"),
        (lose_adapter_tensor, r"0 adapter tensors that belong nowhere, 1 missing; first .*up_proj\.lora_B"),
        (move_adapter_tensor, r"1 adapter tensors that belong nowhere, 0 missing; first .*layers\.7\.mlp"),
        (widen_adapter_tensor, "an adapter for other shapes: .*up_proj"),
    ],
)
def test_a_wrong_tensor_is_refused(made: Made, damage, message):
    damage(made)
    with pytest.raises(TrainingFault, match=f"the merged model is not base plus adapter\n  got: (?s:{message})"):
        compare(made)


def test_an_update_below_the_rounding_is_not_lost(base: Path, made: Made):
    """What rounds to the base has to be the base, and is no lost adapter."""
    tensors = load_file(made.adapter / "adapter_model.safetensors")
    quiet = {name: tensor * 1e-9 if ".up_proj.lora_B" in name else tensor for name, tensor in tensors.items()}
    save_file(quiet, made.adapter / "adapter_model.safetensors")
    for layer in (0, 1):
        name = f"model.layers.{layer}.mlp.up_proj.weight"
        original = load_file(base / "model.safetensors")[name].to(BFLOAT16)
        change(name, lambda tensor, original=original: original)(made)
    assert compare(made) == TensorComparison(compared=20, adapted=14, steps=0.0)


def test_what_float32_may_round_either_way_is_right(made: Made):
    """A sum in the middle between two stored numbers: both are right, and the difference is counted."""
    tensors = load_file(made.base / "model.safetensors")
    tensors[ADAPTED] = torch.ones_like(tensors[ADAPTED])
    save_file(tensors, made.base / "model.safetensors")
    name = "base_model.model.model.layers.1.mlp.up_proj.lora_{}.weight"
    adapter = load_file(made.adapter / "adapter_model.safetensors")
    adapter[name.format("A")] = torch.ones_like(adapter[name.format("A")])
    adapter[name.format("B")] = torch.full_like(adapter[name.format("B")], 2**-8 / 8)  # half a step, of rank 4, times 2
    save_file(adapter, made.adapter / "adapter_model.safetensors")
    for right in (1.0, 1.0 + 2**-7):
        change(ADAPTED, lambda old, right=right: torch.full_like(old, right))(made)
        assert compare(made).steps == (0.0 if right == 1.0 else 1.0)
    change(ADAPTED, lambda old: torch.full_like(old, 1.0 - 2**-8))(made)
    with pytest.raises(TrainingFault, match=r"differs in 12288 of 12288 numbers, by up to 0\.5 steps"):
        compare(made)


def test_names_that_share_a_tensor_may_be_stored_once_or_twice(made: Made):
    """The output layer is tied to the embeddings; a buffer that no model knows any more may be gone."""
    embedding = load_file(made.base / "model.safetensors")["model.embed_tokens.weight"]
    more = {"lm_head.weight": embedding.clone(), "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(2)}
    original = load_file(made.base / "model.safetensors")
    save_file(original | more, made.base / "model.safetensors")
    assert compare(made).compared == 20
    save_file(original, made.base / "model.safetensors")
    merged = load_file(made.merged / "model.safetensors")
    save_file(merged | {"lm_head.weight": embedding.to(BFLOAT16)}, made.merged / "model.safetensors")
    assert compare(made).compared == 21


def test_a_base_that_stores_its_weights_under_other_names_is_not_compared(made: Made):
    for folder in (made.base, made.merged):
        tensors = load_file(folder / "model.safetensors")
        tensors["decoder.up"] = tensors.pop(ADAPTED)
        save_file(tensors, folder / "model.safetensors")
    found = compare(made)
    assert (found.compared, found.not_compared) == (0, f"the base stores {ADAPTED} under another name")


def test_an_adapter_that_trained_whole_tensors_is_not_compared(made: Made):
    tensors = load_file(made.adapter / "adapter_model.safetensors")
    save_file(tensors | {"base_model.model.lm_head.weight": torch.ones(2)}, made.adapter / "adapter_model.safetensors")
    assert compare(made).not_compared == (
        "the adapter also holds base_model.model.lm_head.weight, which is no low-rank update"
    )


def test_a_sum_too_large_for_the_stored_dtype_is_refused(made: Made):
    base = load_file(made.base / "model.safetensors")
    base[ADAPTED] = torch.full_like(base[ADAPTED], 65504.0)  # float16 ends here
    save_file(base, made.base / "model.safetensors")
    merged = {name: tensor.to(torch.float16) for name, tensor in base.items()}
    merged[ADAPTED] = torch.full_like(merged[ADAPTED], float("inf"))
    save_file(merged, made.merged / "model.safetensors")
    adapter = load_file(made.adapter / "adapter_model.safetensors")
    name = "base_model.model.model.layers.1.mlp.up_proj.lora_{}.weight"
    quiet = {name: tensor * 0 if ".lora_B" in name else tensor for name, tensor in adapter.items()}
    loud = {name.format(side): torch.full_like(adapter[name.format(side)], 10.0) for side in "AB"}
    save_file(quiet | loud, made.adapter / "adapter_model.safetensors")
    with pytest.raises(TrainingFault, match=f"{ONE}{ADAPTED} differs in 12288 of 12288 numbers, by up to inf steps"):
        compare(made, torch.float16)
