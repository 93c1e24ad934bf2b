"""A fresh process accepts a good export and refuses every kind of wrong one."""

import dataclasses
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest
import torch
from export_fixtures import base_folder, inference_of, merged_export, prepared_of, tuned_full, tuned_lora, write_run
from safetensors.torch import load_file, save_file

from trainer.config import Config, ExportConfig
from trainer.errors import RunError, TrainingFault
from trainer.export import answers, verify
from trainer.export.comparison import MEAN_SHARE, VERIFICATION, Comparison, Rounding, TensorComparison, describe
from trainer.export.inference import INFERENCE, GoldenPrompt, read_inference
from trainer.export.verify import main, verify_adapter, verify_merged, verify_run
from trainer.export.weights import export_adapter
from trainer.markers import is_current, read_marker
from trainer.paths import CHECKOUT, RunFolder
from trainer.plan import stage_inputs

CPU = torch.device("cpu")


@dataclasses.dataclass(frozen=True)
class Made:
    root: Path
    base: Path


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """Base and both exports of one run; tests damage copies."""
    root = tmp_path_factory.mktemp("run")
    base = base_folder(root / "cache")
    model = tuned_lora(base)
    inference = inference_of(model, base)
    export_adapter(
        model,
        root / "export" / "adapter",
        tokenizer=base,
        inference=inference,
        base_reference=str(base),
        base_revision="",
    )
    merged_export(model, root / "export" / "merged", base)
    return Made(root=root, base=base)


def copy_of(made: Made, kind: str, place: Path) -> Path:
    return Path(shutil.copytree(made.root / "export" / kind, place / kind))


