"""Simulated renders, one for each seed: `python -m tests.simulate --seeds 2000 --first-seed 0`.

Exit code 1, the seed and a replay command if anything that must hold does not. `--every-boundary` crashes one
render of each film at every single store boundary instead; with `--plot`, a render that a person pauses, cancels,
has parts of made again or starts over, of which another take is picked or a shot locked, or whose garbage is
collected.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections import Counter

from tests.simulated import Plot, World

PLOTS: tuple[Plot, ...] = ("pause", "cancel", "retry", "redo", "fresh", "pick", "lock", "gc")


def main(arguments: list[str] | None = None) -> int:
    """Run the seeds asked for; the exit code."""
    parser = argparse.ArgumentParser(prog="python -m tests.simulate", description=__doc__)
    parser.add_argument("--seeds", type=int, default=200, help="how many (default 200)")
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--crash-at", type=int, help="crash at this store boundary and nowhere else")
    parser.add_argument("--trace", action="store_true", help="print what happens, line by line")
    parser.add_argument("--plot", choices=PLOTS, default="", help="what a person asks of the render")
    parser.add_argument("--every-boundary", action="store_true", help="crash at each store boundary in turn")
    options = parser.parse_args(arguments)
    began_s, happened, runs = time.perf_counter(), Counter[str](), 0
    for seed in range(options.first_seed, options.first_seed + options.seeds):
        worlds = [World(seed, options.crash_at, options.trace, options.plot)]
        if options.every_boundary:
            worlds = every_boundary(seed, options.plot)
        for world in worlds:
            try:
                world.run()
            except Exception as error:
                report(world, error)
                return 1
            happened += world.happened
            runs += 1
    took_s = time.perf_counter() - began_s
    print(f"{runs} renders in {took_s:.1f} s ({runs / took_s:.0f}/s), nothing wrong; {dict(happened)}")
    return 0


def every_boundary(seed: int, plot: Plot = "") -> list[World]:
    """The film of a seed, crashed at each boundary of a run in which nothing else goes wrong.

    Of a plot that begins when the film is there, the boundaries from then on.
    """
    clean = World(seed, crash_at=0, plot=plot).run()
    boundaries = range(clean.act_boundary + 1, clean.boundaries + 1)
    return [World(seed, crash_at=boundary, plot=plot) for boundary in boundaries]


def report(world: World, error: Exception) -> None:
    """Say which seed failed, why, and how to see it again."""
    print(f"seed {world.seed}: {type(error).__name__}: {error}", file=sys.stderr)
    print(f"troubles: {dict(world.happened)}", file=sys.stderr)
    crash = f" --crash-at {world.crash_at}" if world.crash_at is not None else ""
    crash += f" --plot {world.plot}" if world.plot else ""
    replay = f"python -m tests.simulate --seeds 1 --first-seed {world.seed}{crash} --trace"
    print(f"replay: {replay}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
