"""Golden prompts, stop tokens and template travel with the weights."""

import dataclasses
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from export_fixtures import PAD, STOP, answers, base_folder, examples, inference_of, tuned_full

from trainer.errors import ModelError, RunError
from trainer.export.golden import answer_log_probs, choose_golden, golden_prompts, narrow, openings, widen
from trainer.export.inference import (
    load_plain_tokenizer,
    probe_template,
    read_inference,
    template_sha256,
    write_serving_files,
)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return base_folder(tmp_path_factory.mktemp("cache"))


def test_golden_prompts_hold_the_models_own_answers(base: Path):
    model = tuned_full(base)
    rows = examples(base, 10)
    chosen = choose_golden(rows, 4)
    assert [one.id for one in chosen] == ["row0", "row2", "row5", "row7"]
    golden = golden_prompts(model, chosen, answers(model, chosen))
    for one, answer in zip(golden, answers(model, [rows[0], rows[2], rows[5], rows[7]]), strict=True):
        assert one.id == answer.id
        assert one.generated_ids == answer.token_ids == [ids[0] for ids in one.top_ids]  # greedy: the likeliest
        assert all(values == sorted(values, reverse=True) and values[0] < 0 for values in one.top_log_probs)
        assert all(len(ids) == 5 for ids in one.top_ids)


def test_what_is_stored_is_narrowed_and_nothing_else(base: Path):
    """Rotary frequencies are in no file: a reader computes them in float32, and so must what a copy is judged by."""
    model = tuned_full(base)
    narrow(model, torch.bfloat16)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    buffers = dict(model.named_buffers())
    assert {tensor.dtype for name, tensor in buffers.items() if name.endswith("inv_freq")} == {torch.float32}
    tied = [model.get_input_embeddings().weight, model.get_output_embeddings().weight]  # type: ignore[union-attr]
    assert tied[0] is tied[1] or tied[0].dtype == tied[1].dtype == torch.bfloat16


def test_fewer_rows_than_golden_prompts(base: Path):
    assert [one.id for one in choose_golden(examples(base, 2), 8)] == ["row0", "row1"]


def test_weights_are_widened_where_there_is_room(base: Path):
    model = tuned_full(base)
    torch.nn.Module.to(model, torch.bfloat16)
    more = 2 * sum(weights.numel() for weights in [*model.parameters(), *model.buffers()])
    before = model.lm_head.weight.clone()
    assert widen(model, more) == "bfloat16"  # a part of what is free has to stay free
    assert model.lm_head.weight.dtype == torch.bfloat16
    assert widen(model, 2 * more) == "float32"
    assert model.lm_head.weight.dtype == torch.float32
    assert torch.equal(model.lm_head.weight, before.float())
    assert widen(model, 0) == "float32"  # nothing more is needed


def test_log_probabilities_are_those_of_the_next_tokens(base: Path):
    model = tuned_full(base).train()
    found = answer_log_probs(model, [5, 6, 7], [8, 9], torch.device("cpu"))
    assert model.training
    logits = model(input_ids=torch.tensor([[5, 6, 7, 8]]), use_cache=False).logits[0].detach()
    torch.testing.assert_close(found, logits[2:].log_softmax(-1), rtol=1e-5, atol=1e-5)


def test_forward_passes_run_in_the_callers_context(base: Path):
    entered: list[int] = []

    @contextmanager
    def compute():
        entered.append(1)
        yield

    model = tuned_full(base)
    rows = examples(base, 2)
    golden_prompts(model, rows, answers(model, rows), compute=compute)
    assert entered == [1, 1]


def test_an_export_without_prompts_is_refused():
    with pytest.raises(ModelError, match="an export cannot be checked without prompts"):
        choose_golden([])


def test_a_model_that_gives_no_numbers_is_refused(base: Path):
    model = tuned_full(base)
    with torch.no_grad():
        model.get_input_embeddings().weight.fill_(float("nan"))  # type: ignore[union-attr, operator]
    with pytest.raises(ModelError, match="row0: the trained model gives log-probabilities that are not finite"):
        golden_prompts(model, examples(base, 1), answers(model, examples(base, 1)))


def test_written_and_read_again(base: Path, tmp_path: Path):
    inference = inference_of(tuned_full(base), base, system="Be brief.")
    write_serving_files(tmp_path, tokenizer=base, inference=inference)
    assert read_inference(tmp_path) == inference
    tokenizer = load_plain_tokenizer(tmp_path)
    assert template_sha256(tokenizer) == inference.chat_template_sha256 != ""
    assert inference.template_probe is not None
    assert inference.template_probe.turns[0] == ("system", "Be brief.")
    text = str(tokenizer.decode(inference.template_probe.prompt_ids))
    assert text.startswith("<|im_start|>system\nBe brief.<|im_end|>")
    assert text.endswith("<|im_start|>assistant\n")


def test_a_tokenizer_without_a_template(base: Path):
    tokenizer = load_plain_tokenizer(base)
    tokenizer.chat_template = None
    assert template_sha256(tokenizer) == ""
    assert probe_template(tokenizer, None) is None


@pytest.mark.parametrize("stops", [[], [STOP, PAD]])
def test_stop_tokens_have_to_be_there_and_differ_from_padding(base: Path, tmp_path: Path, stops):
    inference = inference_of(tuned_full(base), base, stop_token_ids=stops)
    with pytest.raises(ModelError, match="the exported model would not know where to stop"):
        write_serving_files(tmp_path, tokenizer=base, inference=inference)
    assert list(tmp_path.iterdir()) == []


def test_damaged_and_foreign_files_are_refused(base: Path, tmp_path: Path):
    with pytest.raises(RunError, match=r"inference\.json: cannot read what an export says about itself"):
        read_inference(tmp_path)
    inference = dataclasses.replace(inference_of(tuned_full(base), base), format=99)
    write_serving_files(tmp_path, tokenizer=base, inference=inference)
    with pytest.raises(RunError, match="got: format 99"):
        read_inference(tmp_path)


def test_training_documents_are_asked_by_what_comes_before_the_answer():
    def document(ids: list[int], first: int) -> tuple[list[int], list[bool]]:
        return ids, [place >= first for place in range(len(ids))]

    plain = [document(list(range(100)), 1), document([], 1), document([7], 1), document([1, 2, 3], 1)]
    found = openings([*plain, document(list(range(50)), 40)])
    assert [(one.id, one.prompt_ids) for one in found] == [
        ("document 1", list(range(32))),
        ("document 3", [7]),
        ("document 4", [1]),
        ("document 5", list(range(40))),
    ]
