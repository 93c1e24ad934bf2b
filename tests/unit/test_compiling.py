import pytest
import torch
from model_fixtures import CPU, VOCABULARY, assert_near, gradients, llama, mistral, pack, qwen3
from torch._dynamo.exc import BackendCompilerFailed

from trainer.errors import ModelError
from trainer.evaluate.generate import generate
from trainer.model.adapters import attach_lora, decoder_layer_modules, inner_model
from trainer.model.compiling import compile_layers, require_own, should_compile, without_compiling
from trainer.model.loss import PackedLoss
from trainer.samples import EvaluationExample

CUDA = torch.device("cuda")
# torch.compile looks at .grad of whatever it traces, with warnings switched off, which "error" switches on again.
# See https://github.com/pytorch/pytorch/pull/30531 for the warning.
# The CPU backend of torch.compile still imports what torch has deprecated itself (torch.jit in torch/utils/mkldnn.py).
pytestmark = [
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning"),
    pytest.mark.filterwarnings("ignore:.torch.jit.*is deprecated:DeprecationWarning"),
]


def test_off_on_a_cpu_unless_asked_for():
    assert should_compile(None, CPU, "single") == (False, "only on GPUs, unless model.compile=true")
    assert should_compile(True, CPU, "ddp") == (True, "as configured")
    assert should_compile(False, CUDA, "zero3") == (False, "as configured")


@pytest.mark.parametrize(
    ("package", "compiler", "strategy", "words"),
    [
        (None, "gcc", "single", "triton is not installed"),
        (object(), None, "ddp", "there is no C compiler (cc, gcc, clang)"),
        (object(), "gcc", "zero3", "zero3 gathers the weights of a layer piece by piece"),
    ],
)
def test_what_is_missing_is_said_or_refused(monkeypatch, package, compiler, strategy, words):
    monkeypatch.setattr("trainer.model.compiling.find_spec", lambda name: package)
    monkeypatch.setattr("trainer_launch.room.shutil.which", lambda name: compiler)
    wanted, why = should_compile(None, CUDA, strategy)
    assert not wanted
    assert words in why
    with pytest.raises(ModelError, match="the layers cannot be compiled") as caught:
        should_compile(True, CUDA, strategy)
    assert words in str(caught.value)
    assert "model.compile=false" in str(caught.value)


def test_default_on_a_gpu(monkeypatch):
    monkeypatch.setattr("trainer.model.compiling.find_spec", lambda name: object())
    monkeypatch.setattr("trainer_launch.room.shutil.which", lambda name: name)
    assert should_compile(None, CUDA, "fsdp") == (True, "the default on GPUs")


def test_code_is_not_loaded_from_where_others_may_write(tmp_path, monkeypatch):
    require_own(tmp_path)
    tmp_path.chmod(0o777)
    with pytest.raises(ModelError, match="others may write") as caught:
        require_own(tmp_path)
    assert "mode drwxrwxrwx" in str(caught.value)
    assert "TORCHINDUCTOR_CACHE_DIR" in str(caught.value)
    tmp_path.chmod(0o700)
    monkeypatch.setattr("trainer.model.compiling.os.geteuid", lambda: tmp_path.stat().st_uid + 1)
    with pytest.raises(ModelError, match="others may write"):
        require_own(tmp_path)


def test_compiled_layers_refuse_such_a_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    tmp_path.chmod(0o777)
    with pytest.raises(ModelError, match="others may write"):
        compile_layers(llama())


def test_compiled_layers_give_the_same_loss_for_every_pack_and_are_compiled_once():
    """LoRA on the upper layer of two: layers with and without adapters, and as many documents of other lengths."""
    model = attach_lora(llama(), rank=4, alpha=8, layers=range(1, 2))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(0))
    packs = [pack(), pack((20, 30, 40, 5, 25), seed=1), pack((5, 5, 4, 6, 100), seed=2)]
    wanted = []
    for batch in packs:
        loss = PackedLoss(model, chunk=16)(batch)
        loss.backward()
        wanted.append((loss.detach(), gradients(model)))
    assert compile_layers(model) == 2
    compiled = PackedLoss(model, chunk=16, compiled=True)
    compiled(packs[0]).backward()
    gradients(model)
    with torch.compiler.set_stance("fail_on_recompile"):
        found = []
        for batch in packs:
            loss = compiled(batch)
            loss.backward()
            found.append((loss.detach(), gradients(model)))
    for (loss, grads), (loss_wanted, grads_wanted) in zip(found, wanted, strict=True):
        assert_near(loss, loss_wanted, largest=1e-3, mean=1e-3)
        for name, gradient in grads_wanted.items():
            scale = float(gradient.abs().max())
            assert_near(grads[name], gradient, largest=2e-4 * scale, mean=2e-5 * scale)


class Traced(Exception):
    """Ends a forward pass at the first graph: what would follow needs a GPU."""


@pytest.mark.parametrize("name", ["llama", "qwen3", "mistral", "lora"])
def test_a_layer_with_the_gpu_kernel_is_one_graph(name, monkeypatch):
    """No part of a layer is left to Python on a GPU, its attention least of all."""
    makers = {"llama": llama, "qwen3": qwen3, "mistral": mistral, "lora": lambda: attach_lora(llama(), rank=2, alpha=4)}
    monkeypatch.setattr("trainer.model.attention.uses_varlen_kernel", lambda device, dtype: True)
    calls = []

    def backend(graph, inputs):
        calls.extend(str(node.target) for node in graph.graph.nodes if node.op == "call_function")
        raise Traced

    model = makers[name]()
    for layer in decoder_layer_modules(inner_model(model)):
        layer.compile(backend=backend, fullgraph=True)
    with pytest.raises(BackendCompilerFailed, match="Traced"), torch.autocast("cpu", dtype=torch.bfloat16):
        PackedLoss(model)(pack())
    assert calls.count("torch_attn._varlen_attn") == 1


def test_generation_runs_uncompiled():
    model, calls = llama(), []

    def backend(graph, inputs):
        calls.append(len(inputs))
        return graph.forward

    for layer in decoder_layer_modules(model):
        layer.compile(backend=backend)
    example = EvaluationExample(id="0", prompt_ids=[5, 6, 7], answer="")
    generate(
        model,
        [example],
        max_new_tokens=2,
        stop_token_ids=[VOCABULARY - 1],
        pad_token_id=0,
        batch_tokens=64,
        decode=str,
        device=CPU,
    )
    assert calls == []
    PackedLoss(model)(pack())
    assert calls != []
    with without_compiling():
        before = len(calls)
        PackedLoss(model)(pack((90, 30)))
    assert len(calls) == before
