"""Fixtures of all tests: one encoder on the real ComfyUI runtime, real VAEs of every family, a broker, and processes."""

from __future__ import annotations

import logging
import os
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock
from hypothesis import HealthCheck
from hypothesis import settings as hypothesis_settings
from opentelemetry import trace
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from prometheus_client import REGISTRY

from config import Settings
from latent_encoder import masking
from latent_encoder.telemetry.logs import StderrHandler
from service import LatentEncoder
from tests.broker import ApacheKafka, Broker, choose
from tests.helpers import (
    COMFYUI,
    PROCESS_SETTINGS,
    PROJECT,
    TINY_VAE,
    VAE,
    Encode,
    RunMain,
    clean_environment,
    request_for,
    stock,
)
from tests.kafka_tools import Bench, Events
from tests.trees import CORE, CORE_ONLY, FACTS, TREE, is_wanted, skip_what_holds_for_the_pinned_release

# No deadlines: the machine is shared, and a first run that fills Hypothesis' tables is slow. CI tries the same inputs each
# time; elsewhere a failure prints the line that makes its input again.
hypothesis_settings.register_profile(
    "project", deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize="CI" in os.environ, print_blob=True
)
hypothesis_settings.load_profile("project")


SHOWN_OF_A_LOG = 6000
"""Characters of a worker's log below a failed test: some minutes of a worker that waits for its broker."""

# The tests start a hundred processes, which share their compiled modules.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a model folder with random VAEs of the real architectures: SD-style KL, a TAESD pair, full-size Wan 2.1.

    The processes of pytest-xdist make the VAEs once, beside their temporary folders, and each links them into its own.
    """
    base = tmp_path_factory.getbasetemp()
    made = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "random-vaes"
    with FileLock(f"{made}.lock"):
        if not made.exists():
            stock("make-vaes", made, "kl", "taesd", "wan")
    return Path(shutil.copytree(made, base / "models", copy_function=os.link))


@pytest.fixture(scope="session", autouse=True)
def vae_of_processes(request: pytest.FixtureRequest) -> None:
    """Let processes find the VAE that stands in for the tiny one, if the tree cannot load the tiny one."""
    if VAE != TINY_VAE:
        PROCESS_SETTINGS["MODEL_DIR"] = str(request.getfixturevalue("model_dir"))


@pytest.fixture(autouse=True)
def logging_as_it_was() -> Iterator[None]:
    """Undo the logging configuration of a command line that ran in this process."""
    root = logging.getLogger()
    level = root.level
    yield
    logging.captureWarnings(capture=False)
    root.setLevel(level)
    for handler in root.handlers[:]:
        if isinstance(handler, StderrHandler):
            root.removeHandler(handler)


@pytest.fixture(autouse=True)
def known_secrets_as_they_were(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the process forget the secrets of a test: other tests use the same words, and a file may be named after one."""
    monkeypatch.setattr(masking, "_forms", set(masking._forms))
    monkeypatch.setattr(masking, "_patterns", list(masking._patterns))


@pytest.fixture(scope="session")
def settings(model_dir: Path) -> Settings:
    """Return the defaults, with the models, the image size and the device of the tests."""
    for name in os.environ.keys() - clean_environment().keys():
        del os.environ[name]
    return Settings(
        _env_file=None, comfyui_path=COMFYUI, model_dir=model_dir, vae_model_name=VAE, megapixels=0.02, device="cpu"
    )


@pytest.fixture(scope="session")
def encoder(settings: Settings) -> LatentEncoder:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # ComfyUI and its dependencies warn while they are imported
        return LatentEncoder.set_up(settings)


@pytest.fixture
def grown() -> Callable[..., float]:
    """Return the growth of a metric since the test began, by its name and the values of its labels."""

    def samples() -> dict[tuple[str, ...], float]:
        families = REGISTRY.collect()
        return {(s.name, *s.labels.values()): s.value for family in families for s in family.samples}

    before = samples()
    return lambda *place: samples().get(place, 0) - before.get(place, 0)


@pytest.fixture(scope="session")
def exporter() -> InMemorySpanExporter:
    """Collect the spans that this process exports; a process can have one provider only."""
    exporter, provider = InMemorySpanExporter(), TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    trace.set_tracer_provider(provider)
    return exporter


@pytest.fixture
def spans(exporter: InMemorySpanExporter) -> InMemorySpanExporter:
    exporter.clear()
    return exporter


