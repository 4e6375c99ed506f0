"""One exception tree for everything longtake reports.

    LongtakeError
    ├── UserError            the user's fault: never retried, exit code 2
    │   ├── SpecError        a field of the storyboard (field, value, remedy)
    │   ├── InputFileError   an image, video or soundtrack that cannot be used
    │   ├── CheckpointFault  a checkpoint folder that cannot be used
    │   ├── SettingError     a flag, an environment variable, a missing program
    │   └── NumericsMismatch resumed under another numerics record
    ├── TransientError       may pass: retried within its budget
    │   ├── StoreError       the store answered with an error or not in time
    │   ├── MediaError       ffmpeg failed, hung or wrote a short file
    │   ├── OutOfMemory      host or device memory ran out
    │   └── DeviceError      a GPU, or a library that computes on it, failed
    ├── LostError            the machine under the task is gone: retried, not charged
    │   ├── WorkerLost
    │   ├── OrchestratorLost the process that led the render died: the same command goes on
    │   └── LeaseLost        another orchestrator holds the render now
    ├── QualityError         the gate refused the output, exit code 4
    ├── PermanentError       cannot pass: not retried, exit code 1
    │   ├── CorruptArtifact  bytes in the store differ from their record
    │   └── StoreFull        no space left; everything committed is kept
    └── Interrupted          a stop was asked for: SIGTERM 75, Ctrl-C 130; resumable
"""

from __future__ import annotations


class LongtakeError(Exception):
    """Root of the tree. `exit_code` is what the command line returns for it."""

    exit_code = 1


class UserError(LongtakeError):
    """Something the user wrote, named or set cannot be used. Never retried.

    `field` names the place (a field of the storyboard, a flag, a file), `value` what stood there and
    `remedy` what would be right.
    """

    exit_code = 2

    def __init__(self, message: str, *, field: str = "", value: object = None, remedy: str = "") -> None:
        super().__init__(message)
        self.message, self.field, self.value, self.remedy = message, field, value, remedy

    def __str__(self) -> str:
        where = f"{self.field}: " if self.field else ""
        got = f" (got {self.value!r})" if self.value is not None else ""
        hint = f" {self.remedy}" if self.remedy else ""
        return f"{where}{self.message}{got}.{hint}" if hint else f"{where}{self.message}{got}"

    def __reduce__(self) -> tuple[object, ...]:
        return (_rebuild, (type(self), self.message, self.field, self.value, self.remedy))


def _rebuild(kind: type[UserError], message: str, field: str, value: object, remedy: str) -> UserError:
    return kind(message, field=field, value=value, remedy=remedy)


class SpecError(UserError):
    """A field of the storyboard is wrong."""


class InputFileError(UserError):
    """An image, video or soundtrack named by the storyboard cannot be used."""


class CheckpointFault(UserError):
    """The checkpoint folder cannot be used."""


class SettingError(UserError):
    """A flag, an environment variable or a program on this machine is wrong or missing."""


class NumericsMismatch(UserError):
    """The render was started under another numerics record; `--allow-mixed` overrides."""


class TransientError(LongtakeError):
    """May pass by itself; retried within the task's budget."""


class StoreError(TransientError):
    """The store answered with an error, or not in time."""


class MediaError(TransientError):
    """ffmpeg failed, hung or wrote a short file; the message carries its last lines."""


class OutOfMemory(TransientError):
    """Host or device memory ran out."""


class DeviceError(TransientError):
    """A GPU, or a library that computes on it, failed. The process may be of no use any more: after a CUDA error every
    later call in it fails alike.
    """


class LostError(LongtakeError):
    """The machine under the task is gone. Retried without charging the task's budget."""


class WorkerLost(LostError):
    """The worker's process or node died, or it stopped making progress."""


class OrchestratorLost(LostError):
    """The process that led the render died, or does not answer any more. What is committed is kept."""


class LeaseLost(LostError):
    """Another orchestrator has taken over this render; this one must stop writing."""


class QualityError(LongtakeError):
    """The quality gate refused the output."""

    exit_code = 4


class PermanentError(LongtakeError):
    """Cannot pass by itself; not retried."""


class CorruptArtifact(PermanentError):
    """Bytes in the store differ from what their commit record says; `path` names the file in the store."""

    def __init__(self, message: str, path: str = "") -> None:
        super().__init__(message, path)
        self.message, self.path = message, path

    def __str__(self) -> str:
        return self.message


class StoreFull(PermanentError):
    """No space left in the store. Everything committed is kept; free space and run again."""


class Interrupted(LongtakeError):
    """A stop was asked for between two steps. What was committed and saved is kept."""

    def __init__(self, message: str = "stopped on request", exit_code: int = 75) -> None:
        super().__init__(message)
        self.exit_code = exit_code


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or its type's name."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
