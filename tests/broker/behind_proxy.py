"""A broker whose listener for passwords is reached through a proxy, which can break off handshakes."""

from __future__ import annotations

import contextlib
import socket
import threading

from tests.broker.apache_kafka import ApacheKafka

CHUNK = 65_536
"""Bytes that are passed on at a time; more than a message of a handshake."""

APPLICATION_DATA = 23
"""The type of a TLS record that carries the client's requests; with TLS 1.3 also the end of its handshake."""

LOGIN_BEGINS = 3
"""The count of such records of a client after which its login has begun and not ended: the third is SaslHandshake or later."""


class Proxy:
    """A TCP proxy in threads of this process."""

    def __init__(self, port: int) -> None:
        """Pass connections on to that port of this machine, until `close`."""
        self._target = ("127.0.0.1", port)
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._connections: set[socket.socket] = set()
        self._breaks = False
        self.address = f"127.0.0.1:{self._listener.getsockname()[1]}"
        threading.Thread(target=self._accept, name="proxy", daemon=True).start()

    def break_logins(self) -> None:
        """Close all connections, and each new one in the middle of its login."""
        self._breaks = True
        for connection in tuple(self._connections):
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    def let_through(self) -> None:
        """Let new connections through again."""
        self._breaks = False

    def close(self) -> None:
        """Accept no more connections."""
        self._listener.close()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):  # the listener is closed
            while True:
                client = self._listener.accept()[0]
                threading.Thread(target=self._serve, args=[client], daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        with client, contextlib.suppress(OSError), socket.create_connection(self._target) as server:
            self._connections |= {client, server}
            threading.Thread(target=self._pass_on, args=[server, client], daemon=True).start()
            self._pass_on(client, server)
            self._connections -= {client, server}

    def _pass_on(self, source: socket.socket, target: socket.socket) -> None:
        requests = 0
        with contextlib.suppress(OSError):
            while data := source.recv(CHUNK):
                requests += data[0] == APPLICATION_DATA
                if self._breaks and requests >= LOGIN_BEGINS:
                    break
                target.sendall(data)
        for end in (source, target):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)


class BehindProxy(ApacheKafka):
    """A broker that names the proxy as its address for passwords, and that takes tokens too."""

    proxy: Proxy

    def _prepare(self) -> None:
        """Change the properties before the broker starts: Kafka's default is to accept tokens that nobody signed."""
        self.proxy = Proxy(self._ports["SASL_SSL"])
        self._addresses["SASL_SSL"] = self.secure_bootstrap_servers = self.proxy.address
        super()._prepare()
        with self._properties.open("a") as properties:
            module = "org.apache.kafka.common.security.oauthbearer.OAuthBearerLoginModule"
            properties.write("listener.name.sasl_ssl.sasl.enabled.mechanisms=SCRAM-SHA-512,PLAIN,OAUTHBEARER\n")
            properties.write(f"listener.name.sasl_ssl.oauthbearer.sasl.jaas.config={module} required;\n")

    def close(self) -> None:
        super().close()
        self.proxy.close()
