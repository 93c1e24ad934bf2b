"""The fault matrix: every row of it, how many points were injected, how many were survived, and which were lost.

    python tests/faults/matrix.py [--quick] [--rows 1,4,5] [--cycles 50] [--table docs/reliability.md]

Rows that a test proves run that test: its cases are the points. Rows that need a Slurm cluster bring one up on this
machine (``tests/unit/slurm_cluster.py``). A row that loses a point makes the exit code 1. ``make faults`` runs all of
it, in more than an hour; ``--quick`` is a minute.
"""

import argparse
import shutil
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / folder) for folder in (".", "kernels", "launch", "tests/unit", "tests/faults")]

from injection import SaveBench, Tally, damage_each, kill_at_random, same_end, sweep_saves  # noqa: E402
from slurm_campaign import run_campaign  # noqa: E402
from slurm_cluster import cluster, why_not  # noqa: E402
from train_fixtures import Run, make_data, train_run, with_data  # noqa: E402

from trainer.distributed.ranks import Ranks, start_ranks  # noqa: E402

SEED = 7
CAMPAIGN_STEPS = 300
QUICK_STEPS = 40


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One row. ``do`` injects; ``tests`` are node ids that prove it; neither: ``why`` says what is missing."""

    number: str
    fault: str
    do: Callable[["Place"], Tally] | None = None
    tests: tuple[str, ...] = ()
    why: str = ""


@dataclass(frozen=True, slots=True)
class Place:
    """Where the points are injected, and how many."""

    folder: Path
    ranks: Ranks
    quick: bool
    cycles: int


def kill_in_saves(place: Place) -> Tally:
    """Row 1, for a save that is waited for and for one behind the training."""
    total = Tally()
    for asynchronous in (True, False):
        folder = place.folder / f"saves-{asynchronous}"
        folder.mkdir()
        bench = SaveBench(folder, place.ranks, asynchronous=asynchronous)
        add(total, sweep_saves(bench, every=40 if place.quick else 1, most=200, chunk=1024))
    return total


def failing_disk(error: str) -> Callable[[Place], Tally]:
    """Rows 8 and 9: every call of a save fails with ``error``; the checkpoint before stays, the next save works."""

    def do(place: Place) -> Tally:
        folder = place.folder / f"disk-{error}"
        folder.mkdir()
        bench = SaveBench(folder, place.ranks, asynchronous=True)
        return sweep_saves(bench, every=40 if place.quick else 1, most=40, chunk=16384, error=error)

    return do


def campaign(place: Place) -> Tally:
    """Row 4 without a cluster: killed at random moments until it is done; the end is that of a straight run."""
    data = make_data(place.folder / "campaign-data")
    steps = QUICK_STEPS if place.quick else CAMPAIGN_STEPS
    straight = Run(folder=str(with_data(place.folder / "straight", data)), dropout=0.1, max_steps=steps)
    began = time.monotonic()
    train_run(straight, place.ranks)
    whole = time.monotonic() - began
    killed = with_data(place.folder / "killed", data)
    run = Run(folder=str(killed), dropout=0.1, max_steps=steps)
    cycles, share = (4, 5) if place.quick else (place.cycles, place.cycles / 2)
    tally = kill_at_random(run, place.ranks, cycles=cycles, longest=whole / share, seed=SEED)
    tally.add("the end", same_end(run, place.ranks, place.folder / "straight", killed))
    return tally


def slurm_campaign(place: Place) -> Tally:
    """Row 4 under a real Slurm: real training, killed in every way there is."""
    tally, missing = Tally(), why_not()
    if missing:
        tally.add("the cluster", missing)
        return tally
    folder = place.folder / "slurm"
    folder.mkdir()
    with cluster() as lab, lab.commands():
        points = run_campaign(lab, folder, kills=place.cycles, seed=SEED, nodes=1, tell=to_stderr)
    for point in points:
        tally.add(point.what, point.problem)
    return tally


def to_stderr(text: str) -> None:
    """How far it is, beside the table."""
    print(text, file=sys.stderr, flush=True)


def damaged(*, all_of_them: bool) -> Callable[[Place], Tally]:
    """Rows 5 to 7."""

    def do(place: Place) -> Tally:
        folder = place.folder / f"damage-{all_of_them}"
        folder.mkdir()
        bench = SaveBench(folder, place.ranks, asynchronous=False)
        return damage_each(folder, bench, all_of_them=all_of_them)

    return do


def add(total: Tally, more: Tally) -> None:
    """Count ``more`` into ``total``."""
    total.points, total.survived = total.points + more.points, total.survived + more.survived
    total.lost += more.lost


def ids(text: str) -> tuple[str, ...]:
    """Node ids below ``tests``: one FILE or FILE::TEST a word."""
    return tuple(f"tests/{word}" for word in text.split())


ROWS = (
    Row(number="1", fault="SIGKILL at every system call of a save", do=kill_in_saves),
    Row(
        number="2",
        fault="SIGKILL of one of two ranks",
        tests=ids("distributed/test_resume.py::test_a_stopped_and_killed_run_equals_a_straight_one"),
    ),
    Row(
        number="3",
        fault="between publishing and deleting; keep=1 (the kills themselves: row 1, whose save deletes too)",
        tests=ids(
            """unit/test_checkpoint.py::test_the_newest_and_the_best_are_kept
            unit/test_checkpoint.py::test_the_last_one_is_never_deleted"""
        ),
    ),
    Row(number="4a", fault="SIGKILL at random moments, one process", do=campaign),
    Row(number="4b", fault="kills at random moments, real training under Slurm", do=slurm_campaign),
    Row(number="5", fault="every file of the newest checkpoint damaged", do=damaged(all_of_them=False)),
    Row(number="6", fault="all checkpoints damaged", do=damaged(all_of_them=True)),
    Row(
        number="7",
        fault="a part of the state is missing",
        tests=ids(
            """unit/test_checkpoint.py::test_a_damaged_one_is_named_and_the_one_before_it_used
            unit/test_checkpoint.py::test_a_hole_in_the_fragments_is_noticed"""
        ),
    ),
    Row(number="8", fault="disk full (ENOSPC) at every call of a save", do=failing_disk("ENOSPC")),
    Row(number="9a", fault="EIO at every call of a save", do=failing_disk("EIO")),
    Row(number="9b", fault="read-only (EROFS) at every call of a save", do=failing_disk("EROFS")),
    Row(
        number="9c",
        fault="disk full while training, lines of the record",
        tests=ids(
            """unit/test_checkpoint.py::test_a_disk_that_is_full_during_training
            unit/test_metrics.py::test_lines_wait_in_memory_while_the_disk_is_full"""
        ),
    ),
    Row(
        number="10",
        fault="power cut: order of fsync and rename",
        tests=ids("unit/test_checkpoint.py::test_everything_is_on_disk_before_the_name_appears"),
    ),
    Row(
        number="11",
        fault="time limit, --signal, a signal to the batch shell alone",
        tests=ids(
            """slurm/test_jobs.py::test_a_time_limit_is_no_loss
            slurm/test_jobs.py::test_a_signal_to_the_batch_shell_alone_reaches_the_processes_of_the_job"""
        ),
    ),
    Row(
        number="12",
        fault="preemption: TERM to the steps alone",
        tests=ids("slurm/test_slurm_matrix.py::test_preempted"),
    ),
    Row(number="13", fault="grace shorter than a save", tests=ids("slurm/test_grace.py")),
    Row(
        number="14",
        fault="signals in training, loading, twice, on one rank",
        tests=ids(
            """distributed/test_resume.py::test_a_stopped_and_killed_run_equals_a_straight_one
            unit/test_loop.py::test_a_validation_that_was_due_at_the_stop_is_made_up_for
            unit/test_guard.py cli/test_run_folder.py::test_ctrl_c_saves_and_the_same_command_goes_on"""
        ),
    ),
    Row(
        number="15",
        fault="a second start after the end",
        tests=ids("unit/test_loop.py::test_a_second_start_after_the_end_does_nothing"),
    ),
    Row(
        number="16a",
        fault="two generations alive",
        tests=ids(
            """distributed/test_faults.py::test_an_old_process_that_wakes_up_harms_nothing
            unit/test_saving.py::test_an_old_generation_cannot_publish
            unit/test_saving.py::test_an_old_generation_cannot_delete
            unit/test_metrics.py::test_a_process_that_was_overtaken_writes_nothing_into_the_new_file"""
        ),
    ),
    Row(
        number="16b",
        fault="a node's network cut and healed, the run's lock not holding",
        tests=ids("slurm/test_partition.py"),
    ),
    Row(
        number="17",
        fault="node down, node or slurmd or controller killed, cancelled, requeued",
        tests=ids(
            """slurm/test_slurm_matrix.py::test_a_node_set_down slurm/test_slurm_matrix.py::test_a_node_that_lost_power
            slurm/test_slurm_matrix.py::test_a_node_daemon_that_was_killed_and_came_back
            slurm/test_slurm_matrix.py::test_a_node_cut_off_and_back
            slurm/test_slurm_matrix.py::test_a_controller_that_restarts
            slurm/test_slurm_matrix.py::test_requeued_by_somebody slurm/test_jobs.py::test_a_cancelled_job_stays_away
            slurm/test_submission.py"""
        ),
    ),
    Row(
        number="17b",
        fault="a job that is forgotten or lost by the controller, with slurmdbd and without",
        tests=ids("slurm/test_accounting.py unit/test_slurm_states.py"),
    ),
    Row(
        number="18a",
        fault="frozen rank in training, a collective that never returns",
        tests=ids(
            """distributed/test_faults.py::test_a_frozen_rank_is_named_and_all_stacks_are_written
            distributed/test_faults.py::test_a_collective_that_never_returns_is_a_hang_though_all_ranks_live
            unit/test_watchdog.py"""
        ),
    ),
    Row(
        number="18b",
        fault="rank frozen in loading, baseline, evaluation, export",
        tests=ids("proofs/test_hangs.py"),
    ),
    Row(number="19", fault="a rank raises, is killed, leaves", tests=ids("unit/test_launch_node.py")),
    Row(
        number="20",
        fault="other world size, micro-batch, accumulation",
        tests=ids("distributed/test_resume.py::test_a_run_goes_on_at_another_world_size unit/test_schedule.py"),
    ),
    Row(
        number="21",
        fault="a value that is not finite, spikes",
        tests=ids(
            """distributed/test_faults.py::test_a_nan_on_one_rank_keeps_both_from_the_step_and_the_run_goes_on
            distributed/test_faults.py::test_a_rollback_is_the_checkpoint_before_and_passes_over_the_data_since
            distributed/test_two_ranks.py::test_a_nan_on_one_rank_stops_both_before_the_step
            unit/test_loop.py unit/test_saving.py::test_a_poisoned_state_is_never_published"""
        ),
    ),
    Row(number="22", fault="bad rows", tests=ids("cli/test_bad_data.py")),
    Row(
        number="23",
        fault="tracker or Hub down, slow, 401",
        tests=ids(
            """unit/test_sources.py::test_a_commit_in_the_cache_needs_no_hub
            unit/test_sources.py::test_without_a_connection_only_a_commit_is_taken unit/test_model_load.py::TestHub
            unit/test_tracking_process.py
            cli/test_tracking_run.py::test_a_server_killed_in_mid_run_does_nothing_to_the_run_and_gets_each_step_once"""
        ),
    ),
    Row(number="24", fault="secrets", tests=ids("cli/test_secrets.py unit/test_redaction.py")),
    Row(number="25", fault="malicious checkpoint, config, template, link", tests=ids("unit/test_malice.py")),
    Row(
        number="26",
        fault="array of a sweep",
        tests=ids("slurm/test_slurm_matrix.py::test_a_sweep_as_an_array"),
    ),
    Row(
        number="27",
        fault="chain of dependencies",
        tests=ids("slurm/test_slurm_matrix.py::test_a_chain_in_which_one_fails"),
    ),
    Row(number="28", fault="changed code, config, data", tests=ids("cli/test_run_folder.py unit/test_markers.py")),
)


def run_tests(tests: tuple[str, ...], folder: Path) -> Tally:
    """Run node ids and count their cases; one that is skipped is no point."""
    report = folder / "report.xml"
    words = [sys.executable, "-m", "pytest", "-q", "-m", "slow or not slow", "-p", "no:cacheprovider"]
    words += [f"--junitxml={report}", *tests]
    ended = subprocess.run(words, cwd=ROOT, check=False, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    tally = Tally()
    if not report.exists() or ended.returncode not in (0, 1):  # 4: a test that is not there
        tally.add("pytest", f"it did not run these tests (exit code {ended.returncode})")
        return tally
    for case in ElementTree.parse(report).iter("testcase"):
        if case.find("skipped") is None:
            failed = [part for kind in ("failure", "error") for part in case.findall(kind)]
            tally.add(str(case.get("name")), failed[0].get("message", "")[:200] if failed else "")
    report.unlink()
    return tally


def do_row(row: Row, place: Place) -> tuple[str, str, str, str]:
    """The cells of ``row`` after its number: points, survived, lost, seconds."""
    if row.do is None and not row.tests:
        return "-", "-", row.why, "-"
    if place.quick and row.do is None:
        return "-", "-", "by the tests themselves", "-"
    began = time.monotonic()
    tally = row.do(place) if row.do is not None else run_tests(row.tests, place.folder)
    lost = " ".join("; ".join(tally.lost[:3]).split()).replace("|", "/") or "0"
    return str(tally.points), str(tally.survived), lost, f"{time.monotonic() - began:.0f}"


def main() -> int:
    """Run the rows that are asked for and print their table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--rows", default="", help="numbers, comma separated; none: all")
    parser.add_argument("--cycles", type=int, default=50)
    parser.add_argument("--table", type=Path, help="write the table as Markdown into this file")
    arguments = parser.parse_args()
    if shutil.which("strace") is None:
        print("strace is missing: apt-get install strace", file=sys.stderr)
        return 2
    chosen = [row for row in ROWS if not arguments.rows or row.number in arguments.rows.split(",")]
    lines = ["| row | fault | points | survived | lost | s |", "|---|---|---|---|---|---|"]
    print("\n".join(lines), flush=True)
    bad = False
    with tempfile.TemporaryDirectory() as folder:
        place = Place(
            Path(folder), start_ranks(device="cpu", world_size=1, threads=1), arguments.quick, arguments.cycles
        )
        for row in chosen:
            cells = do_row(row, place)
            bad = bad or cells[0] != cells[1]
            lines.append(f"| {row.number} | {row.fault} | {' | '.join(cells)} |")
            print(lines[-1], flush=True)
    if arguments.table is not None:
        arguments.table.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return int(bad)


if __name__ == "__main__":
    sys.exit(main())
