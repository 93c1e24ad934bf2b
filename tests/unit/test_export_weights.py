"""What is exported is what was trained, whole or not at all."""

import errno
import json
import shutil
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from accelerate.utils import extract_model_from_parallel
from accelerate.utils import other as unwrapping
from export_fixtures import STOP, answers, base_folder, examples, inference_of, tuned_full, tuned_lora
from safetensors.torch import load_file, save_file

from trainer.errors import ModelError, RunError, TrainingFault
from trainer.export import weights
from trainer.export.stored import shapes_on_disk
from trainer.export.weights import (
    check_adapter,
    compare_with_base,
    export_adapter,
    export_merged,
    merge,
    publish,
    require_change,
    require_free_space,
)
from trainer.model.load import load_model


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return base_folder(tmp_path_factory.mktemp("cache"))


def export_both(model, base: Path, folder: Path, **changes):
    inference = inference_of(model, base)
    adapter = export_adapter(
        model, folder / "adapter", tokenizer=base, inference=inference, base_reference=str(base), base_revision=""
    )
    settings = {"dtype": torch.float32, "max_shard_gb": 5.0} | changes
    merged = export_merged(
        merge(model), folder / "merged", tokenizer=base, inference=inference, base_directory=base, **settings
    )
    return adapter, merged


def test_both_folders_of_a_lora_run(base: Path, tmp_path: Path):
    adapter, merged = export_both(tuned_lora(base), base, tmp_path)
    beside = {
        "inference.json",
        "generation_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
    }
    assert {path.name for path in adapter.folder.iterdir()} == beside | {
        "adapter_config.json",
        "adapter_model.safetensors",
    }
    assert {path.name for path in merged.folder.iterdir()} == beside | {"config.json", "model.safetensors"}
    assert (adapter.tensors, adapter.untouched, adapter.dtype) == (2 * 7 * 2, 0, "float32")
    assert merged.tensors == len(shapes_on_disk(base))
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []
    config = json.loads((adapter.folder / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(base)
    assert json.loads((merged.folder / "config.json").read_text())["use_cache"] is True
    assert "trimtab" not in (merged.folder / "config.json").read_text()
    generation = json.loads((merged.folder / "generation_config.json").read_text())
    assert (generation["eos_token_id"], generation["pad_token_id"], generation["max_new_tokens"]) == ([STOP], 0, 6)
    assert generation["do_sample"] is False
    tokenizer = json.loads((merged.folder / "tokenizer_config.json").read_text())
    assert tokenizer["padding_side"] == "left"
    assert not {"is_local", "local_files_only"} & set(tokenizer)


def test_merged_weights_are_base_plus_scaled_product(base: Path, tmp_path: Path):
    adapter, merged = export_both(tuned_lora(base, targets=["q_proj"]), base, tmp_path)
    before, after = load_file(base / "model.safetensors"), load_file(merged.folder / "model.safetensors")
    update = load_file(adapter.folder / "adapter_model.safetensors")
    name = "model.layers.1.self_attn.q_proj"
    b, a = (update[f"base_model.model.{name}.lora_{side}.weight"] for side in ("B", "A"))
    torch.testing.assert_close(after[f"{name}.weight"], before[f"{name}.weight"] + 8.0 / 4 * b @ a)
    assert torch.equal(after["model.layers.1.mlp.up_proj.weight"], before["model.layers.1.mlp.up_proj.weight"])


def test_hub_base_and_revision_are_named(base: Path, tmp_path: Path):
    model = tuned_lora(base)
    export_adapter(
        model,
        tmp_path / "adapter",
        tokenizer=base,
        inference=inference_of(model, base),
        base_reference="org/base",
        base_revision="c0ffee",
    )
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert (config["base_model_name_or_path"], config["revision"]) == ("org/base", "c0ffee")


def test_full_fine_tuning_is_stored_in_its_dtype_and_in_shards(base: Path, tmp_path: Path):
    model = tuned_full(base)
    expected = answers(model, examples(base))
    inference = inference_of(model, base)
    merged = export_merged(
        model,
        tmp_path / "merged",
        tokenizer=base,
        inference=inference,
        base_directory=base,
        dtype=torch.bfloat16,
        max_shard_gb=0.0001,
    )
    files = sorted(path.name for path in merged.folder.glob("*.safetensors"))
    assert len(files) > 1
    assert "model.safetensors.index.json" in {path.name for path in merged.folder.iterdir()}
    stored = {name: tensor for file in files for name, tensor in load_file(merged.folder / file).items()}
    assert {tensor.dtype for tensor in stored.values()} == {torch.bfloat16}
    assert merged.dtype == "bfloat16"
    again = load_model(merged.folder, dtype=torch.float32)
    assert [one.id for one in answers(again, examples(base))] == [one.id for one in expected]
    whole = tuned_full(base)
    for name, parameter in whole.named_parameters():
        torch.testing.assert_close(stored[name].float(), parameter.detach(), rtol=2**-8, atol=1e-6)


def test_an_export_replaces_the_one_before(base: Path, tmp_path: Path):
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "old").write_text("x")
    (tmp_path / ".adapter.partial-killed").mkdir()
    model = tuned_lora(base)
    export_adapter(
        model,
        tmp_path / "adapter",
        tokenizer=base,
        inference=inference_of(model, base),
        base_reference="b",
        base_revision="",
    )
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]
    assert not (tmp_path / "adapter" / "old").exists()


