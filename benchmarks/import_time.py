"""What `import ftw` costs over `import torch`: fresh interpreters, interleaved, medians.

    python benchmarks/import_time.py [--repeats 7]

The bound is 0.3 s. It is a benchmark and no test, because a busy machine is no mistake of the code.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time

BOUND = 0.3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=7, help="fresh interpreters of each kind (default: 7)")
    repeats: int = parser.parse_args().repeats

    seconds: dict[str, list[float]] = {"torch": [], "ftw": []}
    for module in seconds:  # fills the disk cache and writes the bytecode
        wall_clock(module)
    for _ in range(repeats):
        for module, taken in seconds.items():
            taken.append(wall_clock(module))

    median = {module: statistics.median(taken) for module, taken in seconds.items()}
    for module, taken in seconds.items():
        print(
            f"import {module:6s} {median[module]:.3f} s"
            f"   (median of {repeats}, from {min(taken):.3f} to {max(taken):.3f})"
        )
    print(f"ftw over torch {median['ftw'] - median['torch']:+.3f} s   (bound: {BOUND} s)")


def wall_clock(module: str) -> float:
    """Seconds from the start to the end of an interpreter that imports the module."""
    start = time.perf_counter()
    subprocess.run([sys.executable, "-c", f"import {module}"], check=True)
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
