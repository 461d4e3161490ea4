"""What all ranks have to have the same of, compared by hash before training starts."""

import hashlib
import json
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

Copy = tuple[str, Tensor, dist.ProcessGroup]

NAMED_AT_MOST = 5
WORDS_AT_A_TIME = 1 << 16
WORD_BY_SIZE = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
# Odd constants of SplitMix64 (Steele, Lea, Flood 2014), as signed integers.
GAMMA, MIX_1, MIX_2 = -0x61C8864680B583EB, -0x40A7B892E31B1A47, -0x6B2FB644ECCEEE15


class DisagreementError(ValueError):
    """Ranks of one job do not have the same settings or weights: nothing may be trained."""

    exit_code = 2


def check_same(what: str, settings: Mapping[str, Any]) -> None:
    """Compare nested settings of all ranks. Collective.

    Raises:
        DisagreementError: on every rank; names the ranks that differ from most, and the dotted
            keys and values in which they do.
    """
    text = json.dumps(settings, sort_keys=True, default=str)
    digest = hashlib.sha256(text.encode()).hexdigest()
    digests: list[str] = [""] * dist.get_world_size()
    dist.all_gather_object(digests, digest)
    usual = _most_common(digests)
    if all(other == usual for other in digests):
        return
    shared: list[Any] = [dict(_leaves(settings, ""))]
    dist.broadcast_object_list(shared, src=digests.index(usual))
    difference = _difference(dict(_leaves(settings, "")), shared[0])
    differences: list[list[str]] = [[]] * dist.get_world_size()
    dist.all_gather_object(differences, difference)
    lines = [
        f"rank {rank}: {line}" for rank, found in enumerate(differences) for line in _first(found)
    ]
    raise DisagreementError(
        f"{what} differs between ranks; compared with rank {digests.index(usual)}:\n  "
        + "\n  ".join(lines)
    )


def evidence_of(number: int) -> list[float]:
    """Four numbers whose sums over ranks tell `is_same` whether `number` (32 bits) is the same.

    They ride on a sum of float64 that is taken anyway.
    """
    halves = number & 0xFFFF, number >> 16
    return [float(x) for half in halves for x in (half, half * half)]


def is_same(sums: Sequence[float], ranks: int) -> bool:
    """Whether all ranks had the same number, from the sums of their `evidence_of` it.

    By Cauchy and Schwarz, n times a sum of n squares is the square of the sum if and only if all
    are equal: no differences cancel. For up to 2^20 ranks the sums are below 2^53, thus exact.
    """
    pairs = sums[:2], sums[2:]
    return all(ranks * int(of_squares) == int(total) ** 2 for total, of_squares in pairs)


def replicated(weights: Iterable[tuple[str, Tensor]]) -> Iterator[Copy]:
    """The copies that DTensors of `weights` say that other ranks have, for `check_copies`."""
    for name, weight in weights:
        if isinstance(weight, DTensor):
            for axis, placement in enumerate(weight.placements):
                if placement.is_replicate() and weight.device_mesh.size(axis) > 1:
                    yield name, weight.to_local(), weight.device_mesh.get_group(axis)


@torch.no_grad()
def check_copies(copies: Iterable[Copy]) -> None:
    """Compare weights that several ranks hold copies of. Collective over all ranks.

    Args:
        copies: name, local tensor, and the ranks which hold an equal one; the ranks of a group
            name the same tensors in the same order.

    Raises:
        DisagreementError: on every rank of the job; names the weights and the ranks.
    """
    by_group: dict[dist.ProcessGroup, list[tuple[str, Tensor]]] = defaultdict(list)
    for name, tensor, group in copies:
        by_group[group].append((name, tensor))
    # In one order on all ranks, so that no two of them wait for each other in different groups.
    groups = sorted(by_group, key=lambda group: dist.get_process_group_ranks(group))
    found = [line for group in groups for line in _compare(by_group[group], group)]

    everywhere: list[list[str]] = [[]] * dist.get_world_size()
    dist.all_gather_object(everywhere, found)
    lines = list(dict.fromkeys(line for lines in everywhere for line in lines))
    if lines:
        raise DisagreementError(
            "weights that must be equal differ between ranks:\n  " + "\n  ".join(_first(lines))
        )


def checksum(tensor: Tensor) -> Tensor:
    """A 64-bit checksum of the bits of `tensor`, the same on every kind of device.

    A change of one element changes it for certain, any other change with the probability
    1 - 2^-64. Returns an int64 scalar on the device of `tensor`.
    """
    words = tensor.detach().contiguous().flatten().view(WORD_BY_SIZE[tensor.element_size()])
    total = torch.zeros((), dtype=torch.int64, device=tensor.device)
    for start in range(0, len(words), WORDS_AT_A_TIME):
        part = words[start : start + WORDS_AT_A_TIME]
        position = torch.arange(start, start + len(part), device=tensor.device)
        # One round of SplitMix64, a bijection: sums of products alone would let changes cancel.
        x = position.mul_(GAMMA).add_(part)
        x.bitwise_xor_((x >> 30).bitwise_and_((1 << 34) - 1)).mul_(MIX_1)
        x.bitwise_xor_((x >> 27).bitwise_and_((1 << 37) - 1)).mul_(MIX_2)
        total += x.sum()
    return total


def _compare(tensors: list[tuple[str, Tensor]], group: dist.ProcessGroup) -> list[str]:
    """What differs between the ranks of `group`, in words; the same on each of them."""
    sums = torch.stack([checksum(tensor) for _, tensor in tensors]).tolist()
    table = {
        name: f"{tuple(tensor.shape)} {tensor.dtype} {value}"
        for (name, tensor), value in zip(tensors, sums, strict=True)
    }
    digest = hashlib.sha256(json.dumps(table).encode()).hexdigest()
    digests: list[str] = [""] * dist.get_world_size(group)
    dist.all_gather_object(digests, digest, group=group)
    if len(set(digests)) == 1:
        return []
    tables: list[dict[str, str]] = [{}] * dist.get_world_size(group)
    dist.all_gather_object(tables, table, group=group)
    ranks = dist.get_process_group_ranks(group)
    lines = []
    for name in dict.fromkeys(name for table in tables for name in table):
        values = [table.get(name, "") for table in tables]
        usual = _most_common(values)
        others = [rank for rank, value in zip(ranks, values, strict=True) if value != usual]
        same = [rank for rank in ranks if rank not in others]
        if others:
            lines.append(f"{name}: rank {_listed(others)} compared with rank {_listed(same)}")
    return lines


def _most_common(values: list[str]) -> str:
    """Of equally common ones the first."""
    return max(values, key=values.count)


def _difference(mine: dict[str, Any], usual: dict[str, Any]) -> list[str]:
    return [
        f"{key} = {mine.get(key)!r}, not {usual.get(key)!r}"
        for key in sorted(mine.keys() | usual.keys())
        if mine.get(key) != usual.get(key)
    ]


def _leaves(tree: Any, prefix: str) -> Iterator[tuple[str, Any]]:
    if isinstance(tree, Mapping):
        for key, value in tree.items():
            yield from _leaves(value, f"{prefix}.{key}" if prefix else str(key))
    else:
        yield prefix, tree


def _first(lines: list[str]) -> list[str]:
    more = len(lines) - NAMED_AT_MOST
    return lines if more <= 0 else [*lines[:NAMED_AT_MOST], f"and {more} more"]


def _listed(ranks: list[int]) -> str:
    return ", ".join(map(str, ranks))
