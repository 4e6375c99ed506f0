"""Renders a storyboard from scratch and measures it: seconds, and memory over all processes.

    python examples/measure.py examples/five_minutes.yaml [extra flags of `longtake render`]

Memory is the proportional set size (PSS, shared pages counted once) of the command and everything it started,
sampled every two seconds from /proc, so it includes Ray's own processes and ffmpeg. The driver is the command
itself; the peak of what it has allocated (anonymous memory) in the first and in the last quarter of the run shows
whether it grows with the film. Its share of libraries would grow whenever another process that has them mapped ends.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import psutil

SAMPLE_S = 2.0


def memory_bytes(process: psutil.Process) -> Counter[str]:
    """The process's memory by the kernel's names, in bytes; empty for one that has just ended."""
    try:
        _, *lines = Path(f"/proc/{process.pid}/smaps_rollup").read_text().splitlines()
    except OSError:
        return Counter()
    return Counter({name.rstrip(":"): int(size) * 1024 for name, size, *_ in map(str.split, lines)})


def sample(driver: psutil.Process) -> tuple[int, int]:
    """(bytes that the driver has allocated, bytes of the driver and all its descendants)."""
    try:
        family = [driver, *driver.children(recursive=True)]
    except psutil.NoSuchProcess:
        family = [driver]
    return memory_bytes(driver)["Anonymous"], sum(memory_bytes(process)["Pss"] for process in family)


def measure(command: list[str]) -> tuple[int, float, list[tuple[int, int]]]:
    """Exit code, wall seconds and the memory samples of one run of `command`."""
    started = time.monotonic()
    child = subprocess.Popen(command)
    driver = psutil.Process(child.pid)
    samples = []
    while child.poll() is None:
        samples.append(sample(driver))
        time.sleep(SAMPLE_S)
    return child.returncode, time.monotonic() - started, samples


def main(arguments: list[str]) -> int:
    if not arguments or arguments[0].startswith("-"):
        print(__doc__)
        return 2
    if not Path("/proc/self/smaps_rollup").exists():
        print("memory is measured on Linux only: /proc/<pid>/smaps_rollup is not here", file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory(prefix="longtake-measure-") as folder:
        longtake = Path(sys.executable).with_name("longtake")
        command = [str(longtake), "render", *arguments, "--store", f"{folder}/render"]
        code, seconds, samples = measure(command)
    quarter = max(len(samples) // 4, 1)
    first = max(own for own, _ in samples[:quarter])
    last = max(own for own, _ in samples[-quarter:])
    print(f"exit code                {code}")
    print(f"wall time                {seconds:.0f} s ({seconds / 60:.1f} min)")
    print(f"peak, all processes      {max(total for _, total in samples) / 1e9:.2f} GB")
    print(f"driver, first quarter    {first / 1e6:.0f} MB")
    print(f"driver, last quarter     {last / 1e6:.0f} MB")
    return code


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
