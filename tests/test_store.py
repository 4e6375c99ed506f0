"""The store's contract on a local folder, an object store and a real S3 server; crashes, full disks."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import pickle
import resource
import signal
import subprocess
import sys
import time
import tracemalloc
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import obstore.store
import pytest
from obstore.exceptions import BaseError

from pipeline.errors import CorruptArtifact, SettingError, StoreError, StoreFull
from pipeline.journal import AttemptStarted
from pipeline.ledger import Ledger
from pipeline.object_store import ObjectStore
from pipeline.records import seal, unseal
from pipeline.store import LocalStore, Store, open_store
from pipeline.tasks import ArtifactFile, CommitRecord

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(params=["local", "object"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    if request.param == "local":
        return open_store(tmp_path / "render")
    return ObjectStore("memory://", client=obstore.store.MemoryStore())


def test_written_bytes_are_hashed_listed_and_read_back(store: Store, tmp_path: Path) -> None:
    data = b"latents" * 1000
    source = tmp_path / "source"
    source.write_bytes(data)
    first = store.write_attempt("attempts/segment-1/0001-1/a.bin", data)
    second = store.write_attempt("attempts/segment-1/0001-1/b.bin", source)
    assert (first.sha256, first.size_bytes) == (hashlib.sha256(data).hexdigest(), len(data))
    assert (second.sha256, second.size_bytes, second.name) == (first.sha256, len(data), "b.bin")
    assert store.read(first.path) == data
    assert store.digest(second.path) == (first.sha256, len(data))
    assert [file.path for file in store.list("attempts")] == [first.path, second.path]
    head = store.head(first.path)
    assert head is not None
    assert head.size_bytes == len(data)


def test_create_if_absent_takes_only_the_first(store: Store) -> None:
    assert store.create_if_absent("commits/a.json", b"first")
    assert not store.create_if_absent("commits/a.json", b"second")
    assert not store.create_if_absent("commits/a.json", b"first")
    assert store.read("commits/a.json") == b"first"


def test_only_one_of_many_creators_wins(store: Store) -> None:
    with ThreadPoolExecutor(8) as threads:
        created = list(threads.map(lambda n: store.create_if_absent("lease/1.json", b"%d" % n), range(24)))
    assert created.count(True) == 1
    assert store.read("lease/1.json") == b"%d" % created.index(True)


def test_a_folder_lists_what_is_below_it_and_not_its_namesakes(store: Store) -> None:
    for path in ("commits/b.json", "commits/a.json", "commits-old/c.json", "journal/1/2/d.json"):
        store.create_if_absent(path, b"x")
    assert [file.path for file in store.list("commits")] == ["commits/a.json", "commits/b.json"]
    assert [file.path for file in store.list("journal/")] == ["journal/1/2/d.json"]
    assert len(store.list()) == 4
    assert store.list("nothing") == []


def test_missing_files_are_reported_as_missing(store: Store) -> None:
    with pytest.raises(FileNotFoundError):
        store.read("nothing.json")
    with pytest.raises(FileNotFoundError):
        store.digest("nothing.json")
    assert store.head("nothing.json") is None
    store.delete("nothing.json")
    store.create_if_absent("a.json", b"a")
    assert list(store.read_many(["nothing.json", "a.json"])) == [("nothing.json", None), ("a.json", b"a")]
    assert list(store.digest_many(["nothing.json", "a.json"])) == [
        None,
        (hashlib.sha256(b"a").hexdigest(), 1),
    ]


def test_replaced_copied_and_deleted_files(store: Store) -> None:
    store.put_replace("report.json", b"one")
    store.put_replace("report.json", b"two")
    store.copy("report.json", "films/copy.json")
    store.delete("report.json")
    assert store.read("films/copy.json") == b"two"
    assert [file.path for file in store.list()] == ["films/copy.json"]


def test_open_local_gives_the_recorded_bytes_or_says_that_they_are_corrupt(store: Store, tmp_path: Path) -> None:
    scratch = tmp_path / "scratch"
    artifact = store.write_attempt("attempts/window-1/0001-1/w.bin", b"refined latents")
    assert store.open_local(artifact, scratch).read_bytes() == b"refined latents"
    again = store.open_local(artifact, scratch)
    assert again.read_bytes() == b"refined latents"
    for damaged in (b"refined latentz", b"refined", b""):
        store.put_replace(artifact.path, damaged)
        with pytest.raises(CorruptArtifact) as caught:
            store.open_local(artifact, tmp_path / f"fresh{len(damaged)}")
        assert getattr(caught.value, "path", "") == artifact.path
    store.delete(artifact.path)
    with pytest.raises(CorruptArtifact, match="gone"):
        store.open_local(artifact, tmp_path / "fresh")


@pytest.mark.parametrize(
    "path",
    ["../x", "/etc/x", "a/../b", "a//b", "a/", "", ".hidden", "a/.b", "Ä", "A", "a b", "a\x00", "x" * 129],
)
def test_names_cannot_leave_the_folder(store: Store, path: str) -> None:
    operations: list[Callable[[], Any]] = [
        lambda: store.write_attempt(path, b""),
        lambda: store.create_if_absent(path, b""),
        lambda: store.put_replace(path, b""),
        lambda: store.read(path),
        lambda: store.head(path),
        lambda: store.delete(path),
        lambda: store.digest(path),
    ]
    for operation in operations:
        with pytest.raises(SettingError, match="render's folder"):
            operation()


def test_stores_travel_to_other_processes(tmp_path: Path) -> None:
    local = open_store(tmp_path / "render")
    local.create_if_absent("a.json", b"a")
    assert pickle.loads(pickle.dumps(local)).read("a.json") == b"a"
    remote = pickle.loads(pickle.dumps(ObjectStore("s3://bucket/renders/one/")))
    assert remote.url == "s3://bucket/renders/one"
    assert open_store((tmp_path / "render").as_uri()).read("a.json") == b"a"


@pytest.mark.parametrize("address", ["ftp://host/render", "file://host/render"])
def test_an_unknown_kind_of_store_is_refused(address: str) -> None:
    with pytest.raises(SettingError, match="unknown kind of store"):
        open_store(address)


@pytest.mark.parametrize("address", ["", "file://"])
def test_a_store_without_a_name_is_not_the_present_folder(address: str) -> None:
    with pytest.raises(SettingError, match="is empty"):
        open_store(address)


def test_a_tilde_that_the_shell_left_is_the_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert open_store("~/render").url == str(tmp_path / "render")


@pytest.mark.parametrize("address", ["s3://AKIA:hushhush@films/one", "az://films/one?sig=hushhush"])
def test_an_address_with_a_secret_in_it_is_refused_and_not_repeated(address: str) -> None:
    with pytest.raises(SettingError, match="environment") as raised:
        open_store(address)
    assert "hushhush" not in str(raised.value)


# Local: races, crashes and full disks


def test_a_creator_who_is_overtaken_in_the_last_moment_does_not_overwrite(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, rival = LocalStore(tmp_path), LocalStore(tmp_path)

    def overtaken(original: Callable[..., None]) -> Callable[..., None]:
        def call(source: Any, target: Any) -> None:
            monkeypatch.undo()
            assert rival.create_if_absent("lease/2.json", b"rival")
            original(source, target)

        return call

    monkeypatch.setattr(os, "link", overtaken(os.link))
    monkeypatch.setattr(os, "replace", overtaken(os.replace))
    assert not store.create_if_absent("lease/2.json", b"mine")
    assert store.read("lease/2.json") == b"rival"


@pytest.mark.parametrize("refusal", [None, errno.ENOTSUP, errno.ENOTTY])
def test_on_macos_bytes_and_names_go_through_the_drive_s_cache_where_that_can_be_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refusal: int | None
) -> None:
    asked: list[int] = []
    flushed: list[int] = []

    def ask(handle: int, command: int) -> int:
        asked.append(command)
        if refusal is not None:
            raise OSError(refusal, "no such call")
        return 0

    monkeypatch.setattr(sys, "platform", "darwin")
    monkeypatch.setattr(fcntl, "F_FULLFSYNC", 51, raising=False)
    monkeypatch.setattr(fcntl, "fcntl", ask)
    monkeypatch.setattr(os, "fsync", flushed.append)
    LocalStore(tmp_path).create_if_absent("a.json", b"data")
    assert asked == [51, 51], "the file, then its folder"
    assert len(flushed) == (0 if refusal is None else 2)


def test_on_macos_a_drive_that_fails_to_flush_is_not_asked_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second time it may say that all is well: the system tells of lost bytes once."""

    def fail(handle: int, command: int) -> int:
        raise OSError(errno.EIO, "input/output error")

    monkeypatch.setattr(sys, "platform", "darwin")
    monkeypatch.setattr(fcntl, "F_FULLFSYNC", 51, raising=False)
    monkeypatch.setattr(fcntl, "fcntl", fail)
    with pytest.raises(StoreError):
        LocalStore(tmp_path).create_if_absent("a.json", b"data")
    assert not (tmp_path / "a.json").exists()


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="names of open files are read from /proc")
def test_bytes_are_on_the_disk_before_their_name_and_the_name_before_it_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps: list[tuple[str, str]] = []
    fsync, link, replace = os.fsync, os.link, os.replace

    def flush(handle: int) -> None:
        steps.append(("flushed", os.readlink(f"/proc/self/fd/{handle}")))
        fsync(handle)

    def named(original: Callable[..., None]) -> Callable[..., None]:
        def call(source: Any, target: Any) -> None:
            assert ("flushed", str(source)) in steps
            original(source, target)
            steps.append(("named", str(target)))

        return call

    monkeypatch.setattr(os, "fsync", flush)
    monkeypatch.setattr(os, "link", named(link))
    monkeypatch.setattr(os, "replace", named(replace))
    store = LocalStore(tmp_path / "render")
    for path, write in (("commits/a.json", store.create_if_absent), ("attempts/b/c.bin", store.write_attempt)):
        steps.clear()
        write(path, b"data")
        target = store.root / path
        assert steps[-2:] == [("named", str(target)), ("flushed", str(target.parent))]
        assert ("flushed", str(target.parent.parent)) in steps, "the name of a new folder, too"


