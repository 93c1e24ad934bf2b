"""Saving behind the training, and the fence between two processes of one run."""

import os
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from train_fixtures import BASE, IDENTITY, tiny_strategy

from trainer.distributed.ranks import Ranks, start_ranks
from trainer.distributed.strategy import Strategy
from trainer.errors import TrainingFault
from trainer.train.checkpoint import behind, publish, writing
from trainer.train.checkpoint.behind import Saver
from trainer.train.checkpoint.fence import Fence, Fenced, claim, claim_together
from trainer.train.checkpoint.format import checkpoint_path, published, verify
from trainer.train.checkpoint.publish import SaveFailed, retain, save
from trainer.train.checkpoint.writing import PoisonedValue, write_durably, write_tensors
from trainer.train.state import TrainState


@pytest.fixture(scope="module")
def ranks() -> Ranks:
    return start_ranks(device="cpu", world_size=1)


@pytest.fixture
def strategy(ranks: Ranks) -> Strategy:
    made, _ = tiny_strategy(ranks, lora=True)
    return made


class Saving:
    """A ``Saver`` that can be held before it writes, and what it said and did."""

    def __init__(self, strategy: Strategy, folder: Path, *, asynchronous: bool = True) -> None:
        self.fence = claim(folder)
        self.warnings: list[str] = []
        self.cleaned: list[int] = []
        self.go_on = threading.Event()
        self.go_on.set()
        self.saver = Saver(
            strategy,
            self.fence,
            strategy.ranks.aside() if asynchronous else None,
            identity=IDENTITY,
            base=BASE,
            before=self.hold,
            after=lambda state: self.cleaned.append(state.step),
            warn=self.warnings.append,
        )

    def hold(self) -> None:
        assert self.go_on.wait(60)


def change(strategy: Strategy, factor: float = 2.0) -> None:
    with torch.no_grad():
        for parameter in strategy.trainable.values():
            parameter.add_(factor)


def contents(path: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in path.iterdir()}


# -- behind the training -------------------------------------------------------------------------------------------


def test_both_ways_of_saving_write_the_same_bytes(strategy: Strategy, tmp_path: Path) -> None:
    state = TrainState(step=4, tokens=17)
    Saving(strategy, tmp_path / "waiting", asynchronous=False).saver.save(state, required=False)
    Saving(strategy, tmp_path / "behind").saver.save(state, required=True)
    one, other = (contents(checkpoint_path(tmp_path / name, 4)) for name in ("waiting", "behind"))
    assert one == other
    assert set(one) == {"manifest.json", "rank0.json", "rank0.safetensors"}


def test_what_changes_after_the_copy_is_not_in_the_file(strategy: Strategy, tmp_path: Path) -> None:
    state = TrainState(step=4)
    save(strategy, claim(tmp_path / "before"), state, identity=IDENTITY, base=BASE)
    saving = Saving(strategy, tmp_path / "behind")
    saving.go_on.clear()
    saving.saver.save(state, required=False)
    change(strategy)
    state.step, state.tokens = 5, 99
    state.losses.add(1.0, factor=0, window=4)
    assert published(tmp_path / "behind") == []
    saving.go_on.set()
    saving.saver.finish()
    assert contents(checkpoint_path(tmp_path / "behind", 4)) == contents(checkpoint_path(tmp_path / "before", 4))


def test_one_save_at_a_time_in_the_same_memory(strategy: Strategy, tmp_path: Path) -> None:
    saving = Saving(strategy, tmp_path)
    saving.go_on.clear()
    saving.saver.save(TrainState(step=1), required=False)
    first = {tensor.data_ptr() for tensor in saving.saver._copies._tensors.values()}
    change(strategy)
    threading.Timer(0.01, saving.go_on.set).start()
    saving.saver.save(TrainState(step=2), required=False)
    assert [path.name for path in published(tmp_path)][-1] == "step-00000001", "the first was waited for"
    saving.saver.finish()
    assert {tensor.data_ptr() for tensor in saving.saver._copies._tensors.values()} == first
    hashes = [verify(path).files["rank0.safetensors"].sha256 for path in published(tmp_path)]
    assert len(set(hashes)) == 2
    assert saving.cleaned == [1, 2]