def test_good_exports_pass_in_a_process_of_their_own(made: Made):
    folder = RunFolder(made.root)
    plan = write_run(folder, made.base)
    done = subprocess.run(
        [sys.executable, "-m", "trainer.export.verify", str(made.root)],
        cwd=CHECKOUT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "adapter: 3 of 3 golden answers equal" in done.stdout
    assert "merged: 3 of 3 golden answers equal" in done.stdout
    assert "; 20 tensors, 14 of them adapted, bit-equal to base plus adapter" in done.stdout
    assert is_current(folder, "verify", stage_inputs(plan, "verify"))
    marker = read_marker(folder, "verify")
    assert marker is not None
    assert marker.summary == {"adapter": "3 of 3 answers equal", "merged": "3 of 3 answers equal, 20 tensors as merged"}
    adapter, merged = msgspec.json.decode((folder.export / VERIFICATION).read_bytes(), type=list[Comparison])
    assert (adapter.name, adapter.equal, merged.name, merged.equal) == ("adapter", 3, "merged", 3)
    assert max(adapter.difference, merged.difference) < 1e-4
    assert adapter.tensors is None
    assert merged.tensors == TensorComparison(compared=20, adapted=14, steps=0.0)
    assert adapter.base_difference is not None
    assert adapter.base_difference > 0.1  # it would have seen a lost adapter


def test_the_plain_readers_use_nothing_of_ours(made: Made):
    script = (
        "import sys; from pathlib import Path; import torch; from trainer.export import verify;"
        "verify.verify_merged(Path(sys.argv[1]), torch.device('cpu'));"
        "ours = [name for name in sys.modules if name.startswith(('trainer.model', 'trainer.train', 'trainer.data'))];"
        "print(ours)"
    )
    merged = str(made.root / "export" / "merged")
    done = subprocess.run(
        [sys.executable, "-c", script, merged], cwd=CHECKOUT, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip().endswith("[]")


def test_full_fine_tuning_is_verified_without_an_adapter(made: Made, tmp_path: Path):
    folder = RunFolder(tmp_path)
    merged_export(tuned_full(made.base), folder.merged, made.base)
    found = verify_run(
        folder, base=prepared_of(made.base).base, adapter=False, merged=True, merged_from=None, device=CPU
    )
    assert [(one.name, one.equal, one.near_ties) for one in found] == [("merged", 3, 0)]
    assert found[0].base_difference is None
    assert found[0].tensors is None


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_a_copy_meets_the_rounded_model_however_far_rounding_moved_it(made: Made, tmp_path: Path, kind: str):
    """In bfloat16 the copy is judged by the rounded model in memory, not by a bound wide enough for any rounding."""
    model = tuned_lora(made.base) if kind == "lora" else tuned_full(made.base)
    merged_export(model, tmp_path / "merged", made.base, dtype=torch.bfloat16)
    found = verify_merged(tmp_path / "merged", CPU)
    assert found.tolerance == answers.SAME_WEIGHTS
    assert found.difference < 1e-4
    assert found.rounding is not None
    assert found.rounding.mean > answers.SAME_WEIGHTS * MEAN_SHARE  # before rounding it would be refused
    assert "; rounding to the stored dtype moved log-probabilities by up to" in describe(found)
    perturb("model.norm.weight", 0.02)(tmp_path / "merged")
    with pytest.raises(
        TrainingFault, match=r"allowed: up to 0\.002, 0\.0002 on average; computed in float32, stored in"
    ):
        verify_merged(tmp_path / "merged", CPU)


def test_a_merge_that_no_tensors_prove_is_judged_by_the_trained_answers(made: Made, tmp_path: Path):
    """The adapter is lost, and the merged model agrees with itself: only the trained model's answers can tell."""
    folder = RunFolder(tmp_path)
    shutil.copytree(made.root / "export" / "adapter", folder.merged_from)
    tensors = load_file(folder.merged_from / "adapter_model.safetensors")
    save_file(tensors | {"lm_head.weight": torch.ones(2)}, folder.merged_from / "adapter_model.safetensors")
    shutil.copytree(made.root / "export" / "merged", folder.merged)

    def check() -> None:
        verify_run(
            folder,
            base=prepared_of(made.base).base,
            adapter=False,
            merged=True,
            merged_from=folder.merged_from,
            device=CPU,
        )

    check()
    inference = read_inference(folder.merged)
    lost = Rounding(difference=0.0021, mean=0.0001, answers=3, same_answers=0)
    for rounding, message in ((lost, "by up to 0.0021 nats"), (None, "no record of what rounding changed")):
        changed = dataclasses.replace(inference, rounding=rounding)
        (folder.merged / INFERENCE).write_bytes(msgspec.json.encode(changed))
        with pytest.raises(TrainingFault, match=rf"{message}(.|\n)*where tensors cannot be compared"):
            check()


@pytest.mark.parametrize(("difference", "same", "warned"), [(0.4, 3, False), (1.1, 3, True), (0.1, 2, True)])
def test_rounding_that_changes_much_is_warned_of(made: Made, tmp_path: Path, capsys, difference, same, warned):
    folder = RunFolder(tmp_path)
    write_run(folder, made.base, Config(export=ExportConfig(adapter=False)))
    shutil.copytree(made.root / "export" / "merged", folder.merged)
    shutil.copytree(made.root / "export" / "adapter", folder.merged_from)
    rounding = Rounding(difference=difference, mean=0.0, answers=3, same_answers=same)
    changed = dataclasses.replace(read_inference(folder.merged), rounding=rounding)
    (folder.merged / INFERENCE).write_bytes(msgspec.json.encode(changed))
    assert main([str(tmp_path)]) == 0
    printed = capsys.readouterr()
    assert ("the evaluation is the trained model's" in " ".join((printed.out + printed.err).split())) == warned


def test_without_room_for_float32_all_is_compared_in_16_bits(made: Made, tmp_path: Path):
    folder = copy_of(made, "adapter", tmp_path)
    narrow = dataclasses.replace(read_inference(folder), dtype="bfloat16", golden_dtype="bfloat16")
    (folder / INFERENCE).write_bytes(msgspec.json.encode(narrow))
    found = verify_adapter(folder, made.base, CPU)
    assert 1e-3 < found.difference < found.tolerance == answers.IN_16_BITS["bfloat16"]


def scale_adapter(folder: Path) -> None:
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | {"lora_alpha": 16}))


def zero_adapter(folder: Path) -> None:
    tensors = load_file(folder / "adapter_model.safetensors")
    save_file({name: tensor * 0 for name, tensor in tensors.items()}, folder / "adapter_model.safetensors")


