"""A broker for work on the service, with its topics: `python -m tests.broker`."""

from __future__ import annotations

import signal
import time
from pathlib import Path

import click
from confluent_kafka import KafkaError, KafkaException
from confluent_kafka.admin import AdminClient
from confluent_kafka.cimpl import NewTopic

from tests.broker import ApacheKafka, BrokerError, Tansu, choose_local

TOPICS = ["latent-encoder-requests", "latent-encoder-responses", "latent-encoder-requests-dlq"]
CONFIG = {"latent-encoder-requests-dlq": {"max.message.bytes": "10485760"}}  # a dead letter is larger than its request


@click.command()
@click.option("--port", default=9092, show_default=True, type=click.IntRange(1, 65535), help="Port to listen on.")
@click.option("--partitions", default=8, show_default=True, type=click.IntRange(min=1), help="Partitions of each topic.")
@click.option("--data-dir", type=click.Path(file_okay=False, path_type=Path), help="Keep the data there for the next start.")
def main(port: int, partitions: int, data_dir: Path | None) -> None:
    """Run a Kafka broker on this machine until Ctrl-C, with the service's topics."""
    signals: list[int] = []  # no Event: its lock may be held by the very wait that a signal interrupts
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, _: signals.append(number))
    try:
        with start(port, data_dir) as broker:
            create_topics(broker.bootstrap_servers, partitions)
            click.echo(f"{broker.name} at {broker.bootstrap_servers}")
            while not signals:
                broker.check()
                time.sleep(0.5)
    except BrokerError as error:
        raise click.ClickException(str(error)) from error


def start(port: int, data_dir: Path | None) -> ApacheKafka | Tansu:
    """Start the best broker that can run here without Docker."""
    kind = choose_local()
    if kind is ApacheKafka:
        return ApacheKafka(port, data_dir)
    if data_dir:
        raise click.UsageError("--data-dir needs Java 17 or newer and Maven; the broker without them keeps no data")
    return Tansu(port)


def create_topics(bootstrap_servers: str, partitions: int) -> None:
    """Create those of the service's topics that do not exist yet."""
    admin = AdminClient({"bootstrap.servers": bootstrap_servers, "log_level": 4})
    for created in admin.create_topics(
        [NewTopic(topic, partitions, 1, config=CONFIG.get(topic, {})) for topic in TOPICS]
    ).values():
        try:
            created.result()
        except KafkaException as error:
            if error.args[0].code() != KafkaError.TOPIC_ALREADY_EXISTS:
                raise


if __name__ == "__main__":
    main()
