from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from model_fixtures import CPU, assert_near, cohere, gemma2, gradients, granite, llama, pack, without_targets

from trainer.model.adapters import attach_lora
from trainer.model.attention import packed_arguments
from trainer.model.loss import PackedLoss, add_embedding_noise, logit_scaling, target_positions

MODELS = {"tied": lambda: llama(tie_word_embeddings=True), "untied": llama, "granite": granite, "cohere": cohere}


def full_cross_entropy(model, batch):
    logits = model(input_ids=batch.input_ids, **packed_arguments(batch)).logits[0]
    return F.cross_entropy(logits.float(), batch.labels[0], ignore_index=-100, reduction="sum")


def some_labels(batch, keep):
    """The pack with labels at the positions ``keep`` only."""
    labels = torch.full_like(batch.labels, -100)
    labels[0, keep] = batch.labels[0, keep]
    changed = without_targets(batch)
    return type(batch)(
        input_ids=changed.input_ids,
        labels=labels,
        position_ids=changed.position_ids,
        cu_seqlens=changed.cu_seqlens,
        boundaries=changed.boundaries,
        max_seqlen=changed.max_seqlen,
        num_tokens=changed.num_tokens,
        num_targets=int((labels != -100).sum()),
    )


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(("chunk", "via"), [(1, "head"), (7, "head"), (10_000, "head"), (7, "model")])
def test_equals_cross_entropy_on_all_logits(name, chunk, via):
    model = MODELS[name]()
    batch = some_labels(pack(), [0, 3, 9, 39, 41, 42, 77, 110])
    expected = full_cross_entropy(model, batch)
    expected.backward()
    wanted = gradients(model)
    loss = PackedLoss(model, chunk=chunk, logits_via=via)(batch)
    loss.backward()
    assert loss.dtype == torch.float32
    assert loss.shape == ()
    assert_near(loss, expected, largest=1e-4, mean=1e-4)
    for parameter, gradient in gradients(model).items():
        scale = float(wanted[parameter].abs().max())
        assert_near(gradient, wanted[parameter], largest=2e-5 * scale, mean=2e-6 * scale)


@pytest.mark.parametrize("frozen", [False, True])
def test_gradients_at_once_take_the_factor_of_the_step(frozen):
    """The loop multiplies the sum; with many chunks the gradients are already there by then."""
    found = []
    for chunk in (7, 10_000):
        model = llama(tie_word_embeddings=True)
        model.get_input_embeddings().requires_grad_(not frozen)
        (PackedLoss(model, chunk=chunk)(pack()) * 0.37).backward()
        found.append(gradients(model))
    for name, gradient in found[1].items():
        scale = float(gradient.abs().max())
        assert_near(found[0][name], gradient, largest=2e-5 * scale, mean=2e-6 * scale)


def test_logits_are_made_once(monkeypatch):
    """Forward and backward pass together project each learnt position one time, in float16 two times."""
    for dtype, times in ((torch.float32, 1), (torch.float16, 2)):
        model, rows = llama(), []
        model.lm_head.register_forward_hook(lambda module, inputs, output, rows=rows: rows.append(output.shape[0]))
        loss = PackedLoss(model, chunk=7)
        loss.compute_dtype = dtype
        monkeypatch.setattr("trainer.model.loss.compute_context", lambda device, dtype: nullcontext())
        batch = pack()
        loss(batch).backward()
        assert sum(rows) == times * batch.num_targets


def test_gradients_at_once_can_be_used_once():
    loss = PackedLoss(llama(), chunk=7)(pack())
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_many_chunks_without_gradients():
    model, batch = llama(), pack()
    with torch.no_grad():
        assert_near(PackedLoss(model, chunk=7)(batch), full_cross_entropy(model, batch), largest=1e-4, mean=1e-4)


