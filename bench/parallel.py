"""Benchmarks of the parallel layers, one at a time.

python -m bench.parallel experts|pipeline|step
"""

import sys
from importlib import import_module

PARTS = ("experts", "pipeline", "step")


def main() -> int:
    if len(sys.argv) != 2 or sys.argv[1] not in PARTS:
        sys.exit(f"usage: python -m bench.parallel {'|'.join(PARTS)}")
    return int(import_module(f"bench.parallel_{sys.argv[1]}").main())


if __name__ == "__main__":
    sys.exit(main())
