"""Benchmarks of context parallelism, one part or all.

    python -m bench.context_parallel [kernels] [step] [traffic]

Exit code 1: something is not as required.
"""

import sys
from importlib import import_module

PARTS = ("kernels", "step", "traffic")


def main() -> int:
    asked = sys.argv[1:] or list(PARTS)
    if unknown := set(asked) - set(PARTS):
        sys.exit(
            f"{', '.join(unknown)}: not a part; usage: python -m bench.context_parallel {PARTS}"
        )
    return max(int(import_module(f"bench.context_{part}").main()) for part in asked)


if __name__ == "__main__":
    sys.exit(main())
