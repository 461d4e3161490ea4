"""GPUs: does each rank have one of its own, and is it well?

Read from `nvidia-smi -q -x`: elements of one name mean the same in all versions of the driver,
while to ask for a field that a version does not know fails.
"""

import os
import shutil
import subprocess
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from xml.etree import ElementTree

from launch.slurm.doctor.findings import Check, Finding, listed
from pretrain.settings import Section

# A driver that has lost a GPU, or has to wake all of them up, takes its time.
TIMEOUT_S = 120
# What the driver and an idle GPU need.
MEMORY_MIB = 1500.0
# By the name NVIDIA gives them, of both versions of the element.
THROTTLED = {
    "hw_slowdown": "slowed down by its hardware",
    "hw_thermal_slowdown": "too hot: slowed down by its hardware",
    "hw_power_brake_slowdown": "slowed down by the power supply of the node",
    "sw_thermal_slowdown": "too hot: slowed down by its driver",
}


class Gpu(Section):
    """What nvidia-smi says of one.

    Attributes:
        index: its number on the node, as nvidia-smi counts those that this process may see.
        ecc_errors: that were not corrected, since the node has booted.
        remapping: what of its memory is to be remapped or cannot be: "pending", "failed" or "".
        throttled: the reasons of `THROTTLED` that are active.
        persistent: None where that cannot be told.
        used_mib: of its memory, before the job uses any.
        fabric: how it stands with the NVLink fabric, "Completed" if it has joined; "" without one.
        recovery: what has to be done before it can be used, such as "Reset"; "" for nothing.
    """

    index: int
    uuid: str
    model: str
    ecc_errors: int = 0
    remapping: str = ""
    throttled: tuple[str, ...] = ()
    persistent: bool | None = None
    used_mib: float = 0.0
    fabric: str = ""
    recovery: str = ""


class Gpus(Section):
    """What a rank sees.

    Attributes:
        error: why nvidia-smi says nothing.
        visible: CUDA_VISIBLE_DEVICES; None if it is not set, and all are visible.
    """

    driver: str = ""
    gpus: tuple[Gpu, ...] = ()
    error: str | None = None
    visible: str | None = None

    def seen(self) -> list[Gpu]:
        """Those that CUDA would show this process, in its order."""
        if self.visible is None:
            return list(self.gpus)
        found = []
        for name in self.visible.split(","):
            gpu = self._called(name.strip())
            # CUDA ignores what comes after a device that is not there.
            if gpu is None:
                break
            found.append(gpu)
        return found

    def _called(self, name: str) -> Gpu | None:
        if name.isdigit():
            return next((gpu for gpu in self.gpus if gpu.index == int(name)), None)
        return next((gpu for gpu in self.gpus if name and gpu.uuid.startswith(name)), None)


def measure() -> Gpus:
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if not shutil.which("nvidia-smi"):
        return Gpus(error="there is no nvidia-smi, so no driver of NVIDIA's", visible=visible)
    try:
        done = subprocess.run(
            ["nvidia-smi", "-q", "-x"],
            capture_output=True,
            text=True,
            errors="replace",
            timeout=TIMEOUT_S,
            check=False,
        )
    except subprocess.TimeoutExpired:
        error = f"nvidia-smi has not answered within {TIMEOUT_S} s"
        return Gpus(error=error, visible=visible)
    if done.returncode:
        said = " ".join((done.stderr or done.stdout).split())
        return Gpus(error=f"nvidia-smi: {said or f'exit code {done.returncode}'}", visible=visible)
    try:
        return parse(done.stdout).model_copy(update={"visible": visible})
    except ElementTree.ParseError as error:
        return Gpus(error=f"nvidia-smi prints no XML: {error}", visible=visible)


def parse(xml: str) -> Gpus:
    """Raises ElementTree.ParseError."""
    log = ElementTree.fromstring(xml)
    gpus = [_gpu(index, gpu) for index, gpu in enumerate(log.iter("gpu"))]
    return Gpus(driver=_text(log, "driver_version"), gpus=tuple(gpus))


def _gpu(index: int, gpu: ElementTree.Element) -> Gpu:
    pending = _text(gpu, "remapped_rows/remapped_row_pending")
    failed = _text(gpu, "remapped_rows/remapped_row_failure")
    volatile = gpu.find("ecc_errors/volatile")
    uncorrected = [one.text for one in volatile or () if "uncorrectable" in one.tag]
    reasons = [
        one.tag.partition("_reason_")[2]
        for kind in ("event", "throttle")
        for one in gpu.find(f"clocks_{kind}_reasons") or ()
        if one.text == "Active"
    ]
    fabric = _text(gpu, "fabric/state")
    persistence = _text(gpu, "persistence_mode")
    recovery = _text(gpu, "gpu_recovery_action")
    return Gpu(
        index=index,
        uuid=_text(gpu, "uuid"),
        model=_text(gpu, "product_name"),
        ecc_errors=sum(int(count) for count in uncorrected if count and count.isdigit()),
        remapping="failed" if failed == "Yes" else "pending" if pending == "Yes" else "",
        throttled=tuple(reason for reason in reasons if reason in THROTTLED),
        persistent=persistence == "Enabled" if persistence else None,
        used_mib=float(_text(gpu, "fb_memory_usage/used").partition(" ")[0] or 0),
        fabric=fabric,
        recovery="" if recovery == "None" else recovery,
    )


def _text(element: ElementTree.Element, path: str) -> str:
    text = (element.findtext(path) or "").strip()
    return "" if text == "N/A" else text


