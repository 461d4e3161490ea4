"""What the doctor's job runs on each node: it measures, and judges nothing.

`python -m launch.slurm.doctor.node FOLDER`, a process for each rank. Each writes what it has seen
of the GPUs to FOLDER/ranks/RANK.json; the first of a node all else that a node can find out.
"""

import os
import signal
import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType

from launch.slurm.doctor import adapters, disk, gpus, names, network, shared_folder, versions
from launch.slurm.doctor.shared_folder import ARRIVE_S, Board, Seen
from launch.slurm.doctor.waiting import wait_until
from launch.slurm.profile import Profile
from pretrain.run_dir import write_atomically
from pretrain.settings import Section

# The stages of a node, by which the others wait for it.
LISTENS, REPLACED, CONNECTED = 1, 2, 3
SIGNAL_S = 120.0


class Request(Section):
    """What the doctor asks of its job.

    Attributes:
        addresses: NodeAddr of all nodes the job can get, by name.
        profile: without `auto`.
    """

    addresses: dict[str, str]
    profile: Profile


class Meeting(Section):
    """What the job has got.

    Attributes:
        addresses: NodeAddr of its nodes by name, in the order of their ranks.
        tasks: how many ranks each of them has.
        interface: of the profile.
        folders: in which there has to be room.
    """

    addresses: dict[str, str]
    tasks: tuple[int, ...]
    interface: str | None
    folders: tuple[disk.Folder, ...]


class OfNode(Section):
    """What the first rank of a node has found out.

    Attributes:
        taken: the port on which ranks meet, if it could not be had.
        signalled: whether the request to stop has arrived.
    """

    names: names.Names
    adapters: adapters.Adapters
    versions: dict[str, str]
    disks: tuple[disk.Disk, ...]
    reached: tuple[network.Reached, ...]
    taken: network.Taken | None
    seen: Seen
    signalled: bool


class OfRank(Section):
    rank: int
    node: str
    gpus: gpus.Gpus
    of_node: OfNode | None


class Folder:
    """Where the doctor and its job write."""

    def __init__(self, root: Path) -> None:
        self.root = root

    @property
    def request(self) -> Path:
        return self.root / "request.json"

    @property
    def meeting(self) -> Path:
        """What the job has got; nothing else is written before it."""
        return self.root / "meeting.json"

    @property
    def started(self) -> Path:
        """A file for each rank that can take the signal which asks to stop."""
        return self.root / "started"

    @property
    def ready(self) -> Path:
        """There once the ranks can be sent the signal that asks to stop."""
        return self.root / "ready"

    @property
    def unreachable(self) -> Path:
        """There if some node could not connect to another: ranks would wait in vain to meet."""
        return self.root / "unreachable"

    @property
    def ranks(self) -> Path:
        return self.root / "ranks"

    @property
    def board(self) -> Path:
        return self.root / "board"

    @property
    def lock(self) -> Path:
        return self.root / "lock"

    @property
    def bandwidth(self) -> Path:
        return self.root / "bandwidth.json"

    @property
    def job_log(self) -> Path:
        """What the batch script has printed."""
        return self.root / "job.log"

    def log(self, step: str) -> Path:
        """What the ranks of a step have printed, each line with their number: node, bandwidth."""
        return self.root / f"{step}.log"

    def measured(self) -> list[OfRank]:
        """In the order of the ranks."""
        found = [OfRank.model_validate_json(path.read_text()) for path in self.ranks.glob("*.json")]
        return sorted(found, key=lambda one: one.rank)


def enter(root: str) -> Folder:
    """The folder of the job of which this process is a rank; says so in its environment."""
    os.environ["RANK"] = os.environ["SLURM_PROCID"]
    os.environ["LOCAL_RANK"] = os.environ["SLURM_LOCALID"]
    return Folder(Path(root))


