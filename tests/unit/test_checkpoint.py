"""Checkpoints: published whole or not at all, verified before they are believed, kept by rules."""

import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import msgspec
import pytest
import torch
from safetensors.torch import load_file, save_file
from train_fixtures import BASE, IDENTITY, Run, make_arena, run_ranks, tiny_loss, weights_of

from trainer.distributed.ranks import Ranks, start_ranks
from trainer.distributed.strategy import Strategy, make_strategy
from trainer.errors import NeedsPerson, RunError
from trainer.fingerprint import digest, file_digest
from trainer.train.checkpoint import publish
from trainer.train.checkpoint.fence import claim
from trainer.train.checkpoint.format import (
    Checkpoint,
    DamagedCheckpoint,
    FileInfo,
    FragmentInfo,
    Manifest,
    checkpoint_path,
    published,
    verify,
)
from trainer.train.checkpoint.publish import SaveFailed, retain, save
from trainer.train.checkpoint.resume import find_agreed, find_resumable, load, state_digest
from trainer.train.optim import make_optimizer
from trainer.train.state import TrainState


@pytest.fixture(scope="module")
def ranks() -> Ranks:
    return start_ranks(device="cpu", world_size=1)


def prepared(ranks: Ranks, *, lora: bool = True) -> Strategy:
    strategy = make_strategy("single", ranks, dtype=torch.float32, clip_norm=1.0)
    strategy.prepare(
        tiny_loss(lora=lora),
        lambda module: make_optimizer(module, lr=1e-2, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0),
    )
    return strategy


