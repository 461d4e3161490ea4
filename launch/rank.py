"""A rank of a run, as launchers start it: `python -m launch.rank RUN_DIR [LAUNCHER]`.

It is `pretrain.train`, with what has to happen before the imports of that, which take seconds: a
request to stop that comes early waits until the training loop can answer it.

Args:
    LAUNCHER: the process id of a launcher on this machine, to stop with it, and whose log of
        standard output gets what goes to standard error as well.
"""

import gc
import os
import runpy
import signal
import sys

from launch.local import signal_when_parent_dies
from pretrain.errors import STOPPED_ON_REQUEST
from pretrain.signals import STOP_SIGNALS


def main() -> None:
    signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    gc.disable()  # until pretrain.train is imported: half a million objects, and no garbage
    if sys.argv[2:]:
        os.dup2(sys.stdout.fileno(), sys.stderr.fileno())
        # A rank whose launcher is killed saves and stops.
        signal_when_parent_dies(signal.SIGTERM)
        if os.getppid() != int(sys.argv[2]):
            sys.exit(STOPPED_ON_REQUEST)
    runpy.run_module("pretrain.train", run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
