"""The attention function alone, and the self-check on whole models: what it lets through and what it refuses."""

import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from model_fixtures import CPU, assert_near, documents, gemma2, granite, llama, mistral, pack, qwen3
from torch import nn

from trainer.errors import ModelError, TrainingFault
from trainer.model import selfcheck
from trainer.model.adapters import attach_lora
from trainer.model.attention import (
    IMPLEMENTATION,
    packed_arguments,
    packed_attention,
    refuse_config,
    register,
    uses_varlen_kernel,
    varlen_options,
)
from trainer.model.loss import PackedLoss
from trainer.model.selfcheck import expected_windows, probe_documents, relative_difference, self_check

MARKER = torch.ones(1, 1, 1, 1, dtype=torch.bool)


class Layer(nn.Module):
    """What the function may know of a layer."""

    is_causal = True
    num_key_value_groups = 2


def random_heads(total, heads=4, groups=2) -> Any:
    torch.manual_seed(0)
    return [torch.randn(1, h, total, 8, requires_grad=True) for h in (heads, groups, groups)]


def dense_reference(heads, boundaries, window):
    """Softmax over a T x T mask: same document, not later, not further back than the window."""
    query, key, value = heads
    total = query.shape[2]
    document = torch.zeros(total, dtype=torch.int64)
    for end in boundaries[1:-1]:
        document[end:] += 1
    index = torch.arange(total)
    distance = index[:, None] - index[None, :]
    mask = (document[:, None] == document[None, :]) & (distance >= 0)
    if window is not None:
        mask &= distance < window
    key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], dim=1) for x in (key, value))
    scores = (query @ key.transpose(2, 3)) * 0.3
    return (scores.masked_fill(~mask, float("-inf")).softmax(-1) @ value).transpose(1, 2)


@pytest.mark.parametrize("window", [None, 1, 5, 1000])
@pytest.mark.parametrize("groups", [4, 2, 1])
@pytest.mark.parametrize("lengths", [(20,), (1, 1, 18), (7, 13), (20, 3, 1, 40, 300)])
def test_equals_the_definition(window, groups, lengths):
    boundaries = [0, *itertools.accumulate(lengths)]
    heads = random_heads(sum(lengths), groups=groups)
    expected = dense_reference(heads, boundaries, window)
    weight = torch.randn_like(expected)
    wanted = torch.autograd.grad((expected * weight).sum(), heads)
    query, key, value = heads
    output, _ = packed_attention(
        Layer(),
        query,
        key,
        value,
        MARKER,
        scaling=0.3,
        sliding_window=window,
        cu_seq_lens_q=torch.tensor(boundaries, dtype=torch.int32),
        max_length_q=max(lengths),
    )
    assert_near(output, expected, largest=2e-6, mean=2e-7)
    for gradient, reference in zip(torch.autograd.grad((output * weight).sum(), heads), wanted, strict=True):
        assert_near(gradient, reference, largest=2e-5, mean=2e-6)


@pytest.mark.parametrize("groups", [4, 2, 1])
@pytest.mark.parametrize("scaling", [0.3, None])
def test_bfloat16_gradients_on_a_cpu(groups, scaling):
    """They come from plain products: equal to float32 SDPA within rounding, and the output is SDPA's own."""
    lengths = (20, 3, 1, 40)
    boundaries = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)
    heads = [x.detach().bfloat16().requires_grad_() for x in random_heads(64, groups=groups)]
    exact = [x.detach().float().requires_grad_() for x in heads]
    weight = torch.randn(1, 64, 4, 8)
    results = []
    for query, key, value in (heads, exact):
        output, _ = packed_attention(Layer(), query, key, value, MARKER, scaling=scaling, cu_seq_lens_q=boundaries)
        gradients = torch.autograd.grad((output.float() * weight).sum(), (query, key, value))
        results.append([output, *gradients])
    for value, reference in zip(*results, strict=True):
        assert value.dtype == torch.bfloat16
        assert relative_difference(value.detach(), reference.detach()) < 0.01


def test_without_boundaries_it_is_sdpa_with_the_given_mask():
    query, key, value = random_heads(6)
    mask = torch.tril(torch.ones(6, 6, dtype=torch.bool))
    mask[:, 0] = False
    mask[0, 0] = True
    output, _ = packed_attention(Layer(), query, key, value, mask[None, None], scaling=0.3)
    key, value = (x.repeat_interleave(2, dim=1) for x in (key, value))
    expected = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=0.3).transpose(1, 2)
    assert_near(output, expected, largest=2e-6, mean=2e-7)


