"""Versions: ranks with other code or libraries compute other numbers, or do not meet."""

import hashlib
import platform
import shutil
import subprocess
from collections import Counter, defaultdict
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path

from launch.slurm.doctor.findings import Check, Finding, listed

OURS = ("pretrain", "parallel", "data_pipeline", "launch")
ROOT = Path(__file__).parents[3]
# What is not installed on a node.
NONE = "none"
NAMED_AT_MOST = 4


def measure() -> dict[str, str]:
    """The version of everything that a rank here would run, by name."""
    found = _packages()
    system, release = platform.libc_ver()
    return found | {
        "python": platform.python_version(),
        "farspan": f"{found.get('farspan', NONE)}, sources {hash_of_sources(ROOT)}",
        "libc": f"{system} {release}",
        "slurmd": _printed("srun", "--version").removeprefix("slurm ").strip() or NONE,
        "machine": platform.machine(),
    }


def _packages() -> dict[str, str]:
    found: dict[str, str] = {}
    # Of two on the path the first is imported.
    for distribution in metadata.distributions():
        name = distribution.metadata["Name"]
        if name:
            found.setdefault(name.lower().replace("_", "-"), distribution.version)
    return found


def hash_of_sources(root: Path) -> str:
    """The first digits of the SHA-256 over farspan's Python files, whatever their commit."""
    digest = hashlib.sha256()
    for folder in OURS:
        for path in sorted((root / folder).rglob("*.py")):
            text = path.read_bytes()
            digest.update(f"{path.relative_to(root)} {len(text)}\n".encode() + text)
    return digest.hexdigest()[:12]


def _printed(*command: str) -> str:
    if not shutil.which(command[0]):
        return ""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    except subprocess.TimeoutExpired:
        return ""
    return done.stdout


def check(measured: Mapping[str, Mapping[str, str]]) -> Check:
    """
    Args:
        measured: versions by name, by node.
    """
    names = sorted({name for versions in measured.values() for name in versions})
    odd: defaultdict[str, list[str]] = defaultdict(list)
    for name in names:
        by_node = {node: versions.get(name, NONE) for node, versions in measured.items()}
        counts = Counter(by_node.values())
        usual = max(counts, key=lambda version: (counts[version], version))
        for node, version in by_node.items():
            if version != usual:
                odd[node].append(f"{name} {version}, elsewhere {usual}")
    alike: defaultdict[tuple[str, ...], list[str]] = defaultdict(list)
    for node, differences in odd.items():
        alike[tuple(differences)].append(node)
    findings = [
        Finding(
            listed(nodes),
            f"other versions than the rest: {_some(differences)}",
            "install the same on all nodes: best one environment on a file system that all of "
            "them see, or one container image",
        )
        for differences, nodes in sorted(alike.items(), key=lambda one: one[1])
    ]
    first = next(iter(measured.values()), {})
    shown = [f"{name} {first[name]}" for name in ("python", "torch", "farspan") if name in first]
    return Check("versions", "; ".join([*shown, f"{len(names)} compared"]), tuple(findings))


def _some(differences: tuple[str, ...]) -> str:
    shown = "; ".join(differences[:NAMED_AT_MOST])
    more = len(differences) - NAMED_AT_MOST
    return f"{shown}; and {more} more" if more > 0 else shown