class ProcessGone(BaseException):
    """Stands for SIGKILL: nothing after it is executed."""


def _crash_at(monkeypatch: pytest.MonkeyPatch, step: int) -> Callable[[], int]:
    """Make the n-th flush, link or rename the last thing the process does not do."""
    calls = [0]

    def wrapped(original: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            calls[0] += 1
            if calls[0] >= step:
                raise ProcessGone
            return original(*arguments, **options)

        return call

    for name in ("fsync", "link", "replace", "open"):
        monkeypatch.setattr(os, name, wrapped(getattr(os, name)))
    unlink = Path.unlink
    monkeypatch.setattr(Path, "unlink", lambda self, missing_ok=False: calls[0] < step and unlink(self, missing_ok))
    return lambda: calls[0]


@pytest.mark.parametrize("operation", ["create_if_absent", "write_attempt", "put_replace"])
def test_a_crash_at_any_step_leaves_a_whole_file_or_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, operation: str
) -> None:
    data = os.urandom(100_000)
    for step in range(1, 30):
        store = LocalStore(tmp_path / f"{step}")
        with monkeypatch.context() as patch:
            steps = _crash_at(patch, step)
            try:
                getattr(store, operation)("commits/a.json", data)
            except ProcessGone:
                finished = False
            else:
                finished = steps() < step
        visible = [file.path for file in store.list()]
        assert visible in ([], ["commits/a.json"])
        if visible:
            assert store.read("commits/a.json") == data
        store.create_if_absent("commits/a.json", data)
        assert store.read("commits/a.json") == data
        if finished:
            assert step > 3
            return
    pytest.fail("the operation never finished")


