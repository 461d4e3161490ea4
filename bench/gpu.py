"""Every GPU kernel checked and timed, a training step, and the longest context that fits.

    python -m bench.gpu [--only SECTION ...]
    python -m bench.gpu --smoke

Needs torch, triton, numpy and transformers, nothing else, and no installation: run it in a
checkout. flash-attn joins where it is installed. Each section stands alone: one that fails is
reported with its traceback, and the others still run. `--smoke` runs all of it at small sizes, on a
CPU too. The tables are as `bench/RESULTS.md` wants them; times are medians of repeats in turns,
ratios are of numbers from one run. Exit code 1: a check failed, or a section did.
"""

import argparse
import gc
import sys
import time
import traceback
from importlib import import_module

import torch

from bench.gpu_tools import Machine
from pretrain.model.kernels.backends import kernels_in_use

# Module and function: it prints its tables, and returns whether what it checked was right.
SECTIONS = {
    "checks": ("gpu_checks", "run"),
    "exact": ("gpu_exact", "run"),
    "attention": ("gpu_attention", "run"),
    "gated_delta": ("gpu_layers", "gated_delta"),
    "moe": ("gpu_layers", "moe"),
    "step": ("gpu_step", "step"),
    "longest": ("gpu_step", "longest"),
    "segments": ("gpu_segments", "doubled"),
    "million": ("gpu_segments", "million"),
}


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu")
    parser.add_argument("--smoke", action="store_true", help="small sizes, on a CPU too")
    parser.add_argument("--only", nargs="+", choices=SECTIONS, default=list(SECTIONS))
    arguments = parser.parse_args()
    if not torch.cuda.is_available() and not arguments.smoke:
        parser.error("there is no GPU here; --smoke runs on a CPU")
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    machine = Machine(device, arguments.smoke)

    print(f"    python -m bench.gpu {' '.join(sys.argv[1:])}".rstrip())
    print(f"\n{time.strftime('%Y-%m-%d')}. {machine.name}; {machine.versions()}.")
    for head_dim in (128, 256):
        kernels = kernels_in_use(device, torch.bfloat16, head_dim, key_dim=128)
        print(f"bf16, head dimension {head_dim}: {kernels}.")
    failed = [name for name in arguments.only if not passes(name, machine)]
    print(f"failed: {', '.join(failed)}" if failed else "all sections ran, all checks passed")
    return 1 if failed else 0


def passes(name: str, machine: Machine) -> bool:
    print(f"\n### {name}\n", flush=True)
    start = time.perf_counter()
    try:
        module, function = SECTIONS[name]
        return bool(getattr(import_module(f"bench.{module}"), function)(machine))
    except Exception:
        traceback.print_exc(file=sys.stdout)
        return False
    finally:
        gc.collect()
        if machine.device.type == "cuda":
            torch.cuda.empty_cache()
        print(f"({name}: {time.perf_counter() - start:.0f} s)", flush=True)


if __name__ == "__main__":
    sys.exit(main())
