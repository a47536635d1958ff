"""Properties of Apache Kafka brokers with little load, in a container or not."""

from __future__ import annotations

Properties = dict[str, str]


def single_node() -> Properties:
    """Return the properties of a broker and controller in one that starts and rebalances quickly, except its listeners."""
    return {
        "process.roles": "broker,controller",
        "node.id": "1",
        "controller.listener.names": "CONTROLLER",
        "inter.broker.listener.name": "PLAINTEXT",
        "auto.create.topics.enable": "false",
        # There is no second broker to copy to, and each partition of an internal topic delays its first use.
        "offsets.topic.replication.factor": "1",
        "offsets.topic.num.partitions": "4",
        "transaction.state.log.replication.factor": "1",
        "transaction.state.log.min.isr": "1",
        "transaction.state.log.num.partitions": "4",
        "share.coordinator.state.topic.replication.factor": "1",
        "share.coordinator.state.topic.min.isr": "1",
        "share.coordinator.state.topic.num.partitions": "4",
        # The defaults spare a cluster work, and let a test wait long for a consumer that joins or is lost.
        "group.initial.rebalance.delay.ms": "0",
        "group.min.session.timeout.ms": "1000",
        "group.consumer.min.session.timeout.ms": "1000",
        "group.consumer.min.heartbeat.interval.ms": "200",
        "group.consumer.session.timeout.ms": "3000",
        "group.consumer.heartbeat.interval.ms": "500",
        # The controller takes a killed broker for alive for this long.
        "broker.session.timeout.ms": "3000",
        "broker.heartbeat.interval.ms": "500",
        "log.cleaner.dedupe.buffer.size": str(4 * 1024 * 1024),
    }


def listeners(host: str, ports: dict[str, int], advertised: dict[str, str]) -> Properties:
    """Return the properties of the listeners with their ports, and of the addresses that clients are given, by their names."""
    return {
        "listeners": ",".join(f"{name}://{host}:{port}" for name, port in ports.items()),
        "advertised.listeners": ",".join(f"{name}://{address}" for name, address in advertised.items()),
        "controller.quorum.voters": f"1@127.0.0.1:{ports['CONTROLLER']}",
        "listener.security.protocol.map": ",".join(
            f"{name}:{'PLAINTEXT' if name == 'CONTROLLER' else name}" for name in ports
        ),
    }


def cluster_node(node: int, ports: list[int], controller: str) -> Properties:
    """Return the properties of one of three brokers that hold every partition; the second port is that of a controller."""
    address = f"PLAINTEXT://127.0.0.1:{ports[0]}"
    properties = single_node() | {
        "node.id": str(node),
        "listeners": address,
        "advertised.listeners": address,
        "controller.quorum.voters": controller,
        "listener.security.protocol.map": "PLAINTEXT:PLAINTEXT,CONTROLLER:PLAINTEXT",
        "default.replication.factor": "3",
        "min.insync.replicas": "2",
    }
    for topic in ("offsets.topic", "transaction.state.log", "share.coordinator.state.topic"):
        properties[f"{topic}.replication.factor"] = "3"
    for topic in ("transaction.state.log", "share.coordinator.state.topic"):
        properties[f"{topic}.min.isr"] = "2"
    if len(ports) == 1:
        return properties | {"process.roles": "broker"}
    listener = f"CONTROLLER://127.0.0.1:{ports[1]}"
    return properties | {"listeners": f"{address},{listener}", "advertised.listeners": f"{address},{listener}"}
