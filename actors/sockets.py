"""ZMQ sockets that only the group's own processes can talk to.

All sockets use CURVE encryption with one key pair per group. The key pair travels through Ray alone. CURVE never shows
a server's public key on the wire, and without it a handshake fails; so whoever was not handed the pair can neither
submit nor read, and a client that reaches the wrong endpoint finds no matching secret there.
"""

from __future__ import annotations

from dataclasses import dataclass

import zmq

# Messages older than this on a closing socket are not worth waiting for.
LINGER_MS = 200


@dataclass(frozen=True)
class Keys:
    """A CURVE key pair, Z85-encoded, shared by the processes of one group."""

    public: bytes
    secret: bytes

    @classmethod
    def new(cls) -> Keys:
        return cls(*zmq.curve_keypair())

    def server(self, socket: zmq.Socket) -> None:
        """Makes ``socket`` demand the group's key of whoever connects; call before bind."""
        socket.curve_secretkey = self.secret
        socket.curve_publickey = self.public
        socket.curve_server = True
        _common(socket)

    def client(self, socket: zmq.Socket) -> None:
        """Makes ``socket`` present the group's key; call before connect."""
        socket.curve_secretkey = self.secret
        socket.curve_publickey = self.public
        socket.curve_serverkey = self.public
        _common(socket)


def _common(socket: zmq.Socket) -> None:
    socket.linger = LINGER_MS
    # Queues are bounded by the protocols (requests in flight, one Outputs per client and step), not by dropping.
    socket.sndhwm = 0
    socket.rcvhwm = 0


def bind(socket: zmq.Socket, ip: str) -> str:
    """Binds to a port the kernel chooses on ``ip`` and returns the endpoint others connect to."""
    socket.bind(f"tcp://{ip}:0")
    endpoint = socket.last_endpoint
    assert isinstance(endpoint, bytes)
    return endpoint.decode()
