"""What a W&B server keeps and answers, without the HTTP: the other half of ``wandb_server.py``."""

import itertools
import json
import math
import random
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import unquote

import yaml

ENTITY = "loopback"
Values = Mapping[str, Any]


@dataclass
class Run:
    """What arrived of one run. ``history`` by line number; ``posted``: the steps in the order in which they came."""

    name: str
    project: str = "demo"
    state: str = "pending"
    config: dict[str, Any] = field(default_factory=dict)
    summary: dict[str, Any] = field(default_factory=dict)
    history: dict[int, dict[str, Any]] = field(default_factory=dict)
    posted: list[int] = field(default_factory=list)
    events: list[dict[str, Any]] = field(default_factory=list)
    output: list[str] = field(default_factory=list)
    files: dict[str, bytes] = field(default_factory=dict)
    given: dict[str, Any] = field(default_factory=dict)
    sweep: str | None = None
    exit_code: int | None = None
    preempting: bool = False

    @property
    def rows(self) -> list[dict[str, Any]]:
        """The history, in its order."""
        return [self.history[number] for number in sorted(self.history)]


@dataclass
class Sweep:
    """A sweep and the names of its runs."""

    name: str
    text: str
    state: str = "RUNNING"
    runs: list[str] = field(default_factory=list)

    @property
    def config(self) -> dict[str, Any]:
        """What was written in the sweep's file."""
        return yaml.safe_load(self.text)


@dataclass
class Artifact:
    """A versioned artifact: its files (name to content) and aliases."""

    name: str
    kind: str
    aliases: list[str]
    files: dict[str, bytes] = field(default_factory=dict)
    committed: bool = False


class Store:
    """What arrived, and the answers. An operation that is not known is kept in ``unknown``."""

    def __init__(self) -> None:
        self.url = ""
        self.runs: dict[str, Run] = {}
        self.sweeps: dict[str, Sweep] = {}
        self.agents: dict[str, str] = {}
        self.artifacts: dict[str, Artifact] = {}
        self.stopping: set[str] = set()
        """Runs that the sweep ends early: their agents are told so at their next heartbeat."""
        self.stopped: set[str] = set()
        """Runs that are to end, by a person on their page or by their sweep: their own client is told, if it asks."""
        self.unknown: list[str] = []
        self._numbers = itertools.count(1)

    def answer(self, operation: str, values: Values) -> Any:
        """The ``data`` of a GraphQL operation; None for one that is not known."""
        method = OPERATIONS.get(operation)
        if method is None:
            self.unknown.append(operation)
            return None
        return method(self, values)

    def new_name(self, prefix: str) -> str:
        """A name that nothing here has."""
        return f"{prefix}{next(self._numbers):05d}"

    def stream(self, name: str, body: Values) -> None:
        """Take what the client streams: history, summary, system metrics, output, and the end."""
        run = self.runs.setdefault(name, Run(name))
        for file, part in (body.get("files") or {}).items():
            offset, content = part.get("offset", 0), part["content"]
            if file == "wandb-history.jsonl":
                for number, line in enumerate(content, offset):
                    run.history[number] = json.loads(line)
                    run.posted.append(run.history[number].get("_step", -1))
            elif file == "wandb-summary.json":
                run.summary = json.loads(content[-1])
            elif file == "wandb-events.jsonl":
                run.events += [json.loads(line) for line in content]
            elif file == "output.log":
                run.output += content
        run.preempting = run.preempting or bool(body.get("preempting"))
        if body.get("complete"):
            run.exit_code = body.get("exitcode") or 0
            run.state = "finished" if run.exit_code == 0 else "preempted" if run.preempting else "failed"

    def put(self, path: str, body: bytes) -> None:
        """Take a file, of a run or of an artifact."""
        _, kind, owner, name = unquote(path).lstrip("/").split("/", 3)
        if kind == "run":
            self.runs.setdefault(owner, Run(owner)).files[name] = body
        else:
            self.artifacts[owner].files[name] = body

    def storage(self, kind: str, owner: str, name: str) -> str:
        """Where the client is to put a file."""
        return f"{self.url}/storage/{kind}/{owner}/{name}"


# -- the operations ------------------------------------------------------------------------------------------------


def _viewer(server: Store, values: Values) -> Any:
    team = {"edges": [{"node": {"id": "e1", "name": ENTITY}}]}
    viewer = {"id": "u1", "entity": ENTITY, "username": ENTITY, "email": "t@t", "flags": "{}", "admin": False}
    return {"viewer": viewer | {"name": "t", "teams": team, "apiKeys": {"edges": []}}}


def _default_entity(server: Store, values: Values) -> Any:
    return {"viewer": {"id": "u1", "entity": ENTITY}}


def _server_info(server: Store, values: Values) -> Any:
    return {"serverInfo": {"cliVersionInfo": {"max_cli_version": "0.99.0"}, "latestLocalVersionInfo": None}}


