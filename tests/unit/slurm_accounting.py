"""A cluster on this machine whose jobs are accounted for, and forgotten by the controller as soon as that is possible.

The database listens at a socket in the cluster's folder and nowhere else; it and slurmdbd end with the cluster.
"""

import getpass
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

from slurm_cluster import SEARCH, Cluster, cluster, free_ports, until, why_not

NEEDED = ("slurmdbd", "sacct", "sacctmgr", "mariadbd", "mariadb-install-db")
MIN_JOB_AGE = 2
"""Seconds; the controller looks once a minute for what is older."""
FORGETS = f"MinJobAge={MIN_JOB_AGE}"
CONTROLLER = """AccountingStorageType=accounting_storage/slurmdbd
AccountingStorageHost=127.0.0.1
AccountingStoragePort={port}
AccountingStoragePass={{folder}}/munge/socket
AccountingStoreFlags=job_comment
"""
STORAGE = """AuthType=auth/munge
AuthInfo=socket={folder}/munge/socket
DbdHost=localhost
DbdAddr=127.0.0.1
DbdPort={port}
SlurmUser={user}
LogFile={folder}/slurmdbd.log
PidFile={folder}/slurmdbd.pid
StorageType=accounting_storage/mysql
StorageHost=localhost
StorageUser=root
StorageLoc=accounting
"""


def why_no_accounting() -> str:
    """Why no accounting can be brought up here; empty: it can."""
    missing = [name for name in NEEDED if shutil.which(name, path=SEARCH) is None]
    install = "apt-get install slurmdbd mariadb-server-core mariadb-client-core"
    return why_not() or (f"Slurm's accounting is not installed: no {', '.join(missing)} ({install})" if missing else "")


@contextmanager
def accounted() -> Iterator[Cluster]:
    """A cluster of two nodes with accounting, which keeps the comments of jobs, as few sites do."""
    (port,) = free_ports(1)
    with cluster(
        nodes=2, accounting=CONTROLLER.format(port=port) + FORGETS, before=partial(_start_accounting, port=port)
    ) as made:
        yield made


def _start_accounting(lab: Cluster, port: int) -> None:
    database, user = lab.folder / "database", getpass.getuser()
    words = ["mariadb-install-db", "--no-defaults", f"--user={user}", f"--datadir={database}", "--skip-test-db"]
    made = subprocess.run(
        [*words, "--auth-root-authentication-method=normal"],
        env=lab.environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert made.returncode == 0, made.stderr
    socket = lab.folder / "database.socket"
    words = ["mariadbd", "--no-defaults", f"--user={user}", f"--datadir={database}", f"--socket={socket}"]
    small = ["--skip-networking", "--innodb-buffer-pool-size=16M", "--innodb-lock-wait-timeout=900"]
    lab.start("mariadbd", *words, *small)
    until(socket.exists, "the database listens", 60)
    conf = lab.folder / "slurmdbd.conf"
    conf.touch(mode=0o600)
    conf.write_text(STORAGE.format(folder=lab.folder, port=port, user=user))
    lab.environment["MYSQL_UNIX_PORT"] = str(socket)
    lab.start("slurmdbd", "slurmdbd", "-D")
    until(lambda: "Cluster" in lab.ask("sacctmgr", "list", "cluster", check=False), "slurmdbd answers", 60)
    lab.ask("sacctmgr", "-i", "add", "cluster", "tests")
