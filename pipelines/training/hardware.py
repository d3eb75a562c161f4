"""Accelerators by name: what they can do, and what an hour of one costs. Every figure has its source."""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass

__all__ = ["HARDWARE", "Hardware", "find_hardware", "list_price", "peak_flops"]


@dataclass(frozen=True, slots=True)
class Hardware:
    name: str
    peak_flops: float  # Dense bf16 FLOP/s, from the vendor's data sheet.
    memory_gib: float  # What a program can have of it.
    dollars_per_hour: float  # Of one, on demand; prices move, `--price` overrides.
    price_source: str


LAMBDA = "lambda.ai/instances, nodes of 8, read 2026-09-20"
HARDWARE = {
    hardware.name: hardware
    for hardware in (
        Hardware("b200", 2250e12, 178, 6.69, LAMBDA),
        Hardware("h200", 989e12, 140, 4.45, "akash.network/pricing/gpus, from, read 2026-09-20"),
        Hardware("h100", 989e12, 79, 3.99, LAMBDA),
        Hardware("a100", 312e12, 79, 2.79, LAMBDA),
        Hardware("a100-40", 312e12, 39, 1.99, LAMBDA),
    )
}


def find_hardware(text: str) -> tuple[Hardware, int]:
    """From "h100x8" the H100 and 8. Raises ValueError with the nearest known name."""
    found = re.fullmatch(r"([a-z0-9-]+?)(?:x(\d+))?", text.lower())
    name, count = (found[1], int(found[2] or 1)) if found else (text, 1)
    if name not in HARDWARE or count < 1:
        near = difflib.get_close_matches(name, HARDWARE, n=1, cutoff=0.0)
        raise ValueError(f"hardware {text!r} is not known; nearest: {near[0]}x8; known: {', '.join(HARDWARE)}, each xN")
    return HARDWARE[name], count


# Dense bf16 FLOP/s from the vendors' data sheets; the first name found in the name that a driver gives a device counts.
PEAK_FLOPS = {
    "B200": HARDWARE["b200"].peak_flops,
    "H200": HARDWARE["h200"].peak_flops,  # GH200 too.
    "H100 PCIe": 756e12,
    "H100": HARDWARE["h100"].peak_flops,
    "A100": HARDWARE["a100"].peak_flops,
    "A10": 125e12,
    "L40S": 362e12,
    "L4": 121e12,
    "V100": 125e12,
    "T4": 65e12,
}


def peak_flops(device_name: str) -> float | None:
    """Of a device by the name that its driver gives it, as in "NVIDIA H100 80GB HBM3"; None if it is not known."""
    return next((peak for key, peak in PEAK_FLOPS.items() if key in device_name), None)


def list_price(device_name: str) -> float | None:
    """Dollars for an hour of such a device, by `HARDWARE`; None if it has no price there."""
    words = re.split(r"[^a-z0-9]+", device_name.lower())
    kind = next((name for name in HARDWARE if name in words), None)
    if kind == "a100" and "40gb" in words:
        kind = "a100-40"
    return HARDWARE[kind].dollars_per_hour if kind else None
