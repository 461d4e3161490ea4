"""Accounting for a sandbox: a database behind a socket in its folder, and slurmdbd."""

import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

from slurm.sandbox.configuration import slurmdbd_conf
from slurm.sandbox.processes import client_environment, start_daemon
from slurm.sandbox.programs import require
from slurm.sandbox.settings import Settings

# The empty database that the package of Debian and Ubuntu makes.
_EMPTY = Path("/var/lib/mysql")

Wait = Callable[[str, Callable[[], bool]], None]


def start(folder: Path, settings: Settings, in_network: list[str], wait: Wait) -> None:
    """
    Args:
        in_network: what runs a command in the network of the controller.
        wait: returns when its condition holds.

    Raises:
        ValueError: MariaDB or slurmdbd is not installed.
    """
    install = "apt-get install mariadb-server slurmdbd"
    server, client = require("mariadbd", install), require("mariadb", install)
    slurmdbd, sacctmgr = require("slurmdbd", install), require("sacctmgr", install)
    socket = f"{folder}/run/mysql.sock"
    subprocess.run(["cp", "-a", "--sparse=always", str(_EMPTY), f"{folder}/db"], check=True)
    shutil.chown(folder / "run", user="mysql")
    files = [f"--datadir={folder}/db", f"--socket={socket}", f"--pid-file={folder}/run/db.pid"]
    memory = ["--innodb-buffer-pool-size=32M", "--innodb-flush-log-at-trx-commit=0"]
    options = ["--no-defaults", "--user=mysql", "--skip-networking"]
    start_daemon(folder, "mariadbd", [server, *options, *files, *memory])
    create = [client, "--no-defaults", "-S", socket, "-uroot", "-e", "create database slurm"]
    wait("mariadbd", lambda: _succeeds(create))

    conf = folder / "slurmdbd.conf"
    conf.write_text(slurmdbd_conf(folder, settings))
    conf.chmod(0o600)
    environment = {"SLURM_CONF": str(conf), "MYSQL_UNIX_PORT": socket}
    start_daemon(folder, "slurmdbd", [*in_network, slurmdbd, "-D"], environment)
    add = [*in_network, sacctmgr, "--immediate", "add", "cluster", "sandbox"]
    clients = client_environment(folder)
    wait("slurmdbd", lambda: _succeeds(add, clients))


def _succeeds(command: list[str], environment: dict[str, str] | None = None) -> bool:
    done = subprocess.run(command, env=environment, capture_output=True, check=False, timeout=60)
    return done.returncode == 0
