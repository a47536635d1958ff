"""Secrets: none reaches a log, a message or a report, wherever an error is raised and whatever it says."""

from __future__ import annotations

import json
import logging
import re
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
from confluent_kafka import Consumer
from pydantic import SecretStr

from config import Settings, SettingsError, load_settings
from errors import one_line
from latent_encoder.kafka.properties import consumer_properties, make_client
from latent_encoder.masking import keep_secret, masked
from latent_encoder.telemetry.logs import configure_logging, get_logger, log_stray_exceptions
from tests.broker import ApacheKafka, Broker
from tests.helpers import OUR_FILES, PROJECT, RunMain
from tests.kafka_tools import Bench, read_responses

PASSWORD = "hunter2-sasl-Pässword"  # noqa: S105
KEY_PASSWORD = 'hunter2 "key" \\ word'  # noqa: S105
PROPERTY = "hunter2-in-a-property"
HEADER = "hunter2-in-a-header"
TRACE = "hunter2"
"""A part of each secret above."""


def given_settings(folder: Path) -> Settings:
    """Return settings with a secret of each kind, whose file of properties has one too."""
    file = folder / "client.properties"
    file.write_text(f"sasl.oauthbearer.client.secret={PROPERTY}\n")
    return Settings(
        _env_file=None, kafka_sasl_password=PASSWORD, kafka_ssl_key_password=KEY_PASSWORD, kafka_client_config=file
    )


def fail_in(file: Path, text: str, settings: Settings, properties: dict[str, Any]) -> Exception:
    """Return an exception raised by a frame of a module of ours, with all secrets in its variables and a text of its own."""
    code = "def fail(settings, properties, headers, password):\n    raise ValueError(text) from OSError(text)"
    module: dict[str, Any] = {"__name__": file.stem, "text": text}
    exec(compile(code, file, "exec"), module)  # noqa: S102
    with pytest.raises(ValueError, match="refused") as caught:
        module["fail"](settings, properties, (("authorization", HEADER.encode()),), PASSWORD)
    return caught.value


def logger_of(file: Path) -> str:
    found = re.search(r'get_?[lL]ogger\("([^"]+)"\)', file.read_text())
    return found[1] if found else "latent_encoder"


