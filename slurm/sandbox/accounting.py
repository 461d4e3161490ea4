"""Accounting for a sandbox: a database behind a socket in its folder, and slurmdbd."""

import subprocess
from collections.abc import Callable
from pathlib import Path

from slurm.sandbox.configuration import slurmdbd_conf, user_name
from slurm.sandbox.processes import client_environment, start_daemon
from slurm.sandbox.programs import require
from slurm.sandbox.settings import Settings

PROGRAMS = ("mariadb-install-db", "mariadbd", "mariadb", "slurmdbd", "sacctmgr")
INSTALL = "apt-get install mariadb-server slurmdbd"
Wait = Callable[[str, Callable[[], bool]], None]


def start(folder: Path, settings: Settings, in_network: list[str], wait: Wait) -> None:
    """
    Args:
        in_network: what runs a command in the network of the controller.
        wait: returns when its condition holds.

    Raises:
        ValueError: MariaDB or slurmdbd is not installed.
    """
    _start_database(folder, wait)
    conf = folder / "slurmdbd.conf"
    conf.write_text(slurmdbd_conf(folder, settings))
    conf.chmod(0o600)
    environment = {"SLURM_CONF": str(conf), "MYSQL_UNIX_PORT": f"{folder}/run/mysql.sock"}
    slurmdbd = [*in_network, require("slurmdbd", INSTALL), "-D"]
    start_daemon(folder, "slurmdbd", slurmdbd, environment)
    add = [*in_network, require("sacctmgr", INSTALL), "--immediate", "add", "cluster", "sandbox"]
    clients = client_environment(folder)
    wait("slurmdbd", lambda: _succeeds(add, clients))


def _start_database(folder: Path, wait: Wait) -> None:
    """A MariaDB that is reached through a socket alone."""
    socket = f"{folder}/run/mysql.sock"
    own = ["--no-defaults", f"--user={user_name()}", f"--datadir={folder}/db"]
    no_password = "--auth-root-authentication-method=normal"
    with (folder / "log" / "install-db.out").open("wb") as printed:
        install = [require("mariadb-install-db", INSTALL), *own, no_password]
        subprocess.run(install, stdout=printed, stderr=printed, check=True, timeout=60)
    files = [f"--socket={socket}", f"--pid-file={folder}/run/db.pid"]
    memory = ["--innodb-buffer-pool-size=32M", "--innodb-flush-log-at-trx-commit=0"]
    server = [require("mariadbd", INSTALL), *own, "--skip-networking", *files, *memory]
    start_daemon(folder, "mariadbd", server)
    client = [require("mariadb", INSTALL), "--no-defaults", "-S", socket, "-uroot"]
    wait("mariadbd", lambda: _succeeds([*client, "-e", "create database slurm"]))


def _succeeds(command: list[str], environment: dict[str, str] | None = None) -> bool:
    done = subprocess.run(command, env=environment, capture_output=True, check=False, timeout=60)
    return done.returncode == 0