def test_mixed_precision_of_queries_and_values():
    """float32 weights under autocast: rotary factors lift queries and keys above the values."""
    query, key, value = random_heads(6)
    boundaries = torch.tensor([0, 6], dtype=torch.int32)
    output, _ = packed_attention(Layer(), query, key, value.bfloat16(), None, cu_seq_lens_q=boundaries)
    assert output.dtype == torch.bfloat16


class TestRefusals:
    def refusal(self, **options):
        query, key, value = random_heads(6)
        mask = options.pop("mask", MARKER)
        with pytest.raises(ModelError) as caught:
            packed_attention(Layer(), query, key, value, mask, **options)
        return str(caught.value)

    def test_boundaries_lost_on_the_way(self):
        assert "its layers do not receive the keyword arguments" in self.refusal()

    def test_a_mask_of_the_models_own(self):
        mask = torch.ones(1, 1, 6, 6, dtype=torch.bool)
        boundaries = torch.tensor([0, 6], dtype=torch.int32)
        assert "makes an attention mask of its own" in self.refusal(mask=mask, cu_seq_lens_q=boundaries)

    @pytest.mark.parametrize(
        ("option", "words"),
        [
            ({"softcap": 50.0}, "its attention scores are soft-capped"),
            ({"s_aux": torch.zeros(4)}, "it has attention sinks"),
            ({"position_bias": torch.zeros(1)}, "it adds a position bias"),
            ({"is_causal": False}, "its attention is not causal"),
        ],
    )
    def test_attention_that_is_not_implemented(self, option, words):
        text = self.refusal(**option, cu_seq_lens_q=torch.tensor([0, 6], dtype=torch.int32))
        assert words in text
        assert "Layer" in text

    @pytest.mark.parametrize("key", ["attn_logit_softcapping", "attention_chunk_size"])
    def test_by_config_before_anything_is_loaded(self, key):
        with pytest.raises(ModelError, match=f"got: {key}=50 in a gemma2 config"):
            refuse_config({"model_type": "gemma2", key: 50})
        refuse_config({"model_type": "gemma2", key: None})


class TestVarlenOptions:
    """The signature of ``varlen_attn`` as it is in torch 2.13, 2.11 and before."""

    def test_window_and_groups(self):
        accepted = frozenset({"window_size", "scale", "enable_gqa"})
        options = varlen_options(accepted, grouped=True, window=None, scaling=0.5)
        assert options == {"window_size": (-1, 0), "scale": 0.5, "enable_gqa": True}
        assert varlen_options(accepted, grouped=False, window=9, scaling=None) == {"window_size": (8, 0)}

    def test_without_groups_heads_are_repeated_by_the_caller(self):
        options = varlen_options(frozenset({"window_size", "scale"}), grouped=True, window=None, scaling=0.5)
        assert "enable_gqa" not in options

    def test_older(self):
        assert varlen_options(frozenset({"is_causal"}), grouped=True, window=None, scaling=None) == {"is_causal": True}
        with pytest.raises(ModelError, match="has no sliding window"):
            varlen_options(frozenset({"is_causal"}), grouped=True, window=9, scaling=None)
        with pytest.raises(ModelError, match="has no scale"):
            varlen_options(frozenset({"is_causal"}), grouped=True, window=None, scaling=0.5)

    def test_where_the_kernel_is_used(self):
        assert uses_varlen_kernel(torch.device("cuda"), torch.bfloat16)
        assert not uses_varlen_kernel(torch.device("cuda"), torch.float32)
        assert not uses_varlen_kernel(CPU, torch.bfloat16)


def check(model, dtype=torch.float32, pad=2):
    return self_check(model, documents((50, 60)), pad_token_id=pad, compute_dtype=dtype, device=CPU)


