"""A run on several machines, as the driver of each of them sees it.

The same command is started on every machine, with its ``--node-rank``: by hand, over ssh, or by a batch system. Node 0
does everything that is done once (it holds the lock, prepares, verifies) and tells the others when to start their ranks
and how the run ended; all of them end with the same exit code and the same cause.
"""

import socket
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from trainer import console
from trainer.config import Config
from trainer.config.launch import LaunchConfig
from trainer.drive.folder import make_folder
from trainer.drive.lock import hold
from trainer.drive.preflight import facts, hello_of, token_left, why_not
from trainer.drive.stages import pending
from trainer.errors import EXIT_AGAIN, EXIT_DONE, EXIT_STOPPED, ConfigError, Problem, RunError, TrimtabError, UserError
from trainer.markers import BY_RANKS
from trainer.paths import RunFolder
from trainer.plan import RunPlan
from trainer_launch.chair import Chair, new_token, open_chair
from trainer_launch.hosts import run_hosts, told_by_environment, unreachable
from trainer_launch.machines import Address, FromOutside, host_name, node_command, parse_address, shell_line
from trainer_launch.meeting import Hello, MeetingError
from trainer_launch.run import run_as_ordered
from trainer_launch.seat import Seat, find_chair
from trainer_launch.spec import LaunchSpec

BY_HAND_SECONDS = 300
BY_SSH_SECONDS = 30
TELL_SECONDS = 5


