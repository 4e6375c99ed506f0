"""Fetching from a hub: a stand-in server on loopback that breaks connections, lies and refuses."""

from __future__ import annotations

import hashlib
import json
import shutil
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import urlsplit

import pytest
import torch
from checkpoint_folders import write_checkpoint

import model.pull
from model.checkpoint import load_dit
from model.digest import digest
from model.errors import CheckpointError
from model.manifest import read_manifest
from model.pull import is_needed, pull
from model.verify import verify

REPO = "meituan-longcat/LongCat-Video"
COMMIT = "a" * 40
LARGE = "dit/diffusion_pytorch_model-00002-of-00003.safetensors"
LARGE_BYTES_FROM = 1000  # files from this size on are in large-file storage


class Hub(ThreadingHTTPServer):
    """The few endpoints of a hub that a download needs. `faults`: file -> what to do to its next requests."""

    daemon_threads = True

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), Endpoints)
        self.folder = folder
        self.commit = COMMIT
        self.faults: dict[str, list[str]] = {}
        self.refusal: tuple[int, str] | None = None
        self.served: list[tuple[str, str | None]] = []
        self.tokens: dict[str, str | None] = {}

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def names(self) -> list[str]:
        return sorted(p.relative_to(self.folder).as_posix() for p in self.folder.rglob("*") if p.is_file())


