"""The settings, read once. The command line wins over the environment, that over `.env`, and that over the defaults below."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from ipaddress import IPv4Network, IPv6Network
from pathlib import Path
from typing import Annotated, Any, Literal, Self, get_args

from pydantic import AfterValidator, BeforeValidator, Field, SecretStr, ValidationError, model_validator
from pydantic.fields import FieldInfo
from pydantic_settings import BaseSettings, EnvSettingsSource, NoDecode, SettingsConfigDict

from errors import LatentEncoderError
from latent_encoder.env_file import EnvFile, read_env_file
from latent_encoder.masking import keep_secret
from latent_encoder.requests import descriptions
from latent_encoder.secret_files import file_variable, secrets_in_files, source_of
from latent_encoder.storage.locations import WebUrl, is_url, location_of
from latent_encoder.suggestions import closest
from latent_encoder.user_paths import setting_path
from models import (
    MAX_MEGAPIXELS,
    MIN_MEGAPIXELS,
    Alpha,
    EncodeRequest,
    FileFormat,
    Fit,
    Megapixels,
    Text,
    UpscaleMethod,
    VaeModelName,
)

VERSION = "0.11.0"
PROJECT_DIR = Path(__file__).resolve().parent


NO_LIMIT = "remove the variable if requests may use every folder"
NO_FOLDERS = ("null", "none", "nil", "undefined", "nan", "false", "true", "0", "*", "''")
"""Words that programs write where a value is missing, and a pattern that people write for no limit, in lower case."""

LONGEST_S = 31_536_000.0
"""Seconds of a year, the longest time of a setting. A longer one, or infinity, would turn the limit off without a word."""

MOST_DAYS = 36_525.0
"""Days of a century. Output files that may stay for longer need no limit."""

MOST_THREADS = 4096
"""More than any machine that torch runs on has. With millions, torch hangs while it starts them."""


class SettingsError(LatentEncoderError):
    """A setting has a value that cannot be used. The text names the variable."""


TopicName = Annotated[str, Field(pattern=r"^[a-zA-Z0-9._-]{1,249}$")]  # the names that Kafka allows


def _split_names(value: object) -> object:
    return [name.strip() for name in value.split(",") if name.strip()] if isinstance(value, str) else value


def _expanded(value: object) -> object:
    return setting_path(value) if isinstance(value, str) else value


def _split_folders(value: object) -> object:
    """Return the folders of a setting that limits requests. Whatever could mean no limit by mistake is refused."""
    if not isinstance(value, str):
        return value
    names = [name.strip() for name in _listed_folders(value) if name.strip()]
    if not names:
        raise ValueError(f"must name a folder; {NO_LIMIT}")
    if wrong := [name for name in names if name.lower() in NO_FOLDERS]:
        raise ValueError(
            f"must name folders, and {wrong[0]} is none; {NO_LIMIT} (write ./{wrong[0]} for a folder of that name)"
        )
    return tuple(Path(setting_path(name)).absolute() for name in names)


def _listed_folders(text: str) -> list[str]:
    """Return the names in a list that is separated by commas, or in a JSON array or string."""
    if not text.strip().startswith(("[", '"', "{")):
        return text.split(",")
    try:
        listed = json.loads(text)
    except (ValueError, RecursionError):
        listed = None
    if isinstance(listed, str):
        return listed.split(",")
    if isinstance(listed, list) and all(isinstance(name, str) and name.strip() for name in listed):
        return listed
    raise ValueError("must be folders separated by commas, or a JSON array of them")


def _split_urls(value: object) -> object:
    """Return the prefixes of a setting that limits requests to URLs, in their normalised form's text."""
    if not isinstance(value, str):
        return value
    urls = [url.strip() for url in _listed_folders(value) if url.strip()]
    for url in urls:
        if not is_url(url):
            raise ValueError(f"must be URLs such as s3://bucket/folder, and {url} is none")
        try:
            place = location_of(url)
        except ValueError as exc:
            raise ValueError(f"a URL {exc}") from None
        if isinstance(place, WebUrl) and place.query:
            raise ValueError("must be URLs without a query, which a prefix cannot have")
    return tuple(urls)


def _split_networks(value: object) -> object:
    return [network.strip() for network in value.split(",") if network.strip()] if isinstance(value, str) else value


def _upper(value: object) -> object:
    return value.upper() if isinstance(value, str) else value


