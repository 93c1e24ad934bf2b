"""A checkpoint or a config from somebody else: nothing in it is executed, nothing outside the run folder touched."""

import os
import pickle
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import msgspec
import pytest
from jinja2.exceptions import SecurityError
from safetensors import SafetensorError
from train_fixtures import BASE, IDENTITY, tiny_strategy
from transformers.utils.chat_template_utils import render_jinja_template

from trainer.compose import compose
from trainer.cost.ledger import Spell, append
from trainer.distributed.ranks import start_ranks
from trainer.drive.lock import hold
from trainer.errors import RunError, TrimtabError
from trainer.fingerprint import digest, file_digest
from trainer.paths import CHECKOUT, RunFolder, fresh_folder, write_atomic
from trainer.sweeps.folder import SweepFolder, deciding
from trainer.tracking.__main__ import alone
from trainer.tracking.system import append_sample, take_sample
from trainer.train.checkpoint.fence import claim
from trainer.train.checkpoint.format import Checkpoint, DamagedCheckpoint, FileInfo, Manifest, verify
from trainer.train.checkpoint.publish import save
from trainer.train.checkpoint.resume import load
from trainer.train.state import TrainState
from trainer_launch.children import Child
from trainer_launch.children import start as start_child

UNSAFE = re.compile(
    r"\bpickle\.(load|loads|Unpickler)\b|\btorch\.load\(|\bdcp\.load\(|\byaml\.(full_load|unsafe_load)\(|\byaml\.load\([^,]*\)|\bmarshal\.load"
    r"|\beval\(|\bexec\(|\binstantiate\(|allow_pickle=True|\bjoblib\.load\("
)
MODULE_METHODS = re.compile(r"\.eval\(\)")


class Bomb:
    """Unpickled, it makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return Path.touch, (self.path,)


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    strategy, _ = tiny_strategy(start_ranks(device="cpu", world_size=1), lora=True)
    return save(strategy, claim(tmp_path / "c"), TrainState(step=4), identity=IDENTITY, base=BASE)


def sealed(path: Path, **other: FileInfo) -> None:
    """Make the manifest fit the files, as somebody would who can compute sha256; ``other`` files come to it."""
    manifest = msgspec.json.decode((path / "manifest.json").read_bytes(), type=Manifest)
    files = {name: FileInfo((path / name).stat().st_size, file_digest(path / name)) for name in manifest.files}
    manifest = replace(manifest, files=files | other, sha256="")
    (path / "manifest.json").write_bytes(msgspec.json.encode(replace(manifest, sha256=digest(manifest))))


def test_a_pickle_in_the_place_of_weights_is_not_executed(checkpoint: Path, tmp_path: Path) -> None:
    (checkpoint / "rank0.safetensors").write_bytes(pickle.dumps(Bomb(tmp_path / "boom")))
    sealed(checkpoint)
    strategy, _ = tiny_strategy(start_ranks(device="cpu", world_size=1), lora=True)
    with pytest.raises((SafetensorError, TrimtabError)):
        load(strategy, Checkpoint(checkpoint, verify(checkpoint)))
    assert not (tmp_path / "boom").exists()


def test_the_bomb_would_go_off(tmp_path: Path) -> None:
    pickle.loads(pickle.dumps(Bomb(tmp_path / "boom")))
    assert (tmp_path / "boom").exists()


@pytest.mark.parametrize(
    "name", ["../secret.json", "/etc/passwd", "rank0.pt", ".metadata", "sub/rank0.json", "rank0.json\n"]
)
def test_a_manifest_cannot_name_a_file_elsewhere_or_of_another_kind(checkpoint: Path, name: str) -> None:
    (checkpoint.parent / "secret.json").write_text("{}")
    (checkpoint / "rank0.pt").write_bytes(b"")
    sealed(checkpoint, **{name: FileInfo(2, "0" * 64)})
    with pytest.raises(DamagedCheckpoint, match=re.escape(f"{name} is missing")):
        verify(checkpoint)


def test_a_checkpoint_that_is_a_link_is_refused(checkpoint: Path) -> None:
    moved = checkpoint.rename(checkpoint.parent / "elsewhere")
    checkpoint.symlink_to(moved)
    with pytest.raises(DamagedCheckpoint, match="it is a link to another place"):
        verify(checkpoint)


@pytest.mark.parametrize(
    "text",
    [
        "model:\n  _target_: os.system\n  path: x\n",
        "model:\n  path: !!python/object/apply:os.system ['touch {boom}']\n",
        "model:\n  path: !!python/name:os.system\n",
    ],
)
def test_a_config_cannot_name_code(tmp_path: Path, text: str) -> None:
    folder = tmp_path / "conf" / "experiment"
    folder.mkdir(parents=True)
    boom = tmp_path / "boom"
    (folder / "evil.yaml").write_text(f"# @package _global_\n{text.replace('{boom}', str(boom))}")
    with pytest.raises(TrimtabError):
        compose(["+experiment=evil"], config_dir=tmp_path / "conf", cwd=tmp_path)
    assert not boom.exists()


def test_nothing_in_the_source_loads_code_from_data() -> None:
    sources = [path for folder in ("trainer", "kernels", "launch") for path in (CHECKOUT / folder).rglob("*.py")]
    found = [
        f"{path.relative_to(CHECKOUT)}:{number}: {line.strip()}"
        for path in sources
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if UNSAFE.search(MODULE_METHODS.sub("", line))
    ]
    assert len(sources) > 80
    assert found == []


def test_a_log_that_is_a_link_is_not_written(tmp_path: Path) -> None:
    """Lines of a log may be anybody's text: through a link they could end in a file that a shell reads."""
    victim, log = tmp_path / "profile", tmp_path / "logs" / "rank0.log"
    victim.write_text("mine")
    log.parent.mkdir()
    log.symlink_to(victim)
    child = Child(name="rank 0", arguments=("true",), variables={}, log=log, shown=False)
    with pytest.raises(OSError, match="Too many levels of symbolic links"):
        start_child(child, on_line=lambda _: None, on_exit=lambda: None, keep_open=())
    assert victim.read_text() == "mine"


