"""Two hosts on one machine: network namespaces that a pair of virtual cards joins. Takes root and Debian's iproute2."""

import os
import signal
import subprocess
from pathlib import Path

CARD = "veth0"
PORT = "29511"


class Hosts:
    """In a ``with`` block two hosts, 0 and 1, with an address each, and nobody else on their network."""

    def __init__(self):
        self.names = [f"samerge-{os.getpid()}-{host}" for host in (0, 1)]
        self.addresses = [f"10.199.7.{host + 1}" for host in (0, 1)]

    def __enter__(self):
        try:
            for name in self.names:
                _ip("netns", "add", name)
            first, second = self.names
            _ip("-n", first, "link", "add", CARD, "type", "veth", "peer", "name", CARD, "netns", second)
            for name, address in zip(self.names, self.addresses, strict=True):
                _ip("-n", name, "address", "add", f"{address}/24", "dev", CARD)
                for card in ("lo", CARD):
                    _ip("-n", name, "link", "set", card, "up")
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_):
        for host, name in enumerate(self.names):
            self.kill(host)
            subprocess.run(["ip", "netns", "delete", name], capture_output=True)

    def start(self, host: int, command: list[str], output: Path, **environment: str) -> subprocess.Popen:
        """A command on a host; what it prints goes into a file."""
        with output.open("w") as file:
            return subprocess.Popen(
                ["ip", "netns", "exec", self.names[host], *command],
                stdout=file, stderr=subprocess.STDOUT, env={**os.environ, "GLOO_SOCKET_IFNAME": CARD, **environment},
            )  # fmt: skip

    def kill(self, host: int) -> None:
        """All that runs on a host, at once."""
        listed = subprocess.run(["ip", "netns", "pids", self.names[host]], capture_output=True, text=True)
        for process in listed.stdout.split():
            os.kill(int(process), signal.SIGKILL)

    def cut_off(self, host: int, is_down: bool = True) -> None:
        """Takes a host's card down, or up again: what is sent is lost, and nobody is told."""
        _ip("-n", self.names[host], "link", "set", CARD, "down" if is_down else "up")


def why_not() -> str | None:
    """Why this process cannot make hosts; None where it can."""
    try:
        with Hosts():
            return None
    except FileNotFoundError:
        return "skipped: there is no ip here (Debian's iproute2)"
    except subprocess.CalledProcessError as error:
        return f"skipped: this process may make no network namespaces (it takes root): {error.stderr.strip()}"


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True)