def _without_credentials(servers: str) -> str:
    if "@" in servers:
        raise ValueError("must be host:port without credentials; KAFKA_SASL_USERNAME and KAFKA_SASL_PASSWORD are for those")
    return servers


def _passed_on_whole(secret: SecretStr | None) -> SecretStr | None:
    """Refuse a secret that cannot be handed to librdkafka, which takes UTF-8 up to the first NUL character."""
    value = secret.get_secret_value() if secret else ""
    if "\0" in value:
        raise ValueError("must not have a NUL character")
    if not value.isprintable() and any("\ud800" <= character <= "\udfff" for character in value):
        raise ValueError("must be UTF-8")
    return secret


def _default_of(request_field: str, description: str) -> Any:
    """Return the setting that gives this field of a request its default. Its own default is the model's."""
    return Field(EncodeRequest.model_fields[request_field].default, description=description)


def _listed(choices: Sequence[str]) -> str:
    """Return the choices as a list in prose: `a`, `b` or `c`."""
    *others, last = (f"`{choice}`" for choice in choices)
    return f"{', '.join(others)} or {last}"


DamagedImages = Literal["refuse", "note"]
Secret = Annotated[SecretStr | None, AfterValidator(_passed_on_whole)]
Folders = Annotated[tuple[Path, ...] | None, NoDecode, BeforeValidator(_split_folders)]
UrlPrefixes = Annotated[tuple[str, ...] | None, NoDecode, BeforeValidator(_split_urls)]
Networks = Annotated[tuple[IPv4Network | IPv6Network, ...], NoDecode, BeforeValidator(_split_networks)]
Place = Annotated[Path, BeforeValidator(_expanded)]
PlaceText = Annotated[Text, BeforeValidator(_expanded)]
Seconds = Annotated[float, Field(le=LONGEST_S, allow_inf_nan=False)]


