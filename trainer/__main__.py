"""The command line: ``python -m trainer [verb] [RUN ...] [overrides]``.

Sorts the words into verb, run folders and overrides, and hands them on. Everything that can be wrong is found before
torch is needed, so the answer comes at once, on a login node too.
"""

import argparse
import shlex
import signal
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import NoReturn

from trainer import __version__, console
from trainer.compose import compose, config_text, expand_multirun, help_text
from trainer.drive.agent import AGENT_HELP, do_agent
from trainer.drive.run import VERBS, do_existing, do_new
from trainer.drive.show import show_runs
from trainer.drive.tracked import sync_runs
from trainer.drive.trial import begin_trial, end_trial, note_stop
from trainer.errors import EXIT_DONE, StoppedInGoodOrder, UserError, nearest
from trainer.paths import RunFolder
from trainer.sweeps.command import do_sweep
from trainer.sweeps.multirun import do_each
from trainer.sweeps.words import read_words, words_help

USAGE = """\
python -m trainer [verb] [RUN ...] [overrides]

  python -m trainer +experiment=legal_lora               fine-tune, evaluate, export, check
  python -m trainer plan +experiment=legal_lora          say what would be done
  python -m trainer data=files data.train=my.jsonl       the same with your own data
  python -m trainer evaluate outputs/my/0123456789       one stage of a run that exists
  python -m trainer show outputs/my/0123456789           how it stands; with several runs: how they differ
  python -m trainer sweep +experiment=smoke sweep=smoke  search settings: many runs, a table, the best one

Verbs:
"""
SHOW, SWEEP, AGENT, SYNC = "show", "sweep", "agent", "sync"
VERB_HELP = {name: verb.help for name, verb in VERBS.items()} | {
    SHOW: "how a run stands: stages, curves, scores, checkpoints, cost; several runs: side by side",
    SWEEP: "search settings by a file of conf/sweep (sweep=NAME sweep.trials=N), with Optuna or W&B; -m a=1,2: a grid",
    AGENT: AGENT_HELP,
    SYNC: "send what trackers have not got of runs (docs/tracking.md)",
}
OPTIONS = """\

Options:
  --cfg job          print the composed config and stop
  --config-dir DIR   look for config groups here first
  --node-rank K      launch=torchrun: this machine is node K
  -m, --multirun     a grid of runs: -m optim.lr=1e-4,2e-4 (a sweep, with all its words; sweep.workers=2: two at a time)
  --html FILE        show: write a page for a browser, which needs nothing else
  --verify           show: read every byte of the checkpoints and compare their hashes
  --version          print the version
  -h, --help         this text
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Words:
    """The command line, sorted."""

    verb: str
    runs: tuple[Path, ...]
    overrides: tuple[str, ...]
    config_dir: Path | None
    show_config: bool
    multirun: bool
    node_rank: int | None
    verify: bool
    html: Path | None
    help: bool
    version: bool


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """Report a wrong option as every other mistake is reported."""
        raise UserError(message, where="command line", allowed="see Options in --help", do="python -m trainer --help")


def sort_words(arguments: Sequence[str]) -> Words:
    """Sort ``arguments`` into verb, run folders, overrides and options.

    Raises:
        UserError: an unknown verb or option, or a bare word that is no run folder.
    """
    parser = _Parser(prog="python -m trainer", add_help=False, allow_abbrev=False)
    parser.add_argument("words", nargs="*")
    parser.add_argument("--cfg", choices=["job"])
    parser.add_argument("--config-dir", type=Path)
    parser.add_argument("--node-rank", type=int)
    parser.add_argument("-m", "--multirun", action="store_true")
    parser.add_argument("--verify", action="store_true")
    parser.add_argument("--html", type=Path)
    parser.add_argument("--version", action="store_true")
    parser.add_argument("-h", "--help", action="store_true")
    found = parser.parse_intermixed_args(list(arguments))
    words: list[str] = found.words
    bare = [word for word in words if _is_run(word) or not _is_override(word)]
    verb = bare.pop(0) if bare and not _is_run(bare[0]) else "run"
    if verb == AGENT and not found.help:
        raise _agent_among_others(arguments)
    if verb not in (*VERB_HELP, "help"):
        raise _unknown_verb(verb)
    for word in bare if verb != AGENT else ():
        if not _is_run(word):
            raise _not_a_run(word)
    return Words(
        verb=verb,
        runs=tuple(Path(word) for word in bare),
        overrides=tuple(word for word in words if _is_override(word) and not _is_run(word)),
        config_dir=found.config_dir,
        show_config=found.cfg == "job",
        multirun=found.multirun,
        node_rank=found.node_rank,
        verify=found.verify,
        html=found.html,
        help=found.help or verb == "help",
        version=found.version,
    )


def _is_override(word: str) -> bool:
    return "=" in word or word.startswith(("+", "~"))


def _is_run(word: str) -> bool:
    return RunFolder(Path(word)).plan_json.is_file()


def _unknown_verb(word: str) -> UserError:
    if Path(word).exists():
        return _not_a_run(word)
    verbs = (*VERB_HELP, "help")
    return UserError(
        "unknown verb",
        where="command line",
        got=word,
        allowed=f"{', '.join(verbs)}; a run folder; or overrides such as +experiment=legal_lora",
        do=nearest(word, verbs) or f"if a setting was meant, write it as key=value, for example +experiment={word}",
    )


def _agent_among_others(arguments: Sequence[str]) -> UserError:
    return UserError(
        "agent stands first and takes one sweep, nothing else",
        where="command line",
        got=shlex.join(arguments),
        allowed="settings of trials are part of the sweep's command",
        do="python -m trainer agent ENTITY/PROJECT/ID",
    )


def _not_a_run(word: str) -> UserError:
    return UserError(
        "not a run folder",
        where="command line",
        got=word,
        allowed="a folder with a plan.json, as below outputs/",
        do="check the path, or give the settings of a new run as key=value",
    )


def act(arguments: Sequence[str], cwd: Path) -> int:
    """Do what the command line says; gives the exit code."""
    if arguments[:1] == [AGENT] and not {"-h", "--help"} & set(arguments):
        return do_agent(arguments[1:], cwd)
    words = sort_words(arguments)
    if words.version:
        console.say(__version__)
    elif words.help:
        verbs = "".join(f"  {name:10} {text}\n" for name, text in VERB_HELP.items())
        console.say(USAGE + verbs + OPTIONS + "\n" + help_text(config_dir=words.config_dir, cwd=cwd) + words_help())
    elif words.verb == SHOW:
        _show(words)
    elif words.verify or words.html:
        raise _belongs_to_show(words)
    elif words.verb == SWEEP:
        return _sweep(words, arguments, cwd)
    elif words.verb == SYNC:
        return _sync(words)
    elif words.runs:
        return _existing(words, cwd)
    else:
        return _new(words, arguments, cwd)
    return EXIT_DONE


def _belongs_to_show(words: Words) -> UserError:
    option = "--verify" if words.verify else "--html FILE"
    verify = "; a resume reads every byte anyway, and the stage `verify` is the word without dashes"
    return UserError(
        f"{option} belongs to show",
        where="command line",
        got=f"{option} with {words.verb}",
        allowed=f"python -m trainer show {option} RUN",
        do="leave it out" + (verify if words.verify else ""),
    )


def _require_runs(words: Words, what: str, allowed: str) -> None:
    if not words.runs or words.overrides or words.multirun or words.show_config:
        raise UserError(
            what,
            where="command line",
            got="no run folder" if not words.runs else "settings or options beside the run folders",
            allowed=allowed,
            do=f"python -m trainer {words.verb} outputs/NAME/IDENTITY [another ...]",
        )


def _show(words: Words) -> None:
    _require_runs(words, "show looks at runs as they are", "one run folder, or several to compare")
    show_runs(words.runs, contents=words.verify, page=words.html)


def _sweep(words: Words, arguments: Sequence[str], cwd: Path) -> int:
    if words.runs or words.show_config or words.node_rank is not None:
        raise UserError(
            "a sweep makes runs of its own",
            where="command line",
            got=str(words.runs[0]) if words.runs else "--cfg or --node-rank",
            allowed="settings, and words of the sweep (sweep=NAME sweep.trials=N)",
            do="leave it out",
        )
    typed = shlex.join(["python", "-m", "trainer", *arguments])
    return do_sweep(words.overrides, config_dir=words.config_dir, cwd=cwd, typed=typed, multirun=words.multirun)


def _sync(words: Words) -> int:
    _require_runs(words, "sync sends what trackers have not got", "run folders that have trackers")
    return sync_runs(words.runs)


def _existing(words: Words, cwd: Path) -> int:
    if words.multirun:
        raise UserError(
            "-m makes new runs",
            where="command line",
            got=f"-m with {words.runs[0]}",
            do="leave out -m or the run folder",
        )
    for run in words.runs:
        command = shlex.join(["python", "-m", "trainer", words.verb, str(run), *words.overrides])
        code = do_existing(
            words.verb,
            run,
            words.overrides,
            cwd=cwd,
            command=command,
            show_config=words.show_config,
            node_rank=words.node_rank,
        )
        if code != EXIT_DONE:
            return code
    return EXIT_DONE


def _new(words: Words, arguments: Sequence[str], cwd: Path) -> int:
    grid = words.multirun and words.verb == "run" and not words.show_config
    overrides = read_words(words.overrides).overrides if grid else words.overrides
    each = [list(overrides)]
    if words.multirun:
        each = expand_multirun(overrides, config_dir=words.config_dir, cwd=cwd)
    configs = [compose(overrides, config_dir=words.config_dir, cwd=cwd) for overrides in each]
    command = shlex.join(["python", "-m", "trainer", *arguments])

    def do(number: int) -> int:
        one = [words.verb, *each[number]]
        if words.config_dir is not None:
            one += ["--config-dir", str(words.config_dir)]
        return do_new(words.verb, configs[number], cwd=cwd, command=command, words=one, node_rank=words.node_rank)

    if words.show_config:
        for number, config in enumerate(configs):
            if len(each) > 1:
                console.say(f"[{number + 1} of {len(each)}] {shlex.join(each[number])}")
            console.say(config_text(config).rstrip())
        return EXIT_DONE
    if len(each) == 1:
        return do(0)
    if grid and all(config.launch.name == "local" for config in configs):
        return do_sweep(words.overrides, config_dir=words.config_dir, cwd=cwd, typed=command, multirun=True)
    return do_each(each, configs, do, cwd=cwd)


def _interrupt(number: int, _frame: FrameType | None) -> None:
    raise KeyboardInterrupt(signal.Signals(number).name)


def main() -> None:
    """Run the command line of this process and exit."""
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP):
        if signal.getsignal(number) != signal.SIG_IGN:  # nohup
            signal.signal(number, _interrupt)
    sys.exit(end_trial(console.run_and_report(_main)))


def _main() -> int:
    try:
        begin_trial(sys.argv[1:])
        return act(sys.argv[1:], Path.cwd())
    except KeyboardInterrupt as interrupt:
        note_stop(str(interrupt))
        raise StoppedInGoodOrder("stopped; nothing was being computed, and the same command continues") from None


if __name__ == "__main__":
    main()