@dataclass(frozen=True, slots=True)
class Typed:
    """What the user typed: the whole ``command``, and the ``words`` after ``python -m trainer`` that mean this run."""

    command: str
    words: tuple[str, ...]
    node_rank: int | None
    cwd: Path


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Which of the machines this is. ``config`` says how many there are and where they meet.

    ``only_starts``: none of them, this process starts the others or says how. ``submits``: none of them, it puts a job
    into the queue.
    """

    config: Config
    node: int = 0
    only_starts: bool = False
    submits: bool = False


def find_place(config: Config, typed: Typed, *, together: bool) -> Place:
    """Find out which machine this is, from ``--node-rank``, or the variables that torchrun would read.

    ``together``: the verb has work for ranks; any other is done by one machine alone.

    Raises:
        UserError: a number for one of several machines, where there is one, or no such machine.
        ConfigError: it is not known how many machines there are, or where they meet.
    """
    if config.launch.name == "local":
        if typed.node_rank is not None:
            raise UserError(
                "there is one machine only",
                where="--node-rank",
                got=str(typed.node_rank),
                allowed="nothing with launch=local",
                do="launch=torchrun launch.nodes=N launch.address=HOST, or leave it out",
            )
        return Place(config=config)
    if config.launch.name == "slurm":
        config = replace(config, launch=replace(config.launch, nodes=config.launch.nodes or 1))
        if typed.node_rank is None:  # in the job, the agents are told their numbers
            return Place(config=config, submits=together)
    outside = told_by_environment()
    node = outside.node_rank if typed.node_rank is None else typed.node_rank
    config = replace(config, launch=located(config.launch, outside, node))
    if not together:
        return Place(config=config)
    if node is None:
        return Place(config=config, only_starts=True)
    nodes = config.launch.nodes or 1
    if not 0 <= node < nodes:
        raise UserError(
            "there is no such machine",
            where="--node-rank" if typed.node_rank is not None else "PET_NODE_RANK or NODE_RANK",
            got=str(node),
            allowed=f"0 to {nodes - 1} (launch.nodes={nodes})",
            do="number the machines from 0",
        )
    return Place(config=config, node=node)


def located(launch: LaunchConfig, outside: FromOutside, node: int | None) -> LaunchConfig:
    """``launch`` with the number of machines and the address filled in.

    Raises:
        ConfigError: nobody says them.
    """
    hosts = launch.hosts
    nodes = launch.nodes or (len(hosts) if hosts else outside.nodes)
    address = launch.address or (host_name(hosts[0]) if hosts else outside.address)
    if not address and node is None:
        address = socket.gethostname()  # where the commands are printed
    problems: list[Problem] = []
    if nodes is None:
        problems.append(
            Problem(
                what="must be given",
                where="launch.nodes",
                allowed="the number of machines",
                do="launch.nodes=2, or launch.hosts=[...]",
            )
        )
    meeting = parse_address(address)
    if not address:
        problems.append(
            Problem(
                what="must be given",
                where="launch.address",
                allowed="HOST or HOST:PORT of node 0",
                do="launch.address=HOST, the same on all machines",
            )
        )
    elif meeting is None and launch.address is None:
        problems.append(
            Problem(what="is no address", where="launch.address", got=address, allowed="HOST:PORT", do="give it")
        )
    if problems:
        raise ConfigError.of(problems)
    return replace(launch, nodes=nodes, address=address if meeting is None else str(meeting))


def meet_seconds(launch: LaunchConfig) -> int:
    """How long machines wait for each other."""
    return launch.meet_seconds or (BY_SSH_SECONDS if launch.hosts else BY_HAND_SECONDS)


def _meeting(launch: LaunchConfig) -> Address:
    address = parse_address(launch.address or "")
    assert address is not None, "the plan was checked"
    return address


# -- starting, or saying how ---------------------------------------------------------------------------------------


def start_all(plan: RunPlan, typed: Typed) -> int:
    """Start every machine over ssh and see the run through, or where no hosts are given, print what to type on each.

    Raises:
        RunError: a host does not answer; nothing was started.
    """
    launch = plan.config.launch
    words = [*typed.words]
    for key, value in (("launch.nodes", launch.nodes), ("launch.address", launch.address)):
        if not any(word.lstrip("+").startswith(f"{key}=") for word in words) and not launch.hosts:
            words.append(f"{key}={value}")
    if not launch.hosts:
        return _print_commands(plan, words, typed.cwd)
    folder = str(typed.cwd)
    silent = unreachable(launch.ssh, launch.hosts, folder=folder, python=sys.executable)
    if silent:
        raise RunError(
            "not all hosts can be used",
            where="launch.hosts",
            got="; ".join(f"{host}: {why}" for host, why in silent.items()),
            allowed="ssh without a password, and the same folder and Python as here",
            do=f"make this work: ssh {next(iter(silent))} ls {folder}",
        )
    run = RunFolder(Path(plan.run_dir))
    make_folder(run)
    console.note(f"{len(launch.hosts)} machines over ssh, meeting at {launch.address}: {', '.join(launch.hosts)}")
    with console.Relay() as show:
        result = run_hosts(
            [sys.executable, "-m", "trainer", *words],
            launch.hosts,
            show,
            ssh=launch.ssh,
            folder=folder,
            log=lambda node: run.logs / f"node{node}.log",
        )
    if result.exit_code == EXIT_STOPPED:
        console.say(f"{result.cause}. Nothing is lost; to continue, type:\n  {typed.command}")
    elif result.exit_code != EXIT_DONE:
        console.error(result.cause)
    return result.exit_code


def _print_commands(plan: RunPlan, words: Sequence[str], cwd: Path) -> int:
    console.say(f"run {plan.name}/{plan.identity} on {plan.nodes} machines that meet at {plan.config.launch.address}")
    console.say(f"Nothing was started. Type one line on each machine, in any order, in {cwd}:")
    for node in range(plan.nodes):
        console.say(f"  {shell_line(node_command(['python', '-m', 'trainer', *words], node))}")
    console.note(f"{plan.run_dir} and {plan.cache_dir} have to be the same folders on all of them")
    return EXIT_DONE


# -- node 0 --------------------------------------------------------------------------------------------------------


@contextmanager
def chaired(plan: RunPlan, folder: RunFolder, todo: Sequence[str]) -> Iterator[Chair | None]:
    """The meeting with the other machines, all of them here and fit; None where there are none, or nothing for ranks.

    Raises:
        RunError: the port is taken, a machine is missing or unfit (named).
    """
    if plan.nodes == 1 or not any(stage in BY_RANKS for stage in todo):
        yield None
        return
    launch, token = plan.config.launch, new_token()
    address, seconds = _meeting(launch), meet_seconds(launch)
    mine = facts(plan)
    with (
        token_left(folder, Path(plan.cache_dir), token),
        _as_run_errors(),
        open_chair(address.host, address.port, plan.nodes, token) as chair,
        _telling(chair),
    ):
        console.note(f"node 0 of {plan.nodes}, at {address}: waiting for the others, at most {seconds} s")
        chair.assemble(lambda hello: why_not(hello, mine, folder), seconds=seconds)
        yield chair


@contextmanager
def _telling(chair: Chair) -> Iterator[None]:
    """What ends node 0 outside of its ranks is what the others say, too."""
    try:
        yield
    except MeetingError as fault:
        chair.ends_with(RunError.exit_code, str(fault))
        raise
    except TrimtabError as fault:
        chair.ends_with(fault.exit_code, f"node 0: {_one_line(fault)}")
        raise
    except KeyboardInterrupt as stop:
        chair.ends_with(EXIT_STOPPED, f"stopped by {stop}")
        raise


@contextmanager
def _as_run_errors() -> Iterator[None]:
    try:
        yield
    except MeetingError as fault:
        raise RunError(fault.what, where="launch", got=fault.got, do=fault.do) from None


def _one_line(fault: TrimtabError) -> str:
    problem = fault.problems[0]
    return f"{problem.what}: {problem.got}" if problem.got else problem.what


# -- the others ----------------------------------------------------------------------------------------------------


def follow(
    make: Callable[[], RunPlan], place: Place, spec: Callable[[RunPlan], LaunchSpec], verb: str, stages: Sequence[str]
) -> int:
    """Do a machine's part that is not node 0; gives the exit code of the whole run.

    ``make`` plans the run on this machine, ``spec`` says what to start for it.

    Raises:
        TrimtabError: this machine cannot take part; node 0 was told.
    """
    address, seconds = _meeting(place.config.launch), meet_seconds(place.config.launch)
    try:
        plan = make()
    except TrimtabError as fault:
        _tell(address, place.node, fault)
        raise
    folder = RunFolder(Path(plan.run_dir))
    if not any(stage in BY_RANKS for stage in pending(plan, folder, stages)):
        console.say(f"nothing is left to do for node {place.node}, with the same inputs: {folder.root}")
        return EXIT_DONE
    console.note(f"node {place.node} of {plan.nodes}: asking node 0 at {address}, at most {seconds} s")
    with _as_run_errors():
        seat = find_chair(address.host, address.port, seconds=seconds)
        try:
            hello = hello_of(place.node, plan, seat.token_digest)
            with ExitStack() as held:
                try:
                    held.enter_context(hold(folder.launch / f"node{place.node}.lock", verb))
                except RunError as fault:
                    hello = replace(hello, problem=hello.problem or _one_line(fault))
                seat.take(hello)
                return _obey(seat, spec(plan))
        finally:
            seat.leave()


def _obey(seat: Seat, spec: LaunchSpec) -> int:
    console.note(f"node {spec.node_rank} of {spec.nodes}: taking part; node 0 shows how the run goes")
    while True:
        try:
            order = seat.next_order()
        except KeyboardInterrupt:
            seat.stop_all()
            continue
        if "start" in order:
            with console.Relay() as show:
                run_as_ordered(spec, seat, order["start"], show)
        elif "finish" in order:
            return _end(int(order["finish"]), str(order["cause"]))


def _end(code: int, cause: str) -> int:
    if code == EXIT_STOPPED:
        console.say(f"{cause}; the same commands continue")
    elif code == EXIT_DONE:
        console.say("the run is finished")
    elif code == EXIT_AGAIN:
        console.error(cause)
        console.say("what was saved is intact; the same commands continue")
        return EXIT_STOPPED
    else:
        console.error(cause)
    return code


def _tell(address: Address, node: int, fault: TrimtabError) -> None:
    """Let node 0 know that this machine cannot take part, if it is there: it would wait until the time is over."""
    try:
        seat = find_chair(address.host, address.port, seconds=TELL_SECONDS)
    except MeetingError:
        return
    hello = Hello(node=node, host=socket.gethostname(), token="", problem=_one_line(fault))
    try:
        seat.take(hello)
    except MeetingError:
        return
    finally:
        seat.leave()