class Settings(BaseSettings):
    """All settings. The environment variable of each is its name in capitals; an empty one counts as not set.

    `usable_settings` adds the values of `.env`.
    """

    model_config = SettingsConfigDict(
        frozen=True,
        env_ignore_empty=True,
        extra="ignore",
        hide_input_in_errors=True,
    )

    mode: Literal["standalone", "kafka", "dlq-replay", "health", "inspect", "doctor", "compare"] = Field(
        "standalone",
        description="`standalone` encodes images and exits; `kafka` serves a topic; "
        "`dlq-replay` sends dead letters back to their topic; `health` shows the health of a worker; "
        "`inspect` shows the content of latent files; `doctor` checks the installation; "
        "`compare` measures ComfyUI's own encoder and the service's.",
    )

    kafka_bootstrap_servers: Annotated[Text, AfterValidator(_without_credentials)] = Field(
        "localhost:9092", description="Kafka brokers, `host:port`, comma-separated."
    )
    kafka_request_topic: TopicName = Field("latent-encoder-requests", description="Topic that requests are consumed from.")
    kafka_response_topic: TopicName = Field("latent-encoder-responses", description="Topic that responses are produced to.")
    kafka_dlq_topic: TopicName = Field("latent-encoder-requests-dlq", description="Topic of the dead letters.")
    kafka_consumer_group: Text = Field("latent-encoder-group", description="Consumer group of the service.")
    kafka_group_protocol: Literal["classic", "consumer"] = Field(
        "classic",
        description="`classic`, or `consumer`: the group protocol of Apache Kafka 4.0 and newer, in which the broker assigns "
        "the partitions.",
    )
    kafka_group_instance_id: Text | None = Field(
        None,
        description="Makes this worker a static member of its group: if it is back within the session timeout, "
        "it keeps its partitions. Each worker needs an id of its own.",
    )
    kafka_prefetch: int | None = Field(
        None,
        ge=1,
        description="Requests that a worker holds at a time: the one that is encoded, and those before and after it; "
        "if not set, PREPARE_THREADS plus one, and 16 more if URLs are allowed.",
    )
    kafka_max_retries: int = Field(3, ge=0, description="Retries of a request after transient errors.")
    kafka_retry_backoff_s: Seconds = Field(
        1.0,
        gt=0,
        le=3600,
        description="Seconds before the first retry; doubled each time, up to 60, and varied at random by a quarter.",
    )
    kafka_max_crashes: int = Field(
        2,
        ge=0,
        description="Crashes of workers by one request after which it is still tried again; then it gets an error response "
        "and becomes a dead letter.",
    )
    kafka_breaker_failures: int = Field(
        5,
        ge=0,
        description="Requests in a row whose failure shows that the machine is broken, for example a full disk, after which "
        "none is taken until one succeeds; one is enough if object storage is out of reach; 0 turns this off.",
    )
    kafka_max_message_bytes: int = Field(
        1_048_576,
        ge=1,
        description="Largest request message, in bytes; larger ones become dead letters. "
        "Reading one may take 26 times its size of memory.",
    )
    kafka_ack_timeout_s: Seconds = Field(
        60.0,
        gt=0,
        description="Seconds for a reachable broker to acknowledge a response; after them, the delay is logged, "
        "and for a dead letter the service ends.",
    )
    kafka_auth_timeout_s: Seconds = Field(
        120.0,
        ge=0,
        description="Seconds for which a broker that accepted the service once may refuse its login, or the token endpoint be "
        "away, before the service ends; a first login that is refused ends it at once.",
    )
    kafka_stall_timeout_s: Seconds = Field(
        60.0,
        gt=0,
        description="Seconds without a record from a partition with unread ones, while the worker has room, after which it is "
        "not ready; after five times as long it is not alive.",
    )
    kafka_revoke_timeout_s: Seconds = Field(
        60.0,
        ge=0,
        description="Seconds to finish work on a partition that goes to another worker; after them the work is dropped.",
    )
    shutdown_timeout_s: Seconds = Field(
        120.0, ge=0, description="Seconds to finish the requests in flight after SIGTERM or SIGINT."
    )
    kafka_transactional_id: Text | None = Field(
        None, description="Makes each response and its offset one transaction; each worker needs an id of its own."
    )

    kafka_create_topics: bool = Field(False, description="Whether to create topics that do not exist.")
    kafka_topic_partitions: int = Field(8, ge=1, description="Partitions of a topic that is created.")
    kafka_topic_replication: int | None = Field(
        None, ge=1, description="Replicas of a topic that is created; the broker's default if not set."
    )

    kafka_security_protocol: Annotated[
        Literal["PLAINTEXT", "SSL", "SASL_PLAINTEXT", "SASL_SSL"] | None, BeforeValidator(_upper)
    ] = Field(None, description="`SSL`, `SASL_PLAINTEXT` or `SASL_SSL`; `PLAINTEXT` if not set.")
    kafka_sasl_mechanism: Annotated[
        Literal["PLAIN", "SCRAM-SHA-256", "SCRAM-SHA-512", "GSSAPI", "OAUTHBEARER"] | None, BeforeValidator(_upper)
    ] = Field(None, description="`PLAIN`, `SCRAM-SHA-256`, `SCRAM-SHA-512`, `GSSAPI` or `OAUTHBEARER`.")
    kafka_sasl_username: Text | None = Field(None, description="User for SASL.")
    kafka_sasl_password: Secret = Field(None, description="Password for SASL.")
    kafka_ssl_ca_location: Place | None = Field(
        None, description="PEM file of the authorities that sign the brokers' certificates."
    )
    kafka_ssl_certificate_location: Place | None = Field(
        None, description="PEM file of the service's certificate, for mutual TLS."
    )
    kafka_ssl_key_location: Place | None = Field(None, description="PEM file of that certificate's private key.")
    kafka_ssl_key_password: Secret = Field(None, description="Password of the private key.")
    kafka_client_config: Place | None = Field(
        None,
        description="File of further librdkafka properties, one `name=value` a line; unsafe ones are refused.",
    )

    http_port: int = Field(
        8080, ge=0, le=65535, description="Port of `/healthz`, `/readyz` and `/metrics` in Kafka mode; 0 turns it off."
    )
    http_host: Text = Field("0.0.0.0", description="Address that HTTP_PORT listens on; `127.0.0.1` for this machine only.")  # noqa: S104
    encode_timeout_s: Seconds = Field(
        1800.0,
        gt=0,
        description="Seconds that one step of a request, or the start, may take before the worker counts as hung.",
    )
    warmup: bool = Field(
        True, description="Whether Kafka mode loads the VAE and encodes a small image before it takes requests."
    )

    model_dir: Place | None = Field(
        None,
        description="Folder that is searched first for VAE files, directly and in its `vae/` (TAESD pairs: `vae_approx/`).",
    )
    vae_model_name: VaeModelName = _default_of("vae_model_name", "VAE file for requests that name none.")
    output_dir: PlaceText = _default_of("output_dir", "Folder for the files of requests that name none.")
    output_ttl_days: float | None = Field(
        None,
        gt=0,
        le=MOST_DAYS,
        allow_inf_nan=False,
        description="Days (fractions allowed) after which workers in Kafka mode remove the files that the service wrote to "
        "OUTPUT_DIR and the folders below it; they are kept for ever if not set.",
    )
    latent_format: FileFormat = _default_of(
        "latent_format", "`pt` (torch), `safetensors` or `comfy` (for ComfyUI's LoadLatent), for requests that name none."
    )
    preview: bool = Field(False, description="Whether to write a preview of each latent, beside its scaled image.")
    roundtrip: bool = Field(
        False,
        description="Whether to decode each latent, write that image, and measure its difference from the scaled image.",
    )

    allowed_input_dirs: Folders = Field(
        None, description="Folders that images may be read from, comma-separated; any if the variable is not set."
    )
    allowed_output_dirs: Folders = Field(
        None, description="Folders that files may be written to, comma-separated; any if the variable is not set."
    )
    allowed_input_urls: UrlPrefixes = Field(
        None,
        description="Beginnings of the URLs that images may be read from, comma-separated, each up to the end of a name; if "
        "not set, none in Kafka mode, and any on the command line.",
    )
    allowed_output_urls: UrlPrefixes = Field(
        None,
        description="Beginnings of the URLs that files may be written to, `s3://`, `gs://` or `az://`; if not set, none in "
        "Kafka mode, and any on the command line.",
    )
    allowed_private_networks: Networks = Field(
        (),
        description="Private networks, for example `10.1.0.0/16`, that the name of a web server may lead to, comma-separated.",
    )
    storage_timeout_s: Seconds = Field(
        30.0, gt=0, description="Seconds that one call to object storage or to a web server may take, its body included."
    )
    storage_max_retries: int = Field(
        4,
        ge=0,
        le=20,
        description="Repetitions of such a call if the server throttles, fails or cannot be reached; the first after 0.2 "
        "seconds, the pause doubled each time.",
    )
    max_image_bytes: int = Field(104_857_600, ge=1, description="Largest input image file, in bytes.")
    max_image_pixels: int = Field(
        89_478_485,
        ge=1,
        description="Largest input image, in pixels, as its header gives them; the default is Pillow's warning limit.",
    )
    image_timeout_s: float = Field(
        60.0,
        gt=0,
        le=3600,
        description="Seconds that checking one image may take; after them it is refused.",
    )
    damaged_images: DamagedImages = Field(
        "refuse",
        description="`refuse` responds to a damaged image with an error; `note` encodes as much of it as ComfyUI loads, "
        "with `damaged` in `image_notes`.",
    )
    max_output_megapixels: Megapixels = Field(
        MAX_MEGAPIXELS, description=f"Most megapixels that a request may ask for, at most {MAX_MEGAPIXELS}."
    )

    comfyui_path: Place = Field(
        PROJECT_DIR / "comfyui", description="ComfyUI tree to run; if not set, the one that `setup_comfyui.sh` filled."
    )
    custom_nodes: Annotated[tuple[str, ...], NoDecode, BeforeValidator(_split_names)] = Field(
        (), description="Packages in ComfyUI's `custom_nodes/` to load at the start, comma-separated."
    )

    log_level: Annotated[Literal["DEBUG", "INFO", "WARNING", "ERROR"], BeforeValidator(_upper)] = Field(
        "INFO", description="Least severe level that is logged: `DEBUG`, `INFO`, `WARNING` or `ERROR`."
    )
    log_format: Literal["json", "text"] = Field("json", description="`json`, one object a line, or `text` for people.")

    upscale_method: UpscaleMethod = _default_of(
        "upscale_method", f"{_listed(get_args(UpscaleMethod))}, for requests that name none."
    )
    megapixels: Megapixels = _default_of(
        "megapixels",
        f"Size to scale to, {MIN_MEGAPIXELS} to {MAX_MEGAPIXELS} (one is 1024 x 1024), for requests that name none.",
    )

    fit: Fit = _default_of(
        "fit",
        "`crop` cuts off what exceeds multiples of the VAE's factor, `exact` scales to such multiples "
        "(needs a ComfyUI of 2026), for requests that name none.",
    )

    alpha: Alpha = _default_of(
        "alpha",
        "Treatment of transparency: `drop` encodes the colours under it, as ComfyUI does; `black`, `white` and `grey` lay the "
        "image over that colour; for requests that name none.",
    )

    device: Literal["auto", "cpu", "cuda"] = Field(
        "auto", description="`auto` is the accelerator that torch finds, else the CPU; `cpu` and `cuda` allow no other."
    )
    vae_precision: Literal["auto", "fp32", "fp16", "bf16"] = Field(
        "auto", description="Precision that the VAE runs in; `auto` leaves it to ComfyUI (float32 on a CPU)."
    )
    encoder: Literal["auto", "stock"] = Field(
        "auto",
        description="`auto` is the single-frame encoder if it fits the VAE, else ComfyUI's; `stock` is always ComfyUI's.",
    )
    compile: bool = Field(
        False,
        description="Whether to compile the single-frame encoder when a VAE is loaded, which needs a C++ compiler.",
    )
    oom_policy: Literal["fail", "tile"] = Field(
        "fail",
        description="If memory runs out, `fail` responds with an error, and "
        "`tile` lets ComfyUI encode in tiles, with a slightly different latent.",
    )
    torch_num_threads: int | None = Field(
        None, ge=1, le=MOST_THREADS, description="Threads for the encode; if not set, as many as this container has CPUs."
    )
    prepare_threads: int | None = Field(
        None,
        ge=1,
        le=64,
        description="Images that are read and scaled at the same time; if not set, one less than the CPUs of this container, "
        "1 to 8.",
    )
    vae_cache_size: int = Field(2, ge=1, description="VAEs that stay loaded; the least recently used is dropped first.")

    @model_validator(mode="after")
    def _keep_secrets(self) -> Self:
        """Keep the secrets out of every log and message from now on."""
        for field in SECRETS:
            if secret := getattr(self, field):
                keep_secret(secret.get_secret_value())
        return self

    @property
    def request_defaults(self) -> dict[str, Any]:
        """The values of the fields that a request leaves out."""
        return {name: getattr(self, name) for name in REQUEST_SETTINGS}


