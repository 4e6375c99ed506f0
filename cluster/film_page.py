"""`report.html`, the page about a render's film: `python -m cluster.film_page STORE [--ffmpeg FILE]`.

Measuring decodes the whole film, which takes a minute or more for a long one. In a process of its own it holds up
nobody (a farm's event loop carries many renders), and whoever stops the render need not wait for it.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Sequence

from cluster.inspect import inspect_render
from pipeline.ledger import Ledger
from pipeline.media import find_ffmpeg
from pipeline.page import render_page
from pipeline.store import Store, open_store
from pipeline.tasks import CommitRecord

PAGE = "report.html"


def is_page_of(store: Store, film: CommitRecord) -> bool:
    """Whether the page there is about this very film: running a finished render again measures nothing."""
    return store.head(PAGE) is not None and store.read(PAGE).endswith(_mark(film))


def start_page(store_url: str, ffmpeg: str | None) -> subprocess.Popen[str]:
    """Begin to measure. The process ends with 0 once the page is there, else with its reason on stderr."""
    command = [sys.executable, "-m", "cluster.film_page", store_url]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    return subprocess.Popen(
        command if ffmpeg is None else [*command, "--ffmpeg", ffmpeg],
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


def _put_page(store: Store, ffmpeg: str | None) -> None:
    state = Ledger(store).load()
    inspection, film = inspect_render(store, state, find_ffmpeg(ffmpeg))
    store.put_replace(PAGE, render_page(inspection).encode() + _mark(film))


def _mark(film: CommitRecord) -> bytes:
    return f"<!-- film {film.files[0].sha256} -->\n".encode()


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure the film of the render in a store and put its page there."""
    parser = argparse.ArgumentParser(prog="python -m cluster.film_page", description=__doc__)
    parser.add_argument("store")
    parser.add_argument("--ffmpeg")
    options = parser.parse_args(arguments)
    _put_page(open_store(options.store), options.ffmpeg)
    return 0


if __name__ == "__main__":
    sys.exit(main())
