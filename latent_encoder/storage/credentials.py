"""Credentials for object storage: found where the cloud's own tools look for them, and kept out of every text."""

from __future__ import annotations

import os
from configparser import ConfigParser, Error
from pathlib import Path

from latent_encoder.masking import keep_secret

SECRET_VARIABLES = (
    "AWS_SECRET_ACCESS_KEY",
    "AWS_SESSION_TOKEN",
    "AZURE_STORAGE_ACCOUNT_KEY",
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

IN_PROFILE = {
    "aws_access_key_id": "access_key_id",
    "aws_secret_access_key": "secret_access_key",
    "aws_session_token": "session_token",
    "region": "region",
}
"""Options of obstore, by their names in a profile."""


def mask_secrets() -> None:
    """Mask the secrets in the environment in every text from now on."""
    for name in SECRET_VARIABLES:
        keep_secret(os.environ.get(name, ""))


def profile_options() -> dict[str, str]:
    """Return the keys and the region of the profile that AWS_PROFILE names; nothing if the environment has other credentials.

    obstore reads no profiles. Those without keys in the file, for example of a single sign-on, are not used.
    """
    if any(os.environ.get(name) for name in OTHER_SOURCES):
        return {}
    profile = os.environ.get("AWS_PROFILE") or "default"
    found: dict[str, str] = {}
    for variable, usual, section in (
        ("AWS_CONFIG_FILE", "~/.aws/config", profile if profile == "default" else f"profile {profile}"),
        ("AWS_SHARED_CREDENTIALS_FILE", "~/.aws/credentials", profile),
    ):
        found |= _section(Path(os.environ.get(variable) or usual).expanduser(), section)
    if not {"access_key_id", "secret_access_key"} <= found.keys():
        found = {name: value for name, value in found.items() if name == "region"}
    if os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION"):
        found.pop("region", None)
    for name in ("secret_access_key", "session_token"):
        keep_secret(found.get(name, ""))
    return found


def _section(file: Path, section: str) -> dict[str, str]:
    parser = ConfigParser(interpolation=None)
    try:
        parser.read(file, encoding="utf-8")
    except (OSError, Error, UnicodeError):
        return {}
    options = parser[section] if parser.has_section(section) else {}
    return {IN_PROFILE[name]: value for name, value in options.items() if name in IN_PROFILE and value}
