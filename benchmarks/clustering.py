"""How long clustering takes: activity with planted groups, merged until nothing is saved.

    python benchmarks/clustering.py 10000 16384   # subcomponents, positions

Prints processor time and wall time in seconds, and the largest memory of the process.
"""

from __future__ import annotations

import argparse
import resource
import time

import numpy as np
import torch

from vpd_lens.analysis.clustering import Activity, Best, Rank, merge
from vpd_lens.analysis.clustering.bits import packed

L0, SIZE = 130, 4  # active at each position, on average; members of a group


def planted(n: int, n_positions: int, seed: int = 0) -> Activity:
    """Groups whose densities are spread over two decades, and members that miss one in twenty."""
    rng = np.random.default_rng(seed)
    density = np.geomspace(0.01, 1, n // SIZE)
    density *= L0 / (SIZE * density.sum())
    bits = []
    for start in range(0, n_positions, 4096):
        shape = min(4096, n_positions - start), n // SIZE
        groups = rng.random(shape, dtype=np.float32) < density
        active = np.repeat(groups, SIZE, axis=1)
        active &= rng.random(active.shape, dtype=np.float32) > 0.05
        bits.append(packed(active))
    names = tuple(f"blocks.0.mlp.in:{c}" for c in range(n // SIZE * SIZE))
    place = np.arange(n_positions)
    return Activity(names, np.concatenate(bits), place * 0, place, 0.01, 0, "")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("n", type=int)
    parser.add_argument("positions", type=int)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--until-one", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    found = planted(arguments.n, arguments.positions)
    for sampler in (Rank(), Best()):
        cpu, wall = time.process_time(), time.perf_counter()
        clusters = merge(found, 1.0, sampler, until_one=arguments.until_one)
        cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        print(
            f"{sampler}: {cpu:.0f} s of processor time, {wall:.0f} s; {len(clusters.merges)} "
            f"merges, {len(clusters)} groups; {memory:.1f} GiB",
            flush=True,
        )


if __name__ == "__main__":
    main()