def rename_adapter_tensor(folder: Path) -> None:
    tensors = load_file(folder / "adapter_model.safetensors")
    name = next(iter(tensors))
    tensors[name.replace("layers.0", "layers.7")] = tensors.pop(name)
    save_file(tensors, folder / "adapter_model.safetensors")


def add_config(folder: Path) -> None:
    (folder / "config.json").write_text("{}")


def change_generation(key: str, value: object) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        config = json.loads((folder / "generation_config.json").read_text())
        (folder / "generation_config.json").write_text(json.dumps(config | {key: value}))

    return change


def change_template(folder: Path) -> None:
    template = (folder / "chat_template.jinja").read_text()
    (folder / "chat_template.jinja").write_text(template.replace("assistant\\n", "assistant \\n"))


def add_token(folder: Path) -> None:
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    tokenizer["model"]["merges"] = tokenizer["model"]["merges"][:5]
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (scale_adapter, "log-probabilities differ by up to"),
        (zero_adapter, "log-probabilities differ by up to"),
        (rename_adapter_tensor, "adapter tensors did not arrive in the model"),
        (add_config, "the adapter folder has a config.json"),
        (change_generation("eos_token_id", 7), r"stop tokens \[2\] are not in generation_config.json \(\[7\]\)"),
        (change_generation("pad_token_id", 2), r"padding token 2, stop tokens \[2\]"),
        (change_generation("pad_token_id", 9), r"padding token 9, stop tokens \[2\]"),
        (change_template, "the chat template is another one"),
        (add_token, "the chat template makes other tokens than in training"),
        (change_generation("max_new_tokens", 2), "row0: answered"),
        (change_generation("repetition_penalty", 50.0), "answered"),
    ],
)
@pytest.mark.filterwarnings("ignore:Found missing adapter keys:UserWarning")  # peft only warns; the check is ours
def test_a_wrong_adapter_is_refused(made: Made, tmp_path: Path, damage, message):
    folder = copy_of(made, "adapter", tmp_path)
    damage(folder)
    with pytest.raises(TrainingFault, match=f"does not answer like the model it was written from\n  got: .*{message}"):
        verify_adapter(folder, made.base, CPU)


def perturb(name: str, amount: float) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        tensors[name] = tensors[name] + amount
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})

    return change


def drop(name: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        tensors = {key: value for key, value in load_file(folder / "model.safetensors").items() if key != name}
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})

    return change


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (perturb("model.norm.weight", 0.2), "log-probabilities differ by up to"),
        (perturb("model.norm.weight", float("nan")), "log-probabilities differ by up to inf"),
        (drop("model.layers.1.mlp.up_proj.weight"), r"missing \['model.layers.1.mlp.up_proj.weight'\]"),
    ],
)
def test_a_wrong_merged_model_is_refused(made: Made, tmp_path: Path, damage, message):
    folder = copy_of(made, "merged", tmp_path)
    damage(folder)
    with pytest.raises(TrainingFault, match=message):
        verify_merged(folder, CPU)


def rewrite_golden(folder: Path, change: Callable[[GoldenPrompt], GoldenPrompt]) -> None:
    inference = read_inference(folder)
    golden = [change(inference.golden[0]), *inference.golden[1:]]
    changed = dataclasses.replace(inference, golden=golden)
    (folder / INFERENCE).write_bytes(msgspec.json.encode(changed))


def test_tokens_that_were_almost_as_likely_may_change_places(made: Made, tmp_path: Path, monkeypatch):
    """The recorded answer takes the second token where both are within the tolerance; the model now takes the first."""
    monkeypatch.setitem(answers.NEAR_TIE, "float32", 50.0)
    monkeypatch.setattr(verify, "SAME_WEIGHTS", 50.0)
    folder = copy_of(made, "merged", tmp_path)

    def second_choice(golden: GoldenPrompt) -> GoldenPrompt:
        return dataclasses.replace(golden, generated_ids=[golden.top_ids[0][1], *golden.generated_ids[1:]])

    rewrite_golden(folder, second_choice)
    found = verify_merged(folder, CPU)
    assert (found.equal, found.near_ties) == (2, 1)
    assert "2 of 3 golden answers equal, 1 after a near tie" in describe(found)


