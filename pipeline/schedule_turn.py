"""One turn of a schedule: see how its runs are, take what is due, hand over what can start.

Whoever has a clock calls `advance` again and again: the farm every few seconds, a Kubernetes CronJob at each
tick. Several may do so at once, and each may be killed anywhere.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from pipeline.errors import UserError
from pipeline.recurring import Cancel, CancelAsked, Ended, Run, Submit, Submitted, next_step
from pipeline.schedule_log import ScheduleLog


@dataclass(frozen=True)
class RunOutcome:
    """How a run ended."""

    exit_code: int
    message: str


REPLACED = RunOutcome(130, "replaced before it ended")


class Runner(Protocol):
    """Who renders. Each call may be repeated after a crash and changes nothing the second time."""

    def submit(self, run: Run) -> None:
        """Have it rendered under its id. Raises UserError if that can never be."""

    def outcome(self, run: Run) -> RunOutcome | None:
        """How a run ended; None while it has not, or nobody knows."""

    def cancel(self, run: Run) -> None:
        """Stop it, if anybody renders it: whoever has begun with it may not have said so yet, or have died."""


def advance(log: ScheduleLog, now_s: float, runner: Runner) -> None:
    """Do everything that can be done now. Raises what store and runner raise; the next turn goes on there."""
    log.refresh()
    while _note_end(log, now_s, runner) or _take_step(log, now_s, runner):
        pass


def _note_end(log: ScheduleLog, now_s: float, runner: Runner) -> bool:
    for run in log.state.open_runs:
        if run.submitted and (outcome := runner.outcome(run)) is not None:
            log.append(_end_of(run, now_s, outcome))
            return True
    return False


def _take_step(log: ScheduleLog, now_s: float, runner: Runner) -> bool:
    match next_step(log.state, now_s):
        case None:
            return False
        case Submit(run):
            log.append(_submit(run, now_s, runner))
        case Cancel(run):
            runner.cancel(run)
            log.append(
                CancelAsked(now_s, run.number)
                if run.submitted
                else _end_of(run, now_s, runner.outcome(run) or REPLACED)
            )
        case entry:
            log.append(entry)
    return True


def _submit(run: Run, now_s: float, runner: Runner) -> Submitted | Ended:
    try:
        run.storyboard()
        runner.submit(run)
    except UserError as error:
        return Ended(now_s, run.number, error.exit_code, str(error))
    # One entry for both: a crash between two would leave a run of which nobody knows that it is over.
    outcome = runner.outcome(run)
    return Submitted(now_s, run.number) if outcome is None else _end_of(run, now_s, outcome)


def _end_of(run: Run, now_s: float, outcome: RunOutcome) -> Ended:
    return Ended(now_s, run.number, outcome.exit_code, outcome.message)