class TestSelfCheck:
    @pytest.mark.parametrize("make", [llama, qwen3, mistral, granite, lambda: gemma2(attention_cap=None)])
    def test_passes(self, make):
        model = make().train()
        before = {name: value.clone() for name, value in model.state_dict().items()}
        result = check(model)
        assert result.logits_via == "head"
        assert max(result.isolation, result.generation) < 1e-4
        assert result.loss < 1e-5
        assert "one SDPA call per document (cpu, float32)" in result.lines()[0]
        assert "packed against single documents" in result.lines()[1]
        assert model.training
        assert model.config._attn_implementation == IMPLEMENTATION
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())

    def test_passes_with_adapters_in_bfloat16(self):
        model = attach_lora(llama().bfloat16(), rank=4, alpha=8)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                nn.init.normal_(parameter, std=0.02)
        assert check(model, torch.bfloat16).tolerance == 0.1

    def test_documents_that_leak(self, monkeypatch):
        def leaking(module, query, key, value, mask, cu_seq_lens_q=None, **options):
            whole = None if cu_seq_lens_q is None else cu_seq_lens_q[[0, -1]]
            return packed_attention(module, query, key, value, mask, cu_seq_lens_q=whole, **options)

        monkeypatch.setattr(selfcheck, "packed_attention", leaking)
        with pytest.raises(TrainingFault, match="logits of packed documents differ from those of each document alone"):
            check(llama())

    def test_a_head_that_the_config_does_not_tell_of(self):
        """The loss then goes through the model's own head, and says so."""
        model = llama()
        forward = model.forward

        def scaled(*args, **kwargs):
            output = forward(*args, **kwargs)
            output.logits = output.logits * 0.5
            return output

        model.forward = scaled
        result = check(model)
        assert result.logits_via == "model"
        assert "the model's own head, not chunked" in result.lines()[1]
        batch = pack()
        expected = F.cross_entropy(
            model(input_ids=batch.input_ids, **packed_arguments(batch)).logits[0], batch.labels[0], reduction="sum"
        )
        assert_near(PackedLoss(model, logits_via="model")(batch), expected, largest=1e-3, mean=1e-3)

    def test_no_way_of_the_loss_agrees(self, monkeypatch):
        monkeypatch.setattr(PackedLoss, "forward", lambda self, batch: torch.tensor(1.0))
        with pytest.raises(TrainingFault, match="the chunked loss is not the cross-entropy of the model's own logits"):
            check(llama())

    def test_padding_that_is_attended_to(self, monkeypatch):
        generate = selfcheck._generate

        def unmasked(model, ids, mask, *rest):
            return generate(model, ids, torch.ones_like(mask), *rest)

        monkeypatch.setattr(selfcheck, "_generate", unmasked)
        with pytest.raises(TrainingFault, match="logits generated in a left-padded batch differ"):
            check(llama())

    def test_a_window_that_the_layers_do_not_pass_on(self):
        model = llama()
        model.config.sliding_window = 9
        with pytest.raises(ModelError, match="its layers do not all use the attention they were given") as caught:
            check(model)
        assert "2 layers with None" in str(caught.value)
        assert "2 layers with 9" in str(caught.value)
        assert model.config._attn_implementation == IMPLEMENTATION

    def test_layers_with_attention_of_their_own(self):
        model = llama()
        original = model.model.layers[1].self_attn.forward

        def own(hidden_states, **kwargs):
            for name in ("cu_seq_lens_q", "cu_seq_lens_k"):
                kwargs.pop(name, None)
            return original(hidden_states, **kwargs)

        model.model.layers[1].self_attn.forward = own
        with pytest.raises(ModelError, match="its layers do not receive the keyword arguments given to the model"):
            check(model)

    def test_probes(self):
        probes = probe_documents([list(range(100)), list(range(100, 200))])
        assert [len(probe) for probe in probes] == [51, 13, 38, 26]
        assert list(itertools.chain(*probes)) == [*range(64), *range(100, 164)]
        with pytest.raises(ValueError, match="needs at least 4 tokens, got 2"):
            probe_documents([[1, 2]])

    def test_relative_difference(self):
        reference = torch.tensor([1.0, -1.0])
        assert relative_difference(reference, reference) == 0.0
        assert relative_difference(reference * 1.5, reference) == pytest.approx(0.5)
        assert relative_difference(reference * float("nan"), reference) == float("inf")

    def test_expected_windows(self):
        assert expected_windows({"num_hidden_layers": 2}) == [None, None]
        assert expected_windows({"num_hidden_layers": 2, "sliding_window": 9}) == [9, 9]
        assert expected_windows({"num_hidden_layers": 1, "sliding_window": 9, "use_sliding_window": False}) == [None]
        kinds = ["sliding_attention", "full_attention"]
        config = {"num_hidden_layers": 2, "sliding_window": 9, "layer_types": kinds}
        assert expected_windows(config) == [9, None]


def test_left_padded_batches_after_registration():
    """Padding on the left gives each row what it gets alone, also through our mask function."""
    register()
    model = llama().eval()
    rows = documents((9, 4))
    ids = torch.tensor([rows[0], [2] * 5 + rows[1]])
    mask = torch.tensor([[1] * 9, [0] * 5 + [1] * 4])
    with torch.no_grad():
        positions = (mask.cumsum(1) - 1).clamp_min(0)
        batched = model(input_ids=ids, attention_mask=mask, position_ids=positions).logits
        for row, document in enumerate(rows):
            single = model(input_ids=torch.tensor([document])).logits[0]
            assert_near(batched[row, -len(document) :], single, largest=2e-4, mean=2e-5)
