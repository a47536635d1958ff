"""The doctor on object storage and web servers: each fault is found with its next step, and nothing is left behind."""

from __future__ import annotations

import json
import os
import shutil
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from pathlib import Path
from typing import Any

import pytest

from config import Settings
from latent_encoder.doctor import storage
from latent_encoder.doctor.check import Check, State
from latent_encoder.doctor.storage import check_storage
from tests.broker.certificates import Certificates
from tests.broker.ports import free_ports
from tests.doctor.test_doctor import examined
from tests.helpers import VAE, RunMain
from tests.storage.conftest import Bucket
from tests.storage.faulty_proxy import Fault, Kind
from tests.storage.s3_server import IGNORING, SECRET_KEY, S3Server
from tests.storage.web_server import WebServer, redirect, status

TICK, WARNING, CROSS = State
KEYS = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY")
SIGNATURE = "X-Amz-Signature=0123456789abcdef"

Examine = Callable[..., list[Check]]


@pytest.fixture
def examine(settings: Settings) -> Examine:
    """Return a function that examines the storage of these settings."""

    def examine(inputs: tuple[str, ...] = (), outputs: tuple[str, ...] = (), **changes: Any) -> list[Check]:
        limits = {"allowed_input_urls": inputs or None, "allowed_output_urls": outputs or None}
        checks = examined(check_storage, settings.model_copy(update={**limits, "storage_timeout_s": 5.0, **changes}))
        assert not any(SECRET_KEY in text or "X-Amz" in text for check in checks for text in (check.found, check.advice))
        return checks

    return examine


def states(checks: list[Check]) -> dict[str, State]:
    return {check.name: check.state for check in checks}


def fault(checks: list[Check]) -> Check:
    """Return the only check that is not a tick."""
    (check,) = [check for check in checks if check.state is not TICK]
    return check


def test_without_urls_there_is_no_check(examine: Examine) -> None:
    """Settings without a URL give no finding, and obstore is not asked for."""
    assert examine() == []


def test_a_sound_bucket(bucket: Bucket, examine: Examine) -> None:
    """Everything is tried, and the hidden objects are removed."""
    bucket.add()
    checks = examine((f"{bucket.url}/in",), (f"{bucket.url}/out",), output_dir=f"{bucket.url}/out")
    assert set(states(checks).values()) == {TICK}
    assert [check.name for check in checks] == [
        "object storage",
        "storage credentials",
        "storage server",
        "storage clock",
        "storage write",
        "storage read",
    ]
    assert "AWS_ACCESS_KEY_ID in the environment" in checks[1].found
    assert "(OUTPUT_DIR)" in checks[4].found
    assert bucket.names() == []
    assert bucket.names("in") == ["astronaut.png"]
    assert {call.method for call in bucket.proxy.calls} == {"GET", "HEAD", "PUT", "DELETE"}


def test_the_report(bucket: Bucket, run_main: RunMain) -> None:
    """The process reports it as text and as JSON, in a group of its own; a fault is status 1, and no secret is shown."""
    env = {**bucket.environment, "ALLOWED_OUTPUT_URLS": bucket.url, "HTTP_PORT": "0", "COMFYUI_PATH": "/nowhere"}
    arguments = ("doctor", "--vae_model_name", VAE, "--output_dir", f"{bucket.url}/out")
    report = json.loads(run_main(*arguments, "--json", env=env).stdout)
    group = [check for check in report["checks"] if check["group"] == "Object storage"]
    assert [check["state"] for check in group if check["name"] == "storage write"] == ["tick", "tick"]
    done = run_main(*arguments, env={**env, "AWS_SECRET_ACCESS_KEY": "not-the-secret-of-it"})
    assert done.returncode == 1
    assert "storage credentials" in done.stdout
    assert "not-the-secret-of-it" not in done.stdout + done.stderr