REQUEST_SETTINGS = tuple(name for name in EncodeRequest.model_fields if name in Settings.model_fields)
"""The fields of a request whose default is a setting."""

SECRETS = tuple(name for name, field in Settings.model_fields.items() if SecretStr in get_args(field.annotation))
"""The settings whose value is never shown. A variable can name a file that holds it: `secret_files.py`."""

LIMITS = ("allowed_input_dirs", "allowed_output_dirs")
"""The settings that limit requests to folders, and that allow every folder if they are not set."""

ACCESS = ("kafka_sasl_", "kafka_ssl_", "kafka_security_")
"""The beginnings of the settings among which a secret may be put in the wrong place."""


LONGEST_WORD = 4
"""Characters of a value that is no secret: `TLS`, `MTLS`. No password of four characters is worth hiding."""


def _variables() -> dict[str, FieldInfo]:
    found = {}
    for name, field in Settings.model_fields.items():
        found[name] = field
        if name in SECRETS:
            found[file_variable(name)] = FieldInfo(default=None, description=f"File that holds {name.upper()}, in its place.")
    return found


VARIABLES: Mapping[str, FieldInfo] = _variables()
"""All variables by their names in lower case: the settings, and after each secret the variable of its file."""


def load_settings(overrides: Mapping[str, Any]) -> Settings:
    """Return the settings in force. `overrides` are the command line's, None for each that it leaves out.

    Raises:
        SettingsError: a value cannot be used. The text names the variable.
    """
    settings, faults = usable_settings(overrides)
    if faults:
        raise SettingsError("; ".join(faults))
    return settings


