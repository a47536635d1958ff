"""Credentials for object storage: found where the cloud's own tools look for them, and kept out of every text."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import threading
import time
from configparser import ConfigParser, Error
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TypedDict

from latent_encoder.masking import keep_secret

SECRET_VARIABLES = (
    "AWS_SECRET_ACCESS_KEY",
    "AWS_SESSION_TOKEN",
    "AWS_TOKEN",
    "AWS_CONTAINER_AUTHORIZATION_TOKEN",
    "AWS_SSE_CUSTOMER_KEY_BASE64",
    "AZURE_STORAGE_ACCOUNT_KEY",
    "AZURE_STORAGE_ACCESS_KEY",
    "AZURE_STORAGE_MASTER_KEY",
    "AZURE_STORAGE_CLIENT_SECRET",
    "AZURE_STORAGE_SAS_KEY",
    "AZURE_STORAGE_SAS_TOKEN",
    "AZURE_STORAGE_TOKEN",
    "AZURE_CLIENT_SECRET",
    "GOOGLE_SERVICE_ACCOUNT_KEY",
)

OTHER_SOURCES = (
    "AWS_ACCESS_KEY_ID",
    "AWS_WEB_IDENTITY_TOKEN_FILE",
    "AWS_CONTAINER_CREDENTIALS_RELATIVE_URI",
    "AWS_CONTAINER_CREDENTIALS_FULL_URI",
)
"""Variables with credentials for S3 that count before a profile, as in Amazon's tools. obstore reads them itself."""

READ_AGAIN_S = 60.0
"""Seconds after which a profile is read again: keys that were exchanged in the file are in use within a minute."""

RENEWED_BEFORE_S = 300.0
"""Seconds before their end at which obstore asks for new credentials."""

PROCESS_S = 30.0
"""Longest time of a `credential_process`, in seconds: it may call a server of its own."""

RUN_AGAIN_S = 10.0
"""Shortest time between two runs of it, in seconds, if the credentials are about to expire whenever they are asked for."""

OF_ANOTHER_TOOL = ("role_arn", "sso_session", "sso_start_url", "source_profile", "credential_source", "login_session")
"""Names in a profile for credentials that only Amazon's tools can get."""


class NoCredentials(Exception):
    """A profile has no credentials that can be used."""


def mask_secrets() -> None:
    """Mask the secrets in the environment in every text from now on."""
    for name in SECRET_VARIABLES:
        keep_secret(os.environ.get(name, ""))


class Profile:
    """The profile that AWS_PROFILE names, in the files of Amazon's tools. obstore reads no profiles.

    It is read again after a while, so that keys that were exchanged in the file are used without a new start.
    """

    def __init__(self) -> None:
        self.name = os.environ.get("AWS_PROFILE") or "default"
        self._process: tuple[float, Credentials] | None = None
        self._running = threading.Lock()

    @property
    def region(self) -> str | None:
        """The region in the profile, unless the environment has one."""
        return None if any(map(os.environ.get, ("AWS_REGION", "AWS_DEFAULT_REGION"))) else self._options().get("region")

    @property
    def is_used(self) -> bool:
        """True if the credentials come from the profile: the environment has none, and the profile has or should have them.

        Raises:
            NoCredentials: they can be had only from another tool, or AWS_PROFILE names no profile.
        """
        if any(os.environ.get(name) for name in OTHER_SOURCES):
            return False
        options = self._options()
        if _has_keys(options) or "credential_process" in options:
            return True
        if any(name in options for name in OF_ANOTHER_TOOL):
            raise NoCredentials(
                f"the profile {self.name} has no keys; add a profile with the line credential_process = aws configure "
                f"export-credentials --profile {self.name} --format process, and name that one in AWS_PROFILE"
            )
        if os.environ.get("AWS_PROFILE") and not options:
            raise NoCredentials(f"there is no profile {self.name}, which AWS_PROFILE names")
        return False

    def __call__(self) -> Credentials:
        """Return the credentials; obstore calls this when the former ones end.

        Raises:
            NoCredentials: the profile has none any more, or its process fails.
        """
        options = self._options()
        if _has_keys(options):
            found: Credentials = {
                "access_key_id": options["aws_access_key_id"],
                "secret_access_key": options["aws_secret_access_key"],
                "token": options.get("aws_session_token"),
                "expires_at": datetime.now(UTC) + timedelta(seconds=RENEWED_BEFORE_S + READ_AGAIN_S),
            }
        elif command := options.get("credential_process"):
            found = self._from_process(command)
        else:
            raise NoCredentials(f"the profile {self.name} has no keys")
        keep_secret(found["secret_access_key"])
        keep_secret(found["token"] or "")
        return found

    def _from_process(self, command: str) -> Credentials:
        with self._running:
            if self._process is None or time.monotonic() - self._process[0] >= RUN_AGAIN_S:
                found = _run(command, self.name)
                self._process = time.monotonic(), found
            return self._process[1]

    def _options(self) -> dict[str, str]:
        found: dict[str, str] = {}
        for variable, usual, section in (
            ("AWS_CONFIG_FILE", "~/.aws/config", self.name if self.name == "default" else f"profile {self.name}"),
            ("AWS_SHARED_CREDENTIALS_FILE", "~/.aws/credentials", self.name),
        ):
            found |= _section(Path(os.environ.get(variable) or usual).expanduser(), section)
        return found


class Credentials(TypedDict):
    """The credentials for S3, as obstore takes them."""

    access_key_id: str
    secret_access_key: str
    token: str | None
    expires_at: datetime | None


def _has_keys(options: dict[str, str]) -> bool:
    return {"aws_access_key_id", "aws_secret_access_key"} <= options.keys()


def _run(command: str, profile: str) -> Credentials:
    """Return the credentials that a `credential_process` prints. Nothing of its output is quoted, because it is secret."""
    fault = f"the credential_process of the profile {profile}"
    try:
        ended = subprocess.run(  # noqa: S603  # the file with the profile is the operator's
            shlex.split(command), stdin=subprocess.DEVNULL, capture_output=True, timeout=PROCESS_S, check=False
        )
    except subprocess.TimeoutExpired:
        raise NoCredentials(f"{fault} takes longer than {PROCESS_S:g} s") from None
    except (OSError, ValueError) as exc:
        raise NoCredentials(f"{fault} cannot be run ({type(exc).__name__})") from None
    if ended.returncode:
        raise NoCredentials(f"{fault} ended with status {ended.returncode}")
    try:
        printed = json.loads(ended.stdout)
        end = printed.get("Expiration")
        return {
            "access_key_id": str(printed["AccessKeyId"]),
            "secret_access_key": str(printed["SecretAccessKey"]),
            "token": printed.get("SessionToken"),
            "expires_at": datetime.fromisoformat(end).astimezone(UTC) if end else None,
        }
    except (ValueError, KeyError, TypeError, AttributeError):
        raise NoCredentials(f"{fault} prints no credentials as JSON") from None


def _section(file: Path, section: str) -> dict[str, str]:
    parser = ConfigParser(interpolation=None)
    try:
        parser.read(file, encoding="utf-8")
    except (OSError, Error, UnicodeError):
        return {}
    options = parser[section] if parser.has_section(section) else {}
    return {name: value for name, value in options.items() if value}
