"""A driver whose prepare, ranks, verify and card are small programs that write what the real ones write."""

from dataclasses import dataclass
from pathlib import Path

from trainer.compose import compose
from trainer.config import Config
from trainer.drive.stages import Programs

CHECKOUT = Path(__file__).parents[2]

PROGRAM = """
import json, os, sys
from pathlib import Path
sys.path[:0] = [{checkout!r}]
from trainer.markers import Marker, write_marker
from trainer.paths import RunFolder
from trainer.plan import load_plan, stage_inputs

folder = RunFolder(Path(sys.argv[1]))
plan = load_plan(folder.plan_json.read_bytes())
stages = sys.argv[3].split(",") if len(sys.argv) > 3 else [{name!r}.removeprefix("stand_in_")]
rank = os.environ.get("RANK", "0")
with open({journal!r}, "a") as journal:
    journal.write(f"{{','.join(stages)}} rank {{rank}}\\n")
{body}
if rank == "0":
    for stage in stages:
        write_marker(folder, Marker(
            stage=stage, inputs=stage_inputs(plan, stage), seconds=61.0, finished="2026-01-01T00:00:00+00:00",
            summary={{"steps": 4, "loss": 0.25}},
        ))
"""

PREPARED = """
base = folder.root / "base"
base.mkdir(exist_ok=True)
(base / "config.json").write_text('{"hidden_size": 64}')
(base / "model.safetensors").write_bytes(bytes(1000))
arena = folder.root / "arena"
arena.mkdir(exist_ok=True)
split = {"rows": 3, "documents": 3, "tokens": 1234, "targets": 99, "longest": 60, "arena": str(arena)}
folder.prepared_json.write_text(json.dumps({
    "base": {"name": "builtin:tiny", "directory": str(base), "parameters": 1000},
    "dtype": "float32", "dtype_reason": "no bf16 instructions", "train": split, "validation": None, "test": split,
    "dropped": [{"reason": "no target", "count": 2, "first": []}], "truncated": 1,
}))
folder.launch.mkdir(exist_ok=True)
(folder.launch / "schedule.json").write_text(json.dumps(
    {"packs": 7, "fill": 0.95, "steps": 4, "steps_per_epoch": 2.0, "tokens_per_step": 5000.5}
))
"""

RANKS = """
folder.evaluation.mkdir(exist_ok=True)
(folder.evaluation / "zero_shot.json").write_text(json.dumps({"metrics": {"exact_match": 0.0}, "loss": 3.5, "rows": 3}))
(folder.evaluation / "tuned.json").write_text(json.dumps({"metrics": {"exact_match": 0.75}, "loss": 0.5, "rows": 3}))
folder.merged.mkdir(parents=True, exist_ok=True)
"""


@dataclass(frozen=True)
class Driven:
    """Where the programs lie (to be the current folder), their names, and what they wrote into the journal."""

    folder: Path
    programs: Programs

    def program(self, name: str, body: str) -> None:
        """Write the program ``name``: ``body`` between reading the plan and writing the markers."""
        text = PROGRAM.format(checkout=str(CHECKOUT), name=name, journal=str(self.folder / "journal"), body=body)
        (self.folder / f"{name}.py").write_text(text)

    def journal(self) -> list[str]:
        journal = self.folder / "journal"
        return journal.read_text().splitlines() if journal.exists() else []

    def config(self, *overrides: str) -> Config:
        root = f"run.root={self.folder / 'outputs'}"
        words = ["experiment=smoke", "launch.device=cpu", "launch.processes=1", root, *overrides]
        return compose(words, config_dir=None, cwd=self.folder)


def driven(folder: Path) -> Driven:
    """Write all four programs into ``folder``."""
    made = Driven(
        folder,
        Programs(prepare="stand_in_prepare", ranks="stand_in_ranks", verify="stand_in_verify", card="stand_in_card"),
    )
    made.program("stand_in_prepare", PREPARED)
    made.program("stand_in_ranks", RANKS)
    made.program("stand_in_verify", "")
    made.program("stand_in_card", "")
    return made
