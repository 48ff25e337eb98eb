"""How long a step takes, and whether it fits.

Assumptions: products and elementwise passes do not overlap; kernels are launched while earlier
ones run, so that launching only counts where it takes longer than all of them; gradients are
summed over the ranks after the backward pass (a ring, not overlapped).
"""

from __future__ import annotations

from dataclasses import dataclass

from vpd_lens.training.cost.hardware import (
    GPUS_PER_NODE,
    LAUNCH_SECONDS,
    NETWORK,
    Hardware,
)
from vpd_lens.training.cost.memory import Memory, memory
from vpd_lens.training.cost.passes import operations, repetitions, traffic
from vpd_lens.training.cost.products import flops, products
from vpd_lens.training.cost.workload import Workload

# Measured with benchmarks/step.py on a CPU, a compiled step took 0.7 to 0.85 of the time; its
# products are the same, so about half of the elementwise traffic is fused away. Of the kernels
# started, 0.3 is a guess.
COMPILED_TRAFFIC = 0.5
COMPILED_LAUNCHES = 0.3

# Share of an H100's peak that the authors' own code reached: 29 TFLOP per step and GPU, 3.99
# steps per second on eight of them.
AUTHORS_UTILISATION = 0.12


@dataclass(frozen=True)
class Phase:
    """One phase of a step on one rank.

    Attributes:
        name: Which.
        passes: How often it runs.
        flops: Of its matrix products.
        moved: Bytes of its elementwise passes.
        product_seconds: Time of the products.
        traffic_seconds: Time of the elementwise passes.
    """

    name: str
    passes: int
    flops: float
    moved: float
    product_seconds: float
    traffic_seconds: float


@dataclass(frozen=True)
class Prediction:
    """What a run on some hardware would take.

    Attributes:
        work: The run.
        hardware: Each of its devices.
        phases: The phases of a step.
        launch_seconds: Time to start all kernels of a step.
        communication_seconds: Time to exchange gradients (and sharded weights).
        communicated: Bytes that each rank contributes to that.
        memory: Of one rank.
    """

    work: Workload
    hardware: Hardware
    phases: tuple[Phase, ...]
    launch_seconds: float
    communication_seconds: float
    communicated: float
    memory: Memory

    @property
    def device_seconds(self) -> float:
        """Time of all kernels of a step."""
        return sum(phase.product_seconds + phase.traffic_seconds for phase in self.phases)

    @property
    def seconds(self) -> float:
        """Time of a step."""
        return max(self.device_seconds, self.launch_seconds) + self.communication_seconds

    @property
    def cautious_seconds(self) -> float | None:
        """Time of a step at the authors' utilisation; `None` where speed is measured."""
        if self.hardware.measured:
            return None
        return max(self.seconds, self.flops / (AUTHORS_UTILISATION * self.peak))

    @property
    def peak(self) -> float:
        """FLOP/s of the data sheet (or measured) in the precision of the target."""
        products = self.hardware.products
        return products.get(self.work.precision, products["float32"])

    @property
    def flops(self) -> float:
        """FLOPs of a step on one rank."""
        return flops(self.work)

    @property
    def utilisation(self) -> float:
        """Share of the data sheet's FLOP/s, in the precision of the target, that is used."""
        return self.flops / self.seconds / self.peak

    @property
    def gpu_hours(self) -> float:
        """Of all devices, for all steps of the run; the faithfulness warm-up is left out."""
        return self.work.n_ranks * self.work.config.steps * self.seconds / 3600

    @property
    def fits(self) -> bool:
        """Whether the memory of one rank fits its device."""
        return self.memory.total <= self.hardware.memory


def predict(work: Workload, hardware: Hardware) -> Prediction:
    """Time and memory of a run on `work.n_ranks` such devices."""
    compiled = work.config.compile
    moved, times = traffic(work), repetitions(work)
    of_products = {product.phase: product for product in products(work)}
    phases = []
    for name in times:
        product = of_products.get(name)
        own_flops = product.flops if product else 0.0
        rate = hardware.product_rate(product.precision if product else "float32")
        own_bytes = moved.get(name, 0.0) * (COMPILED_TRAFFIC if compiled else 1)
        seconds = own_flops / rate, own_bytes / hardware.traffic_rate
        passes = product.passes if product else times[name]
        phases.append(Phase(name, passes, own_flops, own_bytes, *seconds))
    launches = operations(work) * (COMPILED_LAUNCHES if compiled else 1)
    bytes_sent = communicated(work)
    speed = hardware.interconnect if work.n_ranks <= GPUS_PER_NODE else NETWORK
    return Prediction(
        work,
        hardware,
        tuple(phase for phase in phases if phase.flops or phase.moved),
        launches * LAUNCH_SECONDS if hardware.is_gpu else 0.0,
        bytes_sent / speed,
        bytes_sent,
        memory(work),
    )


def communicated(work: Workload) -> float:
    """Bytes that each rank sends per step.

    A ring sums `n` bytes over `r` ranks by sending `2 (r - 1) / r n`. Where the importance
    function is sharded, its weights are gathered for every forward and backward pass and its
    gradients scattered after each of the latter, `(r - 1) / r n` each.
    """
    ring = (work.n_ranks - 1) / work.n_ranks
    parts = work.config.micro_batches
    sharded = parts * (4 if parts > 1 else 3)
    importance = sharded if work.config.shard_importance else 2
    return 4 * ring * (2 * work.directions + importance * work.importance_parameters)