_WRITER = """
import os, sys
from pipeline.records import seal
from pipeline.store import open_store
store = open_store(sys.argv[1])
print("ready", flush=True)
for number in range(10**9):
    store.create_if_absent(f"commits/{number}.json", seal({"number": number, "fill": "x" * 50_000}))
"""


def test_records_written_under_sigkill_are_whole(tmp_path: Path) -> None:
    for attempt in range(3):
        folder = tmp_path / str(attempt)
        writer = subprocess.Popen([sys.executable, "-c", _WRITER, str(folder)], stdout=subprocess.PIPE, cwd=ROOT)
        assert writer.stdout is not None
        assert writer.stdout.readline() == b"ready\n"
        time.sleep(0.05 + 0.03 * attempt)
        writer.send_signal(signal.SIGKILL)
        writer.wait()
        writer.stdout.close()
        store = open_store(folder)
        numbers = [unseal(store.read(file.path))["number"] for file in store.list("commits")]
        assert sorted(numbers) == list(range(len(numbers)))


@pytest.fixture
def file_size_limit() -> Iterator[None]:
    """No file of this process may grow beyond 10 kB: the kernel fails the write, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.usefixtures("file_size_limit")
def test_a_full_disk_is_named_and_leaves_nothing_short(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    store.create_if_absent("commits/small.json", b"small")
    for operation in (store.write_attempt, store.create_if_absent, store.put_replace):
        with pytest.raises(StoreFull, match="free some and run the same command again"):
            operation("attempts/a/1/big.bin", b"x" * 20_000)
    assert [file.path for file in store.list()] == ["commits/small.json"]
    assert not os.listdir(tmp_path / "attempts/a/1")


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        (errno.ENOSPC, StoreFull),
        (errno.EDQUOT, StoreFull),
        (errno.EIO, StoreError),
        (errno.EROFS, SettingError),
    ],
)
def test_operating_system_errors_become_the_projects_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, expected: type[Exception]
) -> None:
    def fail(handle: int) -> None:
        raise OSError(code, os.strerror(code))

    store = open_store(tmp_path)
    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(expected):
        store.create_if_absent("a.json", b"a")
    assert store.list() == []


def test_a_folder_that_is_a_file_is_the_users_to_correct(tmp_path: Path) -> None:
    (tmp_path / "render").write_text("not a folder")
    with pytest.raises(SettingError, match="--store"):
        open_store(tmp_path / "render").create_if_absent("commits/a.json", b"")


def test_large_files_are_streamed(tmp_path: Path) -> None:
    source = tmp_path / "large"
    with source.open("wb") as stream:
        stream.truncate(40 * 1024 * 1024)
    store = open_store(tmp_path / "render")
    tracemalloc.start()
    artifact = store.write_attempt("attempts/film-1/0001-1/film.mp4", source)
    store.open_local(artifact, tmp_path)
    peak_bytes = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert artifact.size_bytes == 40 * 1024 * 1024
    assert peak_bytes < 16 * 1024 * 1024


# Object stores: lost answers and outages


class Flaky:
    """An object store whose requests fail: `before` times without effect, `after` times with effect."""

    def __init__(self, *, before: int = 0, after: int = 0, message: str = "503 slow down") -> None:
        self.inner = obstore.store.MemoryStore()
        self.before, self.after, self.message = before, after, message

    def __getattr__(self, name: str) -> Any:
        original = getattr(self.inner, name)

        def call(*arguments: Any, **options: Any) -> Any:
            if self.before:
                self.before -= 1
                raise BaseError(self.message)
            result = original(*arguments, **options)
            if self.after:
                self.after -= 1
                raise BaseError(self.message)
            return result

        return call


def _flaky_store(client: Flaky) -> tuple[ObjectStore, list[float]]:
    pauses: list[float] = []
    return ObjectStore("memory://", client=client, sleep=pauses.append), pauses


def test_requests_are_repeated_with_growing_pauses_and_not_for_ever() -> None:
    store, pauses = _flaky_store(Flaky(before=3))
    store.put_replace("a.json", b"a")
    assert len(pauses) == 3
    assert pauses[2] > pauses[0]
    store, pauses = _flaky_store(Flaky(before=100))
    with pytest.raises(StoreError, match="503"):
        store.read("a.json")
    assert len(pauses) == 5


def test_a_record_created_by_a_request_nobody_answered_is_ours() -> None:
    store, _ = _flaky_store(Flaky(after=1))
    assert store.create_if_absent("commits/a.json", b"mine")
    assert not store.create_if_absent("commits/a.json", b"mine")


def test_a_record_created_by_somebody_else_meanwhile_is_not_ours() -> None:
    client = Flaky(before=1)
    client.inner.put("commits/a.json", b"theirs")
    store, _ = _flaky_store(client)
    assert not store.create_if_absent("commits/a.json", b"mine")


@pytest.mark.parametrize(
    "message",
    [
        "Server returned non-2xx status code: 507 Insufficient Storage: ",
        "Server returned non-2xx status code: 400 Bad Request: <Code>XMinioStorageFull</Code>",
    ],
)
def test_a_full_object_store_is_named_at_once(message: str) -> None:
    store, pauses = _flaky_store(Flaky(before=1, message=message))
    with pytest.raises(StoreFull):
        store.write_attempt("attempts/a/1/a.bin", b"x")
    assert not pauses


def test_a_duration_or_an_address_with_the_digits_507_is_no_full_store() -> None:
    silence = "Error performing GET http://10.0.0.1:25507/a in 5.001507813s - HTTP error: error sending request"
    store, pauses = _flaky_store(Flaky(before=1, message=silence))
    store.write_attempt("attempts/a/1/a.bin", b"x")
    assert len(pauses) == 1


@pytest.mark.parametrize(("number", "kind"), [(errno.ENOSPC, StoreFull), (errno.EIO, OSError)])
def test_a_broken_disk_of_a_worker_is_no_full_store(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, kind: type[Exception]
) -> None:
    """A full store ends the render; a task that fails is tried on another machine."""
    store, _ = _flaky_store(Flaky())
    artifact = store.write_attempt("attempts/a/1/a.bin", b"x")

    def broken(path: Path, chunks: str) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(ObjectStore, "_ranges", broken)
    with pytest.raises(kind) as raised:
        store.open_local(artifact, tmp_path)
    assert isinstance(raised.value, StoreFull) is (number == errno.ENOSPC)


# S3 over HTTP


@pytest.fixture(scope="module")
def s3_url() -> Iterator[str]:
    """A real S3 server on loopback with one bucket; credentials and endpoint in the environment."""
    server_module = pytest.importorskip("moto.server")
    server = server_module.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    endpoint = f"http://{host}:{port}"
    environment = {
        "AWS_ACCESS_KEY_ID": "key",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_REGION": "us-east-1",
        "AWS_ENDPOINT_URL": endpoint,
        "AWS_ALLOW_HTTP": "true",
    }
    with pytest.MonkeyPatch.context() as patch:
        for name, value in environment.items():
            patch.setenv(name, value)
        request = urllib.request.Request(f"{endpoint}/renders", method="PUT")
        urllib.request.urlopen(request).close()
        yield "s3://renders/one"
    server.stop()


def test_s3_creates_conditionally_and_streams(s3_url: str, tmp_path: Path) -> None:
    store = open_store(s3_url)
    with ThreadPoolExecutor(4) as threads:
        created = list(threads.map(lambda n: store.create_if_absent("lease/1.json", b"%d" % n), range(6)))
    assert created.count(True) == 1
    large = tmp_path / "large"
    large.write_bytes(os.urandom(6_000_000))  # beyond one part of a multipart upload
    artifact = store.write_attempt("attempts/film-1/0001-1/film.mp4", large)
    assert store.open_local(artifact, tmp_path / "scratch").read_bytes() == large.read_bytes()
    assert [file.path for file in store.list("attempts")] == [artifact.path]
    store.delete(artifact.path)
    assert store.head(artifact.path) is None


def test_s3_carries_a_ledger(s3_url: str) -> None:
    store = open_store(f"{s3_url}-ledger")
    ledger = Ledger(store)
    ledger.take_lease()
    artifact = store.write_attempt("attempts/text-1/0001-1/text.bin", b"embeddings")
    ledger.journal([AttemptStarted("text-1", 1, 1, "w1", "n1")])
    record = ledger.commit(CommitRecord("text-1", 1, 1, (artifact,), {}))
    assert Ledger(store).load().commits == {"text-1": record}
    with pytest.raises(SettingError, match="another render is writing here"):
        Ledger(store).take_lease()


def test_s3_without_the_bucket_is_the_users_to_correct(s3_url: str) -> None:
    store = open_store("s3://nobody-made-this/one")
    with pytest.raises(SettingError, match="no such bucket"):
        store.create_if_absent("a.json", b"a")


def test_seal_of_an_artifact_file_survives_json() -> None:
    file = ArtifactFile("a.bin", "attempts/a/1/a.bin", 3, "0" * 64)
    assert ArtifactFile(**unseal(seal(vars(file)))) == file


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="no folder can be made below /proc")
def test_where_no_folder_can_be_made_is_no_missing_file() -> None:
    with pytest.raises(SettingError, match="no folder can be made here"):
        open_store("/proc/nothing").create_if_absent("a/b", b"")
