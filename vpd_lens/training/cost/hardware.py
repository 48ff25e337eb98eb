"""What the hardware can do, from its data sheets or measured on the spot."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from vpd_lens.errors import ConfigError
from vpd_lens.training.cost.available import available_memory

# A GB of a data sheet is taken as 10^9 bytes. GPUs have up to 7 % more, which is left to the CUDA
# context and to fragmentation.
_GB, _TERA = 1e9, 1e12

# Parts of the data-sheet figures that large matrix products and elementwise kernels usually
# reach, and the time PyTorch takes to start a kernel from Python. Common experience, not fitted.
PRODUCT_EFFICIENCY = 0.6
BANDWIDTH_EFFICIENCY = 0.8
LAUNCH_SECONDS = 8e-6

# Beyond one node: 400 Gbit/s of network per GPU.
GPUS_PER_NODE, NETWORK = 8, 50e9


@dataclass(frozen=True)
class Hardware:
    """One device.

    Attributes:
        name: What it is.
        products: FLOP/s of dense matrix products by dtype.
        bandwidth: Bytes per second to and from its memory.
        memory: Bytes.
        interconnect: Bytes per second to the other GPUs of a node, in one direction.
        source: The data sheet, or how it was measured.
        measured: Whether `products` and `bandwidth` are what is reached, not what is promised.
        is_gpu: Whether autocast applies and kernels are launched.
    """

    name: str
    products: Mapping[str, float]
    bandwidth: float
    memory: float
    interconnect: float
    source: str
    measured: bool = False
    is_gpu: bool = True

    def product_rate(self, precision: str) -> float:
        """FLOP/s that are reached."""
        peak = self.products.get(precision, self.products["float32"])
        return peak if self.measured else peak * PRODUCT_EFFICIENCY

    @property
    def traffic_rate(self) -> float:
        """Bytes per second that are reached."""
        return self.bandwidth if self.measured else self.bandwidth * BANDWIDTH_EFFICIENCY


_Number = int | float


def _gpu(
    name: str,
    half: _Number,
    single: _Number,
    bandwidth: _Number,
    memory: _Number,
    link: _Number,
    sheet: str,
) -> Hardware:
    products = {"bfloat16": half * _TERA, "float16": half * _TERA, "float32": single * _TERA}
    return Hardware(name, products, bandwidth * _GB, memory * _GB, link * _GB, sheet)


# TFLOP/s without sparsity (bf16 by tensor cores, fp32 without TF32), GB/s, GB, GB/s one way.
TABLE: dict[str, Hardware] = {
    hardware.name: hardware
    for hardware in (
        _gpu("A100-40", 312, 19.5, 1555, 40, 300, "NVIDIA A100 Tensor Core GPU data sheet, SXM"),
        _gpu("A100-80", 312, 19.5, 2039, 80, 300, "NVIDIA A100 Tensor Core GPU data sheet, SXM"),
        _gpu("H100", 989, 67, 3350, 80, 450, "NVIDIA H100 Tensor Core GPU data sheet, SXM"),
        _gpu("H200", 989, 67, 4800, 141, 450, "NVIDIA H200 Tensor Core GPU data sheet, SXM"),
        _gpu("B200", 2250, 75, 8000, 180, 900, "NVIDIA HGX B200 data sheet"),
        _gpu("L40S", 362, 91.6, 864, 48, 32, "NVIDIA L40S data sheet"),
        _gpu("RTX4090", 165, 82.6, 1008, 24, 32, "NVIDIA Ada GPU architecture whitepaper"),
        _gpu("RTX3090", 71, 35.6, 936, 24, 16, "NVIDIA GA102 GPU architecture whitepaper"),
    )
}


def parse_gpus(text: str) -> tuple[int, Hardware]:
    """`8xH100`, `1xthis` or `A100-80`: how many of which.

    Raises:
        ConfigError: If the number or the name makes no sense.
    """
    number, cross, name = text.strip().partition("x")
    if not (cross and number.isdigit()):
        number, name = "1", text.strip()
    known = {key.lower().replace("-", "").replace(" ", ""): key for key in TABLE}
    key = name.lower().replace("-", "").replace(" ", "").removesuffix("gb")
    if int(number) < 1 or (key != "this" and key not in known):
        raise ConfigError(
            f"gpus={text!r}: expected NUMBERxNAME, NAME being one of {', '.join(TABLE)}, or `this` "
            "for the device at hand."
        )
    return int(number), measure() if key == "this" else TABLE[known[key]]


def measure(device: str | None = None) -> Hardware:
    """This machine's GPU, or its CPU with the threads PyTorch is set to: three seconds of work.

    Args:
        device: `"cpu"` or `"cuda"`; `None`: CUDA if there is.
    """
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    gpu = device.startswith("cuda")
    size = 8192 if gpu else 768
    products = {}
    for dtype in (torch.float32, torch.bfloat16):
        a = torch.randn(size, size, device=device).to(dtype)
        out = torch.empty_like(a)
        seconds = _seconds(lambda a=a, out=out: torch.mm(a, a, out=out), gpu)
        products[str(dtype).removeprefix("torch.")] = 2.0 * size**3 / seconds
    x = torch.ones(2**28 if gpu else 2**25, device=device)
    y = torch.empty_like(x)
    bandwidth = 2 * x.nbytes / _seconds(lambda: torch.mul(x, 2.0, out=y), gpu)
    name = torch.cuda.get_device_name() if gpu else f"this CPU, {torch.get_num_threads()} threads"
    memory = available_memory(torch.device(device)) or 0.0
    how = f"measured: products of {size} x {size}, a copy of {x.nbytes / 1e6:.0f} MB"
    return Hardware(name, products, bandwidth, memory, bandwidth / 10, how, True, gpu)


def _seconds(work: Callable[[], object], gpu: bool) -> float:
    """The fastest of some runs: others may use the machine too."""
    best = float("inf")
    begun = time.perf_counter()
    while time.perf_counter() - begun < 1.0 or best == float("inf"):
        start = time.perf_counter()
        work()
        if gpu:
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - start)
    return best
