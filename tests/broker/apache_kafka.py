"""A real Apache Kafka on this machine, without Docker."""

from __future__ import annotations

import shutil
import subprocess
import tempfile
from collections.abc import Mapping
from pathlib import Path

from tests.broker.certificates import Certificates, write_certificates
from tests.broker.interface import Broker, BrokerError, wait_for_response
from tests.broker.maven import class_path, kafka_version
from tests.broker.ports import free_ports, require_free
from tests.broker.process import Process
from tests.broker.properties import Properties, listeners, single_node

CLUSTER_ID = "latent-encoder-testing"  # any 16 bytes in URL-safe base64
# The process lives for seconds or minutes, so options that make Java fast in the long run would only delay its start.
JAVA = ["java", "-Xmx400m", "-XX:+UseSerialGC", "-XX:TieredStopAtLevel=1", "-Dorg.slf4j.simpleLogger.showDateTime=true"]


class ApacheKafka(Broker):
    """One broker that can be restarted, with a listener for everybody, one for passwords and one for certificates."""

    name = f"Apache Kafka {kafka_version()} (KRaft, jars from Maven Central)"
    username = "service"
    password = "service-secret"  # noqa: S105 - of a broker that only this machine reaches
    secure_bootstrap_servers: str
    """Address for SASL_SSL, with SCRAM-SHA-512 or PLAIN. A client certificate is optional, but must be valid."""
    mutual_tls_bootstrap_servers: str
    """Address for SSL, which only clients with a certificate can use."""
    ca_file: Path
    client_certificate: Path
    client_key: Path

    def __init__(
        self, port: int | None = None, folder: Path | None = None, properties: Mapping[str, str] | None = None
    ) -> None:
        """Start the broker on a given port or any, with the data of a given folder, which is kept, or with new data.

        The given properties win over those of the tests.
        """
        self._given = properties or {}
        open_port, secure_port, mutual_tls_port, controller_port = free_ports(4)
        self._ports = {"PLAINTEXT": port or open_port, "SASL_SSL": secure_port, "SSL": mutual_tls_port}
        self._addresses = {name: f"127.0.0.1:{number}" for name, number in self._ports.items()}
        self._ports["CONTROLLER"] = controller_port
        self.bootstrap_servers = self._addresses["PLAINTEXT"]
        self.secure_bootstrap_servers = self._addresses["SASL_SSL"]
        self.mutual_tls_bootstrap_servers = self._addresses["SSL"]
        self._class_path = class_path()
        self._keep_data = folder is not None
        self._folder = (folder or Path(tempfile.mkdtemp(prefix="latent-encoder-kafka-"))).absolute()
        self._process: Process | None = None
        try:
            self._prepare()
            self.start()
        except BaseException:
            self.close()
            raise

    def start(self) -> None:
        """Start the broker with its data on its ports, and wait until it responds."""
        require_free(self._ports.values())
        self._process = Process(self._java("kafka.Kafka", str(self._properties)), self._folder / "kafka.log")
        wait_for_response(self.bootstrap_servers, self._process.check)

    def stop(self) -> None:
        """Shut the broker down in good order; its data stays."""
        if self._process:
            self._process.stop()
            self._process = None

    def freeze(self) -> None:
        """Suspend the broker, with its connections open, until it is killed."""
        if self._process:
            self._process.freeze()

    def kill(self) -> None:
        """Kill the broker; its data stays as it is."""
        if self._process:
            self._process.kill()
            self._process = None

    def check(self) -> None:
        """Raise BrokerError if the broker has ended by itself."""
        if self._process:
            self._process.check()

    def close(self) -> None:
        """Stop the broker, and delete its data unless the folder was given."""
        self.stop()
        if not self._keep_data:
            shutil.rmtree(self._folder)

    @property
    def _properties(self) -> Path:
        return self._folder / "server.properties"

    def _java(self, main_class: str, *arguments: str) -> list[str]:
        return [*JAVA, "-cp", self._class_path, main_class, *arguments]

    def _prepare(self) -> None:
        """Write the certificates, the properties and the formatted data folder that the broker starts from."""
        self._folder.mkdir(parents=True, exist_ok=True)
        certificates = write_certificates(self._folder / "certificates")
        self.ca_file = certificates.authority
        self.client_certificate = certificates.client
        self.client_key = certificates.client_key

        properties = single_node() | listeners("127.0.0.1", self._ports, self._addresses) | access_rules()
        properties |= tls("ssl", certificates, "required") | tls("sasl_ssl", certificates, "requested")
        properties |= passwords("sasl_ssl", self.username, self.password)
        properties |= {"log.dirs": str(self._folder / "data"), **self._given}
        self._properties.write_text("".join(f"{key}={value}\n" for key, value in properties.items()))

        user = f"SCRAM-SHA-512=[name={self.username},password={self.password}]"
        arguments = ["format", "--ignore-formatted", "-t", CLUSTER_ID, "-c", str(self._properties), "--add-scram", user]
        command = self._java("kafka.tools.StorageTool", *arguments)
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
        if done.returncode != 0:
            raise BrokerError(f"Apache Kafka cannot prepare its data:\n{done.stdout}")


def tls(listener: str, certificates: Certificates, client_auth: str) -> Properties:
    """Return the properties of a listener's certificate and of the client certificates that it asks for."""
    prefix = f"listener.name.{listener}.ssl"
    return {
        f"{prefix}.keystore.type": "PEM",
        f"{prefix}.keystore.location": str(certificates.server),
        f"{prefix}.truststore.type": "PEM",
        f"{prefix}.truststore.location": str(certificates.authority),
        f"{prefix}.client.auth": client_auth,
    }


def passwords(listener: str, username: str, password: str) -> Properties:
    """Return the properties by which a user can log in; SCRAM passwords are in the broker's data, not in its properties."""
    prefix = f"listener.name.{listener}"
    modules = "org.apache.kafka.common.security"
    return {
        f"{prefix}.sasl.enabled.mechanisms": "SCRAM-SHA-512,PLAIN",
        f"{prefix}.scram-sha-512.sasl.jaas.config": f"{modules}.scram.ScramLoginModule required;",
        f"{prefix}.plain.sasl.jaas.config": f'{modules}.plain.PlainLoginModule required user_{username}="{password}";',
    }


def access_rules() -> Properties:
    """Return the properties that allow access rules; these bind users with a name, not other clients and not the broker."""
    return {
        "authorizer.class.name": "org.apache.kafka.metadata.authorizer.StandardAuthorizer",
        "allow.everyone.if.no.acl.found": "true",
        "super.users": "User:ANONYMOUS",
    }