def usable_settings(overrides: Mapping[str, Any]) -> tuple[Settings, list[str]]:
    """Return the settings and a list of faults; a setting that cannot be used keeps its default."""
    given, file = _given(overrides), env_file()
    sources = _variable_sources(file)
    faults = [*file.shown_faults(), *_emptied_limits(file, sources)]
    for variables in sources.values():
        for field in SECRETS:
            keep_secret(variables.get(field) or "")  # before a fault of any setting is described
    secrets, secret_faults = secrets_in_files((field for field in SECRETS if field not in given), sources)
    in_file = {name: value for name, value in sources[".env"].items() if name not in sources["environment"]}
    given = {**{name: value for name, value in in_file.items() if name in Settings.model_fields}, **secrets, **given}
    try:
        settings = Settings(**given)
    except ValidationError as exc:
        faults += descriptions(exc, name=str.upper, hides=_hides)
        wrong = {str(error["loc"][0]) for error in exc.errors()}
        settings = Settings(**given | {name: Settings.model_fields[name].default for name in wrong})
    faults += secret_faults
    return settings, faults or _contradictions(settings)


def origins_of(overrides: Mapping[str, Any]) -> dict[str, str]:
    """Return the source of each setting: `command line`, `environment`, `.env` or `default`; of a secret also its file."""
    variables = _variable_sources(env_file())
    sources: dict[str, Mapping[str, Any]] = {"command line": _given(overrides), **variables}
    origins = {
        field: next((origin for origin, values in sources.items() if field in values), "default")
        for field in Settings.model_fields
    }
    for field in SECRETS:
        source = source_of(file_variable(field), variables)
        if source and origins[field] == "default":
            origins[field] = f"file of {file_variable(field).upper()}, {source}"
    return origins


