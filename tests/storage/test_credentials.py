"""Credentials for S3: profiles, processes that print them, and those that are wrong or expire."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from errors import AccessDenied, OutputDirNotWritable
from latent_encoder.masking import masked
from latent_encoder.outputs.bucket import reported
from latent_encoder.storage import credentials
from latent_encoder.storage.access import AllowedUrls
from latent_encoder.storage.images import read_from_url
from latent_encoder.storage.locations import ObjectPath
from latent_encoder.storage.stores import store_of
from tests.kafka_tools import MakeBench, read_responses, wait_until
from tests.storage.conftest import Bucket
from tests.storage.s3_server import ACCESS_KEY, SECRET_KEY


@dataclass
class Profiles:
    """The files of Amazon's tools for one test; the environment has no other credentials."""

    folder: Path

    def write(self, credentials: str = "", config: str = "") -> None:
        (self.folder / "credentials").write_text(credentials)
        (self.folder / "config").write_text(config)

    def process(self, *lines: str) -> str:
        """Return the option that names a program with these lines."""
        program = self.folder / "program.py"
        program.write_text("\n".join(("import json, os, sys, time", *lines)))
        return f"credential_process = '{sys.executable}' '{program}'\n"


@pytest.fixture
def profiles(bucket: Bucket, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Profiles:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
        del bucket.environment[name]
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "credentials"))
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    return Profiles(tmp_path)


def read(url: str) -> bytes:
    return read_from_url(url, AllowedUrls("image_path", retries=0, timeout_s=5), 10_000_000)


def keys(access: str = ACCESS_KEY, secret: str = SECRET_KEY) -> str:
    return f"aws_access_key_id = {access}\naws_secret_access_key = {secret}\n"


def printing(access: str = ACCESS_KEY, secret: str = SECRET_KEY, **more: object) -> str:
    return f"print({json.dumps({'Version': 1, 'AccessKeyId': access, 'SecretAccessKey': secret, **more})!r})"


def test_keys_that_were_exchanged_in_the_file(bucket: Bucket, profiles: Profiles, monkeypatch: pytest.MonkeyPatch) -> None:
    """New keys in the file of the profile are used without a new start."""
    monkeypatch.setattr(credentials, "READ_AGAIN_S", 0.0)
    url = bucket.add()
    profiles.write(f"[default]\n{keys('nobody', 'secret-of-nobody')}")
    with pytest.raises(AccessDenied, match=r"credentials of the service do not open.*InvalidAccessKeyId") as refused:
        read(url)
    assert refused.value.storage_fault == (bucket.url, True)
    profiles.write(f"[default]\n{keys()}")
    wait_until(lambda: _opens(url), "the new keys", 10)
    assert "secret-of-nobody" not in masked("the key is secret-of-nobody")


def _opens(url: str) -> bool:
    try:
        return bool(read(url))
    except AccessDenied:
        return False


@pytest.mark.parametrize("file", ["credentials", "config"])
def test_a_process_that_prints_credentials(
    bucket: Bucket, profiles: Profiles, monkeypatch: pytest.MonkeyPatch, file: str
) -> None:
    """The credential_process of a profile, in either file, is run once for many images, and its region counts."""
    monkeypatch.setenv("AWS_PROFILE", "sso")
    end = (datetime.now(UTC) + timedelta(hours=1)).isoformat().replace("+00:00", "Z")
    command = profiles.process("open(sys.argv[0] + '.runs', 'a').write('x')", printing(Expiration=end))
    section = "[sso]" if file == "credentials" else "[profile sso]"
    profiles.write(**{file: f"{section}\nregion = eu-west-1\n{command}"})
    url = bucket.add()
    assert read(url) == read(url)
    assert (profiles.folder / "program.py.runs").read_text() == "x"