def no_space(*_: object, **__: object) -> None:
    raise OSError(28, "No space left on device")


def test_a_failure_is_told_at_the_next_boundary_and_tried_again(
    strategy: Strategy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saving = Saving(strategy, tmp_path)
    saving.saver.save(TrainState(step=4), required=True)
    monkeypatch.setattr(publish, "write_tensors", no_space)
    saving.saver.save(TrainState(step=8), required=False)
    thread = saving.saver._thread
    assert thread is not None
    thread.join(60)
    assert saving.warnings == []
    saving.saver.check()
    (warning,) = saving.warnings
    assert "rank 0: [Errno 28] No space left on device" in warning
    assert "training goes on and will try again" in warning
    assert [path.name for path in published(tmp_path)] == ["step-00000004"]
    assert list(saving.fence.space.iterdir()) == [], "the partial one is gone"
    with pytest.raises(SaveFailed):
        saving.saver.save(TrainState(step=12), required=True)
    monkeypatch.undo()
    saving.saver.save(TrainState(step=12), required=True)
    verify(checkpoint_path(tmp_path, 12))


def test_old_checkpoints_that_cannot_go_end_nothing(strategy: Strategy, tmp_path: Path) -> None:
    saving = Saving(strategy, tmp_path)
    saving.saver._after = no_space
    saving.saver.save(TrainState(step=4), required=True)
    assert saving.warnings == ["old checkpoints could not be deleted: [Errno 28] No space left on device"]


def test_leaving_waits_for_the_save_under_way(strategy: Strategy, tmp_path: Path) -> None:
    saving = Saving(strategy, tmp_path)
    saving.go_on.clear()
    saving.saver.save(TrainState(step=4), required=False)
    threading.Timer(0.01, saving.go_on.set).start()
    saving.saver.leave()
    verify(checkpoint_path(tmp_path, 4))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("asynchronous", [True, False])
def test_a_poisoned_state_is_never_published(
    strategy: Strategy, tmp_path: Path, value: float, asynchronous: bool
) -> None:
    saving = Saving(strategy, tmp_path, asynchronous=asynchronous)
    with torch.no_grad():
        list(strategy.trainable.values())[-1].view(-1)[3] = value
    with pytest.raises(TrainingFault, match="hold a value that is not finite; no checkpoint was made"):
        saving.saver.save(TrainState(step=4), required=True)
    assert published(tmp_path) == []
    assert list(saving.fence.space.iterdir()) == []


# -- the one place of writing --------------------------------------------------------------------------------------


def test_the_files_are_safetensors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writing, "CHUNK", 64)
    tensors = {"one": torch.arange(100.0), "é": torch.zeros(0), "three": torch.randn(7, 3)[:, 1]}
    info = write_tensors(tmp_path / "a.safetensors", tensors)
    with safe_open(tmp_path / "a.safetensors", framework="pt") as stored:
        assert set(stored.keys()) == set(tensors)
        assert all(torch.equal(stored.get_tensor(name), tensor) for name, tensor in tensors.items())
    assert info.bytes == (tmp_path / "a.safetensors").stat().st_size
    assert (info.bytes - 4 * 107) % 8 == 0, "tensors begin at a multiple of eight"


def test_nothing_is_written_through_a_link_or_over_a_file(tmp_path: Path) -> None:
    (tmp_path / "victim").write_text("mine")
    (tmp_path / "link").symlink_to(tmp_path / "victim")
    for name in ("link", "victim"):
        with pytest.raises(FileExistsError):
            write_durably(tmp_path / name, [b"other"])
    assert (tmp_path / "victim").read_text() == "mine"


