"""What a render shows while it runs: rich lines on a terminal, plain lines elsewhere, NDJSON on request.

Progress goes to stderr; stdout carries the film's path at the end, or the NDJSON events.
"""

from __future__ import annotations

import json
import sys
import time
from dataclasses import asdict
from typing import Any, Protocol, TextIO

from pipeline.events import PhaseProgress, ProgressSummary

PLAIN_EVERY_S = 10.0
JSON_EVERY_S = 1.0
PHASES = {
    "text": "prompts",
    "source": "sources",
    "segment": "segments",
    "window": "refinement",
    "encode": "encoding",
    "film": "film",
}


class Display(Protocol):
    """Shows one render. `close` may be called twice."""

    def event(self, event: dict[str, Any]) -> None:
        """Something happened; see `cluster.orchestrator.Story` for the names."""

    def progress(self, summary: ProgressSummary) -> None:
        """Where things stand, several times a second."""

    def line(self, text: str) -> None:
        """A line for the person."""

    def close(self) -> None:
        """The render is over."""


def make_display(*, as_json: bool) -> Display:
    """The display for this process's stdout and stderr."""
    if as_json:
        return JsonDisplay(sys.stdout)
    return RichDisplay() if sys.stderr.isatty() else PlainDisplay(sys.stderr)