def check(measured: Mapping[str, Sequence[Gpus]], wanted: bool) -> Check:
    """
    Args:
        measured: by node, of each of its ranks in their order.
        wanted: whether the profile asks for GPUs.
    """
    if not wanted:
        return _check_without(measured)
    findings: defaultdict[tuple[str, str], list[str]] = defaultdict(list)
    for node, ranks in measured.items():
        for problem in dict.fromkeys(_problems(ranks)):
            findings[problem].append(node)
    versions = _differing(measured)
    models = sorted({gpu.model for ranks in measured.values() for one in ranks for gpu in one.gpus})
    seen = [len(one.seen()) for ranks in measured.values() for one in ranks]
    saw = f"{' and '.join(models) or 'none'}; a rank sees {_range(seen)}"
    found = [Finding(listed(nodes), what, fix) for (what, fix), nodes in findings.items()]
    return Check("GPUs", saw, (*found, *versions))


def _check_without(measured: Mapping[str, Sequence[Gpus]]) -> Check:
    """A rank takes a GPU that it sees (parallel.mesh), whoever else has been given it."""
    seen = {node: max(len(one.seen()) for one in ranks) for node, ranks in measured.items()}
    using = [node for node, count in seen.items() if count]
    if not using:
        return Check("GPUs", "not asked for, and none are seen")
    count = max(seen.values())
    finding = Finding(
        listed(using),
        f"ranks see {count} GPU{'s' if count > 1 else ''}, which the profile does not ask for, and "
        "would use them",
        "gpus: auto in the profile; or hide them: CUDA_VISIBLE_DEVICES with an empty value in its "
        "environment",
    )
    return Check("GPUs", f"not asked for, {count} are seen", (finding,))


def _problems(ranks: Sequence[Gpus]) -> Iterable[tuple[str, str]]:
    """What is wrong on a node, and what to do about it."""
    ask = "ask for GPUs as this site wants it (gpus in the profile: gpus-per-node, gpus-per-task, "
    ask += "gres); `scontrol show node` has the Gres of the node"
    drain = "have the node drained, and the GPU reset or replaced"
    errors = {one.error for one in ranks if one.error}
    if errors:
        yield "; ".join(sorted(errors)), "have the node drained, and its driver mended"
        return
    blind = [rank for rank, one in enumerate(ranks) if not one.seen()]
    if blind:
        shown = {one.visible for one in ranks}
        visible = ", ".join(sorted(repr(one) for one in shown if one is not None)) or "not set"
        ranks_seen = f"{len(blind)} of {len(ranks)} ranks see no GPU"
        yield f"{ranks_seen} (CUDA_VISIBLE_DEVICES is {visible})", ask
    yield from _shared(ranks, ask)
    for gpu in {gpu.uuid: gpu for one in ranks for gpu in one.gpus}.values():
        yield from _illnesses(gpu, drain)


def _shared(ranks: Sequence[Gpus], fix: str) -> Iterable[tuple[str, str]]:
    """Ranks of a node that would use the same GPU (as parallel.mesh chooses)."""
    users: defaultdict[str, list[str]] = defaultdict(list)
    for rank, one in enumerate(ranks):
        seen = one.seen()
        if seen:
            users[seen[rank % len(seen)].uuid].append(str(rank))
    for sharing in users.values():
        if len(sharing) > 1:
            yield f"its ranks {listed(sharing)} would share one GPU", fix


def _illnesses(gpu: Gpu, drain: str) -> Iterable[tuple[str, str]]:
    name = f"GPU {gpu.index} ({gpu.model}, {gpu.uuid})"
    if gpu.ecc_errors:
        yield f"{name} has had {gpu.ecc_errors} ECC errors that were not corrected", drain
    if gpu.remapping:
        yield f"{name}: the remapping of rows of its memory is {gpu.remapping}", drain
    if gpu.recovery:
        yield f"{name} has to be recovered: {gpu.recovery}", drain
    if gpu.throttled:
        yield (
            f"{name} is {', '.join(THROTTLED[reason] for reason in gpu.throttled)}",
            "have the cooling and the power supply of the node looked at; leave it out until then",
        )
    if gpu.persistent is False:
        yield (
            f"{name} is not in persistence mode: each job waits until its driver has started it",
            "have nvidia-persistenced started at boot, or `nvidia-smi -pm 1`",
        )
    if gpu.fabric and gpu.fabric != "Completed":
        yield (
            f"{name} has not joined the NVLink fabric ({gpu.fabric}): CUDA does not start on it",
            "have nvidia-fabricmanager started, of the same version as the driver",
        )
    if gpu.used_mib > MEMORY_MIB:
        yield (
            f"{gpu.used_mib:.0f} MiB of {name} are in use already",
            "end what runs there (`nvidia-smi` names it): another job, or one that has not ended",
        )


def _differing(measured: Mapping[str, Sequence[Gpus]]) -> list[Finding]:
    """Nodes whose driver or GPUs are of another kind."""
    kinds: defaultdict[tuple[str, str], list[str]] = defaultdict(list)
    for node, ranks in measured.items():
        models = {gpu.model for one in ranks for gpu in one.gpus}
        drivers = {one.driver for one in ranks if one.driver}
        if models and drivers:
            kinds[", ".join(sorted(models)), ", ".join(sorted(drivers))].append(node)
    usual = max(kinds, key=lambda kind: (len(kinds[kind]), kind), default=None)
    return [
        Finding(
            listed(nodes),
            f"{kind[0]} with driver {kind[1]}, elsewhere {usual[0]} with driver {usual[1]}",
            "have the driver updated; or leave these nodes out (constraint in the profile)",
        )
        for kind, nodes in kinds.items()
        if usual is not None and kind != usual
    ]


def _range(counts: Sequence[int]) -> str:
    least, most = min(counts, default=0), max(counts, default=0)
    return str(least) if least == most else f"{least} to {most}"