def test_the_umask_decides(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        write_durably(tmp_path / "a", [b"x"])
    finally:
        os.umask(before)
    assert (tmp_path / "a").stat().st_mode & 0o777 == 0o640


def test_a_poisoned_tensor_is_named(tmp_path: Path) -> None:
    with pytest.raises(PoisonedValue, match="two has a value"):
        write_tensors(tmp_path / "a", {"one": torch.ones(3), "two": torch.tensor([1.0, float("nan")])})


# -- two generations -----------------------------------------------------------------------------------------------


def test_generations_count_up_and_clear_away_the_older(tmp_path: Path) -> None:
    old = claim(tmp_path)
    (old.space / "step-00000003").mkdir()
    new = claim(tmp_path)
    assert (old.generation, new.generation) == (1, 2)
    assert [path.name for path in tmp_path.iterdir()] == [".generation-00000002"]
    assert list(new.space.iterdir()) == []
    new.check()
    with pytest.raises(Fenced, match="another process has taken over this run") as fault:
        old.check()
    assert fault.value.problems[0].got == "generation 1, and the run is at 2"
    assert fault.value.exit_code == 2


def test_a_lost_race_for_a_number_takes_the_next(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = Path.mkdir

    def mkdir(self: Path, *arguments: object, **named: object) -> None:
        if self.name == ".generation-00000001":
            monkeypatch.setattr(Path, "mkdir", real)
            real(self)  # the other process was faster
        real(self, *arguments, **named)  # type: ignore[arg-type]

    monkeypatch.setattr(Path, "mkdir", mkdir)
    assert claim(tmp_path).generation == 2


def everything(strategy: Strategy, fence: Fence) -> None:
    save(strategy, fence, TrainState(step=8), identity=IDENTITY, base=BASE)


def in_the_rename(strategy: Strategy, fence: Fence) -> None:
    """Taken over at the last instant: all is written, and the rename comes next."""
    real = publish.fsync_directory

    def sync(path: Path) -> None:
        publish.fsync_directory = real
        claim(fence.directory)

    publish.fsync_directory = sync
    try:
        everything(strategy, fence)
    finally:
        publish.fsync_directory = real


def in_deleting(_: Strategy, fence: Fence) -> None:
    claim(fence.directory)
    retain(fence, keep=1, best=None, verified=set())


@pytest.mark.parametrize("work", [everything, in_the_rename])
def test_an_old_generation_cannot_publish(
    strategy: Strategy, tmp_path: Path, work: Callable[[Strategy, Fence], None]
) -> None:
    fence = claim(tmp_path)
    if work is everything:
        claim(tmp_path)
    with pytest.raises(Fenced):
        work(strategy, fence)
    assert published(tmp_path) == []


def test_an_old_generation_cannot_delete(strategy: Strategy, tmp_path: Path) -> None:
    fence = claim(tmp_path)
    for step in (1, 2):
        save(strategy, fence, TrainState(step=step), identity=IDENTITY, base=BASE)
    with pytest.raises(FileNotFoundError):
        in_deleting(strategy, fence)
    assert len(published(tmp_path)) == 2


def test_a_save_behind_the_training_that_was_overtaken_ends_the_run(strategy: Strategy, tmp_path: Path) -> None:
    saving = Saving(strategy, tmp_path)
    claim(tmp_path)
    saving.saver.save(TrainState(step=4), required=False)
    with pytest.raises(Fenced):
        saving.saver.finish()
    assert behind.SaveFailed is SaveFailed


def test_a_folder_that_cannot_be_taken_over_is_said_on_all_ranks(ranks: Ranks, tmp_path: Path) -> None:
    (tmp_path / "checkpoints").write_text("a file")
    with pytest.raises(Exception, match="this run cannot be taken over"):
        claim_together(ranks, tmp_path / "checkpoints")