def test_a_failed_export_leaves_the_old_one(tmp_path: Path):
    (tmp_path / "merged").mkdir()
    (tmp_path / "merged" / "old").write_text("x")

    def fill(stage: Path) -> None:
        (stage / "half").write_text("y")
        raise ValueError("stopped")

    with pytest.raises(ValueError, match="stopped"):
        publish(tmp_path / "merged", fill)
    assert [path.name for path in tmp_path.rglob("*")] == ["merged", "old"]


def test_a_disk_that_fills_up_is_said(tmp_path: Path):
    def fill(stage: Path) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(RunError, match="the disk is full; the export was not published"):
        publish(tmp_path / "merged", fill)
    with pytest.raises(PermissionError):
        publish(tmp_path / "merged", _deny)
    assert list(tmp_path.iterdir()) == []


def _deny(stage: Path) -> None:
    raise PermissionError(errno.EACCES, "no")


def test_space_is_looked_for_before_writing(base: Path, tmp_path: Path, monkeypatch):
    require_free_space(tmp_path, 1000, free=lambda folder: 1000 + weights.HEADROOM_BYTES)
    with pytest.raises(RunError, match=r"no space for the export\n  got: 0.06 GB free\n  allowed: at least 0.07 GB"):
        require_free_space(tmp_path, 10_000_000, free=lambda folder: 64_000_000)
    model = tuned_lora(base)
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(weights.shutil, "disk_usage", lambda folder: usage._replace(free=10))
    with pytest.raises(RunError, match="no space for the export"):
        export_both(model, base, tmp_path / "export")
    assert list((tmp_path / "export").iterdir()) == []


def test_an_adapter_that_learnt_nothing_is_refused(base: Path):
    state = {"a.lora_A.weight": torch.ones(2), "a.lora_B.weight": torch.zeros(2), "b.lora_B.weight": torch.zeros(2)}
    with pytest.raises(TrainingFault, match=r"the adapter changes nothing.*\n  got: 2 LoRA modules, all with B = 0"):
        check_adapter(state)
    assert check_adapter(state | {"b.lora_B.weight": torch.ones(2)}) == 1


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_an_adapter_that_is_not_finite_is_refused(value):
    with pytest.raises(TrainingFault, match=r"not finite numbers\n  got: 1 of 2 tensors, first a.lora_A"):
        check_adapter({"a.lora_A": torch.tensor([1.0, value]), "a.lora_B": torch.ones(1)})


def test_a_merge_that_overflows_is_refused(base: Path):
    model = tuned_lora(base)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.fill_(3e38)
    with pytest.raises(TrainingFault, match="merging the adapter gave weights that are not finite"):
        merge(model)