@pytest.mark.parametrize("log_format", ["json", "text"])
@pytest.mark.parametrize("file", OUR_FILES, ids=lambda file: str(file.relative_to(PROJECT)))
def test_no_exception_of_any_module_logs_a_secret(
    file: Path, log_format: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A traceback names the module, but has no value of a variable and no secret of the exception's text."""
    settings = given_settings(tmp_path)
    properties = consumer_properties(settings)
    text = f"refused {PASSWORD} {KEY_PASSWORD} {KEY_PASSWORD!r} {json.dumps(PASSWORD)} {PROPERTY}"
    exc = fail_in(file, text, settings, properties)
    configure_logging("DEBUG", log_format)
    log = get_logger(logger_of(file))
    log.error("it failed", exc_info=exc, password=PASSWORD, properties=properties, settings=settings)
    logging.getLogger("librdkafka").debug("bad %s in %r", PASSWORD, properties, exc_info=exc)
    written = capsys.readouterr().err
    assert file.name in written
    assert "it failed" in written
    assert TRACE not in written


@pytest.mark.parametrize("rich_or_plain", ["rich", "better_exceptions"])
def test_installed_prettifiers_add_no_variables(rich_or_plain: str) -> None:
    """Text logs show plain tracebacks, also if a package that shows local variables is imported."""
    code = f"""
import contextlib
with contextlib.suppress(ImportError):
    import {rich_or_plain}
from latent_encoder.telemetry.logs import configure_logging, get_logger
configure_logging("DEBUG", "text")
try:
    password = "".join(reversed("2retnuh"))
    1 / 0
except ZeroDivisionError:
    get_logger("x").exception("it failed")
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=PROJECT, capture_output=True, text=True, check=True)
    assert "ZeroDivisionError" in done.stderr
    assert TRACE not in done.stderr


def test_exception_that_ends_a_thread_is_an_event(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Python would print it as text, with the secret in it."""
    keep_secret(PASSWORD)

    def fail() -> None:
        raise ValueError(PASSWORD)

    monkeypatch.setattr(threading, "excepthook", threading.excepthook)
    monkeypatch.setattr(sys, "unraisablehook", sys.unraisablehook)
    configure_logging("INFO", "json")
    log_stray_exceptions()
    thread = threading.Thread(target=fail, name="worker-1")
    thread.start()
    thread.join()
    event = json.loads(capsys.readouterr().err)
    assert (event["event"], event["thread_name"]) == ("a thread ended by an unexpected error", "worker-1")
    assert event["exception"][0]["exc_value"] == "***"


@pytest.mark.parametrize(
    "text",
    [
        PASSWORD,
        f"{PASSWORD!a} {json.dumps(PASSWORD)}",
        "x" * 290 + PASSWORD,  # one_line would cut it
        "https://user:hunter2@proxy:8080/path",
        "hunter2-sasl-P%C3%A4ssword",
    ],
)
def test_secret_is_masked_in_each_form(text: str) -> None:
    """It may be quoted, escaped, cut, or part of a URL."""
    keep_secret(PASSWORD)
    assert "hunter" not in one_line(ValueError(text), limit=300)
    assert "hunter2" not in masked(text)


def test_secret_of_several_lines_is_masked_line_by_line() -> None:
    """A log may indent the lines of a key, or join them."""
    key = "-----BEGIN KEY-----\nhunter2hunter2aa\nhunter2hunter2bb\n-----END KEY-----\n"
    keep_secret(key)
    for text in (key, key.replace("\n", "\n    "), " ".join(key.split()), repr(key)):
        assert TRACE not in masked(text)


def test_short_secret_leaves_other_words_alone() -> None:
    """A secret of a few characters is masked as a word only."""
    keep_secret("lane")
    assert masked("lanes use lane, planes") == "lanes use ***, planes"


def test_event_that_cannot_be_written_shows_no_argument(capsys: pytest.CaptureFixture[str]) -> None:
    """Python's own report of such an event has the arguments and the call stack."""
    configure_logging("INFO", "json")
    logging.getLogger("librdkafka").warning("%d", HEADER)
    written = capsys.readouterr().err
    assert written == "Error: A log event of librdkafka cannot be written (TypeError).\n"


WRONG = {
    "password in the protocol": {"KAFKA_SECURITY_PROTOCOL": PASSWORD},
    "password in the mechanism": {"KAFKA_SASL_MECHANISM": PASSWORD},
    "password in the brokers": {"KAFKA_BOOTSTRAP_SERVERS": f"service:{PASSWORD}@broker:9092"},
    "password in a number, too": {"KAFKA_PREFETCH": PASSWORD},
    "password as the name of its file": {"KAFKA_SASL_PASSWORD": "", "KAFKA_SASL_PASSWORD_FILE": PASSWORD},
    "password twice": {"KAFKA_SASL_PASSWORD_FILE": "/dev/null"},
    "certificate that is missing": {"KAFKA_SECURITY_PROTOCOL": "ssl", "KAFKA_SSL_CA_LOCATION": f"/{PASSWORD}"},
    "exporter that is missing": {"OTEL_TRACES_EXPORTER": "none,x", "OTEL_EXPORTER_OTLP_HEADERS": f"authorization={HEADER}"},
}
WRONG_PROPERTIES = {
    "mistyped number": f"sasl.password={PROPERTY}\nmax.poll.interval.ms=300000ms",
    "number that is none": f"sasl.password={PROPERTY}\nmax.poll.interval.ms={PROPERTY}",
    "log level": f"log_level={PROPERTY}",
    "slip of a line": f"security.protocol={PROPERTY}",
    "mechanism": f"security.protocol=SASL_PLAINTEXT\nsasl.mechanism={PROPERTY}",
    "object of Python": f"default.topic.config={PROPERTY}",
    "callback": f"error_cb={PROPERTY}",
    "plugin": f"plugin.library.paths={PROPERTY}",
    "key over several lines": f"ssl.key.pem=-----BEGIN KEY-----\n{PROPERTY}\n-----END KEY-----",
    "key": f"security.protocol=SSL\nssl.key.pem={PROPERTY}",
    "keystore": f"security.protocol=SSL\nssl.keystore.location=/none\nssl.keystore.password={PROPERTY}",
    "unknown": f"sasl.jaas.config=PlainLoginModule required password={PROPERTY};",
    "continued": f"sasl.password=\\\n  {PROPERTY}",
}


@pytest.mark.parametrize("log_format", ["json", "text"])
@pytest.mark.parametrize("case", [*WRONG, *WRONG_PROPERTIES])
def test_wrong_setting_is_wrong_usage_without_a_secret(case: str, log_format: str, tmp_path: Path, run_main: RunMain) -> None:
    """Kafka mode ends with status 2 and one message, at the most verbose level."""
    environment = {
        "KAFKA_SASL_PASSWORD": PASSWORD,
        "KAFKA_SSL_KEY_PASSWORD": KEY_PASSWORD,
        "LOG_LEVEL": "DEBUG",
        "LOG_FORMAT": log_format,
        "HTTP_PORT": "0",
        "WARMUP": "false",
        **WRONG.get(case, {}),
    }
    if case in WRONG_PROPERTIES:
        (tmp_path / "wrong.properties").write_text(WRONG_PROPERTIES[case])
        environment["KAFKA_CLIENT_CONFIG"] = "wrong.properties"
    if case.startswith("exporter"):
        pytest.importorskip("opentelemetry.sdk")
    done = run_main("--mode", "kafka", "--debug", env=environment)
    assert done.returncode == 2, done.stderr
    assert sum(line.startswith("Error: ") for line in done.stderr.splitlines()) == 1
    assert "Traceback" not in done.stderr
    assert TRACE not in done.stdout + done.stderr


@pytest.mark.parametrize("name", ["KAFKA_SASL_PASSWORD", "KAFKA_SSL_KEY_PASSWORD"])
def test_report_and_help_show_no_secret(name: str, tmp_path: Path, run_main: RunMain) -> None:
    """The doctor names the file that a secret comes from; its client may put the secret nowhere."""
    (tmp_path / "secret").write_text(PASSWORD + "\n")
    environment = {f"{name}_FILE": "./secret", "KAFKA_BOOTSTRAP_SERVERS": "127.0.0.1:1", "COMFYUI_PATH": "/nowhere"}
    done = run_main("--mode", "doctor", "--json", "--debug", env=environment)
    found = [check["found"] for check in json.loads(done.stdout)["checks"]]
    assert f"{name}=********** (file of {name}_FILE, environment)" in found
    helped = run_main("--help", env=environment)
    assert TRACE not in done.stdout + done.stderr + helped.stdout + helped.stderr


def test_copied_settings_keep_their_secret(tmp_path: Path) -> None:
    """A secret that reaches a client is masked, also if no settings were read with it."""
    settings = given_settings(tmp_path).model_copy(update={"kafka_sasl_password": SecretStr("hunter2-copied")})
    with pytest.raises(SettingsError) as caught:
        make_client(Consumer, {**consumer_properties(settings), "debug": "hunter2-copied"}, settings)
    assert TRACE not in str(caught.value) + masked("hunter2-copied")


def test_worker_logs_no_secret(broker: Broker, bench: Bench, tmp_path: Path) -> None:
    """All of librdkafka's debug contexts, settings, properties and headers of requests: nothing secret is in the log."""
    if not isinstance(broker, ApacheKafka):
        pytest.skip(f"{broker.name} has no listener that asks for a password")
    secret_file, properties = tmp_path / "password", tmp_path / "client.properties"
    secret_file.write_text(broker.password + "\n")
    properties.write_text(f"debug=all\nlog_level=7\nssl.keystore.password={PROPERTY}\n")
    environment = {
        "KAFKA_BOOTSTRAP_SERVERS": broker.secure_bootstrap_servers,
        "KAFKA_SECURITY_PROTOCOL": "SASL_SSL",
        "KAFKA_SASL_MECHANISM": "SCRAM-SHA-512",
        "KAFKA_SASL_USERNAME": broker.username,
        "KAFKA_SASL_PASSWORD_FILE": str(secret_file),
        "KAFKA_SSL_CA_LOCATION": str(broker.ca_file),
        "KAFKA_SSL_KEY_PASSWORD": KEY_PASSWORD,
        "KAFKA_CLIENT_CONFIG": str(properties),
        "LOG_LEVEL": "DEBUG",
    }
    headers = (("authorization", HEADER.encode()), ("baggage", HEADER.encode()), ("traceparent", HEADER.encode()))
    bench.send({"request_id": "r"}, headers=headers)
    bench.send(b"not JSON", headers=headers)
    with bench.process(**environment) as process:
        assert read_responses(bench.responses, 1)[0]["status"] == "success"
        process.wait_for("request answered", count=2)
    written = process.log_file.read_text()
    assert '"librdkafka"' in written
    assert broker.password not in written
    assert TRACE not in written


# Secrets from files


def in_folder(folder: Path, monkeypatch: pytest.MonkeyPatch, **variables: str) -> None:
    monkeypatch.chdir(folder)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)


