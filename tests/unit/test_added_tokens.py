"""Tokens that a base does not have: where their rows begin, that they and no others are trained, what is exported."""

import shutil
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from export_fixtures import base_folder, inference_of, merged_export
from model_fixtures import CPU, gradients, llama, pack
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from trainer.errors import ModelError, TrainingFault
from trainer.export.tensors import compare_tensors
from trainer.export.verify import verify_adapter, verify_merged
from trainer.export.weights import export_adapter
from trainer.model.adapters import TOKEN_ROWS, added_rows, attach_lora, continue_lora
from trainer.model.added_tokens import with_added_tokens
from trainer.model.folder import describe_folder
from trainer.model.load import load_model, load_tokenizer
from trainer.model.loss import PackedLoss
from trainer.model.slices import plan_slices, standing_in, stored_tensors, without_numbers
from trainer.rank.sliced import fill_added_rows
from trainer.samples import BaseModel
from trainer.train.optim import undecayed

WORD, CONTROL = "Mecklenburg", "<|clause|>"


def described(folder: Path) -> BaseModel:
    return describe_folder(folder, name="base", revision="", trust_remote_code=False)


def grown(base: Path, cache: Path) -> BaseModel:
    return with_added_tokens(described(base), cache, tokens=[WORD], special=[CONTROL])


