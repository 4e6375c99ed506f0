"""No cluster is joined by accident that anyone could join."""

from __future__ import annotations

import os
import socket
import stat
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from cluster import access
from cluster.access import answers_anyone, check_address, check_listens, has_token, is_loopback, write_token
from cluster.cli import main
from cluster.session import _local_environment, local_session, open_session
from pipeline.errors import SettingError


@pytest.fixture
def no_token(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))


@pytest.fixture
def token(no_token: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    write_token(tmp_path / "token")
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "token"))
    return tmp_path / "token"


@pytest.mark.parametrize(
    "address",
    ["127.0.0.1:6379", "localhost:6379", "[::1]:6379", "ray://127.0.0.1:10001", "http://127.0.0.1:8265/", "http://localhost"],
)
def test_loopback_needs_no_token(address: str, no_token: None) -> None:
    assert is_loopback(address)
    check_address(address)


@pytest.mark.parametrize(
    "address",
    ["10.0.0.7:6379", "head.example.org:6379", "auto", "ray://192.168.1.4:10001", "127.0.0.1@evil.example:80",
     "http://localhost.evil.example:8265", "http://evil.example/127.0.0.1:80"],
)  # fmt: skip
def test_everything_else_does(
    address: str, no_token: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(access, "answers_anyone", lambda url: False)
    with pytest.raises(SettingError, match="token"):
        check_address(address)
    check_address(address, insecure=True)
    assert address in capsys.readouterr().err, "said aloud"
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    monkeypatch.setenv("RAY_AUTH_TOKEN", "abc")
    check_address(address)


def test_a_token_file_that_ray_would_abort_at_is_named(token: Path) -> None:
    assert has_token()
    token.write_text("  \n")
    with pytest.raises(SettingError, match="holds no token"):
        has_token()
    token.unlink()
    with pytest.raises(SettingError, match="RAY_AUTH_TOKEN_PATH"):
        has_token()


def test_our_tokens_are_readable_by_their_owner_alone(no_token: None, tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        values = _local_environment(tmp_path)
    finally:
        os.umask(before)
    path = Path(values["RAY_AUTH_TOKEN_PATH"])
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert len(path.read_text()) >= 32
    with pytest.raises(FileExistsError):
        write_token(path)


def test_all_local_clusters_of_a_process_have_one_token_since_ray_reads_it_once(tmp_path: Path) -> None:
    for name in ("one", "two"):
        write_token(tmp_path / name)
    assert (tmp_path / "one").read_text() == (tmp_path / "two").read_text()


def test_a_local_cluster_has_a_token_of_its_own_unless_one_is_given(
    no_token: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for number, mode in enumerate((None, "token")):
        (tmp_path / str(number)).mkdir()
        if mode is not None:
            monkeypatch.setenv("RAY_AUTH_MODE", mode)
        assert _local_environment(tmp_path / str(number))["RAY_AUTH_MODE"] == "token"
        assert (tmp_path / str(number) / "token").exists()
    monkeypatch.setenv("RAY_AUTH_TOKEN", "given")
    assert "RAY_AUTH_TOKEN_PATH" not in _local_environment(tmp_path)
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    assert "RAY_AUTH_MODE" not in _local_environment(tmp_path)


def test_a_render_of_its_own_does_not_join_the_cluster_that_the_environment_names(
    no_token: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: dict[str, object] = {}
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    monkeypatch.setattr("ray.init", lambda **options: asked.update(options))
    monkeypatch.setattr("ray.cluster_resources", dict)
    monkeypatch.setattr("ray.shutdown", lambda: None)
    with local_session(2):
        assert (asked["address"], asked["num_cpus"]) == ("local", 2)


@pytest.fixture(params=[200, 401, 403, 500])
def dashboard(request: pytest.FixtureRequest) -> Iterator[tuple[str, int]]:
    """Something that answers on loopback with this status."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            assert "x-ray-authorization" not in {name.lower() for name in self.headers}
            self.send_response(request.param)
            self.end_headers()

        def log_message(self, *values: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}", request.param
    server.shutdown()
    thread.join()
    server.server_close()


def test_a_dashboard_that_answers_without_a_token_is_refused(
    dashboard: tuple[str, int], token: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url, status = dashboard
    assert answers_anyone(url) == (status not in (401, 403))
    monkeypatch.setattr(access, "is_loopback", lambda address: False)
    if status in (401, 403):
        check_address(url)
    else:
        with pytest.raises(SettingError, match="without a token"):
            check_address(url)
    check_address(url, insecure=True)


def test_a_dashboard_that_is_not_there_is_said_so() -> None:
    with pytest.raises(SettingError, match="does not answer"):
        answers_anyone("http://127.0.0.1:9")


@pytest.mark.parametrize("form", ["{}", "ray://{}"])
def test_a_cluster_that_is_not_there_is_said_at_once(form: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = form.format(f"127.0.0.1:{server.getsockname()[1]}")
        check_listens(address)
    with pytest.raises(SettingError, match="does not answer"):
        check_listens(address)
    with pytest.raises(SettingError, match="does not answer"), open_session(address, cpus=1):
        pytest.fail("it was joined")


def test_the_flag_has_to_be_spelled_out(
    no_token: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    seen: list[bool] = []
    monkeypatch.setattr("cluster.render.render", lambda request: seen.append(request.insecure) or 0)
    main(["render", "film.yaml", "--address", "203.0.113.9:6379"])
    main(["render", "film.yaml", "--address", "203.0.113.9:6379", "--insecure"])
    assert seen == [False, True]


@pytest.mark.parametrize(
    "address",
    ["", ":6379", "http://", "127.0.0.1:-1", "127.0.0.1:0", "127.0.0.1:99999", "http://127.0.0.1:1x", "a b:1", "[::]:"],
)
def test_what_is_no_address_is_refused_before_anything_is_asked(address: str) -> None:
    with pytest.raises(SettingError, match="is no address of a cluster"):
        check_address(address, insecure=True)


@pytest.mark.parametrize("address", ["auto", "127.0.0.1", "[::1]", "[::1]:6379", "::1:6379", "https://ray.example/x"])
def test_other_addresses_are_let_through(address: str) -> None:
    check_address(address, insecure=True)
