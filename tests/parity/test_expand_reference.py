"""The kernel on the device makes the batch that the CPU makes, to the bit: in Triton's interpreter, and on a GPU.

Triton comes with torch for CUDA. Without a GPU, `pip install --no-deps triton` is enough for the interpreter.
"""

import subprocess
import sys
from collections.abc import Iterator
from importlib import import_module
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from kernel_fixtures import random_arena

import trainer_kernels
from trainer_kernels import PackedBatch, PackingError, TokenArena, collate, reference

WITHOUT_GPU = "needs a CUDA device"
NAMES = ("input_ids", "labels", "position_ids")


@pytest.fixture(scope="module")
def arena(tmp_path_factory: pytest.TempPathFactory) -> TokenArena:
    """Documents of 2 to 60 tokens."""
    return random_arena(tmp_path_factory.mktemp("expand") / "arena", documents=1500, longest=60)


@pytest.fixture(scope="module")
def interpreted() -> Iterator[ModuleType]:
    """The module ``expand`` with its kernel run by Triton's interpreter, on the CPU; a copy, the real one is left."""
    triton = pytest.importorskip("triton", reason="Triton is not installed: it comes with torch for CUDA")
    source = Path(trainer_kernels.__file__ or "").with_name("expand.py")
    spec = spec_from_file_location("interpreted_expand", source)
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    with triton.knobs.runtime.scope():
        triton.knobs.runtime.interpret = True
        spec.loader.exec_module(module)
        yield module


@pytest.fixture(scope="module")
def compiled() -> ModuleType:
    """The module ``expand`` as it is used on a GPU."""
    if not torch.cuda.is_available():
        pytest.skip(WITHOUT_GPU)
    return import_module("trainer_kernels.expand")


def expanded(module: ModuleType, tokens: Any, cu_seqlens: Any, device: str) -> dict[str, list[int]]:
    """What the kernel writes, in memory that held something else and with a guard behind it."""
    size = len(tokens)
    rows = torch.full((3, size + 2), 77, dtype=torch.int64, device=device)
    given = [torch.tensor(array, dtype=torch.int32, device=device) for array in (tokens, cu_seqlens)]
    module.expand(*given, **{name: row[:size] for name, row in zip(NAMES, rows, strict=True)})
    assert rows[:, size:].tolist() == [[77, 77]] * 3, "nothing is written behind the batch"
    return {name: row[:size].tolist() for name, row in zip(NAMES, rows, strict=True)}


def check(module: ModuleType, arena: TokenArena, documents: Any, device: str, repeats: int, **options: Any) -> None:
    wanted: PackedBatch = collate(arena, documents, layout="int64", **options)
    compact = collate(arena, documents, layout="compact", **options)
    boundaries = np.concatenate([compact.cu_seqlens, np.full(repeats, len(compact.tokens), np.int32)])
    found = expanded(module, compact.tokens, boundaries, device)
    for name in NAMES:
        assert found[name] == getattr(wanted, name).tolist(), name
        assert found[name] == getattr(reference.expand(compact), name).tolist(), name


def check_many(module: ModuleType, arena: TokenArena, device: str) -> None:
    random = np.random.default_rng(1)
    shortest = int(arena.lengths.argmin())
    for number in range(60):
        documents = random.integers(0, arena.num_documents, int(random.integers(1, 80)))
        align = int(random.choice([1, 1, 8, 5]))
        used = int((-(-arena.lengths[documents] // align) * align).sum())
        pad_to = None if number % 3 == 0 else used + align * int(random.integers(0, 1200))
        pad_id = int(random.choice([0, 7, (1 << 31) - 1]))
        check(module, arena, documents, device, number % 20, pad_to=pad_to, align=align, pad_id=pad_id)
    for documents, options in (
        ([], {}),
        ([], {"pad_to": 1500, "pad_id": 3}),
        ([shortest], {}),
        ([shortest], {"pad_to": 3}),
        ([shortest] * 40, {"pad_to": 2048}),
        (list(range(1500)), {"pad_to": 1 << 17}),
        (list(range(1025)), {}),
    ):
        check(module, arena, documents, device, 5, **options)


def check_single_tokens(module: ModuleType, device: str) -> None:
    """Segments of one token each."""
    count = 3000
    tokens = np.arange(count, dtype=np.int64) % 5 - 2
    found = expanded(module, tokens, np.arange(count + 1), device)
    assert found["position_ids"] == [0] * count
    assert found["input_ids"] == (tokens & 0x7FFFFFFF).tolist()
    assert found["labels"] == [*np.where(tokens[1:] >= 0, tokens[1:], -100).tolist(), -100]


def test_the_interpreted_kernel_makes_the_batches_of_the_cpu(interpreted: ModuleType, arena: TokenArena) -> None:
    check_many(interpreted, arena, "cpu")
    check_single_tokens(interpreted, "cpu")


@pytest.mark.gpu
def test_the_kernel_makes_the_batches_of_the_cpu(compiled: ModuleType, arena: TokenArena) -> None:
    check_many(compiled, arena, "cuda")
    check_single_tokens(compiled, "cuda")


BAD: list[tuple[dict[str, Any], list[str]]] = [
    ({"tokens": torch.zeros(4)}, ["tokens cannot be expanded", "got: torch.float32 of 4", "torch.int32, at least 1"]),
    ({"tokens": torch.zeros(0, dtype=torch.int32)}, ["tokens cannot be", "torch.int32 of 0 elements", "at least 1"]),
    ({"cu_seqlens": torch.zeros(1, dtype=torch.int32)}, ["cu_seqlens cannot be", "of 1 elements", "at least 2"]),
    ({"labels": torch.zeros(5, dtype=torch.int64)}, ["labels cannot be", "of 5 elements", "torch.int64, 4 elements"]),
    ({"labels": torch.zeros(4, dtype=torch.int32)}, ["labels cannot be", "got: torch.int32"]),
    ({"input_ids": torch.zeros(8, dtype=torch.int64)[::2]}, ["input_ids cannot be", "not side by side"]),
]


@pytest.mark.parametrize(("wrong", "words"), BAD)
def test_tensors_that_do_not_fit_are_refused(interpreted: ModuleType, wrong: dict[str, Any], words: list[str]) -> None:
    right = {"tokens": torch.zeros(4, dtype=torch.int32), "cu_seqlens": torch.tensor([0, 4], dtype=torch.int32)}
    right |= {name: torch.zeros(4, dtype=torch.int64) for name in NAMES}
    interpreted.expand(**right)
    with pytest.raises(PackingError) as caught:
        interpreted.expand(**right | wrong)
    assert [word for word in words if word not in str(caught.value)] == [], str(caught.value)


def test_the_package_does_not_need_triton_before_there_is_a_device() -> None:
    code = "import sys, trainer_kernels\nassert not {'torch', 'triton'} & set(sys.modules)"
    environment = {"PYTHONPATH": str(Path(trainer_kernels.__file__ or "").parents[1])}
    result = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