def step(strategy: Strategy, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in strategy.trainable.values():
        parameter.grad = torch.randn(parameter.shape, generator=generator)
    strategy.step()


def published_at(strategy: Strategy, folder: Path, *steps: int) -> list[Path]:
    fence = claim(folder)
    return [save(strategy, fence, TrainState(step=number), identity=IDENTITY, base=BASE) for number in steps]


def visible(folder: Path) -> list[str]:
    """What is in a folder of checkpoints, but for the empty one of this generation."""
    (own,) = (path for path in folder.iterdir() if path.name.startswith(".generation-"))
    assert list(own.iterdir()) == []
    return sorted(path.name for path in folder.iterdir() if path != own)


def ignore(_: str) -> None:
    pass


def find(folder: Path, warn: Callable[[str], None] = ignore) -> Checkpoint | None:
    return find_resumable(folder, identity=IDENTITY, base=BASE, warn=warn)


def test_a_loaded_state_continues_bit_by_bit(ranks: Ranks, tmp_path: Path) -> None:
    straight = prepared(ranks)
    for seed in range(3):
        step(straight, seed)
    state = TrainState(step=3, tokens=17)
    state.losses.add(0.1 + 0.2, factor=0, window=4)
    save(straight, claim(tmp_path), state, identity=IDENTITY, base=BASE)
    step(straight, 3)

    resumed = prepared(ranks)
    found = find(tmp_path)
    assert found is not None
    assert load(resumed, found) == state
    step(resumed, 3)
    assert state_digest(resumed) == state_digest(straight)
    for name, weight in weights_of(straight).items():
        assert torch.equal(weights_of(resumed)[name], weight), name


def test_weights_only_leaves_the_optimizer_alone(ranks: Ranks, tmp_path: Path) -> None:
    strategy = prepared(ranks)
    step(strategy, 0)
    (path,) = published_at(strategy, tmp_path, 1)
    other = prepared(ranks)
    load(other, Checkpoint(path, verify(path)), weights_only=True)
    assert all(torch.equal(weights_of(other)[n], w) for n, w in weights_of(strategy).items())
    assert all(float(fragment.step) == 0.0 for fragment in other.fragments(saving=False))
    assert all(not fragment.tensors["exp_avg"].any() for fragment in other.fragments(saving=False))


def test_no_pickle_and_no_leftovers(ranks: Ranks, tmp_path: Path) -> None:
    (path,) = published_at(prepared(ranks), tmp_path, 12)
    assert path.name == "step-00000012"
    assert sorted(file.name for file in path.iterdir()) == ["manifest.json", "rank0.json", "rank0.safetensors"]
    assert visible(tmp_path) == ["step-00000012"]
    modes = {file.stat().st_mode & 0o777 for file in path.iterdir()}
    assert len(modes) == 1, "the umask decides about all files alike"


def test_pieces_of_any_number_of_ranks_fill_a_tensor(ranks: Ranks, tmp_path: Path) -> None:
    """Cut a checkpoint of one rank into two ranks' fragments, as a sharded strategy writes them."""
    strategy = prepared(ranks)
    step(strategy, 0)
    (path,) = published_at(strategy, tmp_path, 1)
    stored = load_file(path / "rank0.safetensors")
    index = msgspec.json.decode((path / "rank0.json").read_bytes(), type=dict[str, FragmentInfo])
    for rank in range(2):
        cuts = {name: slice(0, info.length // 3) if rank == 0 else slice(info.length // 3, None)
                for name, info in index.items()}  # fmt: skip
        save_file({key: flat[cuts[key.split(":", 1)[1]]].clone() for key, flat in stored.items()},
                  path / f"rank{rank}.safetensors")  # fmt: skip
        infos = {
            name: replace(info, start=cuts[name].start, length=len(range(info.length)[cuts[name]]))
            for name, info in index.items()
        }
        (path / f"rank{rank}.json").write_bytes(msgspec.json.encode(infos))
    reseal(path, world_size=2)
    other = prepared(ranks)
    load(other, Checkpoint(path, verify(path)))
    assert state_digest(other) == state_digest(strategy)
    assert all(torch.equal(weights_of(other)[n], w) for n, w in weights_of(strategy).items())


def reseal(path: Path, **changes: object) -> None:
    """Make the manifest fit what is in the folder now, as if it had been published so."""
    manifest = msgspec.json.decode((path / "manifest.json").read_bytes(), type=Manifest)
    files = {
        file.name: FileInfo(file.stat().st_size, file_digest(file))
        for file in sorted(path.iterdir())
        if file.name != "manifest.json"
    }
    manifest = replace(manifest, files=files, sha256="", **changes)
    (path / "manifest.json").write_bytes(msgspec.json.encode(replace(manifest, sha256=digest(manifest))))


def test_a_hole_in_the_fragments_is_noticed(ranks: Ranks, tmp_path: Path) -> None:
    (path,) = published_at(prepared(ranks), tmp_path, 1)
    index = msgspec.json.decode((path / "rank0.json").read_bytes(), type=dict[str, FragmentInfo])
    name = next(iter(index))
    index[name] = replace(index[name], length=index[name].length - 1)
    (path / "rank0.json").write_bytes(msgspec.json.encode(index))
    reseal(path)
    whole = index[name].length + 1
    with pytest.raises(DamagedCheckpoint, match=f"{name} has {whole - 1} of {whole} elements"):
        load(prepared(ranks), Checkpoint(path, verify(path)))


# -- damage --------------------------------------------------------------------------------------------------------


def cut(path: Path) -> str:
    weights = path / "rank0.safetensors"
    size = weights.stat().st_size
    with weights.open("r+b") as handle:
        handle.truncate(size - 1)
    return rf"rank0\.safetensors has {size - 1} of {size} bytes"


def flip(path: Path) -> str:
    weights = path / "rank0.safetensors"
    raw = bytearray(weights.read_bytes())
    raw[-5] ^= 1
    weights.write_bytes(raw)
    return r"rank0\.safetensors has other contents than were written"


def remove_index(path: Path) -> str:
    (path / "rank0.json").unlink()
    return r"rank0\.json is missing"


def remove_manifest(path: Path) -> str:
    (path / "manifest.json").unlink()
    return r"manifest\.json cannot be read \(No such file or directory\)"


def edit_state(path: Path) -> str:
    manifest = json.loads((path / "manifest.json").read_text())
    manifest["state"]["tokens"] += 1
    (path / "manifest.json").write_text(json.dumps(manifest))
    return r"manifest\.json has other contents than were written"


def tear_manifest(path: Path) -> str:
    raw = (path / "manifest.json").read_bytes()
    (path / "manifest.json").write_bytes(raw[: len(raw) // 2])
    return r"manifest\.json cannot be understood"


def empty(path: Path) -> str:
    for file in path.iterdir():
        file.unlink()
    return r"manifest\.json cannot be read"


def other_format(path: Path) -> str:
    reseal(path, format=99)
    return "format 99, and this version reads 2"


def other_step(path: Path) -> str:
    reseal(path, step=7)
    return r"manifest\.json is of step 7"


def link_out(path: Path) -> str:
    weights = path / "rank0.safetensors"
    weights.rename(path.parent / "elsewhere")
    weights.symlink_to(path.parent / "elsewhere")
    return r"rank0\.safetensors is missing"


def name_outside(path: Path) -> str:
    (path / "manifest.json").rename(path / "kept")
    manifest = json.loads((path / "kept").read_text())
    manifest["files"]["../../secret"] = {"bytes": 0, "sha256": ""}
    (path / "kept").unlink()
    typed = msgspec.json.decode(json.dumps(manifest | {"sha256": ""}).encode(), type=Manifest)
    (path / "manifest.json").write_bytes(msgspec.json.encode(replace(typed, sha256=digest(typed))))
    return r"\.\./\.\./secret is missing"


def link_manifest(path: Path) -> str:
    (path / "manifest.json").rename(path.parent / "manifest")
    (path / "manifest.json").symlink_to(path.parent / "manifest")
    return r"manifest\.json is a link to another place"


DAMAGES = [cut, flip, remove_index, remove_manifest, edit_state, tear_manifest, empty, other_format, other_step,
           link_out, link_manifest, name_outside]  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_one_is_named_and_the_one_before_it_used(
    ranks: Ranks, tmp_path: Path, damage: Callable[[Path], str]
) -> None:
    _, newest = published_at(prepared(ranks), tmp_path, 4, 8)
    message = damage(newest)
    with pytest.raises(DamagedCheckpoint, match=message):
        verify(newest)
    warnings: list[str] = []
    found = find(tmp_path, warnings.append)
    assert found is not None
    assert found.path.name == "step-00000004"
    (warning,) = warnings
    kind = "checkpoint of another version" if damage is other_format else "damaged checkpoint"
    assert warning.startswith(f"skipping a {newest}: {kind}")


def test_all_damaged_needs_a_person(ranks: Ranks, tmp_path: Path) -> None:
    for path in published_at(prepared(ranks), tmp_path, 4, 8):
        flip(path)
    with pytest.raises(NeedsPerson, match="no checkpoint of this run can be trusted") as fault:
        find(tmp_path)
    assert fault.value.exit_code == 76
    assert fault.value.problems[0].got == "all 2 are damaged: step-00000008, step-00000004"


def test_no_checkpoint_at_all_is_a_fresh_start(tmp_path: Path) -> None:
    assert find(tmp_path / "nowhere") is None
    (tmp_path / ".stage-step-00000004").mkdir()
    (tmp_path / "step-4").mkdir()
    assert find(tmp_path) is None


@pytest.mark.parametrize(("what", "identity", "base"), [("run", "ffff", BASE), ("base model", IDENTITY, "another")])
def test_a_checkpoint_of_something_else_is_refused(
    ranks: Ranks, tmp_path: Path, what: str, identity: str, base: str
) -> None:
    published_at(prepared(ranks), tmp_path, 4)
    with pytest.raises(RunError, match=f"this checkpoint belongs to another {what}"):
        find_resumable(tmp_path, identity=identity, base=base, warn=ignore)


def test_a_checkpoint_of_other_parameters_is_refused(ranks: Ranks, tmp_path: Path) -> None:
    (path,) = published_at(prepared(ranks), tmp_path, 4)
    with pytest.raises(RunError, match="of a model with other trainable parameters"):
        load(prepared(ranks, lora=False), Checkpoint(path, verify(path)))


def test_an_error_of_the_search_reaches_every_rank(ranks: Ranks, tmp_path: Path) -> None:
    for path in published_at(prepared(ranks), tmp_path, 4):
        flip(path)
    with pytest.raises(NeedsPerson):
        find_agreed(ranks, tmp_path, lambda: find(tmp_path))


# -- publishing ----------------------------------------------------------------------------------------------------


def test_a_whole_checkpoint_of_the_same_step_is_left_alone(ranks: Ranks, tmp_path: Path) -> None:
    strategy = prepared(ranks)
    (path,) = published_at(strategy, tmp_path, 4)
    before = (path / "manifest.json").read_bytes()
    save(strategy, claim(tmp_path), TrainState(step=4, tokens=99), identity=IDENTITY, base=BASE)
    assert (path / "manifest.json").read_bytes() == before


def test_a_damaged_checkpoint_of_the_same_step_is_moved_aside(ranks: Ranks, tmp_path: Path) -> None:
    strategy = prepared(ranks)
    path = checkpoint_path(tmp_path, 4)
    for _ in range(2):
        published_at(strategy, tmp_path, 4)
        flip(path)
    published_at(strategy, tmp_path, 4)
    verify(path)
    assert visible(tmp_path) == ["step-00000004", "step-00000004.damaged", "step-00000004.damaged1"]
    assert [entry.name for entry in published(tmp_path)] == ["step-00000004"]


def test_what_an_earlier_process_left_half_done_goes_away(ranks: Ranks, tmp_path: Path) -> None:
    for leftover in (".stage-step-00000003", ".removed-step-00000001", ".generation-00000007"):
        (tmp_path / leftover).mkdir()
        (tmp_path / leftover / "rank0.safetensors").write_bytes(b"half")
    published_at(prepared(ranks), tmp_path, 4)
    assert visible(tmp_path) == ["step-00000004"]


def test_everything_is_on_disk_before_the_name_appears(
    ranks: Ranks, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Files, then their folder, then the rename, then the folder above."""
    fence, strategy = claim(tmp_path), prepared(ranks)
    events: list[str] = []
    real_sync, real_rename = os.fsync, Path.rename

    def sync(handle: int) -> None:
        events.append(f"sync {Path(os.readlink(f'/proc/self/fd/{handle}')).name}")
        real_sync(handle)

    monkeypatch.setattr(os, "fsync", sync)

    def rename(self: Path, target: Path) -> Path:
        events.append(f"rename to {target.name}")
        return real_rename(self, target)

    monkeypatch.setattr(Path, "rename", rename)
    save(strategy, fence, TrainState(step=4), identity=IDENTITY, base=BASE)
    assert events == [
        "sync rank0.json",
        "sync rank0.safetensors",
        "sync manifest.json",
        "sync step-00000004",
        "rename to step-00000004",
        f"sync {tmp_path.name}",
    ]


@pytest.mark.parametrize("where", ["_make_stage", "_write_rank", "_publish"])
def test_a_failed_save_leaves_nothing_and_harms_nothing(
    ranks: Ranks, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    strategy = prepared(ranks)
    (before,) = published_at(strategy, tmp_path, 4)
    real = getattr(publish, where)

    def no_space(*arguments: object, **named: object) -> None:
        if where != "_publish":
            real(*arguments, **named)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(publish, where, no_space)
    with pytest.raises(SaveFailed, match="a checkpoint could not be written") as fault:
        published_at(strategy, tmp_path, 8)
    assert fault.value.problems[0].got == "rank 0: [Errno 28] No space left on device"
    assert visible(tmp_path) == ["step-00000004"]
    verify(before)
    monkeypatch.undo()
    published_at(strategy, tmp_path, 8)
    assert find(tmp_path) is not None


def test_a_disk_that_is_full_during_training(tmp_path: Path) -> None:
    """A real limit on file size stands for the full disk: the weights do not fit, everything else does."""
    make_arena(tmp_path / "train")
    make_arena(tmp_path / "validation", documents=8, seed=9)
    run = Run(folder=str(tmp_path), max_steps=6, validate_every=2)

    ((code, output),) = run_ranks(run, file_limit=200_000)
    assert code == 74, output
    assert "a checkpoint could not be written" in output
    assert "Traceback" not in output
    assert visible(tmp_path / "checkpoints") == []
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 6, "training went on to its end"


# -- keeping -------------------------------------------------------------------------------------------------------


def steps_in(folder: Path) -> list[int]:
    return [int(path.name[-8:]) for path in reversed(published(folder))]


def test_the_newest_and_the_best_are_kept(ranks: Ranks, tmp_path: Path) -> None:
    published_at(prepared(ranks), tmp_path, 1, 2, 3, 4, 5)
    assert sorted(retain(claim(tmp_path), keep=2, best=2, verified=set())) == [1, 3]
    assert steps_in(tmp_path) == [2, 4, 5]
    assert [name[:5] for name in visible(tmp_path)] == ["step-"] * 3


def test_a_damaged_one_neither_counts_nor_goes(ranks: Ranks, tmp_path: Path) -> None:
    paths = published_at(prepared(ranks), tmp_path, 1, 2, 3, 4)
    flip(paths[3])
    flip(paths[2])
    assert retain(claim(tmp_path), keep=1, best=None, verified=set()) == [1]
    assert steps_in(tmp_path) == [2, 3, 4]


def test_the_last_one_is_never_deleted(ranks: Ranks, tmp_path: Path) -> None:
    published_at(prepared(ranks), tmp_path, 1, 2)
    retain(claim(tmp_path), keep=0, best=None, verified=set())
    assert steps_in(tmp_path) == [2]


def test_what_is_known_to_be_whole_is_not_read_again(
    ranks: Ranks, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    published_at(prepared(ranks), tmp_path, 1, 2)
    read: list[str] = []
    real = publish.verify
    monkeypatch.setattr(publish, "verify", lambda path: (read.append(path.name), real(path))[1])
    verified = {2}
    retain(claim(tmp_path), keep=2, best=None, verified=verified)
    retain(claim(tmp_path), keep=2, best=None, verified=verified)
    assert read == ["step-00000001"]
    assert verified == {1, 2}


def test_names_sort_by_step() -> None:
    assert checkpoint_path(Path("c"), 12) == Path("c/step-00000012")
