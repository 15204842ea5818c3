"""A network for users without privileges: passt (https://passt.top) translates between the guest's frames and sockets
of the host."""

from __future__ import annotations

import os
import select
import socket
import subprocess
import tempfile
from collections.abc import Sequence

from kvmpy.errors import UsageError
from kvmpy.virtio.net.stream_socket import StreamSocket

__all__ = ["Passt"]

_PATIENCE = 5.0
"""Seconds that passt gets to start, and to end."""
_MTU = 65520
"""What passt gives to guests if it is not told otherwise: the longest IP packet that is a multiple of 4 bytes."""


class Passt(StreamSocket):
    """Starts `program`, which gives the guest the host's own network: addresses by DHCP, DHCPv6 and NDP, connections to
    wherever the host can connect to. To the guest, the address of the gateway is the host (its loopback interface).

    `tcp_ports` and `udp_ports` let ports of the host lead into the guest, as passt's options -t and -u say it, such as
    "2222:22". `mtu` is the longest packet; `arguments` are further options of passt. It ends with the device.

    Raises UsageError where passt is not installed, and OSError with what it says where it does not start.
    """

    name = "passt"

    def __init__(
        self, *, tcp_ports: str = "", udp_ports: str = "", mtu: int = _MTU, arguments: Sequence[str] = (),
        program: str = "passt",
    ) -> None:  # fmt: skip
        command = [program, "--foreground", "--quiet", "--mtu", str(mtu)]
        if tcp_ports:
            command += ["--tcp-ports", tcp_ports]
        if udp_ports:
            command += ["--udp-ports", udp_ports]
        ours, theirs = socket.socketpair()
        # It has no other place for what it says than its standard error.
        self._messages = os.memfd_create("passt", os.MFD_CLOEXEC)
        try:
            with theirs:
                self.process = _start([*command, *arguments, "--fd", str(theirs.fileno())], theirs, self._messages)
        except BaseException:
            ours.close()
            os.close(self._messages)
            raise
        self.mtu = mtu
        super().__init__(ours)

    @property
    def messages(self) -> str:
        """What passt has said."""
        return "" if self._messages < 0 else _messages(self._messages)

    def close(self) -> None:
        """Close the socket, which ends passt, and wait for that."""
        super().close()
        if self._messages >= 0:
            _end(self.process)
            os.close(self._messages)
            self._messages = -1


def _start(command: list[str], theirs: socket.socket, messages: int) -> subprocess.Popen[bytes]:
    """Start passt, and wait until it serves the socket `theirs`."""
    with tempfile.TemporaryDirectory(prefix="kvmpy-passt-") as folder:
        # It writes its number when it is ready. As root it becomes another user before.
        os.chmod(folder, 0o711)
        ready_path = os.path.join(folder, "ready")
        os.mkfifo(ready_path)
        os.chmod(ready_path, 0o622)
        ready = os.open(ready_path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            try:
                # A session of its own, so that Ctrl-C at the terminal is not meant for it.
                process = subprocess.Popen(
                    [*command, "--pid", ready_path], pass_fds=[theirs.fileno()], start_new_session=True,
                    stdin=subprocess.DEVNULL, stdout=messages, stderr=messages,
                )  # fmt: skip
            except FileNotFoundError:
                raise UsageError(
                    f"{command[0]} is not installed: Debian's package is passt (apt-get install passt)"
                ) from None
            try:
                _wait_until_ready(process, ready, messages)
            except BaseException:
                process.kill()
                process.wait()
                raise
            return process
        finally:
            os.close(ready)


def _wait_until_ready(process: subprocess.Popen[bytes], ready: int, messages: int) -> None:
    end = os.pidfd_open(process.pid)
    try:
        poll = select.poll()
        poll.register(ready, select.POLLIN)
        poll.register(end, select.POLLIN)
        events = dict(poll.poll(1000 * _PATIENCE))
    finally:
        os.close(end)
    if ready in events:
        return
    if end in events:
        status = process.wait()
        said = "; ".join(_messages(messages).splitlines()[:3])  # it may be the whole list of options
        raise OSError(f"passt does not start: {said or f'exit status {status}'}")
    raise OSError(f"passt is not ready after {_PATIENCE:g} seconds: {_messages(messages)}")


def _end(process: subprocess.Popen[bytes]) -> None:
    try:
        process.wait(_PATIENCE)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _messages(file: int) -> str:
    text = os.pread(file, 0x1_0000, 0).decode(errors="replace")
    # In containers, where there is no syslog, it complains about that before each message.
    beside = ("Failed to send", "Don't run as root")
    return "\n".join(line for line in text.splitlines() if line and not line.startswith(beside))