def embeddings(model: PreTrainedModel) -> torch.Tensor:
    return cast(torch.nn.Embedding, model.get_input_embeddings()).weight


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return base_folder(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def larger(base: Path, tmp_path_factory: pytest.TempPathFactory) -> BaseModel:
    return grown(base, tmp_path_factory.mktemp("larger"))


def test_new_rows_are_the_mean_of_the_old_and_nothing_else_changes(base: Path, larger: BaseModel) -> None:
    before, after = load_model(base, dtype=torch.float32), load_model(larger.directory, dtype=torch.float32)
    old, new = embeddings(before), embeddings(after)
    assert larger.added_tokens == [len(old), len(old) + 1]
    assert torch.equal(new[: len(old)], old)
    assert torch.allclose(new[len(old) :], old.mean(0), atol=1e-6)
    others = {name: tensor for name, tensor in before.state_dict().items() if len(tensor) != len(old)}
    assert all(torch.equal(after.state_dict()[name], tensor) for name, tensor in others.items())
    assert (larger.published, larger.name, larger.license) == (str(base), "base", described(base).license)
    assert described(base).sha256 != larger.sha256, "checkpoints would be taken for those of the base"


def test_the_tokenizer_reads_them_as_one_token_and_only_control_tokens_are_control(larger: BaseModel) -> None:
    tokenizer = load_tokenizer(larger.directory)
    assert tokenizer(f"in {WORD}.")["input_ids"].count(larger.added_tokens[0]) == 1
    assert tokenizer(f"{CONTROL}x")["input_ids"][0] == larger.added_tokens[1]
    assert tokenizer.decode(larger.added_tokens, skip_special_tokens=True) == WORD


def test_the_original_is_not_written_to_and_a_moved_one_is_read_anew(base: Path, tmp_path: Path) -> None:
    here = tmp_path / "here"
    shutil.copytree(base, here)
    (here / "NOTICE").write_text("words")
    before = described(here).sha256
    first = grown(here, tmp_path / "cache")
    assert described(here).sha256 == before
    assert (Path(first.directory) / "NOTICE").is_symlink()
    there = here.rename(tmp_path / "there")
    second = grown(there, tmp_path / "cache")
    assert (second.directory, second.sha256) == (first.directory, first.sha256)
    assert (Path(second.directory) / "NOTICE").read_text() == "words"


def test_spare_rows_are_used_before_there_are_more(base: Path, tmp_path: Path) -> None:
    folder = tmp_path / "spare"
    shutil.copytree(base, folder)
    model = load_model(base, dtype=torch.float32)
    rows = len(embeddings(model))
    model.resize_token_embeddings(rows + 8, mean_resizing=False)
    model.save_pretrained(folder)
    found = grown(folder, tmp_path)
    after = embeddings(load_model(found.directory, dtype=torch.float32))
    assert found.added_tokens == [rows, rows + 1]
    assert len(after) == rows + 8
    assert torch.allclose(after[rows], after[:rows].mean(0), atol=1e-6)


def test_known_tokens_are_refused(base: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"model\.add_special_tokens: is in the vocabulary already"):
        with_added_tokens(described(base), tmp_path, tokens=[], special=["<|im_start|>"])


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("chunk", [4, 1024])
def test_their_gradients_are_those_of_full_fine_tuning_and_no_others_are_trained(tied: bool, chunk: int) -> None:
    """A row that is only trained where it is read, and not where it is predicted, would show here."""
    tokens, batch = [5, 9, 60], pack()
    whole = PackedLoss(cast(torch.nn.Module, llama(tie_word_embeddings=tied)), chunk=chunk)
    whole(batch).backward()
    wanted = gradients(whole)
    adapted = attach_lora(llama(tie_word_embeddings=tied), rank=2, alpha=4.0, tokens=tokens)
    loss = PackedLoss(adapted, chunk=chunk)
    loss(batch).backward()
    found = {name: grad for name, grad in gradients(loss).items() if TOKEN_ROWS in name}
    assert len(found) == (1 if tied else 2)
    for name, grad in found.items():
        matrix = "model.lm_head.weight" if "lm_head" in name else "model.model.embed_tokens.weight"
        assert torch.allclose(grad, wanted[matrix][tokens], rtol=1e-4, atol=1e-5), name
    assert found.keys() <= undecayed(loss)
    trained = {name for name, p in loss.named_parameters() if p.requires_grad}
    assert all("lora_" in name or TOKEN_ROWS in name for name in trained)
    assert all(p.dtype == torch.float32 for p in loss.parameters())


def test_rows_stay_float32_on_a_narrow_base() -> None:
    adapted = attach_lora(llama().to(torch.bfloat16), rank=2, alpha=4.0, tokens=[5])  # type: ignore[arg-type]
    assert {rows.dtype for rows, _ in added_rows(adapted).values()} == {torch.float32}


def test_rows_of_a_model_that_is_read_in_slices_begin_as_those_of_one_that_is_loaded(larger: BaseModel) -> None:
    directory, tokens = Path(larger.directory), larger.added_tokens
    loaded = attach_lora(load_model(directory, dtype=torch.float32), rank=2, alpha=4.0, tokens=tokens)
    empty = cast(PreTrainedModel, without_numbers(directory, torch.float32))
    places = plan_slices(empty, stored_tensors(directory))
    assert isinstance(places, dict)
    with standing_in(cast(torch.nn.Module, empty)):
        sliced = attach_lora(empty, rank=2, alpha=4.0, tokens=tokens)
    fill_added_rows(sliced, places)
    wanted = added_rows(loaded)
    assert wanted.keys() == added_rows(sliced).keys() == {"model.embed_tokens.weight"}
    for name, (rows, ids) in added_rows(sliced).items():
        assert ids == tokens
        assert torch.equal(rows, wanted[name][0])


# -- exports -------------------------------------------------------------------------------------------------------


def tuned(larger: BaseModel, dtype: torch.dtype = torch.float32) -> PeftModel:
    """An adapter and rows that have learnt something; the rows so much that they are answered with."""
    torch.manual_seed(4)
    model = attach_lora(load_model(larger.directory, dtype=dtype), rank=4, alpha=8.0, tokens=larger.added_tokens)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name or TOKEN_ROWS in name:
                parameter.copy_(torch.randn(parameter.shape) * 0.2)
    return model


def exported(larger: BaseModel, root: Path, dtype: torch.dtype = torch.float32) -> None:
    model, folder = cast(PeftModel, tuned(larger, dtype).float()), Path(larger.directory)
    inference = inference_of(model, folder, dtype=str(dtype).removeprefix("torch."))
    assert any(set(larger.added_tokens) & set(golden.generated_ids) for golden in inference.golden), "none is answered"
    export_adapter(
        model,
        root / "adapter",
        tokenizer=folder,
        inference=inference,
        base_reference=larger.published,
        base_revision="",
    )
    merged_export(model, root / "merged", folder, dtype=dtype)


def test_a_stranger_with_the_published_base_gets_the_trained_model(larger: BaseModel, tmp_path: Path) -> None:
    exported(larger, tmp_path)
    published = Path(larger.published)
    found = verify_adapter(tmp_path / "adapter", published, CPU, added_tokens=larger.added_tokens)
    assert (found.equal, found.difference) == (found.prompts, 0.0)
    assert verify_merged(tmp_path / "merged", CPU).difference <= 1e-4

    weights = tmp_path / "adapter" / "adapter_model.safetensors"
    tensors = load_file(weights)
    save_file({name: t * 0.9 if TOKEN_ROWS in name else t for name, t in tensors.items()}, weights)
    with pytest.raises(TrainingFault, match="log-probabilities differ"):
        verify_adapter(tmp_path / "adapter", published, CPU, added_tokens=larger.added_tokens)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_tensor_of_the_merged_model_is_proved(larger: BaseModel, tmp_path: Path, dtype: torch.dtype) -> None:
    exported(larger, tmp_path, dtype)

    def compare() -> Any:
        return compare_tensors(
            tmp_path / "merged", Path(larger.directory), tmp_path / "adapter", dtype=dtype, device=CPU
        )

    found = compare()
    assert not found.not_compared
    assert found.compared == 20
    weights = tmp_path / "merged" / "model.safetensors"
    tensors = load_file(weights)
    tensors["model.embed_tokens.weight"][larger.added_tokens[1]] *= 1.02
    save_file(tensors, weights, metadata={"format": "pt"})
    with pytest.raises(TrainingFault, match="with the rows of the tokens that were added"):
        compare()


def test_an_adapter_goes_on_with_its_own_tokens_only(base: Path, larger: BaseModel, tmp_path: Path) -> None:
    exported(larger, tmp_path)
    again = continue_lora(load_model(larger.directory, dtype=torch.float32), tmp_path / "adapter", larger.added_tokens)
    ((rows, ids),) = added_rows(again).values()
    stored = next(
        t for n, t in load_file(tmp_path / "adapter" / "adapter_model.safetensors").items() if TOKEN_ROWS in n
    )
    assert ids == larger.added_tokens
    assert torch.equal(rows, stored)
    with pytest.raises(ModelError, match="rows for other tokens than are added to the vocabulary"):
        continue_lora(load_model(base, dtype=torch.float32), tmp_path / "adapter")
