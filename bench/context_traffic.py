"""What context parallelism sends, and how evenly it shares packed documents: computed.

    python -m bench.context_parallel traffic

Bytes that a rank sends in a layer, forward and backward, for the model of the recipe
qwen3-next-80b in bfloat16, beside other ways: Ulysses, which exchanges heads, and a gather of the
whole sequence before the layer (its gradient scattered after). The formulas are those of the
docstrings in parallel/context, which tests compare with what is counted. Then the cost of the rank
that has most, relative to the mean, for packed documents of several Pareto distributions, with
zigzag and with the cuts of `split_row`. Exit code 1: more than 5 % above the mean.
"""

import sys

import numpy as np

from parallel.layout import AttentionCost, RowLayout, costs, split_row, zigzag
from pretrain.config import load_config

LENGTHS = (8_192, 32_768, 131_072, 1 << 20)
RANKS = (2, 8, 32, 256)
BF16, FP32 = 2, 4
SHAPES, ROWS, SHORTEST = (0.8, 1.1, 1.5), 20, 64
ALLOWED = 1.05


def main() -> int:
    model = load_config("qwen3-next-80b").model
    attention, linear, d = model.attention, model.linear, model.d_model
    print("MB that a rank sends in a layer, forward + backward; Qwen3-Next-80B, bfloat16\n")
    print("| tokens | cp | ring | Ulysses | gather | states | Ulysses | gather |")
    print("|---:|---:|---:|---:|---:|---:|---:|---:|")
    for length in LENGTHS:
        for n in RANKS:
            t = length // n
            keys = 2 * t * attention.n_kv_heads * attention.head_dim
            ring = keys * (2 * (n - 1) * BF16 + n * FP32)
            head_tokens = t * attention.head_dim * (n - 1) / n * BF16
            key_heads = max(attention.n_kv_heads, n)
            of_heads = 2 * head_tokens * (2 * attention.n_heads + 2 * key_heads)
            gather = 2 * t * d * (n - 1) * BF16
            D, E, H = linear.key_dim, linear.value_dim, linear.n_value_heads
            channels = 2 * linear.n_key_heads * D + H * E
            states = 2 * (n - 1) * H * (D * (D + E) + D * E) * FP32
            states += 2 * 2 * (linear.conv_width - 1) * channels * BF16
            of_linear_heads = 2 * t * (n - 1) / n * (channels + H * E + 2 * H) * BF16
            numbers = [
                ring,
                of_heads if n <= attention.n_heads else None,
                gather,
                states,
                of_linear_heads if n <= linear.n_key_heads else None,
                gather,
            ]
            row = " | ".join("heads < cp" if x is None else f"{x / 1e6:,.1f}" for x in numbers)
            print(f"| {length:,} | {n} | {row} |")
    print("\nThe first three: softmax attention; the others: gated delta net.\n")
    return int(print_balance() > ALLOWED)


def print_balance() -> float:
    """Print the most that a rank has to do, relative to the mean; returns the worst of ours."""
    print(
        f"Cost of the busiest rank / mean, worst of {ROWS} rows; blocks per rank, mean and most\n"
    )
    print("| tokens | cp | Pareto shape | zigzag | farspan | blocks |")
    print("|---:|---:|---:|---:|---:|---|")
    worst = 0.0
    for length, n in ((8192, 2), (32_768, 4), (131_072, 16), (1 << 20, 64)):
        for shape in SHAPES:
            draw = np.random.default_rng(0)
            rows = [pareto_lengths(draw, length, shape) for _ in range(ROWS)]
            layouts = [split_row(row, n) for row in rows]
            ours = max(map(imbalance, layouts))
            of_zigzag = max(imbalance(RowLayout(tuple(row), zigzag(length, n))) for row in rows)
            blocks = [len(of_rank) for layout in layouts for of_rank in layout.blocks]
            print(
                f"| {length:,} | {n} | {shape} | {of_zigzag:.2f} | {ours:.3f} | "
                f"{np.mean(blocks):.1f}, {max(blocks)} |"
            )
            worst = max(worst, ours)
    return worst


def imbalance(layout: RowLayout) -> float:
    of_ranks = costs(layout, AttentionCost())
    return float(max(of_ranks) / np.mean(of_ranks))


def pareto_lengths(draw: np.random.Generator, length: int, shape: float) -> list[int]:
    lengths = []
    while length:
        lengths.append(min(length, int(SHORTEST * (1 + draw.pareto(shape)))))
        length -= lengths[-1]
    return lengths


if __name__ == "__main__":
    sys.exit(main())