def main() -> None:
    told = threading.Event()

    def note(number: int, frame: FrameType | None) -> None:
        told.set()

    signal.signal(signal.SIGUSR2, note)
    folder = enter(sys.argv[1])
    meeting = Meeting.model_validate_json(folder.meeting.read_text())
    rank, node = int(os.environ["RANK"]), os.environ["SLURMD_NODENAME"]
    folder.started.mkdir(exist_ok=True)
    (folder.started / str(rank)).touch()
    is_first = os.environ["LOCAL_RANK"] == "0"
    measured = OfRank(
        rank=rank,
        node=node,
        gpus=gpus.measure(),
        of_node=_measure_node(folder, meeting, node, told) if is_first else None,
    )
    folder.ranks.mkdir(exist_ok=True)
    write_atomically(folder.ranks / f"{rank}.json", measured.model_dump_json() + "\n")


def _measure_node(folder: Folder, meeting: Meeting, node: str, told: threading.Event) -> OfNode:
    nodes = list(meeting.addresses)
    known = {node, *_neighbours(nodes, node, network.peers_of)}
    found = names.measure({name: meeting.addresses[name] for name in known})
    reached, seen, taken = _meet(folder, nodes, node, names.announced(found, meeting.interface))
    if node == nodes[0]:
        # Who has been waited for already is not waited for again.
        _let_signal_come(folder, 0 if seen.missing else ARRIVE_S)
    wait_until(lambda: told.is_set() or folder.ready.exists(), 2 * ARRIVE_S)
    return OfNode(
        names=found,
        adapters=adapters.measure(),
        versions=versions.measure(),
        disks=tuple(map(disk.measure, meeting.folders)),
        reached=reached,
        taken=taken,
        seen=seen,
        signalled=told.wait(SIGNAL_S),
    )


def _neighbours(
    nodes: Sequence[str], node: str, of: Callable[[int, int], Sequence[int]]
) -> list[str]:
    return [nodes[number] for number in of(nodes.index(node), len(nodes))]


def _let_signal_come(folder: Folder, patience_s: float) -> None:
    """A rank that has not got so far as to expect it would be ended by it."""
    ranks = int(os.environ["WORLD_SIZE"])
    wait_until(lambda: len(list(folder.started.iterdir())) >= ranks, patience_s)
    write_atomically(folder.ready, "")


def _meet(
    folder: Folder, nodes: Sequence[str], node: str, address: str
) -> tuple[tuple[network.Reached, ...], Seen, network.Taken | None]:
    """Connect to other nodes, and see what they have written to the folder meanwhile.

    Returns:
        What became of each connection, of the folder, and why the port on which ranks meet could
        not be had.
    """
    is_first = node == nodes[0]
    meets_at = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    board = Board(folder.board, node)
    held = shared_folder.hold(folder.lock) if is_first else None
    meeting, taken = _listen_where_ranks_meet(meets_at[1]) if is_first else (None, None)
    listener = network.Listener()
    board.write(LISTENS, address=address, port=listener.port)
    peers = _neighbours(nodes, node, network.peers_of)
    missing = board.wait(peers, LISTENS, ARRIVE_S)
    board.write(REPLACED, address=address, port=listener.port)
    for one in filter(None, (listener, meeting)):
        one.stage = REPLACED

    reached, lags = [], {}
    for peer in (peer for peer in peers if peer not in missing):
        known = board.read(peer)
        result = network.connect(peer, str(known["address"]), int(str(known["port"])), REPLACED)
        reached.append(result)
        if not result.error:
            lags[peer] = board.lag(peer, REPLACED)
        if peer == nodes[0]:
            reached.append(network.connect(peer, *meets_at, REPLACED))
    if any(one.error for one in reached):
        folder.unreachable.touch()
    tries_lock = not is_first and nodes[0] not in missing
    lock = shared_folder.try_lock(folder.lock) if tries_lock else None

    board.write(CONNECTED, address=address, port=listener.port)
    # Until those who do have connected, and tried the lock.
    callers = _neighbours(nodes, node, network.callers_of)
    board.wait([name for name in callers if board.stage(name) >= LISTENS], CONNECTED, ARRIVE_S)
    listener.close()
    if meeting:
        meeting.close()
    if held:
        held.close()
    return tuple(reached), Seen(missing=tuple(missing), lags=lags, lock=lock), taken


def _listen_where_ranks_meet(port: int) -> tuple[network.Listener | None, network.Taken | None]:
    try:
        return network.Listener(port), None
    except OSError as error:
        return None, network.Taken(port=port, error=error.strerror or str(error))


if __name__ == "__main__":
    main()
