"""Send images to the service over Kafka, and print its responses as they come.

python scripts/send_request.py photo.jpg other.png --megapixels 0.5
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn, get_args
from uuid import uuid4

import click
from confluent_kafka import Consumer, KafkaError, KafkaException, Message, Producer, TopicPartition
from tqdm import tqdm

PROJECT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(PROJECT))

from config import Settings, SettingsError, load_settings
from errors import KafkaFailed
from latent_encoder.cli.parsing import FilePath
from latent_encoder.kafka.connection import BrokerState, kafka_failed
from latent_encoder.kafka.properties import consumer_properties, make_client, producer_properties
from models import UpscaleMethod

CONNECT_TIMEOUT_S = 10.0
POLL_S = 0.5

REQUEST_OPTIONS = ("correlation_id", "vae_model_name", "upscale_method", "megapixels", "output_dir")

EXIT_ERROR_RESPONSE = 1
EXIT_NO_RESPONSE = 3
EXIT_INTERRUPTED = 130  # 128 + SIGINT, as shells have it


@click.command(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.argument("images", metavar="IMAGE…", nargs=-1, required=True, type=FilePath())
@click.option("--bootstrap-servers", "kafka_bootstrap_servers", metavar="HOST:PORT,…", help="Kafka brokers.")
@click.option("--request-topic", "kafka_request_topic", metavar="TOPIC", help="Topic of the requests.")
@click.option("--response-topic", "kafka_response_topic", metavar="TOPIC", help="Topic of the responses.")
@click.option("--vae-model-name", metavar="NAME", help="VAE file in the service's model folders.")
@click.option("--upscale-method", metavar="METHOD", help=f"One of {', '.join(get_args(UpscaleMethod))}.")
@click.option("--megapixels", type=float, metavar="N", help="Size to scale to, 0.01 to 16; one is 1024 x 1024 pixels.")
@click.option("--output-dir", metavar="DIR", help="Folder for the files, as the service sees it.")
@click.option("--request-id", metavar="ID", help="For a single request; a new UUID for each if absent.")
@click.option(
    "--correlation-id",
    default=lambda: str(uuid4()),
    metavar="ID",
    help="Sent with every request; one new UUID for all if absent.",
)
@click.option("--count", type=click.IntRange(min=1), default=1, metavar="N", help="Send each image N times.")
@click.option(
    "--timeout",
    type=click.FloatRange(min=0, min_open=True),
    default=600.0,
    show_default=True,
    metavar="SECONDS",
    help="Wait at most this long for all responses.",
)
def main(images: tuple[str, ...], request_id: str | None, count: int, timeout: float, **options: Any) -> None:
    """Send a request for each IMAGE over Kafka and print each response as one line of JSON.



    The paths are sent as absolute ones and the files are not read here: the service, perhaps on another machine or in a
    container, must see each image under the same path. A field that is not given has the service's default. Brokers, topics
    and access (KAFKA_SASL_…, KAFKA_SSL_…) come from the service's settings: environment variables, or a file named .env.

    Exit status: 0 all succeeded, 1 a response is an error, 2 wrong usage, 3 no broker, no topic, or responses are missing,
    130 interrupted.

    \b
    Examples:
      python scripts/send_request.py photo.jpg other.png --megapixels 0.5
      python scripts/send_request.py photo.jpg --count 100 > responses.jsonl
    """  # noqa: D301  # click needs the character that \b stands for
    if request_id is not None and len(images) * count > 1:
        raise click.UsageError("--request-id is for a single request: one IMAGE, without --count.")
    ids = [request_id or str(uuid4()) for _ in range(len(images) * count)]
    shared = {name: options.pop(name) for name in REQUEST_OPTIONS}
    requests = [request_for(image, one, shared) for image, one in zip(images * count, ids, strict=True)]
    try:
        all_succeeded = run(load_settings(options), requests, timeout)
    except SettingsError as exc:
        raise click.UsageError(f"A setting cannot be used. {exc}") from exc
    except KafkaFailed as exc:
        fail(str(exc), EXIT_NO_RESPONSE)
    except OSError as exc:
        fail(f"Cannot write the responses to standard output ({exc.strerror}).", EXIT_NO_RESPONSE)
    except KeyboardInterrupt:
        fail("Interrupted; the service still responds to the requests that were sent.", EXIT_INTERRUPTED)
    sys.exit(0 if all_succeeded else EXIT_ERROR_RESPONSE)


def request_for(image: str, request_id: str, shared: Mapping[str, Any]) -> dict[str, Any]:
    """Return a request with those of the `shared` fields that were given."""
    given = {name: value for name, value in shared.items() if value is not None}
    return {"request_id": request_id, "image_path": str(Path(image).absolute()), **given, "timestamp": int(time.time())}


def run(settings: Settings, requests: Sequence[dict[str, Any]], timeout: float) -> bool:
    """Send the requests and print the responses; return whether all succeeded.

    Raises:
        SettingsError: librdkafka refuses a property.
        KafkaFailed: the broker cannot be reached, refuses access, or lacks a topic; or not all responses came in `timeout`
            seconds.
    """
    deadline = time.monotonic() + timeout
    connection = BrokerState(settings.kafka_bootstrap_servers)
    callbacks = {"error_cb": connection.on_error}
    consumer = make_client(Consumer, consumer_properties(settings) | callbacks, settings)
    try:
        assign_ends(consumer, connection, settings, min(CONNECT_TIMEOUT_S, timeout))
        producer = make_client(Producer, producer_properties(settings, transactional=False) | callbacks, settings)
        send(producer, connection, settings.kafka_request_topic, requests, deadline)
        ids = {key_of(request) for request in requests}
        statuses = set()
        with tqdm(total=len(ids), unit="response", file=sys.stderr, disable=not sys.stderr.isatty()) as bar:
            for response in responses_to(ids, consumer, connection, deadline):
                with bar.external_write_mode(file=sys.stdout):
                    click.echo(json.dumps(response))
                bar.update()
                statuses.add(response["status"])
    finally:
        consumer.close()
    if ids:
        raise KafkaFailed(f"{len(ids)} of {len(requests)} responses did not come within {timeout:g} s.")
    return statuses == {"success"}


def assign_ends(consumer: Consumer, connection: BrokerState, settings: Settings, timeout: float) -> None:
    """Read the responses from the present end of their topic on, without becoming a member of the service's group.

    Raises:
        KafkaFailed: the broker cannot be reached within `timeout` seconds, refuses access, or lacks one of the topics.
    """
    topic = settings.kafka_response_topic
    try:
        topics = consumer.list_topics(timeout=timeout).topics
        for name in (settings.kafka_request_topic, topic):
            if name not in topics:
                raise KafkaFailed(f"Topic {name} does not exist at {settings.kafka_bootstrap_servers}; create it first.")
        partitions = [TopicPartition(topic, n) for n in topics[topic].partitions]
        for partition in partitions:
            _, partition.offset = consumer.get_watermark_offsets(partition, timeout)
    except KafkaException as exc:
        consumer.poll(0)  # calls the callback, which notes a refused access
        connection.check()
        raise kafka_failed(f"Cannot use the broker at {settings.kafka_bootstrap_servers}", exc.args[0]) from exc
    consumer.assign(partitions)


def send(producer: Producer, connection: BrokerState, topic: str, requests: Sequence[dict[str, Any]], deadline: float) -> None:
    """Send all requests and wait until the broker has them, at most until `deadline` of the monotonic clock.

    Raises:
        KafkaFailed: the broker refuses a request or does not take all in time.
    """
    refused: list[KafkaError] = []

    def delivered(error: KafkaError | None, _: Message) -> None:
        if error is not None:
            refused.append(error)

    for request in requests:
        while True:
            try:
                producer.produce(topic, value=json.dumps(request).encode(), key=key_of(request), on_delivery=delivered)
                break
            except BufferError:
                producer.poll(POLL_S)
                connection.check()
    while unsent := producer.flush(POLL_S):
        connection.check()
        if time.monotonic() > deadline:
            raise KafkaFailed(f"{unsent} of {len(requests)} requests could not be sent in time.")
    if refused:
        raise kafka_failed(f"Topic {topic} refused {len(refused)} of {len(requests)} requests", refused[0])


def responses_to(keys: set[bytes], consumer: Consumer, connection: BrokerState, deadline: float) -> Iterator[dict[str, Any]]:
    """Yield the first response to each request, at most until the deadline, and remove its key from `keys`.

    Raises:
        KafkaFailed: the responses cannot be read.
    """
    while keys and time.monotonic() < deadline:
        message = receive(consumer, connection, min(POLL_S, max(0.0, deadline - time.monotonic())))
        if message is not None and message.key() in keys:
            keys.discard(message.key() or b"")
            yield json.loads(message.value() or b"")


def receive(consumer: Consumer, connection: BrokerState, timeout: float) -> Message | None:
    """Return the next record of the responses, or None if none comes within `timeout` seconds.

    Raises:
        KafkaFailed: the responses cannot be read.
    """
    message = consumer.poll(timeout)
    connection.check()
    error = message.error() if message is not None else None
    if error is not None:
        raise kafka_failed("Cannot read the responses", error)
    return message


def key_of(request: dict[str, Any]) -> bytes:
    """Return the record's key, the request id. The response has the same key, even if the service cannot use the id."""
    request_id: str = request["request_id"]
    return request_id.encode("utf-8", "surrogateescape")


def fail(message: str, status: int) -> NoReturn:
    """End the process with one line on standard error."""
    click.echo(f"Error: {message}", err=True)
    sys.exit(status)


if __name__ == "__main__":
    main()
