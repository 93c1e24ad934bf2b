"""Answers do not depend on the batch, on the rank, or on what the base model's generation config says."""

from contextlib import contextmanager

import pytest
import torch
from torch import nn
from transformers import (
    GenerationConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
)

from trainer.errors import DataError, ModelError
from trainer.evaluate.generate import generate, generating_model, in_order, make_batches
from trainer.model.adapters import attach_lora
from trainer.model.prefix import SharedPrefix, common_beginning, shared_prefix
from trainer.samples import EvaluationExample, Prediction

VOCABULARY, PAD, UNUSED = 97, 0, 96
LENGTHS = [3, 11, 1, 7, 7, 2, 19, 5]


def llama(seed: int = 0) -> PreTrainedModel:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        initializer_range=0.4,
        bos_token_id=1,
        eos_token_id=2,
    )
    return LlamaForCausalLM(config)


def gpt2() -> PreTrainedModel:
    """Learnt absolute positions: a wrong position id under left padding changes the answer."""
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=VOCABULARY,
        n_embd=32,
        n_layer=2,
        n_head=4,
        n_positions=64,
        initializer_range=0.4,
        bos_token_id=1,
        eos_token_id=2,
    )
    return GPT2LMHeadModel(config)


def examples(lengths: list[int] = LENGTHS) -> list[EvaluationExample]:
    draw = torch.Generator().manual_seed(1)
    return [
        EvaluationExample(
            id=f"row{row}", prompt_ids=torch.randint(3, 90, (length,), generator=draw).tolist(), answer=""
        )
        for row, length in enumerate(lengths)
    ]


def answer(model: nn.Module, rows: list[EvaluationExample], **changes: object) -> list[Prediction]:
    settings: dict[str, object] = {
        "max_new_tokens": 6,
        "stop_token_ids": [UNUSED],
        "pad_token_id": PAD,
        "batch_tokens": 10_000,
        "decode": lambda ids: " ".join(map(str, ids)),
        "device": "cpu",
    }
    return generate(model, rows, **(settings | changes))  # type: ignore[arg-type]


@pytest.mark.parametrize("make", [llama, gpt2])
def test_a_batch_answers_like_single_rows(make):
    model, rows = make(), examples()
    together = answer(model, rows)
    alone = [answer(model, [row])[0] for row in rows]
    assert together == alone
    assert len({tuple(one.token_ids) for one in together}) == len(rows)  # the prompts matter
    assert [one.id for one in together] == [row.id for row in rows]


def test_padding_token_does_not_matter():
    model, rows = gpt2(), examples()
    assert [one.token_ids for one in answer(model, rows)] == [
        one.token_ids for one in answer(model, rows, pad_token_id=50)
    ]


def test_small_batches_and_shares_of_ranks_answer_alike():
    model, rows = llama(), examples()
    whole = answer(model, rows, batch_tokens=40)
    shares = [answer(model, rows, batch_tokens=40, rank=rank, world_size=3) for rank in range(3)]
    assert all(shares)
    assert sum(len(share) for share in shares) == len(rows)
    assert in_order(rows, shares) == whole == answer(model, rows)


def test_it_tells_how_many_rows_have_their_answer():
    told: list[int] = []
    answer(llama(), examples(), batch_tokens=40, on_answered=told.append)
    assert told == [1, 3, 6, 8]


def test_the_answer_ends_with_its_first_stop_token():
    model, rows = llama(), examples()
    free = answer(model, rows)
    stop = free[0].token_ids[2]
    stopped = answer(model, rows, stop_token_ids=[UNUSED, stop])
    for before, after in zip(free, stopped, strict=True):
        if stop in before.token_ids:
            end = before.token_ids.index(stop)
            assert after.token_ids == before.token_ids[: end + 1]
            assert after.text == " ".join(map(str, before.token_ids[:end]))
            assert after.stopped
        else:
            assert after == before
            assert not after.stopped
    assert {one.stopped for one in stopped} == {True, False}


def test_the_models_own_generation_config_is_left_out_and_left_alone():
    model, rows = llama(), examples()
    expected = answer(model, rows)
    own = GenerationConfig(repetition_penalty=9.0, do_sample=True, temperature=5.0, min_new_tokens=6, eos_token_id=2)
    model.generation_config = own
    assert answer(model, rows) == expected
    assert model.generation_config is own
    assert own.repetition_penalty == 9.0


def test_modes_and_cache_setting_are_as_before():
    model = llama()
    model.config.use_cache = False
    model.train()
    model.model.layers[1].eval()  # type: ignore[union-attr, index]
    before = {name: module.training for name, module in model.named_modules()}
    answer(model, examples())
    assert {name: module.training for name, module in model.named_modules()} == before
    assert model.config.use_cache is False


def test_modes_are_as_before_after_an_error():
    model = llama()
    model.train()
    with pytest.raises(RuntimeError, match="no text"):
        answer(model, examples(), decode=_raise)
    assert model.training
    assert model.generation_config is not None
    assert model.generation_config.max_new_tokens is None


def _raise(ids: list[int]) -> str:
    raise RuntimeError("no text")