def test_a_token_that_was_not_among_the_likeliest_is_refused(made: Made, tmp_path: Path, monkeypatch):
    monkeypatch.setitem(answers.NEAR_TIE, "float32", 50.0)
    monkeypatch.setattr(verify, "SAME_WEIGHTS", 50.0)
    folder = copy_of(made, "merged", tmp_path)

    def unlikely(golden: GoldenPrompt) -> GoldenPrompt:
        """The model's present first token is not among the recorded ones."""
        generated = [golden.top_ids[0][1], *golden.generated_ids[1:]]
        return dataclasses.replace(
            golden, generated_ids=generated, top_ids=[[300, *golden.top_ids[0][1:]], *golden.top_ids[1:]]
        )

    rewrite_golden(folder, unlikely)
    with pytest.raises(TrainingFault, match=r"row0: answered .* first different at token 0"):
        verify_merged(folder, CPU)


def test_it_says_whether_it_could_have_seen_a_lost_adapter(made: Made, monkeypatch):
    found = verify_adapter(made.root / "export" / "adapter", made.base, CPU)
    assert found.tells_apart
    assert found.base_mean is not None
    by_mean = dataclasses.replace(found, base_difference=0.0, base_mean=found.tolerance)
    assert by_mean.tells_apart
    assert not dataclasses.replace(found, base_difference=0.0, base_mean=0.0).tells_apart
    assert not verify_merged(made.root / "export" / "merged", CPU).tells_apart


def test_a_missing_export_is_refused(made: Made, tmp_path: Path):
    with pytest.raises(RunError, match="there is no such export"):
        verify_run(
            RunFolder(tmp_path),
            base=prepared_of(made.base).base,
            adapter=True,
            merged=False,
            merged_from=None,
            device=CPU,
        )


def test_a_merged_model_alone_is_compared_with_the_adapter_in_it(made: Made, tmp_path: Path):
    folder = RunFolder(tmp_path)
    write_run(folder, made.base, Config(export=ExportConfig(adapter=False)))
    shutil.copytree(made.root / "export" / "merged", folder.merged)
    with pytest.raises(RunError, match=r"export/merged_from: there is no such export"):
        main([str(tmp_path)])
    shutil.copytree(made.root / "export" / "adapter", folder.merged_from)
    assert main([str(tmp_path)]) == 0
    (merged,) = msgspec.json.decode((folder.export / VERIFICATION).read_bytes(), type=list[Comparison])
    assert merged.tensors == TensorComparison(compared=20, adapted=14, steps=0.0)
    scale_adapter(folder.merged_from)
    with pytest.raises(TrainingFault, match="the merged model is not base plus adapter\n  got: 14 of 20 tensors"):
        main([str(tmp_path)])


def test_what_could_not_be_compared_is_said(made: Made, tmp_path: Path, capsys):
    folder = RunFolder(tmp_path)
    write_run(folder, made.base, Config(export=ExportConfig(adapter=False)))
    shutil.copytree(made.root / "export" / "merged", folder.merged)
    shutil.copytree(made.root / "export" / "adapter", folder.merged_from)
    tensors = load_file(folder.merged_from / "adapter_model.safetensors")
    save_file(tensors | {"lm_head.weight": torch.ones(2)}, folder.merged_from / "adapter_model.safetensors")
    assert main([str(tmp_path)]) == 0
    printed = capsys.readouterr()
    assert "warning: merged: only answers were compared, no tensors: the adapter also holds lm_head.weight" in (
        printed.out + printed.err
    )
    (merged,) = msgspec.json.decode((folder.export / VERIFICATION).read_bytes(), type=list[Comparison])
    assert "; tensors not compared: the adapter also holds lm_head.weight" in describe(merged)


def test_nothing_asked_for_nothing_verified(made: Made, tmp_path: Path):
    config = Config(export=ExportConfig(adapter=False, merged=False))
    folder = RunFolder(tmp_path)
    write_run(folder, made.base, config)
    assert main([str(tmp_path)]) == 0
    marker = read_marker(folder, "verify")
    assert marker is not None
    assert marker.summary == {}


def test_the_run_folder_is_needed():
    with pytest.raises(RunError, match="one run folder is needed"):
        main([])