class Endpoints(BaseHTTPRequestHandler):
    server: Hub

    def do_GET(self) -> None:
        path = urlsplit(self.path).path
        if path.startswith(f"/api/models/{REPO}/revision/"):
            self.list_files()
        elif path.startswith(f"/{REPO}/resolve/{self.server.commit}/"):
            self.resolve(path.split(f"/resolve/{self.server.commit}/")[1])
        elif path.startswith("/storage/"):
            self.send_file(path.removeprefix("/storage/"), "storage")
        else:
            self.send_error(404)

    def list_files(self) -> None:
        if self.server.refusal:
            status, code = self.server.refusal
            self.reply(status, b"{}", {"X-Error-Code": code})
            return
        siblings = []
        for name in self.server.names():
            content = (self.server.folder / name).read_bytes()
            entry = {"rfilename": name, "size": len(content), "blobId": git_hash(content)}
            if len(content) >= LARGE_BYTES_FROM:
                sha256 = hashlib.sha256(content).hexdigest()
                entry["lfs"] = {"sha256": sha256, "size": len(content), "pointerSize": 1}
            siblings.append(entry)
        listing = {"id": REPO, "sha": self.server.commit, "siblings": siblings}
        self.reply(200, json.dumps(listing).encode(), {})

    def resolve(self, name: str) -> None:
        if (self.server.folder / name).stat().st_size < LARGE_BYTES_FROM:
            self.send_file(name, "hub")
            return
        self.server.tokens["hub"] = self.headers.get("Authorization")
        # Another host, as with a real hub's content network.
        place = f"http://localhost:{self.server.server_port}/storage/{name}"
        self.reply(302, b"", {"Location": place})

    def send_file(self, name: str, where: str) -> None:
        self.server.tokens[where] = self.headers.get("Authorization")
        self.server.served.append((name, self.headers.get("Range")))
        faults = self.server.faults.get(name) or [""]
        fault = faults.pop(0)
        content = (self.server.folder / name).read_bytes()
        if fault == "refuse":
            self.reply(503, b"", {})
            return
        if fault == "lie":
            content = content[:-1] + bytes([content[-1] ^ 1])
        start = 0
        if self.headers.get("Range") and fault != "ignore range":
            start = int(self.headers["Range"].removeprefix("bytes=").removesuffix("-"))
        rest = content[start:]
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(rest)))
        self.end_headers()
        self.wfile.write(rest[: len(rest) // 2] if fault == "cut" else rest)

    def reply(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


def git_hash(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


@pytest.fixture(scope="module")
def original(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("original") / "checkpoint"
    write_checkpoint(folder)
    (folder / "README.md").write_text("about")
    (folder / "assets").mkdir()
    (folder / "assets" / "film.mp4").write_bytes(b"x" * 5000)
    (folder / "dit" / "training.bin").write_bytes(b"pickle")
    return folder


@pytest.fixture
def hub(original, tmp_path, monkeypatch) -> Iterator[Hub]:
    server = Hub(shutil.copytree(original, tmp_path / "repository"))
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    monkeypatch.setenv("HF_ENDPOINT", server.url)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1,localhost")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.setattr(model.pull, "RETRY_WAITS_S", (0.0, 0.0))
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def target(tmp_path) -> Path:
    return tmp_path / "target"


def fetched(target: Path) -> set[str]:
    return {path.relative_to(target).as_posix() for path in target.rglob("*") if path.is_file()}


def ranges_of(hub: Hub, name: str) -> list[str | None]:
    return [asked for served, asked in hub.served if served == name]


def test_pulled_folder_is_complete_verified_and_loads(hub, target):
    manifest = pull(REPO, target)
    needed = {name for name in hub.names() if is_needed(name)}
    assert fetched(target) == needed | {"manifest.json"}
    assert needed.isdisjoint({"README.md", "assets/film.mp4", "dit/training.bin"})
    assert manifest == read_manifest(target)
    assert manifest.source == {"repo_id": REPO, "revision": COMMIT}
    assert verify(target).digest == digest(target) == digest_without_pickle(hub.folder)
    load_dit(target, device="cpu", dtype=torch.float32)


def digest_without_pickle(folder: Path) -> str:
    (folder / "dit" / "training.bin").unlink()
    return digest(folder)


def test_broken_connection_goes_on_from_the_last_byte(hub, target):
    size = (hub.folder / LARGE).stat().st_size
    hub.faults[LARGE] = ["cut", "cut", "refuse", "cut"]
    pull(REPO, target)
    asked = [None if r is None else int(r[6:-1]) for r in ranges_of(hub, LARGE)]
    assert asked[0] is None
    assert asked[1:4] == [size // 2, size // 2 + (size - size // 2) // 2, asked[2]]
    assert len(asked) == 5
    assert (target / LARGE).read_bytes() == (hub.folder / LARGE).read_bytes()


def test_interrupted_pull_goes_on_where_it_stopped(hub, target):
    received = 0

    def interrupt(what: str, done: int, total: int) -> None:
        nonlocal received
        received += what == LARGE
        if received > 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pull(REPO, target, progress=interrupt)
    (partial,) = target.rglob("*.partial")
    assert partial.name.startswith(Path(LARGE).name)
    have = partial.stat().st_size
    assert 0 < have < (hub.folder / LARGE).stat().st_size
    finished = fetched(target)
    hub.served.clear()
    pull(REPO, target)
    assert ranges_of(hub, LARGE) == [f"bytes={have}-"]
    assert {name for name, _ in hub.served}.isdisjoint(finished)
    assert digest(target) == digest_without_pickle(hub.folder)


def test_server_without_ranges_sends_the_file_again(hub, target):
    hub.faults[LARGE] = ["cut", "ignore range"]
    calls = []
    pull(REPO, target, progress=lambda *call: calls.append(call))
    assert (target / LARGE).read_bytes() == (hub.folder / LARGE).read_bytes()
    assert calls[-1][1] == calls[-1][2]


@pytest.mark.parametrize("name", [LARGE, "dit/config.json"])
def test_bytes_with_another_hash_are_refused_and_fetched_anew(hub, target, name):
    hub.faults[name] = ["lie"]
    with pytest.raises(CheckpointError, match=f"{name}: the bytes received do not have the hash"):
        pull(REPO, target)
    assert not (target / name).exists()
    assert not list(target.rglob("*.partial"))
    pull(REPO, target)
    assert (target / name).read_bytes() == (hub.folder / name).read_bytes()


def test_damaged_file_in_the_target_is_fetched_again(hub, target):
    pull(REPO, target)
    content = bytearray((target / LARGE).read_bytes())
    content[-1] ^= 1
    (target / LARGE).write_bytes(bytes(content))
    hub.served.clear()
    pull(REPO, target)
    assert {name for name, _ in hub.served} == {LARGE}
    verify(target)


def test_hub_that_stays_away_is_given_up_with_the_remedy(hub, target):
    hub.faults[LARGE] = ["cut"] + ["refuse"] * 10
    with pytest.raises(CheckpointError, match=r"stopped at byte \d+ of \d+ .*503.*run again to go on"):
        pull(REPO, target)
    assert len(ranges_of(hub, LARGE)) == 1 + len(model.pull.RETRY_WAITS_S)
    assert not (target / "manifest.json").exists()


def test_token_goes_to_the_hub_and_not_to_its_storage(hub, target):
    pull(REPO, target)
    assert hub.tokens == {"hub": "Bearer hf_secret", "storage": None}


@pytest.mark.parametrize(
    ("refusal", "message"),
    [
        ((401, "RepoNotFound"), "no such repository .* needs HF_TOKEN"),
        ((404, "RevisionNotFound"), "has no revision 'main'"),
        ((403, "GatedRepo"), "needs permission"),
        ((500, ""), "does not answer as a hub"),
    ],
)
def test_refusals_are_explained(hub, target, refusal, message):
    hub.refusal = refusal
    with pytest.raises(CheckpointError, match=message):
        pull(REPO, target)
    assert not target.exists()


def test_absent_hub_is_explained(hub, target, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(CheckpointError, match="check the connection and HF_ENDPOINT"):
        pull(REPO, target)


def test_id_that_is_none_is_refused(hub, target):
    with pytest.raises(CheckpointError, match="wanted owner/name"):
        pull("not a/valid/id", target)


def test_repository_with_pickles_only_is_refused_before_the_first_byte(hub, target):
    for file in list(hub.folder.rglob("*.safetensors")):
        file.rename(file.with_suffix(".bin"))
    with pytest.raises(CheckpointError, match="pickles are never loaded") as caught:
        pull(REPO, target)
    assert caught.value.problems == [
        f"{part}/: no safetensors file" for part in ("text_encoder", "vae", "dit")
    ]
    assert hub.served == []


def test_another_revision_does_not_mix_into_the_same_target(hub, target):
    pull(REPO, target)
    hub.commit = "b" * 40
    with pytest.raises(CheckpointError, match="choose another target"):
        pull(REPO, target)


def test_full_disk_is_noticed_before_the_first_byte(hub, target, monkeypatch):
    usage = shutil.disk_usage(hub.folder)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    with pytest.raises(CheckpointError, match="free some or choose another target"):
        pull(REPO, target)
    assert hub.served == []


@pytest.mark.parametrize(
    "name", ["../x.json", "dit/../../x.json", "/dit/x.json", "dit/.x.json", "x.json", "dit/x.bin"]
)
def test_names_outside_the_parts_are_never_fetched(name):
    assert not is_needed(name)
