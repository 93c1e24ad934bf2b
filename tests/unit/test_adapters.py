import json
from typing import Any, cast

import pytest
import torch
from model_fixtures import assert_near, gradients, llama, pack
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer

from trainer.errors import ModelError
from trainer.model.adapters import (
    attach_lora,
    continue_lora,
    count_parameters,
    decoder_layers,
    enable_activation_checkpointing,
    freeze,
    inner_model,
    linear_names,
    parse_layers,
    trainable_parameters,
)
from trainer.model.loss import PackedLoss

LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def attach(model=None, **changes):
    options = {"rank": 4, "alpha": 8.0, **changes}
    return attach_lora(model or llama(), **options)


def adapted(model):
    """Names of the modules that got an adapter, without the prefix of peft."""
    prefix = "base_model.model."
    return [name.removeprefix(prefix) for name, module in model.named_modules() if isinstance(module, BaseTunerLayer)]


def lora_config(model):
    return cast(LoraConfig, model.peft_config["default"])


def randomise(model):
    torch.manual_seed(3)
    for parameter in trainable_parameters(model).values():
        torch.nn.init.normal_(parameter, std=0.1)


class TestAttach:
    def test_all_linear_is_spelt_out_in_the_config(self):
        model = attach()
        assert sorted(lora_config(model).target_modules or ()) == sorted(LINEAR)
        assert len(adapted(model)) == 2 * len(LINEAR)
        assert linear_names(llama()) == LINEAR

    def test_only_adapters_are_trained(self):
        model = attach()
        assert all("lora_" in name for name in trainable_parameters(model))
        trained, total = count_parameters(model)
        assert trained == 2 * 4 * sum(a + b for a, b in [(64, 64), (64, 32), (64, 32), (64, 64)] + [(64, 128)] * 3)
        assert total == trained + count_parameters(llama())[1]

    def test_layers_and_names(self):
        model = attach(targets=["q_proj", "mlp.down_proj"], layers=range(1, 2))
        assert adapted(model) == ["model.layers.1.self_attn.q_proj", "model.layers.1.mlp.down_proj"]

    def test_a_new_adapter_changes_nothing(self):
        base = llama().eval()
        with torch.no_grad():
            expected = PackedLoss(base)(pack())
            assert torch.equal(PackedLoss(attach(base))(pack()), expected)

    def test_scaling(self):
        def scaling(**changes):
            layer: Any = next(m for m in attach(**changes).modules() if isinstance(m, BaseTunerLayer))
            return layer.scaling["default"]

        assert scaling() == 2.0
        assert scaling(alpha=2.0) == 0.5
        assert scaling(rslora=True) == 4.0

    def test_dora_trains_magnitudes_too(self):
        model = attach(dora=True)
        assert any("lora_magnitude_vector" in name for name in trainable_parameters(model))
        PackedLoss(model, compute_dtype=torch.bfloat16)(pack()).backward()
        assert len(gradients(model)) == 3 * 2 * len(LINEAR)

    def test_initial_weights_follow_the_seed(self):
        def first(seed):
            base = llama()
            torch.manual_seed(seed)
            return next(iter(trainable_parameters(attach(base)).values()))

        assert torch.equal(first(1), first(1))
        assert not torch.equal(first(1), first(2))

    def test_dropout_is_on_in_training_only(self):
        model = attach(dropout=0.5)
        randomise(model)
        loss = PackedLoss(model)
        with torch.no_grad():
            assert torch.equal(loss.eval()(pack()), loss(pack()))
            assert not torch.equal(loss.train()(pack()), loss(pack()))

    def test_adapters_of_a_16_bit_base_stay_float32(self):
        model = attach(llama().bfloat16())
        assert {parameter.dtype for parameter in trainable_parameters(model).values()} == {torch.float32}
        PackedLoss(model, compute_dtype=torch.bfloat16)(pack()).backward()
        assert {gradient.dtype for gradient in gradients(model).values()} == {torch.float32}

    def test_no_activation_is_lifted_to_float32(self):
        """The reason for switching peft's casts off: inputs of an adapter stay in the compute dtype."""
        model = attach(llama().bfloat16())
        seen = set()
        for name, module in model.named_modules():
            if name.endswith(("lora_A.default", "lora_B.default")):
                module.register_forward_hook(lambda m, inputs, output: seen.update([inputs[0].dtype, output.dtype]))
        PackedLoss(model, compute_dtype=torch.bfloat16)(pack())
        assert seen == {torch.bfloat16}

    def test_with_activation_checkpointing(self):
        model = attach(llama().bfloat16()).train()
        randomise(model)
        PackedLoss(model, compute_dtype=torch.bfloat16)(pack()).backward()
        expected = gradients(model)
        enable_activation_checkpointing(model)
        PackedLoss(model, compute_dtype=torch.bfloat16)(pack()).backward()
        for name, gradient in gradients(model).items():
            assert torch.equal(gradient, expected[name])

    def test_equals_peft_in_float32(self):
        config = LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=8, target_modules=LINEAR)
        base = llama()
        with pytest.warns(FutureWarning, match="is_gradient_checkpointing"):
            plain = get_peft_model(base, config)
        ours = attach()
        randomise(plain)
        randomise(ours)
        assert trainable_parameters(plain).keys() == trainable_parameters(ours).keys()
        losses = [PackedLoss(model)(pack()) for model in (plain, ours)]
        for loss in losses:
            loss.backward()
        assert torch.equal(*losses)
        expected, got = gradients(plain), gradients(ours)
        assert all(torch.equal(gradient, expected[name]) for name, gradient in got.items())

    def test_unknown_target(self):
        with pytest.raises(ModelError) as caught:
            attach(targets=["qproj"])
        text = str(caught.value)
        assert "method.targets: no linear module of this model has that name" in text
        assert "got: qproj" in text
        assert "allowed: all-linear, q_proj, k_proj" in text
        assert "did you mean 'q_proj'?" in text

    def test_no_target(self):
        with pytest.raises(ModelError, match="no module is left to train"):
            attach(targets=[])

    def test_a_tied_output_layer(self):
        with pytest.raises(ModelError, match="the output layer shares its weights with the embeddings"):
            attach(llama(tie_word_embeddings=True), targets=["lm_head"])
        assert adapted(attach(targets=["lm_head"])) == ["lm_head"]

    @pytest.mark.parametrize("layers", [range(1, 3), range(0, 0)])
    def test_layers_outside_the_model(self, layers):
        with pytest.raises(ModelError, match="no such decoder layers"):
            attach(layers=layers)


