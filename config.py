"""The settings, read once. The command line wins over the environment, that over `.env`, and that over the defaults below."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self, get_args

from pydantic import AfterValidator, BeforeValidator, Field, SecretStr, ValidationError, model_validator
from pydantic.fields import FieldInfo
from pydantic_settings import BaseSettings, DotEnvSettingsSource, EnvSettingsSource, NoDecode, SettingsConfigDict

from errors import LatentEncoderError, one_line
from latent_encoder.masking import keep_secret
from latent_encoder.requests import descriptions
from latent_encoder.secret_files import file_variable, secrets_in_files, source_of
from latent_encoder.suggestions import closest
from models import (
    MAX_MEGAPIXELS,
    MIN_MEGAPIXELS,
    EncodeRequest,
    FileFormat,
    Fit,
    Megapixels,
    Text,
    UpscaleMethod,
    VaeModelName,
)

VERSION = "0.8.0"
PROJECT_DIR = Path(__file__).resolve().parent


class SettingsError(LatentEncoderError):
    """A setting has a value that cannot be used. The text names the variable."""


TopicName = Annotated[str, Field(pattern=r"^[a-zA-Z0-9._-]{1,249}$")]  # the names that Kafka allows


def _split_names(value: object) -> object:
    return [name.strip() for name in value.split(",") if name.strip()] if isinstance(value, str) else value


def _split_folders(value: object) -> object:
    names = _split_names(value)
    if not isinstance(names, list):
        return value
    if not names:
        raise ValueError(
            "must name a folder"
        )  # an empty list would pass for a setting that is not set, which allows everything
    try:
        return tuple(Path(name).expanduser().absolute() for name in names)
    except RuntimeError as exc:
        raise ValueError(str(exc)) from exc  # `~name` of an unknown user


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


Secret = Annotated[SecretStr | None, AfterValidator(_passed_on_whole)]
Folders = Annotated[tuple[Path, ...], NoDecode, BeforeValidator(_split_folders)]


class Settings(BaseSettings):
    """All settings. The environment variable of each is its name in capitals; an empty one counts as not set."""

    model_config = SettingsConfigDict(
        frozen=True,
        env_file=".env",
        env_file_encoding="utf-8",
        env_ignore_empty=True,
        extra="ignore",
        hide_input_in_errors=True,
    )

    mode: Literal["standalone", "kafka", "dlq-replay", "health", "inspect", "doctor"] = Field(
        "standalone",
        description="`standalone` encodes images and exits; `kafka` serves a topic; "
        "`dlq-replay` sends dead letters back to their topic; `health` shows the health of a worker; "
        "`inspect` shows the content of latent files; `doctor` checks the installation.",
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
        "PREPARE_THREADS plus one if not set.",
    )
    kafka_max_retries: int = Field(3, ge=0, description="Retries of a request after transient errors.")
    kafka_retry_backoff_s: float = Field(
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
        "none is taken until one succeeds; 0 turns this off.",
    )
    kafka_max_message_bytes: int = Field(
        1_048_576,
        ge=1,
        description="Largest request message, in bytes; larger ones become dead letters. "
        "Reading one may take 26 times its size of memory.",
    )
    kafka_ack_timeout_s: float = Field(
        60.0,
        gt=0,
        description="Seconds for a reachable broker to acknowledge a response; after them, the delay is logged, "
        "and for a dead letter the service ends.",
    )
    kafka_auth_timeout_s: float = Field(
        120.0,
        ge=0,
        description="Seconds for which a broker that accepted the service once may refuse its login, or the token endpoint be "
        "away, before the service ends; a first login that is refused ends it at once.",
    )
    kafka_stall_timeout_s: float = Field(
        60.0,
        gt=0,
        description="Seconds without a record from a partition with unread ones, while the worker has room, after which it is "
        "not ready; after five times as long it is not alive.",
    )
    kafka_revoke_timeout_s: float = Field(
        60.0,
        ge=0,
        description="Seconds to finish work on a partition that goes to another worker; after them the work is dropped.",
    )
    shutdown_timeout_s: float = Field(
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
    kafka_ssl_ca_location: Path | None = Field(
        None, description="PEM file of the authorities that sign the brokers' certificates."
    )
    kafka_ssl_certificate_location: Path | None = Field(
        None, description="PEM file of the service's certificate, for mutual TLS."
    )
    kafka_ssl_key_location: Path | None = Field(None, description="PEM file of that certificate's private key.")
    kafka_ssl_key_password: Secret = Field(None, description="Password of the private key.")
    kafka_client_config: Path | None = Field(
        None,
        description="File of further librdkafka properties, one `name=value` a line; unsafe ones are refused.",
    )

    http_port: int = Field(
        8080, ge=0, le=65535, description="Port of `/healthz`, `/readyz` and `/metrics` in Kafka mode; 0 turns it off."
    )
    http_host: Text = Field("0.0.0.0", description="Address that HTTP_PORT listens on; `127.0.0.1` for this machine only.")  # noqa: S104
    encode_timeout_s: float = Field(
        1800.0,
        gt=0,
        description="Seconds that one step of a request, or the start, may take before the worker counts as hung.",
    )
    warmup: bool = Field(
        True, description="Whether Kafka mode loads the VAE and encodes a small image before it takes requests."
    )

    model_dir: Path | None = Field(
        None,
        description="Folder that is searched first for VAE files, directly and in its `vae/` (TAESD pairs: `vae_approx/`).",
    )
    vae_model_name: VaeModelName = _default_of("vae_model_name", "VAE file for requests that name none.")
    output_dir: Text = _default_of("output_dir", "Folder for the files of requests that name none.")
    latent_format: FileFormat = _default_of(
        "latent_format", "`pt` (torch), `safetensors` or `comfy` (for ComfyUI's LoadLatent), for requests that name none."
    )
    preview: bool = Field(False, description="Whether to write a preview of each latent, beside its scaled image.")
    roundtrip: bool = Field(
        False,
        description="Whether to decode each latent, write that image, and measure its difference from the scaled image.",
    )

    allowed_input_dirs: Folders | None = Field(
        None, description="Folders that images may be read from, comma-separated; any if not set."
    )
    allowed_output_dirs: Folders | None = Field(
        None, description="Folders that files may be written to, comma-separated; any if not set."
    )
    max_image_bytes: int = Field(104_857_600, ge=1, description="Largest input image file, in bytes.")
    max_image_pixels: int = Field(
        89_478_485,
        ge=1,
        description="Largest input image, in pixels, as its header gives them; the default is Pillow's warning limit.",
    )
    max_output_megapixels: Megapixels = Field(
        MAX_MEGAPIXELS, description=f"Most megapixels that a request may ask for, at most {MAX_MEGAPIXELS}."
    )

    comfyui_path: Path = Field(
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

    device: Literal["auto", "cpu", "cuda"] = Field(
        "auto", description="`auto` is the accelerator that torch finds, else the CPU; `cpu` and `cuda` allow no other."
    )
    vae_precision: Literal["auto", "fp32", "fp16", "bf16"] = Field(
        "auto", description="Precision that the VAE runs in; `auto` leaves it to ComfyUI (float32 on a CPU)."
    )
    encoder: Literal["auto", "stock"] = Field(
        "auto",
        description="`auto` is an encoder of ours if one fits the VAE, else ComfyUI's; `stock` is always ComfyUI's.",
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
        None, ge=1, description="Threads for the encode; if not set, as many as this container has CPUs."
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
    given, faults, sources = _given(overrides), _env_file_faults(), _variable_sources()
    if faults:
        given["_env_file"] = None
    for variables in sources.values():
        for field in SECRETS:
            keep_secret(variables.get(field) or "")  # before a fault of any setting is described
    secrets, secret_faults = secrets_in_files((field for field in SECRETS if field not in given), sources)
    given = {**secrets, **given}
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
    variables = _variable_sources()
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


def env_file_variables() -> Mapping[str, str | None]:
    """Return the variables of `.env`, settings or not, by their names in lower case. Empty ones are left out.

    Raises:
        OSError, UnicodeDecodeError: the file cannot be read.
    """
    return DotEnvSettingsSource(Settings).env_vars


def environment_variables() -> Mapping[str, str | None]:
    """Return the variables of the environment, settings or not, by their names in lower case. Empty ones are left out."""
    return EnvSettingsSource(Settings).env_vars


def _variable_sources() -> dict[str, Mapping[str, str | None]]:
    """Return the variables of the environment, and those of `.env` if it can be read."""
    return {"environment": environment_variables(), ".env": env_file_variables() if not _env_file_faults() else {}}


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
    return [choice for part in get_args(annotation) for choice in get_args(part)]


def _given(overrides: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in overrides.items() if value is not None}


def _env_file_faults() -> list[str]:
    try:
        env_file_variables()
    except (OSError, UnicodeDecodeError) as exc:
        return [f".env: cannot be read ({one_line(exc)})"]
    return []


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