def _features(server: Store, values: Values) -> Any:
    return {"serverInfo": {"features": []}}


def _project(name: str) -> dict[str, Any]:
    return {"id": "p1", "name": name, "entity": {"id": "e1", "name": ENTITY}}


def _node(run: Run) -> dict[str, Any]:
    """A run as the service gives it back."""
    tail = [json.dumps(run.rows[-1])] if run.history else []
    return {
        "id": run.name,
        "name": run.name,
        "displayName": run.given.get("displayName") or run.name,
        "description": "",
        "config": json.dumps(run.config),
        "sweepName": run.sweep,
        "project": _project(run.project),
        "historyLineCount": len(run.history),
        "eventsLineCount": len(run.events),
        "logLineCount": len(run.output),
        "state": run.state,
        "tags": run.given.get("tags") or [],
        "groupName": run.given.get("groupName"),
        "jobType": None,
        "summaryMetrics": json.dumps(run.summary),
        "shouldStop": False,
        "stopped": False,
        "failed": run.state == "failed",
        "running": run.state == "running",
        "exitcode": run.exit_code,
        "heartbeatAt": None,
        "historyTail": json.dumps(tail),
        "eventsTail": "[]",
        "wandbConfig": json.dumps({"t": 1}),
    }


def _upsert_run(server: Store, values: Values) -> Any:
    name = values.get("name") or server.new_name("run")
    is_new = name not in server.runs or server.runs[name].state == "pending"
    run = server.runs.setdefault(name, Run(name))
    run.state = "running"
    run.project = values.get("project") or values.get("modelName") or run.project
    run.sweep = values.get("sweep") or run.sweep
    if values.get("config"):
        run.config = json.loads(values["config"])
    if values.get("summaryMetrics"):
        run.summary = json.loads(values["summaryMetrics"])
    run.given |= {key: value for key, value in values.items() if value is not None and key != "config"}
    return {"upsertBucket": {"bucket": _node(run), "inserted": is_new}}


def _read_run(server: Store, values: Values) -> Any:
    run = server.runs.get(values["name"])
    if run is None:
        return {"project": {"run": None}}
    keys = {"lastStep": run.rows[-1]["_step"] if run.history else -1, "sets": [], "keys": {}}
    more = {"group": None, "commit": None, "readOnly": False, "notes": None, "systemMetrics": "{}"}
    more |= {
        "user": {"name": ENTITY, "username": ENTITY},
        "createdAt": "2026-01-01T00:00:00Z",
        "projectId": "1",
        "historyKeys": keys,
    }
    return {"project": {"run": _node(run) | more}}


def _resume_status(server: Store, values: Values) -> Any:
    run = server.runs.get(values["name"])
    known = run is not None and run.state != "pending"
    return {"model": _project("demo") | {"bucket": _node(run) if run is not None and known else None}}


def _stopped_status(server: Store, values: Values) -> Any:
    return {"project": {"run": {"stopped": values["runId"] in server.stopped}}}


def _create_files(server: Store, values: Values) -> Any:
    files = [{"name": name, "uploadUrl": server.storage("run", values["run"], name)} for name in values["files"]]
    return {"createRunFiles": {"runID": values["run"], "uploadHeaders": [], "files": files}}


def _upsert_sweep(server: Store, values: Values) -> Any:
    name = values.get("id") or server.new_name("sweep")
    server.sweeps.setdefault(name, Sweep(name, values["config"]))
    project = _project(values.get("projectName") or "demo")
    return {"upsertSweep": {"sweep": {"name": name, "project": project}, "configValidationWarnings": []}}


def _sweep_with_runs(server: Store, values: Values) -> Any:
    sweep = server.sweeps.get(values["sweep"])
    if sweep is None:
        return {"project": {"sweep": None}}
    runs = [{"node": _node(server.runs[name])} for name in sweep.runs if name in server.runs]
    said = {"id": sweep.name, "name": sweep.name, "method": sweep.config["method"], "state": sweep.state}
    said |= {"description": "", "config": sweep.text, "createdAt": "2026-01-01T00:00:00", "heartbeatAt": None}
    said |= {"updatedAt": None, "earlyStopJobRunning": False, "bestLoss": None, "controller": None, "scheduler": None}
    return {"project": {"sweep": said | {"runs": {"edges": runs}}}}


def _create_agent(server: Store, values: Values) -> Any:
    agent = server.new_name("agent")
    server.agents[agent] = values["sweep"]
    return {"createAgent": {"agent": {"id": agent}}}