@pytest.mark.parametrize("name", KEYS)
def test_wrong_keys(bucket: Bucket, examine: Examine, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """The finding names the source of the credentials and the server's code."""
    monkeypatch.setenv(name, "wrong-one")
    for places in (((bucket.url,), ()), ((), (bucket.url,))):
        found = fault(examine(*places))
        assert (found.name, found.state) == ("storage credentials", CROSS)
        assert "AWS_ACCESS_KEY_ID in the environment" in found.found
        assert "wrong-one" not in found.found


def test_keys_of_a_profile(bucket: Bucket, examine: Examine, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Keys of a profile are named by the profile."""
    keys = [bucket.environment[name] for name in KEYS]
    for name in KEYS:
        monkeypatch.delenv(name)
    (tmp_path / "keys").write_text("[mine]\naws_access_key_id={}\naws_secret_access_key={}\n".format(*keys))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "keys"))
    monkeypatch.setenv("AWS_PROFILE", "mine")
    checks = examine((bucket.url,))
    assert set(states(checks).values()) == {TICK}
    assert "s3:// by the profile mine" in checks[1].found


def test_no_credentials(bucket: Bucket, examine: Examine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without keys the role of the machine is tried, and the finding says that there is none."""
    for name in KEYS:
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_METADATA_ENDPOINT", f"http://127.0.0.1:{free_ports(1)[0]}")
    monkeypatch.setenv("HOME", "/nowhere")
    found = fault(examine((bucket.url,)))
    assert (found.name, found.state) == ("storage credentials", CROSS)
    assert "the machine's role" in found.found


def test_a_key_without_its_secret(bucket: Bucket, examine: Examine, monkeypatch: pytest.MonkeyPatch) -> None:
    """The missing variable is named."""
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    monkeypatch.setenv("AWS_METADATA_ENDPOINT", f"http://127.0.0.1:{free_ports(1)[0]}")
    found = examine((bucket.url,))[1]
    assert (found.state, found.found) == (CROSS, "s3:// needs AWS_SECRET_ACCESS_KEY, which is not set")


def test_a_missing_bucket(bucket: Bucket, examine: Examine) -> None:
    """Inputs and outputs in a bucket that does not exist are crosses, each with its setting."""
    shutil.rmtree(bucket.folder)
    checks = examine((f"{bucket.url}/in",), (f"{bucket.url}/out",))
    assert [(check.name, check.state) for check in checks if check.state is not TICK] == [("storage bucket", CROSS)] * 2
    assert "ALLOWED_INPUT_URLS" in checks[-1].advice


@pytest.mark.parametrize(
    ("method", "path", "writes", "state", "reason"),
    [
        ("PUT", "lock", True, CROSS, "refuses to write (403"),
        ("DELETE", "lock", True, CROSS, "refuses to remove (403"),
        ("GET", "lock", True, CROSS, "refuses to read (403"),
        ("GET", "lock|list-type", False, WARNING, "refuses to list, and to read an object that is not there"),
        ("GET", "lock", False, CROSS, "can be listed, but the storage refuses to read"),
        ("HEAD", "photo", False, CROSS, "can be listed, but the storage refuses to read"),
        ("GET", "list-type", True, TICK, ""),
        ("GET", "list-type", False, TICK, "it may not be listed"),
    ],
)
def test_missing_permissions(
    bucket: Bucket, examine: Examine, method: str, path: str, writes: bool, state: State, reason: str
) -> None:
    """Each call that is refused is named, with the permissions that the task needs."""
    bucket.add("photo.jpg")
    bucket.proxy.fault("status", method, path, times=100, status=403)
    checks = examine(*(((), (bucket.url,)) if writes else ((bucket.url,), ())))
    assert checks[-1].state is state
    assert reason in checks[-1].found
    assert state is TICK or "Grant s3:GetObject" in checks[-1].advice
    left = [path.name for path in bucket.folder.iterdir() if path.is_file()]
    assert len(left) == (method == "DELETE")
    assert all(name in checks[-1].found for name in left)


def test_ignored_conditions(bucket: Bucket, examine: Examine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A server that ignores conditions is a cross, and the hidden object is removed."""
    with S3Server(tmp_path / "old", IGNORING) as server:
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{server.port}")
        (server.data / bucket.name).mkdir()
        found = fault(examine((), (f"{bucket.url}/out",)))
        assert (found.name, found.state) == ("storage write", CROSS)
        assert "ignores If-None-Match" in found.found
        assert [path for path in (server.data / bucket.name).rglob("*") if path.is_file()] == []


@pytest.mark.parametrize("kind", ["drop", "lose"])
@pytest.mark.parametrize("number", range(4))
def test_lost_calls_are_no_finding(
    bucket: Bucket, examine: Examine, kind: Kind, number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A write whose call or response is lost once is repeated, and its own object is not taken for another's."""
    counted = iter(range(100))

    def one(method: str, path: str) -> Fault | None:
        return Fault(kind, method, path) if method == "PUT" and next(counted) == number else None

    monkeypatch.setattr(bucket.proxy, "_next_fault", one)
    assert set(states(examine((), (bucket.url,))).values()) == {TICK}
    assert list(bucket.folder.iterdir()) == []


@pytest.mark.parametrize("method", ["PUT", "GET"])
def test_an_overloaded_server(bucket: Bucket, examine: Examine, method: str) -> None:
    """A server that responds 503 to each call is a cross, and no object is left."""
    bucket.proxy.fault("status", method, "lock", times=1000)
    found = fault(examine((), (bucket.url,)))
    assert (found.name, found.state) == ("storage server", CROSS)
    assert "503 Service Unavailable" in found.found
    assert [path for path in bucket.folder.rglob("*") if path.is_file()] == []


def test_a_server_that_hangs(bucket: Bucket, examine: Examine) -> None:
    """A server that takes connections and is silent ends the examination of its places within the limits."""
    bucket.proxy.fault("hold", "GET", "", times=1000)
    bucket.proxy.fault("hold", "PUT", "", times=1000)
    began = time.monotonic()
    checks = examine((f"{bucket.url}/a", f"{bucket.url}/b"), (bucket.url,), storage_timeout_s=0.5)
    assert time.monotonic() - began < 10
    assert [check.name for check in checks if check.state is CROSS] == ["storage server"] * 3


def test_a_server_that_is_away(bucket: Bucket, examine: Examine, monkeypatch: pytest.MonkeyPatch) -> None:
    """A port that nobody listens on, and a name that does not exist, are told apart."""
    for endpoint, reason in (
        (f"http://127.0.0.1:{free_ports(1)[0]}", "no connection: Connection refused"),
        ("http://no-such-host.invalid:9000", "its name cannot be looked up"),
    ):
        monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
        found = fault(examine((bucket.url,)))
        assert (found.name, found.state) == ("storage server", CROSS)
        assert reason in found.found


@pytest.mark.parametrize(
    ("minutes", "state", "words"),
    [(0, TICK, "as that of"), (-3, WARNING, "3 min ahead of"), (20, CROSS, "20 min behind"), (-20, CROSS, "20 min ahead of")],
)
def test_a_clock_that_is_off(bucket: Bucket, examine: Examine, minutes: int, state: State, words: str) -> None:
    """The server's `Date` tells how far off the clock is; from 15 minutes on, signatures are refused."""
    bucket.proxy.date = lambda: format_datetime(datetime.now(UTC) + timedelta(minutes=minutes), usegmt=True)
    (clock,) = [check for check in examine((bucket.url,)) if check.name == "storage clock"]
    assert clock.state is state
    assert words in clock.found


def test_web_servers(web: WebServer, examine: Examine) -> None:
    """A prefix is reached if the server responds, whatever it has there; its query is not shown."""
    web.pages |= {
        "/image.png": b"image",
        "/private": status(403),
        "/busy": status(503),
        "/away": redirect("https://example.org/"),
    }
    paths = ("/image.png", "/folder/", "/private", "/busy", "/away")
    checks = examine(tuple(web.url(f"{path}?{SIGNATURE}") for path in paths))
    assert [check.state for check in checks] == [TICK, TICK, TICK, CROSS, CROSS]
    assert "HTTP status 503" in checks[3].found
    assert "redirected" in checks[4].found
    assert all("(ALLOWED_INPUT_URLS)" in check.found for check in checks)


def test_web_servers_with_tls(certificates: Certificates, examine: Examine) -> None:
    """A certificate that no known authority signed is a cross, and so is a private address that a name leads to."""
    with WebServer(certificates.server) as server:
        (found,) = examine((server.url("/images", "localhost"),))
        assert found.state is CROSS
        assert "certificate is not valid" in found.found


def test_a_web_server_that_hangs(web: WebServer, examine: Examine) -> None:
    """It ends within the time-out and one repetition."""
    web.pages["/slow"] = lambda _: time.sleep(20)
    began = time.monotonic()
    (found,) = examine((web.url("/slow"),), storage_timeout_s=0.5)
    assert (found.state, time.monotonic() - began < 8) == (CROSS, True)


def test_a_place_that_takes_too_long(bucket: Bucket, examine: Examine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever hangs, the examination of a place is given up."""
    monkeypatch.setattr(storage, "CALLS", 1)
    bucket.proxy.latency_s = 0.2
    found = fault(examine((bucket.url,), storage_timeout_s=0.3))
    assert "was not examined within 0.3 s" in found.found


def test_without_obstore(examine: Examine, monkeypatch: pytest.MonkeyPatch) -> None:
    """The missing package is one cross with the command that installs it; web servers do not need it."""
    monkeypatch.setitem(sys.modules, "obstore", None)
    (found,) = examine(("s3://bucket/in",), ("s3://bucket/out",))
    assert (found.name, found.state) == ("object storage", CROSS)
    assert "./setup_comfyui.sh --object-storage" in found.advice


def test_azure_without_its_account(examine: Examine, monkeypatch: pytest.MonkeyPatch) -> None:
    """The variable that Azure needs is named."""
    for name in [name for name in os.environ if name.startswith("AZURE_")]:
        monkeypatch.delenv(name)
    checks = examine(("az://container/in",))
    assert [check.state for check in checks] == [TICK, CROSS, CROSS]
    assert "AZURE_STORAGE_ACCOUNT_NAME" in checks[1].found
