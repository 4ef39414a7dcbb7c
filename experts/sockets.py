"""Sockets to servers, none of which outlives the work on it by long.

A connection that is closed while it still has something to send stays open until that is sent. Over a link that died,
or to a server that accepts and never reads, this is until the kernel gives up: a quarter of an hour of retransmissions
(`tcp_retries2`), and for ever where the other machine still answers that it has no room.
"""

from __future__ import annotations

import contextlib
import socket
import weakref
from typing import Final

from aiohappyeyeballs import AddrInfoType

UNSENT_S: Final = 30.0
"""Seconds for which bytes may stay unacknowledged, or the other side have no room for more, before the connection is
broken: a hand-over or a tunnel is over by then, and a gateway of agora waits no longer for a body either."""


class Sockets:
    """Makes the sockets of one client, and ends those that are left.

    Args:
        unsent_s: Seconds for which sent bytes may stay where they are. Where the platform has no `TCP_USER_TIMEOUT`
            (RFC 5482; Linux has it), only `end` bounds that.
    """

    def __init__(self, unsent_s: float = UNSENT_S) -> None:
        self._unsent_ms = max(1, round(unsent_s * 1000))
        self._made: weakref.WeakSet[socket.socket] = weakref.WeakSet()

    def make(self, address: AddrInfoType) -> socket.socket:
        """A socket for an address, as `aiohttp.TCPConnector` asks its `socket_factory` for one."""
        family, kind, protocol, *_ = address
        made = socket.socket(family, kind, protocol)
        option = getattr(socket, "TCP_USER_TIMEOUT", None)
        if option is not None:
            # Some kernels of containers refuse it: a connection without it is better than none.
            with contextlib.suppress(OSError):
                made.setsockopt(socket.IPPROTO_TCP, option, self._unsent_ms)
        self._made.add(made)
        return made

    def end(self) -> None:
        """Breaks every connection that is still open, whatever it has to send."""
        for made in list(self._made):
            # Not closed: the event loop still watches it, and closes it once it sees that it is broken.
            with contextlib.suppress(OSError):
                made.shutdown(socket.SHUT_RDWR)