def _heartbeat(server: Store, values: Values) -> Any:
    sweep = server.sweeps[server.agents[values["id"]]]
    running = [name for name, runs in json.loads(values.get("runState") or "{}").items() if runs]
    commands: list[dict[str, Any]] = [{"type": "stop", "run_id": name} for name in running if name in server.stopping]
    if not running:
        arguments = suggestion(sweep) if sweep.state == "RUNNING" else None
        commands = [{"type": "exit"}]
        if arguments is not None:
            name = server.new_name("run")
            sweep.runs.append(name)
            server.runs[name] = Run(name, sweep=sweep.name)
            commands = [{"type": "run", "run_id": name, "args": arguments, "program": sweep.config.get("program")}]
    return {"agentHeartbeat": {"agent": {"id": values["id"]}, "commands": json.dumps(commands)}}


def suggestion(sweep: Sweep) -> dict[str, Any] | None:
    """The arguments of the next run: of a grid in its order, otherwise drawn by a fixed seed; None: no more."""
    parameters = dict(_flat(sweep.config["parameters"]))
    number, cap = len(sweep.runs), sweep.config.get("run_cap")
    if cap and number >= cap:
        return None
    if sweep.config["method"] == "grid":
        rows = list(itertools.product(*(one.get("values", [one.get("value")]) for one in parameters.values())))
        drawn = rows[number] if number < len(rows) else None
    else:
        source = random.Random(f"{sweep.name}-{number}")
        drawn = [_draw(one, source) for one in parameters.values()]
    return None if drawn is None else {name: {"value": value} for name, value in zip(parameters, drawn, strict=True)}


def _flat(parameters: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Mapping[str, Any]]]:
    for key, value in parameters.items():
        if "parameters" in value:
            yield from _flat(value["parameters"], f"{prefix}{key}.")
        else:
            yield prefix + key, value


def _draw(space: Mapping[str, Any], source: random.Random) -> Any:
    if "values" in space or "value" in space:
        return source.choice(space.get("values", [space.get("value")]))
    low, high = space["min"], space["max"]
    if space.get("distribution") == "log_uniform_values":
        return math.exp(source.uniform(math.log(low), math.log(high)))
    return source.randint(low, high) if isinstance(low, int) and isinstance(high, int) else source.uniform(low, high)


def _artifact_type(server: Store, values: Values) -> Any:
    return {"project": {"artifact": None}}


def _create_artifact(server: Store, values: Values) -> Any:
    given = values["input"]
    name, aliases = given["artifactCollectionName"], [one["alias"] for one in given["aliases"]]
    key = server.new_name("artifact")
    server.artifacts[key] = Artifact(name, given["artifactTypeName"], aliases)
    return {
        "createArtifact": {"artifact": {"id": key, "state": "PENDING", "artifactSequence": {"latestArtifact": None}}}
    }


def _artifact_files(server: Store, values: Values) -> Any:
    nodes = [
        {
            "name": one["name"],
            "displayName": one["name"],
            "storagePath": one["name"],
            "uploadUrl": server.storage("artifact", one["artifactID"], one["name"]),
            "uploadHeaders": [],
            "uploadMultipartUrls": None,
            "artifact": {"id": one["artifactID"]},
        }
        for one in values["input"]["artifactFiles"]
    ]
    return {"createArtifactFiles": {"files": {"edges": [{"node": node} for node in nodes]}}}


def _create_manifest(server: Store, values: Values) -> Any:
    return {"createArtifactManifest": {"artifactManifest": _manifest(server, values["artifactID"])}}


def _update_manifest(server: Store, values: Values) -> Any:
    key = values["artifactManifestID"].removeprefix("manifest-")
    return {"updateArtifactManifest": {"artifactManifest": _manifest(server, key)}}


def _manifest(server: Store, key: str) -> Any:
    name = "wandb_manifest.json"
    file = {"name": name, "displayName": name, "uploadUrl": server.storage("artifact", key, name), "uploadHeaders": []}
    return {"id": f"manifest-{key}", "file": file}


def _commit_artifact(server: Store, values: Values) -> Any:
    server.artifacts[values["artifactID"]].committed = True
    return {"commitArtifact": {"artifact": {"id": values["artifactID"], "digest": "0"}}}


OPERATIONS: dict[str, Callable[[Store, Values], Any]] = {
    "Viewer": _viewer,
    "GetDefaultEntity": _default_entity,
    "ServerInfo": _server_info,
    "ServerFeaturesQuery": _features,
    "UpsertBucket": _upsert_run,
    "Run": _read_run,
    "RunHistoryKeys": _read_run,
    "RunResumeStatus": _resume_status,
    "RunStoppedStatus": _stopped_status,
    "CreateRunFiles": _create_files,
    "ArtifactType": _artifact_type,
    "CreateArtifact": _create_artifact,
    "CreateArtifactFiles": _artifact_files,
    "CreateArtifactManifest": _create_manifest,
    "UpdateArtifactManifest": _update_manifest,
    "CommitArtifact": _commit_artifact,
    "UpsertSweep": _upsert_sweep,
    "SweepWithRuns": _sweep_with_runs,
    "CreateAgent": _create_agent,
    "Heartbeat": _heartbeat,
}
