"""A whole run on a base in 4 bits: what it exports stands on the base as published, and it says so."""

from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from cli_fixtures import trainer
from layout_fixtures import ALONE, SMOKE, again, assert_equal, tensors

from trainer.paths import RunFolder

pytestmark = [
    pytest.mark.campaign,
    pytest.mark.skipif(find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed (.[qlora])"),
]


def test_what_is_exported_stands_on_the_published_base(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    words = ["method=qlora", "optim.max_steps=4"]
    ended = trainer(tmp_path, *SMOKE, *words, "parallel=ddp", "launch.processes=2")
    assert ended.code == 0, ended.out + ended.err
    exported = tensors(folder)
    assert {tensor.dtype for tensor in exported.values()} == {torch.float32}
    assert any(name.startswith("merged/") for name in exported)
    assert "linear layers in nf4, computing in float32" in " ".join((folder.logs / "rank0.log").read_text().split())
    told = " ".join((ended.out + ended.err).split())
    assert (
        "the adapter was trained on a base in 4 bits and is exported for, and merged into, the base as published"
        in told
    )
    card = folder.card.read_text("utf-8")
    assert "It was trained and measured on a base in 4 bits" in card
    again(tmp_path, folder, [*ALONE, *words])
    assert_equal(tensors(folder), exported)
