"""ffmpeg as a child process: found, started, fed, read, timed and reaped.

A child runs in a process group of its own and in a scratch folder of its own (`Workbench`), where every
input is a link under a name chosen here: no path a user wrote reaches ffmpeg's command line. Whoever waits
for a child waits at most `limit_s` without progress; then the whole group is killed. What ffmpeg last said on
stderr is kept in the MediaError.
"""

from __future__ import annotations

import os
import select
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

import ffmpeg as ffmpeg_python

from pipeline.errors import MediaError, SettingError

LIMIT_S = 120.0
"""Seconds a child may go without progress before it is killed."""

_STDERR_LINES = 12
_STDERR_BYTES = 8192


@dataclass(frozen=True)
class Ffmpeg:
    """The binary every media function is given: absolute path, and the version for the numerics record."""

    path: str
    version: str


def find_ffmpeg(choice: str | None = None) -> Ffmpeg:
    """The ffmpeg to use: `choice`, else the environment's LONGTAKE_FFMPEG, else the one of imageio-ffmpeg.

    Raises SettingError when it is missing, not executable or not an ffmpeg.
    """
    field, named = ("ffmpeg", choice) if choice else ("LONGTAKE_FFMPEG", os.environ.get("LONGTAKE_FFMPEG"))
    found = shutil.which(os.path.expanduser(named)) if named else _bundled()
    if found is None:
        raise SettingError(
            "no executable ffmpeg here",
            field=field,
            value=named,
            remedy="Name an ffmpeg binary, or unset it to use the one that imageio-ffmpeg brings.",
        )
    return Ffmpeg(os.path.abspath(found), _version(os.path.abspath(found), field))


def _bundled() -> str | None:
    import imageio_ffmpeg

    try:
        return shutil.which(str(imageio_ffmpeg.get_ffmpeg_exe()))
    except RuntimeError:
        return None


@cache
def _version(path: str, field: str) -> str:
    wrong = SettingError("is not a working ffmpeg", field=field, value=path, remedy="Name an ffmpeg binary.")
    try:
        said = subprocess.run([path, "-version"], capture_output=True, timeout=LIMIT_S, check=True).stdout
    except (OSError, subprocess.SubprocessError) as error:
        raise wrong from error
    words = said.decode(errors="replace").split()
    if words[:2] != ["ffmpeg", "version"] or len(words) < 3:
        raise wrong
    return words[2]


@cache
def encoder_names(ffmpeg: Ffmpeg) -> frozenset[str]:
    """Names of the encoders the binary was built with."""
    said = subprocess.run([ffmpeg.path, "-hide_banner", "-encoders"], capture_output=True, timeout=LIMIT_S).stdout
    lines = said.decode(errors="replace").partition("------")[2].splitlines()
    return frozenset(line.split()[1] for line in lines if len(line.split()) > 1)


