"""Nodes on one machine: network namespaces that are joined by a bridge, and can be unplugged and plugged in again."""

import os
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

INHERITED = ("PATH", "HOME", "PYTHONPATH", "LANG", "TMPDIR")  # what other tests set for their ranks is not a node's


class NotPermittedError(Exception):
    """This machine lets nobody make network namespaces."""


@dataclass(frozen=True)
class Network:
    """`count` nodes, numbered from 0, at 10.77.0.1 and so on."""

    name: str
    count: int

    def address(self, node: int) -> str:
        return f"10.77.0.{node + 1}"

    def popen(
        self, node: int, command: list[str], *, folder: Path, output: Path, environment: Mapping[str, str]
    ) -> subprocess.Popen[bytes]:
        """Start a command on a node; it ends with the processes that it has started."""
        with output.open("ab") as file:
            return subprocess.Popen(
                ["ip", "netns", "exec", self._namespace(node), *command],
                cwd=folder,
                stdout=file,
                stderr=file,
                env={name: os.environ[name] for name in INHERITED if name in os.environ} | dict(environment),
                start_new_session=True,
            )

    def unplug(self, node: int) -> None:
        """From now on nothing comes from or goes to the node; nobody is told."""
        self._set_port(node, "down")

    def plug_in(self, node: int) -> None:
        self._set_port(node, "up")

    def _set_port(self, node: int, state: str) -> None:
        _ip("-n", f"{self.name}-hub", "link", "set", f"port{node}", state)

    def _namespace(self, node: int) -> str:
        return f"{self.name}-{node}"

    def _build(self) -> None:
        hub = f"{self.name}-hub"
        _ip("netns", "add", hub)
        _ip("-n", hub, "link", "add", "bridge", "type", "bridge")
        _ip("-n", hub, "link", "set", "bridge", "up")
        for node in range(self.count):
            inside = self._namespace(node)
            _ip("netns", "add", inside)
            _ip("-n", hub, "link", "add", f"port{node}", "type", "veth", "peer", "name", "eth0", "netns", inside)
            _ip("-n", hub, "link", "set", f"port{node}", "master", "bridge", "up")
            _ip("-n", inside, "address", "add", f"{self.address(node)}/24", "dev", "eth0")
            _ip("-n", inside, "link", "set", "eth0", "up")
            _ip("-n", inside, "link", "set", "lo", "up")

    def _remove(self) -> None:
        for namespace in (f"{self.name}-hub", *map(self._namespace, range(self.count))):
            subprocess.run(["ip", "netns", "delete", namespace], capture_output=True, check=False)


@contextmanager
def network(count: int) -> Iterator[Network]:
    """A network of its own.

    Raises:
        NotPermittedError: it takes root's rights and iproute2.
    """
    made = Network(f"weft{os.getpid()}", count)
    try:
        made._build()
        yield made
    except (FileNotFoundError, PermissionError) as error:
        raise NotPermittedError(f"no network namespaces: {error}") from None
    finally:
        made._remove()


def _ip(*arguments: str) -> None:
    done = subprocess.run(["ip", *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        raise PermissionError(done.stderr.strip())
