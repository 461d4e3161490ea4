"""Which folders a run needs on its nodes, and whether other machines see a path: by the kind of
file system that it is on.
"""

import re
from pathlib import Path

from launch.slurm.profile import Profile
from pretrain.config import Config, phases_of
from pretrain.data_config import SAMPLE_SHARDS
from pretrain.errors import UserError

# Of one machine alone. What is not known is taken for one of many: there are dozens of those.
LOCAL = (
    *("bcachefs", "btrfs", "devtmpfs", "exfat", "ext2", "ext3", "ext4", "f2fs", "jfs", "ntfs"),
    *("overlay", "ramfs", "reiserfs", "rootfs", "squashfs", "tmpfs", "vfat", "xfs", "zfs"),
)


def folders_of(config: Config) -> dict[str, Path]:
    """What ranks read and write besides their run directory, by what names it.

    Neither what lies in an object store, nor the sample.
    """
    asked = config.eval.sources if config.eval.every else None
    held_out = [asked] if isinstance(asked, str) else [source.path for source in asked or ()]
    named = {f"data.shards = {source.path}": source.path for source in config.data.sources()}
    named |= {f"eval.sources = {path}": path for path in held_out}
    named |= {"checkpoint.dir": config.checkpoint.dir} if config.checkpoint.dir else {}
    return {
        what: Path(path)
        for what, path in named.items()
        if "://" not in path and path != SAMPLE_SHARDS
    }


def node_folders_of(config: Config, scratch: str | None) -> dict[str, Path]:
    """What ranks read and write on the own disk of each node, by what names it.

    Args:
        scratch: of the profile.
    """
    offloaded = {phase.config.parallel.offload_dir for phase in phases_of(config)}
    named: dict[str, str | None] = {"scratch": scratch, "data.cache_dir": config.data.cache_dir}
    named |= {f"parallel.offload_dir = {path}": path for path in sorted(filter(None, offloaded))}
    return {what: Path(path) for what, path in named.items() if path}


def require_shared(what: str, path: Path, profile: Profile, mounts: str | None = None) -> str:
    """The kind of file system that `path` is, or would be, on.

    Args:
        mounts: what /proc/self/mountinfo says.

    Raises:
        UserError: it is one of this machine, and the profile does not say otherwise.
    """
    path = path.resolve()
    if mounts is None:
        mounts = Path("/proc/self/mountinfo").read_text()
    kind, mount = file_system_of(path, mounts)
    is_named = any(path.is_relative_to(shared) for shared in profile.shared_paths)
    if kind not in LOCAL or is_named:
        return kind
    raise UserError(
        f"{what} is not on a shared file system: {path} is on {kind} (mounted at {mount}), which "
        "the nodes do not see. Choose a folder on the cluster's NFS, Lustre or GPFS; or, if all "
        f"nodes do see it, name it in the profile: `shared_paths: [{mount}]`"
    )


def file_system_of(path: Path, mounts: str) -> tuple[str, str]:
    """The kind and the mount point of what `path` is on (proc(5), mountinfo)."""
    found = ("unknown", "/")
    deepest = -1
    for line in mounts.splitlines():
        mount_part, _, source_part = line.partition(" - ")
        mount = _unescaped(mount_part.split()[4])
        # Of two mounts in one place the later one is seen.
        if path.is_relative_to(mount) and len(Path(mount).parts) >= deepest:
            deepest = len(Path(mount).parts)
            found = (source_part.split()[0], mount)
    return found


def _unescaped(text: str) -> str:
    return re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), text)
