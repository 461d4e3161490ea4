"""The memory that a process has had."""

import re
import resource
from pathlib import Path

STATUS = Path("/proc/self/status")


def resident_peak() -> int:
    """The most bytes that this process has had resident.

    Not what `getrusage` says on Linux: that survives `exec`, and so is at least the peak of the
    process that started this one.
    """
    if STATUS.exists() and (found := re.search(r"VmHWM:\s*(\d+) kB", STATUS.read_text())):
        return 1024 * int(found[1])
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
