"""A program that two ranks run for one result, in the way that the argument says."""

import json
import os
import signal
import sys


def main() -> None:
    is_first = os.environ["RANK"] == "0"
    match sys.argv[1]:
        case "result":
            if is_first:
                print(json.dumps({"digits": "7" * 200_000}))
        case "killed":
            if is_first:
                signal.pause()
            os.kill(os.getpid(), signal.SIGKILL)
        case "stopped":
            if is_first:
                os.kill(os.getpid(), signal.SIGSTOP)
            sys.exit(print("stacks\nerror: rank 0 does not answer", file=sys.stderr) or 70)
        case "failed":
            if is_first:
                signal.pause()
            sys.exit(print("no such shard", file=sys.stderr) or 3)
        case "mistaken":
            # The one whose words are shown is the last.
            if is_first:
                os.waitid(os.P_PID, os.fork() or os._exit(0), os.WEXITED)
            sys.exit(print("error: no such batch", file=sys.stderr) or 2)
        case "waits":
            print("rank waits", file=sys.stderr, flush=True)
            signal.pause()


if __name__ == "__main__":
    main()