def test_soft_capped_head():
    model = gemma2(attention_cap=None)
    batch = pack()
    uncapped = PackedLoss(model)
    uncapped._scale_logits = lambda logits: logits
    with torch.no_grad():
        expected = full_cross_entropy(model, batch)
        assert_near(PackedLoss(model, chunk=7)(batch), expected, largest=2e-3, mean=2e-3)
        assert float((uncapped(batch) - expected).abs()) > 1.0


def test_only_learnt_positions_are_projected():
    model = llama()
    rows = []
    model.lm_head.register_forward_hook(lambda module, inputs, output: rows.append(output.shape[0]))
    PackedLoss(model, chunk=3)(some_labels(pack(), [0, 3, 9, 39, 41, 42, 77]))
    assert rows == [3, 3, 1]


@pytest.mark.parametrize("adapters", [False, True])
def test_a_pack_without_targets_gives_a_zero_that_reaches_every_parameter(adapters):
    model = attach_lora(llama(), rank=2, alpha=4) if adapters else llama(tie_word_embeddings=True)
    loss = PackedLoss(model)(without_targets(pack()))
    loss.backward()
    assert float(loss.detach()) == 0.0
    for gradient in gradients(model).values():
        assert torch.count_nonzero(gradient) == 0


def test_sixteen_bit_compute_keeps_float32_gradients():
    model = llama()
    with torch.no_grad():
        exact = PackedLoss(model)(pack())
    loss = PackedLoss(model, compute_dtype=torch.bfloat16)(pack())
    loss.backward()
    assert loss.dtype == torch.float32
    assert 0 < float((loss - exact).detach().abs()) < 0.02 * float(exact)
    assert all(gradient.dtype == torch.float32 for gradient in gradients(model).values())


def test_target_positions_are_those_with_labels():
    batch = some_labels(pack(), [2, 5, 60])
    assert target_positions(batch).tolist() == [2, 5, 60]


def test_chunk_must_be_positive():
    with pytest.raises(ValueError, match="chunk must be at least 1, got 0"):
        PackedLoss(llama(), chunk=0)


def test_only_a_transformers_model_is_taken():
    with pytest.raises(TypeError, match="expected a transformers model or a PeftModel, got Linear"):
        PackedLoss(torch.nn.Linear(2, 2))


class TestEmbeddingNoise:
    def test_is_bounded_by_the_length_of_each_document(self):
        torch.manual_seed(0)
        lengths = [4, 400]
        noise = add_embedding_noise(torch.zeros(1, 404, 32), torch.tensor([0, 4, 404], dtype=torch.int32), alpha=5.0)
        for rows, length in zip(noise[0].split(lengths), lengths, strict=True):
            bound = 5.0 / (length * 32) ** 0.5
            assert float(rows.abs().max()) <= bound
            assert float(rows.abs().max()) > 0.9 * bound
            assert abs(float(rows.mean())) < 0.2 * bound

    def test_in_training_mode_only(self):
        model = llama()
        batch = pack()
        quiet, noisy = PackedLoss(model), PackedLoss(model, neftune_alpha=50.0)
        with torch.no_grad():
            assert torch.equal(quiet.train()(batch), quiet.eval()(batch))
            assert torch.equal(noisy.eval()(batch), quiet(batch))
            assert not torch.equal(noisy.train()(batch), quiet(batch))

    def test_reaches_the_embeddings_of_the_model(self):
        model = llama()
        PackedLoss(model, neftune_alpha=5.0).train()(pack()).backward()
        assert torch.count_nonzero(gradients(model)["model.embed_tokens.weight"]) > 0


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({}, 2.0),
        ({"logit_scale": 0.5}, 1.0),
        ({"model_type": "granitemoe", "logits_scaling": 4.0}, 0.5),
        ({"model_type": "hyperclovax", "logits_scaling": 4.0}, 2.0),
        ({"final_logit_softcapping": 1.0}, 0.9640275),
        ({"final_logit_softcapping": None}, 2.0),
    ],
)
def test_logit_scaling(config, expected):
    assert float(logit_scaling(config)(torch.tensor([2.0], device=CPU))) == pytest.approx(expected)