@pytest.mark.parametrize(
    ("lines", "text"),
    [
        (
            ("sys.stderr.write('secret-in-text'); sys.exit(3)",),
            "credential_process of the profile default ended with status 3",
        ),
        (("print('secret-in-text')",), "prints no credentials as JSON"),
        (("print('{}')",), "prints no credentials as JSON"),
        (("time.sleep(60)",), "takes longer than"),
        (None, "cannot be run"),
    ],
)
def test_a_process_that_fails(
    bucket: Bucket, profiles: Profiles, monkeypatch: pytest.MonkeyPatch, lines: tuple[str, ...] | None, text: str
) -> None:
    """A credential_process that fails is a fault of the service, and nothing of its output is told."""
    monkeypatch.setattr(credentials, "PROCESS_S", 1.0)
    command = "credential_process = /no/such/program\n" if lines is None else profiles.process(*lines)
    profiles.write(f"[default]\n{command}")
    with pytest.raises(AccessDenied, match=text) as refused:
        read(bucket.add())
    assert refused.value.storage_fault == (bucket.url, True)
    assert "secret-in-text" not in str(refused.value)


@pytest.mark.parametrize(
    ("config", "text"),
    [
        ("[profile work]\nsso_session = corp\nsso_account_id = 1\n", "export-credentials --profile work --format process"),
        ("[profile work]\nrole_arn = arn:aws:iam::1:role/x\nsource_profile = default\n", "export-credentials"),
        ("[profile other]\nregion = eu-west-1\n", "there is no profile work"),
    ],
)
def test_a_profile_without_keys(
    bucket: Bucket, profiles: Profiles, monkeypatch: pytest.MonkeyPatch, config: str, text: str
) -> None:
    """A profile whose credentials only another tool can get is refused with the line that makes it usable."""
    monkeypatch.setenv("AWS_PROFILE", "work")
    profiles.write(config=config)
    with pytest.raises(AccessDenied, match=text):
        read(bucket.add())


def test_the_environment_counts_before_a_profile(bucket: Bucket, profiles: Profiles, monkeypatch: pytest.MonkeyPatch) -> None:
    """If the environment has keys, no profile is looked at."""
    profiles.write(f"[default]\n{keys('nobody', 'none')}")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", ACCESS_KEY)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET_KEY)
    assert read(bucket.add())


@pytest.mark.usefixtures("apache_kafka")
def test_credentials_that_become_valid(make_bench: MakeBench, bucket: Bucket, profiles: Profiles) -> None:
    """A worker with credentials that the storage does not know waits for valid ones, and gives no request up."""
    marker = profiles.folder / "valid"
    soon = "__import__('datetime').datetime.now(__import__('datetime').timezone.utc).isoformat()"
    command = profiles.process(
        f"valid = os.path.exists({str(marker)!r})",
        f"access = {ACCESS_KEY!r} if valid else 'nobody'",
        f"print(json.dumps(dict(Version=1, AccessKeyId=access, SecretAccessKey={SECRET_KEY!r}, Expiration={soon})))",
    )
    profiles.write(f"[default]\n{command}")
    bench = make_bench()
    environment = {
        **bucket.environment,
        "AWS_SHARED_CREDENTIALS_FILE": str(profiles.folder / "credentials"),
        "ALLOWED_INPUT_URLS": f"{bucket.url}/in",
    }
    with bench.process(**environment) as worker:
        bench.send({"request_id": "r", "image_path": bucket.add()})
        worker.wait_for("breaker opened, no requests are taken until one succeeds")
        marker.touch()
        (response,) = read_responses(bench.responses, 1)
        assert response["status"] == "success"
        assert bench.dead_letters.all_within(0.5) == []
        assert SECRET_KEY not in worker.log_file.read_text()


def test_no_secret_is_in_a_failure(bucket: Bucket, profiles: Profiles) -> None:
    """The error of an output folder names the fault, not the keys."""
    profiles.write(f"[default]\n{keys(ACCESS_KEY, 'another-long-secret')}")
    place = ObjectPath(bucket.url)
    with pytest.raises(OutputDirNotWritable, match="SignatureDoesNotMatch") as failed, reported(place):
        store_of(place, AllowedUrls("output_dir", retries=0)).put("a", b"1", "00", None)
    assert failed.value.storage_fault == (bucket.url, False)
    assert "another-long-secret" not in str(failed.value)