@pytest.fixture
def encode(encoder: LatentEncoder, settings: Settings, tmp_path: Path) -> Encode:
    """Return a function that encodes one image into `tmp_path` and raises as the service does.

    A field that is not given has its default of `settings`.
    """

    def encode(image: str | Path, **fields: Any) -> Any:
        return encoder.encode(request_for(settings, tmp_path, image, fields))

    return encode


@pytest.fixture
def respond(encoder: LatentEncoder, settings: Settings, tmp_path: Path) -> Encode:
    """Return a function like `encode` that returns an error response instead of raising."""

    def respond(image: str | Path, **fields: Any) -> Any:
        return encoder.respond(request_for(settings, tmp_path, image, fields))

    return respond


@pytest.fixture
def run_main(tmp_path: Path) -> RunMain:
    """Return a function that runs the command line as a process, in an empty folder and without settings around it."""

    def run_main(*arguments: str | Path, env: Mapping[str, str] | None = None, prefix: Sequence[str] = ()) -> Any:
        command = [*prefix, sys.executable, PROJECT / "main.py", *arguments]
        environment = {**clean_environment(), **(env or {})}
        return subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, check=False)

    return run_main


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--require-apache-kafka", action="store_true", help="Fail instead of testing with a broker that is not Apache Kafka."
    )


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--require-apache-kafka") and not choose().is_apache_kafka:
        raise pytest.UsageError("No Apache Kafka can run here: start a Docker engine, or install Java 17 and Maven.")
    if missing := [name for name in CORE if not (PROJECT / "tests" / name).is_file()]:
        raise pytest.UsageError(f"Tests of the core are missing: {', '.join(missing)}.")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Choose the tests for the tree that TEST_COMFYUI_TREE names."""
    config.hook.pytest_deselected(items=[item for item in items if not is_wanted(item)])
    items[:] = [item for item in items if is_wanted(item)]
    for item in items:
        skip_what_holds_for_the_pinned_release(item)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Show the last lines of each worker's log if its test fails."""
    report = yield
    folder = getattr(item, "funcargs", {}).get("tmp_path")
    if report.failed and isinstance(folder, Path):
        for log in sorted(folder.rglob("worker-*.log")):
            report.sections.append((log.name, log.read_text(errors="replace")[-SHOWN_OF_A_LOG:]))
    return report


def pytest_report_header() -> list[str]:
    """Return the ComfyUI tree and the broker of the tests."""
    return [f"ComfyUI {FACTS.version}, {TREE}{', core tests only' * CORE_ONLY}", f"Kafka broker: {choose().name}"]


@pytest.fixture(scope="session")
def broker() -> Iterator[Broker]:
    """Provide the broker of all tests: the one that is given, or one that is started here."""
    with choose()() as broker:
        yield broker


@pytest.fixture
def own(broker: Broker) -> Iterator[ApacheKafka]:
    """Provide a broker for one test, which may freeze it, stop it, kill it, and start it again with its log."""
    if not isinstance(broker, ApacheKafka):
        pytest.skip(f"{broker.name} cannot be stopped and started again with its log")
    with ApacheKafka() as own:
        yield own
        own.kill()  # it may stand still


@pytest.fixture
def make_bench(broker: Broker, tmp_path: Path) -> Iterator[Callable[..., Bench]]:
    """Provide a function that makes topics for one test; `create=False` leaves creating them to the test."""
    benches: list[Bench] = []

    def make_bench(partitions: int = 1, *, create: bool = True, servers: str = broker.bootstrap_servers) -> Bench:
        bench = Bench(servers, tmp_path, partitions)
        benches.append(bench)
        if create:
            bench.create()
        return bench

    yield make_bench
    for bench in benches:
        bench.close()


@pytest.fixture
def bench(make_bench: Callable[..., Bench]) -> Bench:
    """Return topics for one test, with one partition each."""
    return make_bench()


@pytest.fixture
def apache_kafka(broker: Broker) -> None:
    """Skip a test that needs Apache Kafka on another broker."""
    if not broker.is_apache_kafka:
        pytest.skip(f"{broker.name} has no transactions, no limits of a topic's own, and no quick rebalances")


@pytest.fixture
def events(caplog: pytest.LogCaptureFixture) -> Events:
    """Return the log events of a worker in this process."""
    caplog.set_level("INFO")
    return Events(caplog)