@pytest.mark.parametrize("name", ["kafka_sasl_password", "kafka_ssl_key_password"])
@pytest.mark.parametrize(
    ("content", "secret"),
    [
        (b"plain", "plain"),
        (b"newline\n", "newline"),
        (b"windows\r\n", "windows"),
        (b"two\nlines\n", "two\nlines"),
        ("Pässwörd ☃\n".encode(), "Pässwörd ☃"),
        (b" spaces \n", " spaces "),
    ],
)
def test_file_holds_the_secret(
    name: str, content: bytes, secret: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its content without the newline at the end is the secret."""
    (tmp_path / "secret").write_bytes(content)
    in_folder(tmp_path, monkeypatch, **{f"{name.upper()}_FILE": "secret"})
    value = getattr(load_settings({}), name)
    assert value.get_secret_value() == secret
    consumer_properties(load_settings({}))


def test_env_file_may_name_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A variable in `.env` names it, too; the environment wins."""
    for name in ("one", "two"):
        (tmp_path / name).write_text(f"secret {name}")
    (tmp_path / ".env").write_text("KAFKA_SASL_PASSWORD_FILE=one\nKAFKA_SASL_PASSWORD=\n")
    in_folder(tmp_path, monkeypatch)
    assert load_settings({}).kafka_sasl_password == SecretStr("secret one")
    monkeypatch.setenv("KAFKA_SASL_PASSWORD_FILE", "two")
    assert load_settings({}).kafka_sasl_password == SecretStr("secret two")


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (None, "No such file"),
        (b"", "empty"),
        (b"\n", "empty"),
        (b"hunter2\xff", "not UTF-8"),
        (b"hunter2" * 20_000, "larger than 65536 bytes"),
    ],
)
def test_file_that_holds_no_secret_is_named(
    content: bytes | None, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The message has the variable and the path, and nothing of the content."""
    file = tmp_path / "secret"
    if content is not None:
        file.write_bytes(content)
    in_folder(tmp_path, monkeypatch, KAFKA_SSL_KEY_PASSWORD_FILE=str(file))
    with pytest.raises(SettingsError, match=rf"^KAFKA_SSL_KEY_PASSWORD_FILE: {file} cannot be used \({reason}") as caught:
        load_settings({})
    assert TRACE not in str(caught.value)


def test_folder_pipe_and_nul_hold_no_secret(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder and a pipe are refused at once; so is a NUL character, at which librdkafka would end the secret."""
    in_folder(tmp_path, monkeypatch, KAFKA_SASL_PASSWORD_FILE=str(tmp_path))
    with pytest.raises(SettingsError, match=r"^KAFKA_SASL_PASSWORD_FILE: .* cannot be used \(Is a directory\)"):
        load_settings({})
    monkeypatch.setenv("KAFKA_SASL_PASSWORD_FILE", "./pipe")
    subprocess.run(["mkfifo", tmp_path / "pipe"], check=True)
    with pytest.raises(SettingsError, match=r"\./pipe cannot be used \(not a regular file\)"):
        load_settings({})
    (tmp_path / "nul").write_bytes(b"hunter2\0rest")
    monkeypatch.setenv("KAFKA_SASL_PASSWORD_FILE", "./nul")
    with pytest.raises(SettingsError, match=r"^KAFKA_SASL_PASSWORD: must not have a NUL character") as caught:
        load_settings({})
    assert TRACE not in str(caught.value)


@pytest.mark.parametrize("also_in", ["environment", ".env"])
def test_secret_and_its_file_exclude_each_other(also_in: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The message names both variables with their sources."""
    in_folder(tmp_path, monkeypatch, KAFKA_SASL_PASSWORD_FILE="/dev/null")  # noqa: S106
    if also_in == ".env":
        (tmp_path / ".env").write_text(f"KAFKA_SASL_PASSWORD={PASSWORD}")
    else:
        monkeypatch.setenv("KAFKA_SASL_PASSWORD", PASSWORD)
    text = rf"^KAFKA_SASL_PASSWORD: is set \({re.escape(also_in)}\), and so is KAFKA_SASL_PASSWORD_FILE \(environment\)"
    with pytest.raises(SettingsError, match=text) as caught:
        load_settings({})
    assert TRACE not in str(caught.value)
