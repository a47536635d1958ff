"""The servers of object storage and the sources of credentials, as obstore finds them in the environment."""

from __future__ import annotations

import os
from pathlib import Path

from latent_encoder.storage.credentials import OTHER_SOURCES, NoCredentials, Profile
from latent_encoder.storage.locations import ObjectPath

SOURCES = {
    "s3": OTHER_SOURCES,
    "gs": (
        "GOOGLE_SERVICE_ACCOUNT",
        "GOOGLE_SERVICE_ACCOUNT_PATH",
        "GOOGLE_SERVICE_ACCOUNT_KEY",
        "GOOGLE_APPLICATION_CREDENTIALS",
    ),
    "az": (
        "AZURE_STORAGE_ACCOUNT_KEY",
        "AZURE_STORAGE_SAS_KEY",
        "AZURE_STORAGE_SAS_TOKEN",
        "AZURE_STORAGE_TOKEN",
        "AZURE_CLIENT_SECRET",
        "AZURE_FEDERATED_TOKEN_FILE",
    ),
}
"""The variables that give credentials, in the order in which they count."""

UNSIGNED = {"s3": "AWS_SKIP_SIGNATURE", "gs": "GOOGLE_SKIP_SIGNATURE", "az": "AZURE_SKIP_SIGNATURE"}
"""Variables that turn signatures off, for storage that everybody may read."""

GCLOUD = "~/.config/gcloud/application_default_credentials.json"

MACHINE = {"s3": "the machine's role", "gs": "the machine's service account", "az": "the machine's managed identity"}


def source_of_credentials(scheme: str) -> str | None:
    """Return the source of the credentials by its name, never its value; None if only the machine's own account is left."""
    if (unsigned := UNSIGNED[scheme]) in os.environ and _value(unsigned).lower() in ("1", "true", "yes"):
        return f"none, because of {unsigned}"
    if name := next((name for name in SOURCES[scheme] if _value(name)), None):
        return f"{name} in the environment"
    if scheme == "s3" and _is_used(profile := Profile()):
        return f"the profile {profile.name}"
    if scheme == "gs" and Path(GCLOUD).expanduser().is_file():
        return GCLOUD
    return None


def missing_variable(scheme: str) -> str | None:
    """Return a variable that the given ones need, and that is not set."""
    if scheme == "s3" and _value("AWS_ACCESS_KEY_ID") and not _value("AWS_SECRET_ACCESS_KEY"):
        return "AWS_SECRET_ACCESS_KEY"
    if scheme == "az" and not (_value("AZURE_STORAGE_ACCOUNT_NAME") or _value("AZURE_STORAGE_USE_EMULATOR")):
        return "AZURE_STORAGE_ACCOUNT_NAME"
    return None


def server_of(place: ObjectPath) -> str | None:
    """Return the URL of the server that has this bucket; None if the environment does not name it."""
    if place.scheme == "s3":
        return _value("AWS_ENDPOINT_URL_S3") or _value("AWS_ENDPOINT_URL") or _value("AWS_ENDPOINT") or _of_region()
    if place.scheme == "gs":
        return "https://storage.googleapis.com"
    account = _value("AZURE_STORAGE_ACCOUNT_NAME")
    named = _value("AZURE_STORAGE_ENDPOINT") or _value("AZURE_ENDPOINT")
    return named or (f"https://{account}.blob.core.windows.net" if account else None)


def _of_region() -> str:
    region = _value("AWS_REGION") or _value("AWS_DEFAULT_REGION") or Profile().region or "us-east-1"
    return f"https://s3.{region}.amazonaws.com{'.cn' if region.startswith('cn-') else ''}"


def _is_used(profile: Profile) -> bool:
    try:
        return profile.is_used
    except NoCredentials:
        return False


def _value(name: str) -> str:
    return os.environ.get(name, "")