def test_an_adapter_takes_part():
    rows = examples()
    base = answer(llama(), rows)
    adapted = attach_lora(llama(), rank=4, alpha=8.0, targets=["q_proj", "down_proj"])
    torch.manual_seed(3)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter)
    found = answer(adapted, rows)
    assert found != base
    assert found == answer(adapted.merge_and_unload(), rows)


def test_wrappers_are_seen_through():
    model = llama()
    assert generating_model(nn.Sequential(model)) is model


def test_every_batch_runs_in_a_context_of_its_own():
    entered: list[int] = []

    @contextmanager
    def compute():
        entered.append(1)
        yield

    answer(llama(), examples(), batch_tokens=40, compute=compute)
    batches = len(make_batches(LENGTHS, batch_tokens=40, max_new_tokens=6))
    assert batches > 2
    assert len(entered) == batches + 1, "one for the beginning that prompts share"


def test_batches_keep_the_budget_and_waste_little():
    lengths = [int(length) for length in torch.randint(1, 300, (200,), generator=torch.Generator().manual_seed(0))]
    batches = make_batches(lengths, batch_tokens=1000, max_new_tokens=8)
    assert sorted(row for batch in batches for row in batch) == list(range(200))
    for batch in batches:
        widest = max(lengths[row] for row in batch)
        assert len(batch) == 1 or len(batch) * (widest + 8) <= 1000
    assert lengths[batches[0][0]] == max(lengths)
    padded = sum(len(batch) * max(lengths[row] for row in batch) for batch in batches)
    assert sum(lengths) / padded > 0.95


def test_a_row_above_the_budget_runs_alone():
    assert make_batches([50, 60], batch_tokens=10, max_new_tokens=4) == [[1], [0]]


def test_no_rows_no_answers():
    assert answer(llama(), []) == []


def test_an_empty_prompt_is_refused():
    with pytest.raises(DataError, match=r"row1: an evaluation example has an empty prompt"):
        answer(llama(), examples([3, 0]))


def test_a_prompt_without_room_for_its_answer_is_refused():
    with pytest.raises(
        DataError, match=r"60 prompt tokens \+ task.max_new_tokens=6 = 66\n  allowed: at most 64 tokens"
    ):
        answer(llama(), examples([60]))


def test_a_model_that_cannot_generate_is_refused():
    with pytest.raises(ModelError, match="this model cannot generate\n  got: Linear"):
        answer(nn.Linear(2, 2), examples())


def test_lost_and_doubled_predictions_are_noticed():
    rows = examples([2, 3])
    found = answer(llama(), rows)
    with pytest.raises(DataError, match=r"1 of 2 examples without one, first \['row1'\]"):
        in_order(rows, [found[:1]])
    twins = [rows[0], rows[0]]
    with pytest.raises(DataError, match="do not cover the examples one to one"):
        in_order(twins, [found])


def test_a_generate_that_returns_no_tensor_is_a_defect(monkeypatch):
    model = llama()
    monkeypatch.setattr(model, "generate", lambda *a, **k: {"sequences": None})
    with pytest.raises(TypeError, match="generate returned dict"):
        answer(model, examples())


BEGINNING = [7, 3, 88, 41, 5, 9, 60, 61, 62, 63, 20, 21, 22, 23, 24, 25, 26, 27]


def with_beginning() -> list[EvaluationExample]:
    return [EvaluationExample(id=one.id, prompt_ids=[*BEGINNING, *one.prompt_ids], answer="") for one in examples()]


@pytest.mark.parametrize("make", [llama, gpt2])
def test_a_beginning_that_all_share_is_computed_once_and_changes_nothing(make, monkeypatch):
    model, rows = make(), with_beginning()
    widths: list[int] = []
    model.get_input_embeddings().register_forward_hook(lambda _, ids, __: widths.append(ids[0].numel()))
    together = answer(model, rows, batch_tokens=120)
    shared, widths[:] = sum(widths), []
    monkeypatch.setattr("trainer.evaluate.generate.shared_prefix", lambda *_: SharedPrefix([], None))
    assert together == answer(model, rows, batch_tokens=120)
    assert sum(widths) - shared == (len(rows) - 1) * len(BEGINNING)
    assert together == [answer(model, [row])[0] for row in rows]


def test_a_window_that_padding_would_shift_shares_nothing():
    torch.manual_seed(0)
    config = MistralConfig(**dict(llama().config.to_dict(), model_type="mistral", sliding_window=4))
    model, rows = MistralForCausalLM(config).eval(), with_beginning()
    assert shared_prefix(model, [row.prompt_ids for row in rows], "cpu").ids == []
    assert answer(model, rows) == [answer(model, [row])[0] for row in rows]


def test_a_beginning_leaves_a_token_of_every_prompt():
    assert common_beginning([[1, 2, 3], [1, 2], [1, 2, 3, 4]]) == [1]
    assert common_beginning([[1, 2], [2, 1]]) == []
    assert common_beginning([[5, 6, 7]]) == [5, 6]
    assert common_beginning([]) == []
