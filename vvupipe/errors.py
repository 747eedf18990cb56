"""The exceptions of the control plane.

VvupipeError
├── UserError       what the user asked for cannot be done; one line, exit status 2
├── ProtocolError   a peer broke its protocol; its session ends, the service goes on
│   ├── Disconnected    the peer went away in the middle of a message or an exchange
│   └── Refused         a back-end answered that it did not do what was asked; the connection stays usable
├── NotNegotiated   a request needs a feature that was not negotiated; nothing was sent
├── TransportError  the carrier (VFIO function, socket) failed under us
└── WorkerError     a worker process failed or did not answer
"""

__all__ = [
    "Disconnected",
    "NotNegotiated",
    "ProtocolError",
    "Refused",
    "TransportError",
    "UserError",
    "VvupipeError",
    "WorkerError",
]


class VvupipeError(Exception):
    """Base of every error that vvupipe raises on purpose."""


class UserError(VvupipeError):
    """What the user asked for cannot be done. The message is one line that says what to do instead."""


class ProtocolError(VvupipeError):
    """A peer broke its protocol. Its session must end; the service goes on with the next one."""


class Disconnected(ProtocolError):
    """The peer closed its end while an answer or the rest of a message was still due."""


class Refused(ProtocolError):
    """A back-end answered that it did not do what was asked. The connection stays usable."""


class NotNegotiated(VvupipeError):
    """A request needs a feature that was not negotiated. Nothing was sent."""


class TransportError(VvupipeError):
    """The carrier of the messages failed; a new connection may help."""


class WorkerError(VvupipeError):
    """A worker process died, failed a command or did not answer in time."""