class TestContinue:
    def saved(self, folder):
        model = attach(rank=3, alpha=5.0, targets=["q_proj", "v_proj"])
        randomise(model)
        model.save_pretrained(folder)
        return model

    def test_goes_on_where_it_was(self, tmp_path):
        first = self.saved(tmp_path)
        second = continue_lora(llama(), tmp_path)
        assert isinstance(second, PeftModel)
        assert lora_config(second).r == 3
        assert trainable_parameters(second).keys() == trainable_parameters(first).keys()
        for name, parameter in trainable_parameters(second).items():
            assert torch.equal(parameter, trainable_parameters(first)[name])
        with torch.no_grad():
            assert_near(PackedLoss(second)(pack()), PackedLoss(first)(pack()), largest=0, mean=0)

    def refusal(self, folder, model=None):
        with pytest.raises(ModelError) as caught:
            continue_lora(model or llama(), folder)
        return str(caught.value)

    def test_not_an_adapter(self, tmp_path):
        text = self.refusal(tmp_path)
        assert "no adapter here" in text
        assert "no adapter_config.json" in text

    def test_config_is_not_json(self, tmp_path):
        (tmp_path / "adapter_config.json").write_text("{")
        assert "the adapter's config is not JSON" in self.refusal(tmp_path)

    def test_another_kind(self, tmp_path):
        (tmp_path / "adapter_config.json").write_text('{"peft_type": "IA3"}')
        text = self.refusal(tmp_path)
        assert "this adapter cannot be continued" in text
        assert "IA3" in text

    def test_pickled_weights(self, tmp_path):
        self.saved(tmp_path)
        (tmp_path / "adapter_model.safetensors").rename(tmp_path / "adapter_model.bin")
        text = self.refusal(tmp_path)
        assert "the adapter folder has no safetensors weights" in text
        assert "adapter_model.bin" in text

    def test_damaged_weights(self, tmp_path):
        self.saved(tmp_path)
        (tmp_path / "adapter_model.safetensors").write_bytes(b"\0" * 20)
        assert "the adapter's weights are damaged" in self.refusal(tmp_path)

    def test_base_of_another_width(self, tmp_path):
        self.saved(tmp_path)
        text = self.refusal(tmp_path, llama(hidden_size=32))
        assert "the adapter was made for another base model" in text
        assert "size mismatch" in text

    def test_base_with_fewer_layers(self, tmp_path):
        self.saved(tmp_path)
        text = self.refusal(tmp_path, llama(num_hidden_layers=1))
        assert "the adapter was made for another base model" in text
        assert "layers.1" in text

    def test_base_with_more_layers(self, tmp_path):
        self.saved(tmp_path)
        assert "layers.2" in self.refusal(tmp_path, llama(num_hidden_layers=3))

    def test_base_without_its_modules(self, tmp_path):
        self.saved(tmp_path)
        path = tmp_path / "adapter_config.json"
        config = json.loads(path.read_text())
        config["target_modules"] = ["c_attn", "q_proj"]
        path.write_text(json.dumps(config))
        assert "no modules c_attn in this model" in self.refusal(tmp_path)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("15:", range(15, 30)),
        (":8", range(8)),
        ("4:12", range(4, 12)),
        ("-10:", range(20, 30)),
        (":-5", range(25)),
        (":", range(30)),
    ],
)
def test_parse_layers(text, expected):
    assert parse_layers(text, 30) == expected