def append_a_spell(path: Path) -> None:
    append(path, Spell(stage="train", began="", rank=0, seconds=1.0))


def append_a_sample(path: Path) -> None:
    append_sample(path, take_sample(1, []))


def lock_of_tracking(path: Path) -> None:
    with alone(RunFolder(path.parents[1])):
        pass


def lock_of_a_sweep(path: Path) -> None:
    with deciding(SweepFolder(path.parent)):
        pass


@pytest.mark.parametrize(
    ("name", "write"),
    [
        ("cost/rank0.jsonl", append_a_spell),
        ("tracking/system.jsonl", append_a_sample),
        ("tracking/lock", lock_of_tracking),
        ("sweep.lock", lock_of_a_sweep),
    ],
)
def test_nothing_that_grows_or_is_locked_in_place_is_reached_through_a_link(
    tmp_path: Path, name: str, write: Callable[[Path], None]
) -> None:
    victim, path = tmp_path / "profile", tmp_path / "run" / name
    victim.write_text("mine")
    path.parent.mkdir(parents=True)
    path.symlink_to(victim)
    with pytest.raises(OSError, match="Too many levels of symbolic links"):
        write(path)
    assert victim.read_text() == "mine"


def test_a_lock_that_is_a_link_is_refused(tmp_path: Path) -> None:
    victim = tmp_path / "profile"
    victim.write_text("mine")
    (tmp_path / "run.lock").symlink_to(victim)
    with pytest.raises(RunError, match="is a symbolic link, which is not followed"), hold(tmp_path / "run.lock", "run"):
        pass
    assert victim.read_text() == "mine"


@pytest.mark.parametrize(("mask", "file", "folder"), [(0o077, 0o600, 0o700), (0o007, 0o660, 0o770)])
def test_the_users_umask_decides_who_may_read(tmp_path: Path, mask: int, file: int, folder: int) -> None:
    before = os.umask(mask)
    try:
        write_atomic(tmp_path / "file", "text")
        made = fresh_folder(tmp_path, ".partial-")
    finally:
        os.umask(before)
    assert (tmp_path / "file").stat().st_mode & 0o777 == file
    assert made.stat().st_mode & 0o777 == folder
    assert fresh_folder(tmp_path, ".partial-") != made


def test_nothing_in_the_source_sets_rights_itself() -> None:
    """Asking for the umask changes it for an instant; what is made in a thread just then, everybody may write."""
    sources = [path for folder in ("trainer", "kernels", "launch") for path in (CHECKOUT / folder).rglob("*.py")]
    own = re.compile(r"\bumask\(|\bchmod\(|\bmktemp\(|\bmkdtemp\(")
    assert [path.name for path in sources if own.search(path.read_text())] == []


@pytest.mark.parametrize(
    "template",
    ["{{ ''.__class__.__mro__ }}", "{{ messages.append('x') }}", "{% include '/etc/passwd' %}"],
    ids=["python", "data", "files"],
)
def test_a_chat_template_is_rendered_in_a_sandbox(template: str) -> None:
    with pytest.raises((SecurityError, TypeError)):
        render_jinja_template([[{"role": "user", "content": "x"}]], chat_template=template)
