"""Measure start-up: wall seconds of a fresh process for `import moeplug`, the help, and the plugin list.

    python benchmarks/bench_startup.py --out benchmarks/results/startup.json

Goals: import 0.15 s, help 0.3 s, plugins 0.5 s. `python -c pass` is beside them: it is in every figure.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path

COMMANDS = {
    "python -c pass": ([sys.executable, "-c", "pass"], None),
    "import moeplug": ([sys.executable, "-c", "import moeplug"], 0.15),
    "moeplug --help": ([sys.executable, "-m", "moeplug", "--help"], 0.3),
    "moeplug plugins": ([sys.executable, "-m", "moeplug", "plugins"], 0.5),
}


def main() -> None:
    """Run the commands in turn and print medians."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeat", type=int, default=15)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    seconds: dict[str, list[float]] = {name: [] for name in COMMANDS}
    for _ in range(args.repeat + 1):
        for name, (command, _goal) in COMMANDS.items():
            started = time.perf_counter()
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
            seconds[name].append(time.perf_counter() - started)
    print(f"{'command':18} {'median s':>9} {'min':>7} {'max':>7} {'goal':>6}")
    for name, (_command, goal) in COMMANDS.items():
        counted = seconds[name][1:]  # the first run warms the page cache
        print(
            f"{name:18} {statistics.median(counted):9.3f} {min(counted):7.3f} {max(counted):7.3f} "
            f"{goal if goal is not None else '':>6}"
        )
    if args.out is not None:
        document = {
            "command": " ".join(["python", "benchmarks/bench_startup.py", *sys.argv[1:]]),
            "python": platform.python_version(), "cores": os.cpu_count(), "seconds": seconds,
        }  # fmt: skip
        args.out.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