@pytest.mark.parametrize("text", ["", "7", "a:b", "1:2:3", "1.5:", "30:", "12:4", "3:3", ":31", "-31:"])
def test_parse_layers_of_another_form_or_outside(text):
    with pytest.raises(ModelError, match="are no layers of this model") as caught:
        parse_layers(text, 30)
    assert "layers 0 to 29: '15:', ':8', '4:12' or '-10:'" in str(caught.value)


class TestFreeze:
    def test_first_layers_and_embeddings(self):
        model = llama(tie_word_embeddings=True)
        freeze(model, 1, embeddings=True)
        names = trainable_parameters(model)
        assert not [name for name in names if "layers.0." in name or "embed" in name or "lm_head" in name]
        assert [name for name in names if "layers.1." in name]
        PackedLoss(model)(pack()).backward()
        assert gradients(model).keys() == names.keys()

    def test_nothing(self):
        model = llama()
        freeze(model, 0, embeddings=False)
        assert len(trainable_parameters(model)) == len(list(model.parameters()))

    def test_more_layers_than_there_are(self):
        with pytest.raises(ModelError, match="no such decoder layers") as caught:
            freeze(llama(), 3, embeddings=False)
        assert "0 to 2" in str(caught.value)


def test_inner_model():
    base = llama()
    assert inner_model(base) is base
    assert inner_model(attach(base)) is base
    with pytest.raises(TypeError, match="got Linear"):
        inner_model(torch.nn.Linear(1, 1))


def test_decoder_layers():
    model = llama()
    assert decoder_layers(model) == ("layers", 2)
    model.config.num_hidden_layers = 3
    with pytest.raises(ModelError, match="cannot find the decoder layers"):
        decoder_layers(model)


def test_a_model_without_activation_checkpointing():
    model = llama()
    type(model).supports_gradient_checkpointing = False
    try:
        with pytest.raises(ModelError, match="this model has no activation checkpointing"):
            enable_activation_checkpointing(model)
    finally:
        del type(model).supports_gradient_checkpointing
