"""Where things are: the shipped config, and the name of everything in a run folder.

One place for names, because people script against them. Nothing here reads or understands what the files say.
"""

import os
from dataclasses import dataclass
from pathlib import Path
from secrets import token_hex

NEW_FILE = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
"""With the mode 0666, of which the kernel takes away what the user's umask says; asking for the umask would change it
for an instant, in which another thread might make a file."""
PACKAGE = Path(__file__).resolve().parent
CHECKOUT = PACKAGE.parent


def shipped_conf() -> Path:
    """The config folder that comes with the package: inside it in a wheel, beside it in a checkout."""
    inside = PACKAGE / "conf"
    return inside if inside.is_dir() else CHECKOUT / "conf"


def shipped_slurm() -> Path:
    """The folder of batch templates that comes with the package: inside it in a wheel, beside it in a checkout."""
    inside = PACKAGE / "slurm"
    return inside if inside.is_dir() else CHECKOUT / "slurm"


def conf_directories(extra: Path | None, cwd: Path) -> list[Path]:
    """Config folders in search order: ``extra`` (``--config-dir``), ``./conf`` of the user, the shipped one."""
    candidates = [extra, cwd / "conf", shipped_conf()]
    found: list[Path] = []
    for candidate in candidates:
        if candidate is not None and candidate.is_dir() and candidate.resolve() not in found:
            found.append(candidate.resolve())
    return found


def without_links(path: str, flags: int) -> int:
    """An ``opener`` for files that grow or are locked in place: a symbolic link at that name is not followed.

    Raises:
        OSError: there is one (ELOOP), or the file cannot be opened.
    """
    return os.open(path, flags | os.O_NOFOLLOW, 0o666)


def write_atomic(path: Path, data: bytes | str) -> None:
    """Write ``path`` so that a reader sees the old or the whole new content, also after a power cut.

    Raises:
        OSError: no space, no permission; the old content stays and the partial file is removed.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    raw = data.encode("utf-8") if isinstance(data, str) else data
    partial = path.with_name(f".{path.name}.{token_hex(8)}")
    try:
        with os.fdopen(os.open(partial, NEW_FILE, 0o666), "wb") as handle:
            handle.write(raw)
            handle.flush()
            os.fsync(handle.fileno())
    except OSError:
        partial.unlink(missing_ok=True)
        raise
    partial.replace(path)
    fsync_directory(path.parent)


def fresh_folder(parent: Path, prefix: str) -> Path:
    """Make a folder in ``parent`` under a name that nobody could prepare; the user's umask decides who may read it.

    Raises:
        OSError: no space, no permission.
    """
    folder = parent / f"{prefix}{token_hex(8)}"
    folder.mkdir()
    return folder


def fsync_file(path: Path) -> None:
    """Make what a library wrote into ``path`` durable."""
    with path.open("rb") as handle:
        os.fsync(handle.fileno())


def fsync_directory(folder: Path) -> None:
    """Make the entries of ``folder`` durable (POSIX: a rename is only safe once its folder is synced)."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@dataclass(frozen=True, slots=True)
class RunFolder:
    """Names inside one run folder."""

    root: Path

    @property
    def config_yaml(self) -> Path:
        """The composed config."""
        return self.root / "config.yaml"

    @property
    def plan_json(self) -> Path:
        """``RunPlan``."""
        return self.root / "plan.json"

    @property
    def prepared_json(self) -> Path:
        """``Prepared``."""
        return self.root / "prepared.json"

    @property
    def env_json(self) -> Path:
        """Versions, devices and code of the last start."""
        return self.root / "env.json"

    @property
    def metrics_jsonl(self) -> Path:
        """One object per optimizer step."""
        return self.root / "metrics.jsonl"

    @property
    def curve_png(self) -> Path:
        """Training and validation loss."""
        return self.root / "loss.png"

    @property
    def lineage_json(self) -> Path:
        """Where every part of the result came from."""
        return self.root / "lineage.json"

    @property
    def card(self) -> Path:
        """The model card."""
        return self.root / "README.md"

    @property
    def done(self) -> Path:
        """Written last: every stage is finished."""
        return self.root / "DONE"

    @property
    def lock(self) -> Path:
        """Held by the process that works on this run."""
        return self.root / "run.lock"

    @property
    def launch(self) -> Path:
        """What the ranks were started with."""
        return self.root / "launch"

    @property
    def schedule_npz(self) -> Path:
        """Where each epoch's packs begin and how many targets each pack has, so that ranks need not pack all epochs."""
        return self.launch / "schedule.npz"

    @property
    def deepspeed_json(self) -> Path:
        """DeepSpeed's config under ZeRO, as the ranks make it of the plan."""
        return self.launch / "deepspeed.json"

    @property
    def job_sbatch(self) -> Path:
        """The batch script of the Slurm job."""
        return self.launch / "job.sbatch"

    @property
    def job_json(self) -> Path:
        """The Slurm job that was submitted last."""
        return self.launch / "job.json"

    @property
    def starts_json(self) -> Path:
        """Starts of Slurm jobs since a person submitted or released one, and how they ended."""
        return self.launch / "starts.json"

    @property
    def logs(self) -> Path:
        """One file per rank."""
        return self.root / "logs"

    @property
    def signs(self) -> Path:
        """The last sign of life of every rank."""
        return self.logs / "signs"

    @property
    def cost(self) -> Path:
        """What was spent: a ledger of each rank, and one of the driver."""
        return self.root / "cost"

    @property
    def driver_ledger(self) -> Path:
        """What the stages of one process used."""
        return self.cost / "driver.jsonl"

    @property
    def checkpoints(self) -> Path:
        """Published checkpoints, ``step-00000012``."""
        return self.root / "checkpoints"

    @property
    def evaluation(self) -> Path:
        """Scores and predictions of baselines and the tuned model."""
        return self.root / "evaluation"

    @property
    def export(self) -> Path:
        """``adapter`` and ``merged``."""
        return self.root / "export"

    @property
    def adapter(self) -> Path:
        """The adapter alone, for peft and servers that load adapters."""
        return self.export / "adapter"

    @property
    def merged(self) -> Path:
        """A full model."""
        return self.export / "merged"

    @property
    def merged_from(self) -> Path:
        """The adapter in ``merged``, for its verification, where ``adapter`` is not exported."""
        return self.export / "merged_from"

    @property
    def stages(self) -> Path:
        """One marker per finished stage."""
        return self.root / "stages"

    @property
    def tracking(self) -> Path:
        """What trackers were sent, and samples of the machine."""
        return self.root / "tracking"

    @property
    def system_jsonl(self) -> Path:
        """What GPUs, CPUs and memory did, a line per look."""
        return self.tracking / "system.jsonl"

    @property
    def tracking_log(self) -> Path:
        """What the process beside the training said."""
        return self.logs / "tracking.log"

    def rank_log(self, rank: int) -> Path:
        """Everything that ``rank`` printed."""
        return self.logs / f"rank{rank}.log"

    def rank_ledger(self, rank: int) -> Path:
        """What ``rank`` used."""
        return self.cost / f"rank{rank:05d}.jsonl"
