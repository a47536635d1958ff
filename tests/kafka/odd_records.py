"""A producer of records that Python's client refuses to send: header names that are not UTF-8, as C clients may send them.

It calls librdkafka, which Python's client contains, by its C interface.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

from confluent_kafka import cimpl

# The tags of the arguments of `rd_kafka_producev`, from rdkafka.h.
END, TOPIC, VALUE, FLAGS, HEADERS = 0, 1, 4, 7, 10
COPY = 2  # the flag that has librdkafka copy the value
PRODUCER = 0
PATIENCE_MS = 30_000


def send_odd(servers: str, topic: str, value: bytes, headers: Sequence[tuple[bytes, bytes]]) -> None:
    """Send a record whose header names are any bytes except NUL, and wait until the broker has it."""
    rdkafka = ctypes.CDLL(cimpl.__file__)
    for function in ("rd_kafka_conf_new", "rd_kafka_new", "rd_kafka_headers_new"):
        getattr(rdkafka, function).restype = ctypes.c_void_p
    fault = ctypes.create_string_buffer(512)
    properties = ctypes.c_void_p(rdkafka.rd_kafka_conf_new())
    assert rdkafka.rd_kafka_conf_set(properties, b"bootstrap.servers", servers.encode(), fault, 512) == 0, fault.value
    producer = ctypes.c_void_p(rdkafka.rd_kafka_new(PRODUCER, properties, fault, 512))
    assert producer, fault.value
    listed = ctypes.c_void_p(rdkafka.rd_kafka_headers_new(len(headers)))
    for name, content in headers:
        assert rdkafka.rd_kafka_header_add(listed, name, len(name), content, len(content)) == 0
    tagged: list[object] = [
        TOPIC,
        topic.encode(),
        VALUE,
        value,
        ctypes.c_size_t(len(value)),
        FLAGS,
        COPY,
        HEADERS,
        listed,
        END,
    ]
    assert rdkafka.rd_kafka_producev(producer, *tagged) == 0
    assert rdkafka.rd_kafka_flush(producer, PATIENCE_MS) == 0
    rdkafka.rd_kafka_destroy(producer)
