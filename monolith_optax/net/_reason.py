"""Why a node is not known to be up."""

import enum
import errno
import socket

from monolith_optax._public import public


@public("monolith_optax.net")
class Reason(enum.StrEnum):
    """Why a node is not known to be alive."""

    REFUSED = "refused"
    TIMEOUT = "timeout"
    UNREACHABLE = "unreachable"
    NAME_NOT_RESOLVED = "name not resolved"
    NO_NAME_SERVER = "no name server"
    INVALID_ADDRESS = "invalid address"
    UNHEALTHY = "unhealthy"
    LOCAL_FAULT = "local fault"


class UnhealthyError(ConnectionError):
    """The port is open, but what listens does not answer as a healthy node would."""


# This machine lacks something.
LOCAL_SHORTAGES = {
    errno.EMFILE,
    errno.ENFILE,
    errno.ENOBUFS,
    errno.ENOMEM,
    errno.EPERM,
    errno.EACCES,
}
_REASONS = {
    Reason.REFUSED: {errno.ECONNREFUSED, errno.ECONNRESET, errno.ECONNABORTED},
    Reason.TIMEOUT: {errno.ETIMEDOUT},
    Reason.UNREACHABLE: {
        errno.EHOSTUNREACH,
        errno.ENETUNREACH,
        errno.EHOSTDOWN,
        errno.ENETDOWN,
    },
    # A link-local address without its scope.
    Reason.INVALID_ADDRESS: {errno.EINVAL},
}
_LOOKUP_REASONS: dict[int | None, Reason] = {
    socket.EAI_MEMORY: Reason.LOCAL_FAULT,
    socket.EAI_SYSTEM: Reason.LOCAL_FAULT,
    socket.EAI_AGAIN: Reason.NO_NAME_SERVER,
}


def reason_of(error: OSError) -> Reason:
    """What an error says about the node; LOCAL_FAULT if it says nothing about it."""
    if isinstance(error, socket.gaierror):
        return _LOOKUP_REASONS.get(error.errno, Reason.NAME_NOT_RESOLVED)
    if isinstance(error, UnhealthyError):
        return Reason.UNHEALTHY
    if isinstance(error, TimeoutError):
        return Reason.TIMEOUT
    return next(
        (reason for reason, numbers in _REASONS.items() if error.errno in numbers),
        Reason.LOCAL_FAULT,
    )