class Workbench:
    """A scratch folder that is a child's working directory; inputs are linked into it under safe names."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def link(self, source: Path, name: str) -> str:
        """Make `source` readable as `name` inside the folder, whatever it is really called."""
        (self.path / name).symlink_to(os.path.abspath(source))
        return f"file:{name}"

    def write(self, name: str, text: str) -> str:
        """Write a small text file for the child."""
        (self.path / name).write_text(text, encoding="utf-8")
        return f"file:{name}"


@contextmanager
def workbench(beside: Path | None = None) -> Iterator[Workbench]:
    """A fresh Workbench, removed afterwards. `beside` puts it next to a file it will be renamed to."""
    folder = None if beside is None else os.path.abspath(beside.parent)
    with tempfile.TemporaryDirectory(prefix=".media-", dir=folder, ignore_cleanup_errors=True) as path:
        yield Workbench(Path(path))


class Child:
    """One running ffmpeg. Use as a context manager: leaving it kills what still runs and reaps it."""

    def __init__(
        self,
        ffmpeg: Ffmpeg,
        output: Any,
        bench: Workbench,
        *,
        limit_s: float = LIMIT_S,
        feeds: bool = False,
        level: Literal["error", "info"] = "error",
    ) -> None:
        """Start what the ffmpeg-python node `output` describes. `feeds`: its stdin is a pipe we write to.
        `level`: how much it tells on stderr."""
        quiet = ("-hide_banner", "-nostats", "-v", level, "-xerror", "-y", *(() if feeds else ("-nostdin",)))
        args = ffmpeg_python.compile(output.global_args(*quiet), cmd=ffmpeg.path)
        self.limit_s = limit_s
        self._stderr = tempfile.TemporaryFile()  # noqa: SIM115 - closed in __exit__
        self._process = _start(args, bench.path, self._stderr.fileno(), feeds)
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                os.set_blocking(pipe.fileno(), False)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.kill()
        for pipe in (self._process.stdin, self._process.stdout, self._stderr):
            if pipe is not None:
                pipe.close()

    @property
    def pid(self) -> int:
        """Process id, which is also the id of the child's process group."""
        return self._process.pid

    def kill(self) -> None:
        """Kill the child's group if it still runs, and reap it."""
        if self._process.poll() is None:
            # macOS refuses it for a group whose only process has just ended.
            with suppress(PermissionError):
                os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()

    def write(self, data: memoryview) -> None:
        """Write all of `data` (bytes) to the child. Raises MediaError when it stopped reading."""
        assert self._process.stdin is not None
        fd = self._process.stdin.fileno()
        while data.nbytes:
            self._wait_for(fd, select.POLLOUT)
            try:
                data = data[os.write(fd, data[: 1 << 20]) :]
            except BlockingIOError:
                continue
            except BrokenPipeError:
                self._process.wait(self.limit_s)
                raise self._failed("stopped before its input ended") from None

    def read(self, size: int) -> bytes:
        """The next `size` bytes of the child's stdout; fewer only where it ends."""
        assert self._process.stdout is not None
        fd, parts, missing = self._process.stdout.fileno(), [], size
        while missing:
            self._wait_for(fd, select.POLLIN)
            part = os.read(fd, min(missing, 1 << 20))
            if not part:
                break
            parts.append(part)
            missing -= len(part)
        return b"".join(parts)

    def finish(self) -> None:
        """Close the child's stdin and wait for its end. Raises MediaError unless it ended well."""
        if self._process.stdin is not None:
            self._process.stdin.close()
        try:
            code = self._process.wait(self.limit_s)
        except subprocess.TimeoutExpired:
            self.kill()
            raise self._failed(f"did not end within {self.limit_s:g} s and was killed") from None
        if code != 0:
            raise self._failed(f"exited with {code}")

    def _wait_for(self, fd: int, event: int) -> None:
        poll = select.poll()
        poll.register(fd, event)
        if not poll.poll(self.limit_s * 1000):
            self.kill()
            raise self._failed(f"made no progress for {self.limit_s:g} s and was killed")

    def _failed(self, what: str) -> MediaError:
        return MediaError(f"ffmpeg {what}: {self.last_words() or '(it said nothing)'}")

    def last_words(self, lines: int = _STDERR_LINES) -> str:
        """The last lines of the child's stderr, at most 8 KiB."""
        end = os.fstat(self._stderr.fileno()).st_size
        tail = os.pread(self._stderr.fileno(), _STDERR_BYTES, max(0, end - _STDERR_BYTES))
        return "\n".join(tail.decode(errors="replace").strip().splitlines()[-lines:])


def _start(args: Sequence[str], folder: Path, stderr: int, feeds: bool) -> subprocess.Popen[bytes]:
    try:
        return subprocess.Popen(
            args,
            cwd=folder,
            stdin=subprocess.PIPE if feeds else subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=stderr,
            start_new_session=True,
        )
    except OSError as error:
        raise MediaError(f"ffmpeg could not be started: {error}") from error


def run(
    ffmpeg: Ffmpeg, output: Any, bench: Workbench, *, limit_s: float = LIMIT_S, most_bytes: int = 0
) -> bytes:
    """Run a child to its end within `limit_s` in all; what it printed, which is at most `most_bytes`."""
    with Child(ffmpeg, output, bench, limit_s=limit_s) as child:
        until = time.monotonic() + limit_s
        said = bytearray()
        while part := child.read(1 << 16):
            said += part
            if len(said) > most_bytes:
                raise MediaError(f"ffmpeg printed more than {most_bytes} bytes")
            if time.monotonic() > until:
                raise MediaError(f"ffmpeg took longer than {limit_s:g} s and was killed")
        child.finish()
        return bytes(said)
