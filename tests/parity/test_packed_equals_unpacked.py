"""A pack gives what its documents give one at a time: logits, loss, and the gradient of every parameter."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from model_fixtures import (
    CPU,
    LENGTHS,
    assert_near,
    cohere,
    documents,
    gemma2,
    gradients,
    granite,
    llama,
    mistral,
    pack,
    qwen3,
)
from transformers import PreTrainedModel

from trainer.model.adapters import attach_lora, enable_activation_checkpointing
from trainer.model.attention import packed_arguments
from trainer.model.loss import PackedLoss
from trainer.model.selfcheck import probe_batch

MODELS: dict[str, Callable[[], PreTrainedModel]] = {
    "llama": llama,
    "qwen3": qwen3,
    "mistral": mistral,
    "granite": granite,
    "cohere": cohere,
    "gemma2": lambda: gemma2(attention_cap=None),
}


def one_at_a_time(model: PreTrainedModel) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits [T, V] and summed loss out of transformers' own eager attention, a document per pass."""
    model.set_attn_implementation("eager")
    logits: list[torch.Tensor] = []
    losses: list[torch.Tensor] = []
    for document in documents():
        ids = torch.tensor([document])
        output = model(input_ids=ids, use_cache=False).logits[0]
        logits.append(output)
        losses.append(F.cross_entropy(output[:-1], ids[0, 1:], reduction="sum"))
    model.set_attn_implementation("trimtab_packed")
    return torch.cat(logits), torch.stack(losses).sum()


@pytest.mark.parametrize("name", MODELS)
def test_logits_and_gradients(name: str) -> None:
    model = MODELS[name]().train()
    logits, loss = one_at_a_time(model)
    loss.backward()
    expected = gradients(model)

    batch = pack()
    packed = model(input_ids=batch.input_ids, **packed_arguments(batch)).logits[0]
    assert_near(packed, logits, largest=2e-4, mean=2e-5)
    packed_loss = PackedLoss(model, chunk=16)(batch)
    packed_loss.backward()
    assert_near(packed_loss, loss, largest=2e-3, mean=2e-3)
    for parameter, gradient in gradients(model).items():
        scale = float(expected[parameter].abs().max())
        assert_near(gradient, expected[parameter], largest=1e-4 * scale, mean=1e-5 * scale)


def test_a_leak_is_large_enough_to_be_seen() -> None:
    """The bounds above mean something: without boundaries the same comparison is off by a thousand times them."""
    model = llama()
    logits, _ = one_at_a_time(model)
    batch = pack()
    model.set_attn_implementation("sdpa")
    leaking = model(
        input_ids=batch.input_ids,
        position_ids=batch.position_ids,
        attention_mask=torch.ones_like(batch.input_ids),
        use_cache=False,
    ).logits[0]
    assert float((leaking - logits).detach().abs().max()) > 0.2


@pytest.mark.parametrize("name", ["llama", "mistral"])
def test_lora_gradients(name: str) -> None:
    """LoRA in float32 is peft's: with its own casts on and unpacked documents the gradients are the same."""
    model = attach_lora(MODELS[name](), rank=4, alpha=8, dropout=0.0)
    torch.manual_seed(1)
    for parameter_name, parameter in model.named_parameters():
        if "lora_B" in parameter_name:  # zero at first: the gradient of A would be zero too
            torch.nn.init.normal_(parameter, std=0.1)
    _, loss = one_at_a_time(model.get_base_model())  # pyright: ignore
    loss.backward()
    expected = gradients(model)
    packed_loss = PackedLoss(model, chunk=16)(pack())
    packed_loss.backward()
    assert_near(packed_loss, loss, largest=2e-3, mean=2e-3)
    for parameter_name, gradient in gradients(model).items():
        scale = float(expected[parameter_name].abs().max())
        assert scale > 0
        assert_near(gradient, expected[parameter_name], largest=1e-4 * scale, mean=1e-5 * scale)


def test_activation_checkpointing_changes_nothing() -> None:
    model = llama().train()
    loss = PackedLoss(model)(pack())
    loss.backward()
    expected = gradients(model)
    enable_activation_checkpointing(model)
    checkpointed = PackedLoss(model)(pack())
    checkpointed.backward()
    assert torch.equal(checkpointed, loss)
    for name, gradient in gradients(model).items():
        assert torch.equal(gradient, expected[name])


def test_order_of_the_documents_changes_nothing() -> None:
    """A document's logits do not depend on what is packed before it."""
    model = llama()
    ids = documents()
    forward = probe_batch(ids, CPU)
    backward = probe_batch(ids[::-1], CPU)
    first = model(input_ids=forward.input_ids, **packed_arguments(forward)).logits[0].split(list(LENGTHS))
    second = model(input_ids=backward.input_ids, **packed_arguments(backward)).logits[0].split(list(LENGTHS[::-1]))
    for one, other in zip(first, second[::-1], strict=True):
        assert_near(one, other, largest=2e-4, mean=2e-5)
