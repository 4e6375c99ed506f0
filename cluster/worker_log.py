"""What a worker writes down about each attempt: its whole log, kept in the render's store.

The log of an attempt holds the project's own log lines, warnings and tracebacks, and what the process and its
children wrote to stderr meanwhile. It is put into the store every few seconds and at the end, so that it is
there when the worker, its machine and the cluster are gone. No answer waits for the last of these writes (`settle`
does). Its size is bounded: the beginning and the end are kept, the middle is left out and counted. Where logs for
machines are wanted each line goes there as well.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import stat
import sys
import threading
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from cluster.json_log import is_json_wanted, log_record
from pipeline.errors import LongtakeError
from pipeline.store import Store

HEAD_BYTES = 64 << 10
TAIL_BYTES = 192 << 10
STDERR_BYTES = 64 << 10
LINE_CHARS = 4096
FLUSH_S = 10.0
TAIL_LINES = 20


class BoundedText:
    """Lines, of which the first `head_bytes` and the last `tail_bytes` (about) are kept."""

    def __init__(self, head_bytes: int = HEAD_BYTES, tail_bytes: int = TAIL_BYTES) -> None:
        self._head_left, self._tail_left = head_bytes, tail_bytes
        self._head: list[str] = []
        self._tail: deque[str] = deque()
        self.lines = 0
        self._dropped = 0

    def add(self, line: str) -> None:
        """One line, without its line break, cut at LINE_CHARS."""
        self.lines += 1
        line = line[:LINE_CHARS]
        size = len(line) + 1
        if not self._tail and size <= self._head_left:
            self._head_left -= size
            self._head.append(line)
            return
        self._head_left = 0
        self._tail.append(line)
        self._tail_left -= size
        while self._tail_left < 0:
            self._tail_left += len(self._tail.popleft()) + 1
            self._dropped += 1

    def text(self) -> str:
        """What is kept, with a line about what is not."""
        gap = [f"... {self._dropped} lines left out ..."] if self._dropped else []
        return "\n".join([*self._head, *gap, *self._tail])


class WorkerLog(logging.Handler):
    """The log of one worker process. `attempt` brackets an order; outside of one only the tail is kept."""

    def __init__(self) -> None:
        super().__init__(logging.INFO)
        self.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s %(message)s", "%H:%M:%S"))
        self._tail: deque[str] = deque(maxlen=TAIL_LINES)
        self._text: BoundedText | None = None
        self._about: dict[str, Any] = {}
        self._writer: threading.Thread | None = None
        self._traceback = logging.Formatter("%(message)s")
        logging.getLogger().addHandler(self)
        logging.getLogger("longtake").setLevel(logging.INFO)
        logging.captureWarnings(True)

    def emit(self, record: logging.LogRecord) -> None:
        if is_json_wanted():
            log_record(record, self._traceback.format(record), self._about)
        for line in self.format(record).splitlines():
            self._tail.append(line)
            if self._text is not None:
                self._text.add(line)

    def tail(self) -> str:
        """The last lines."""
        return "\n".join(self._tail)

    @contextlib.contextmanager
    def attempt(self, store: Store, path: str) -> Iterator[None]:
        """Keep the log of what happens inside at `path`, now and then and at the end, which `settle` waits for."""
        self.settle()
        text, stderr = BoundedText(), _Stderr()
        _, task_id, name = path.split("/")
        self._about = {"render": store.url, "task": task_id, "attempt": int(name.split("-")[0])}
        over = threading.Event()

        def write() -> None:
            # A store that does not take the log must not harm the order; it has its own ways to say so.
            with contextlib.suppress(LongtakeError):
                store.put_replace(path, (text.text() + stderr.text() + "\n").encode(errors="replace"))

        def write_now_and_then() -> None:
            written = 0
            while not over.wait(FLUSH_S):
                if text.lines != written:
                    written = text.lines
                    write()
            write()

        self._writer = threading.Thread(target=write_now_and_then, name="log", daemon=True)
        self._text = text
        self._writer.start()
        try:
            yield
        finally:
            self._text = None
            self._about = {}
            over.set()

    def settle(self) -> None:
        """Wait until the last attempt's whole log is in the store, or was refused there. Not for one under way."""
        if self._writer is not None and self._text is None:
            self._writer.join()


class _Stderr:
    """What is written to this process's stderr from now on, where that is a file (Ray redirects it to one)."""

    def __init__(self) -> None:
        self._path: Path | None = None
        with contextlib.suppress(OSError):
            if stat.S_ISREG(os.fstat(2).st_mode):
                self._path = _path_of(2)
                self._start = self._path.stat().st_size

    def text(self) -> str:
        """The last of it, with a heading; "" if there is nothing."""
        if self._path is None:
            return ""
        try:
            with self._path.open("rb") as stream:
                end = stream.seek(0, os.SEEK_END)
                stream.seek(max(self._start, end - STDERR_BYTES))
                data = stream.read()
        except OSError:
            return ""
        return f"\n--- stderr\n{data.decode(errors='replace').rstrip()}" if data.strip() else ""


def _path_of(handle: int) -> Path:
    """Where an open file lies. Raises OSError."""
    if sys.platform == "darwin":
        return Path(os.fsdecode(fcntl.fcntl(handle, fcntl.F_GETPATH, bytes(1024)).rstrip(b"\0")))
    return Path(os.readlink(f"/proc/self/fd/{handle}"))