def env_file() -> EnvFile:
    """Return the content of `.env` in the working folder, with its faults."""
    return read_env_file(Path(".env"), VARIABLES)


def env_file_variables() -> Mapping[str, str]:
    """Return the variables of `.env`, settings or not, by their names in lower case. Empty ones are left out."""
    return _not_empty(env_file())


def environment_variables() -> Mapping[str, str | None]:
    """Return the variables of the environment, settings or not, by their names in lower case. Empty ones are left out."""
    return EnvSettingsSource(Settings).env_vars


def _not_empty(file: EnvFile) -> Mapping[str, str]:
    return {name: value for name, value in file.variables.items() if value}


def _variable_sources(file: EnvFile) -> dict[str, Mapping[str, str | None]]:
    """Return the variables of the environment, and those of `.env` that can be read."""
    return {"environment": environment_variables(), ".env": _not_empty(file)}


def _emptied_limits(file: EnvFile, sources: Mapping[str, Mapping[str, str | None]]) -> Iterator[str]:
    """Yield a fault for each limit on folders that is set to nothing, which must not pass for a limit that is not set."""
    empty = {
        "environment": {name.lower() for name, value in os.environ.items() if not value},
        ".env": {name for name, value in file.variables.items() if not value},
    }
    for field in LIMITS:
        if any(field in variables for variables in sources.values()):
            continue
        for source, names in empty.items():
            if field in names:
                yield f"{field.upper()}: is empty ({source}); name the folders, or {NO_LIMIT}"


def _hides(field: str, value: object) -> bool:
    """Return whether a fault must not show this value: it is a secret, or may be one in the place of another setting.

    A short value, or one that resembles an allowed value, is shown: `TLS` is a mistake that one wants to see.
    """
    if field in SECRETS or (field == "kafka_bootstrap_servers" and "@" in str(value)):
        return True
    return field.startswith(ACCESS) and len(str(value)) > LONGEST_WORD and closest(str(value), _choices(field)) is None


def _choices(field: str) -> list[str]:
    """Return the values that a setting allows; none if it is not a choice."""
    annotation = Settings.model_fields[field].annotation
    return [choice for part in get_args(annotation) for choice in get_args(part) if isinstance(choice, str)]


def _given(overrides: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in overrides.items() if value is not None}


def _contradictions(settings: Settings) -> list[str]:
    """Return the faults between settings that are valid one by one."""
    faults = []
    if settings.megapixels > settings.max_output_megapixels:
        faults.append(
            f"MEGAPIXELS: must be at most MAX_OUTPUT_MEGAPIXELS={settings.max_output_megapixels} (got {settings.megapixels})"
        )
    topics = (settings.kafka_request_topic, settings.kafka_response_topic, settings.kafka_dlq_topic)
    if len(set(topics)) < len(topics):
        faults.append(
            "KAFKA_REQUEST_TOPIC, KAFKA_RESPONSE_TOPIC, KAFKA_DLQ_TOPIC: must be three different topics, or the service "
            f"would read its own responses (got {', '.join(topics)})"
        )
    return faults