def format_seconds(seconds: float) -> str:
    """`8s`, `3m05s`, `2h07m`."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02}s"
    return f"{whole // 3600}h{whole % 3600 // 60:02}m"


class Rates:
    """Frames a second of each phase, over the time from its first frame of this run to its last."""

    def __init__(self) -> None:
        self._first: dict[str, tuple[float, int]] = {}
        self._last: dict[str, tuple[float, int]] = {}

    def of(self, name: str, phase: PhaseProgress, elapsed_s: float) -> float | None:
        """The rate so far; None until it is known. What was committed before this run does not count."""
        now = (elapsed_s, phase.frames)
        first = self._first.get(name)
        if first is None or (not phase.running and first[1] == phase.frames):
            self._first[name] = self._last[name] = now
            return None
        if phase.frames > self._last[name][1]:
            self._last[name] = now
        seconds, frames = (late - early for late, early in zip(self._last[name], first, strict=True))
        return frames / seconds if seconds > 0 else None


def phase_text(phase: PhaseProgress, frames_per_s: float | None) -> str:
    """`3/57, 2 running, 41.2 frames/s`."""
    parts = [f"{phase.done}/{phase.total}"]
    if phase.running:
        parts.append(f"{phase.running} running")
    if phase.failed:
        parts.append(f"{phase.failed} FAILED")
    if frames_per_s:
        parts.append(f"{frames_per_s:.1f} frames/s")
    return ", ".join(parts)


def event_text(event: dict[str, Any]) -> str | None:
    """The line a person is shown for an event, or None where progress says it already."""
    match event["event"]:
        case "started":
            weights = "" if event["precision"] == "stored" else f", weights {event['precision']}"
            precision = f"{event['device']}, {event['dtype']}{weights}, {event['threads']} thread(s) each"
            todo = f"{event['left']} of {event['tasks']} tasks to do"
            return f"{todo}, {event['workers']} worker(s) on {precision}"
        case "numerics":
            record = event["record"]
            kernels, ffmpeg = record["attention_backend"], record["ffmpeg"]
            dense = f"; dense attention: {record['cuda']['dense_attention']}" if "cuda" in record else ""
            return f"computing on {record['device']}; attention and other kernels: {kernels}{dense}; ffmpeg {ffmpeg}"
        case "failed":
            where = f"{event['label'] or event['task']} on {event['host']}"
            return f"{where}: {event['kind']}: {event['message']}"
        case "worker_lost":
            return f"worker {event['worker']} on {event['host']} lost: {event['reason']}"
        case "worker_recycled":
            return f"worker {event['worker']} restarted: {event['reason']}"
        case "node_draining":
            left = "" if event["seconds_left"] is None else f" in {format_seconds(event['seconds_left'])}"
            return f"node {event['node'][:8]} will be taken away{left}: nothing new is sent there"
        case "asked":
            return f"{event['request']} asked for"
        case "commit_refused":
            return f"{event['task']}: not committed: {event['message']}"
        case "note" if event["warning"]:
            return f"warning: {event['message']}"
        case "waiting":
            return f"waiting: {event['message']}"
    return None


class JsonDisplay:
    """One JSON object a line: every event, and `progress` about once a second."""

    def __init__(self, out: TextIO) -> None:
        self._out = out
        self._shown_s = 0.0

    def event(self, event: dict[str, Any]) -> None:
        self._out.write(json.dumps(event) + "\n")
        self._out.flush()

    def progress(self, summary: ProgressSummary) -> None:
        if time.monotonic() - self._shown_s >= JSON_EVERY_S:
            self._shown_s = time.monotonic()
            self.event({"event": "progress", "time": round(time.time(), 3), **asdict(summary)})

    def line(self, text: str) -> None:
        self.event({"event": "note", "time": round(time.time(), 3), "message": text, "warning": False})

    def close(self) -> None:
        self._out.flush()


class PlainDisplay:
    """Plain lines: what changed, at most every few seconds, and what went wrong at once."""

    def __init__(self, out: TextIO) -> None:
        self._out = out
        self._shown_s = 0.0
        self._counts: dict[str, tuple[int, int]] = {}
        self._rates = Rates()

    def event(self, event: dict[str, Any]) -> None:
        text = event_text(event)
        if text:
            self.line(text)

    def progress(self, summary: ProgressSummary) -> None:
        phases = {str(name): phase for name, phase in summary.phases.items() if phase.total}
        rates = {name: self._rates.of(name, phase, summary.elapsed_s) for name, phase in phases.items()}
        counts = {name: (phase.done, phase.total) for name, phase in phases.items()}
        finished = any(done == of and self._counts.get(name) != (done, of) for name, (done, of) in counts.items())
        due = time.monotonic() - self._shown_s >= PLAIN_EVERY_S
        if counts == self._counts or not (finished or due):
            return
        self._shown_s, self._counts = time.monotonic(), counts
        texts = [f"{PHASES[name]} {phase_text(phase, rates[name])}" for name, phase in phases.items()]
        eta = f"; about {format_seconds(summary.eta_s)} left" if summary.eta_s is not None else ""
        self.line(f"{format_seconds(summary.elapsed_s)}: {'; '.join(texts)}{eta}")

    def line(self, text: str) -> None:
        print(text, file=self._out, flush=True)

    def close(self) -> None:
        self._out.flush()


class RichDisplay:
    """A line for each phase, with a bar, counts, frames/s and the time left."""

    def __init__(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn

        self._progress = Progress(
            TextColumn("{task.description:<11}"),
            BarColumn(bar_width=32),
            TextColumn("{task.fields[text]}"),
            console=Console(stderr=True),
            refresh_per_second=4,
        )
        self._rows: dict[str, Any] = {}
        self._rates = Rates()
        self._progress.start()

    def event(self, event: dict[str, Any]) -> None:
        text = event_text(event)
        if text:
            self.line(text)

    def progress(self, summary: ProgressSummary) -> None:
        for name, phase in summary.phases.items():
            if phase.total:
                rate = self._rates.of(name, phase, summary.elapsed_s)
                self._row(PHASES[name], phase.done, phase.total, phase_text(phase, rate))
        left = f"about {format_seconds(summary.eta_s)} left" if summary.eta_s is not None else summary.waiting
        done = sum(phase.work_done_s for phase in summary.phases.values())
        total = sum(phase.work_total_s for phase in summary.phases.values())
        self._row("all", done, total or 1.0, f"{format_seconds(summary.elapsed_s)}, {left}")

    def _row(self, name: str, done: float, total: float, text: str) -> None:
        if name not in self._rows:
            self._rows[name] = self._progress.add_task(name, total=total, text=text)
        self._progress.update(self._rows[name], completed=done, total=total, text=text)

    def line(self, text: str) -> None:
        self._progress.console.print(text, markup=False, highlight=False)

    def close(self) -> None:
        self._progress.stop()