def test_a_model_equal_to_its_base_is_refused(base: Path, tmp_path: Path):
    model = load_model(base, dtype=torch.float32)
    with pytest.raises(TrainingFault, match="the exported model is the base model, bit by bit"):
        export_merged(
            model,
            tmp_path / "merged",
            tokenizer=base,
            inference=inference_of(model, base),
            base_directory=base,
            dtype=torch.float32,
            max_shard_gb=5.0,
        )
    assert list(tmp_path.iterdir()) == []


def test_tensors_of_another_base_are_not_published(base: Path, tmp_path: Path):
    tensors = load_file(base / "model.safetensors")
    other = stored(tmp_path / "other", tensors | {"model.norm.weight": torch.zeros(7)})
    model = tuned_full(base)
    with pytest.raises(TrainingFault, match="the exported tensors are not those of the base model"):
        export_merged(
            model,
            tmp_path / "export" / "merged",
            tokenizer=base,
            inference=inference_of(model, base),
            base_directory=other,
            dtype=torch.float32,
            max_shard_gb=5.0,
        )
    assert list((tmp_path / "export").iterdir()) == []


def stored(folder: Path, tensors: dict[str, torch.Tensor]) -> Path:
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors")
    return folder


def test_other_names_shapes_and_lost_tensors_are_noticed(base: Path, tmp_path: Path):
    model = load_model(base, dtype=torch.float32)
    good = load_file(base / "model.safetensors")
    compare_with_base(stored(tmp_path / "same", good), base, model)
    compare_with_base(stored(tmp_path / "untied", good | {"lm_head.weight": torch.zeros(1)}), base, model)
    with pytest.raises(TrainingFault, match=r"1 with other names, 0 with other shapes; first extra \(1,\), base None"):
        compare_with_base(stored(tmp_path / "more", good | {"extra": torch.zeros(1)}), base, model)
    with pytest.raises(TrainingFault, match=r"0 with other names, 1 with other shapes; first model.norm.weight \(3,\)"):
        compare_with_base(stored(tmp_path / "reshaped", good | {"model.norm.weight": torch.zeros(3)}), base, model)
    less = {name: tensor for name, tensor in good.items() if name != "model.norm.weight"}
    with pytest.raises(TrainingFault, match="some weights were not written"):
        compare_with_base(stored(tmp_path / "less", less), base, model)


def test_a_change_below_the_stored_dtype_is_no_change(base: Path, tmp_path: Path):
    tensors = {name: tensor.bfloat16() for name, tensor in load_file(base / "model.safetensors").items()}
    with pytest.raises(TrainingFault, match="bit by bit"):
        require_change(stored(tmp_path / "a", tensors), base)
    tensors["model.norm.weight"] = tensors["model.norm.weight"] + 0.5
    require_change(stored(tmp_path / "b", tensors), base)
    with pytest.raises(TrainingFault, match="bit by bit"):
        require_change(stored(tmp_path / "c", {"foreign": torch.ones(2)}), base)


def test_a_folder_without_weights_cannot_be_compared(tmp_path: Path):
    with pytest.raises(ModelError, match="no weights to compare with\n  got: no safetensors file"):
        shapes_on_disk(tmp_path)


@pytest.mark.parametrize("used", [False, True])
def test_deepspeed_is_only_looked_for_where_somebody_uses_it(base: Path, tmp_path: Path, monkeypatch, used: bool):
    """accelerate would import it for the type of its engine, at every export."""
    asked: list[int] = []
    monkeypatch.delitem(sys.modules, "deepspeed", raising=False)
    if used:
        monkeypatch.setitem(sys.modules, "deepspeed", ModuleType("deepspeed"))
    monkeypatch.setattr(unwrapping, "is_deepspeed_available", lambda: bool(asked.append(1)))
    export_both(tuned_lora(base), base, tmp_path)
    assert bool(asked) == used
    asked.clear()
    extract_model_from_parallel(torch.nn.Linear(1, 1))
    assert asked, "it is as it was afterwards"
