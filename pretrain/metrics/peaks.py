"""What devices can do at most."""

import re
from typing import NamedTuple

import torch


class Peak(NamedTuple):
    """Dense operations per second, from the data sheets: of bfloat16 on tensor cores, of float32
    on the others.
    """

    bfloat16: float
    float32: float


# By a word or words of the device's name; the first that fits.
PEAKS = {
    "H100 PCIe": Peak(756e12, 51.2e12),
    "H100 NVL": Peak(835e12, 60e12),
    "H100": Peak(989e12, 66.9e12),
    "H800": Peak(989e12, 66.9e12),
    "H200": Peak(989e12, 66.9e12),
    "H20": Peak(148e12, 44e12),
    "GH200": Peak(989e12, 66.9e12),
    "B200": Peak(2250e12, 75e12),
    "A100": Peak(312e12, 19.5e12),
    "A800": Peak(312e12, 19.5e12),
    "A40": Peak(149.7e12, 37.4e12),
    "A10": Peak(125e12, 31.2e12),
    "L40S": Peak(362e12, 91.6e12),
    "L4": Peak(121e12, 30.3e12),
}


def peak_of(device: torch.device, dtype: torch.dtype) -> float | None:
    """Operations per second of a device; None where it is not known, and of CPUs."""
    if device.type != "cuda":
        return None
    return peak_by_name(torch.cuda.get_device_name(device), dtype)


def peak_by_name(name: str, dtype: torch.dtype) -> float | None:
    """As `peak_of`, of the device that calls itself so."""
    for known, peak in PEAKS.items():
        if re.search(rf"\b{known}\b", name):
            return peak.bfloat16 if dtype == torch.bfloat16 else peak.float32
    return None
