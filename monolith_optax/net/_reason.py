"""Why a node is not known to be up."""

import enum
import errno
import socket


class Reason(enum.StrEnum):
    """Why a node is not known to be alive."""

    REFUSED = "refused"
    TIMEOUT = "timeout"
    UNREACHABLE = "unreachable"
    NAME_NOT_RESOLVED = "name not resolved"
    INVALID_ADDRESS = "invalid address"
    LOCAL_FAULT = "local fault"


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


def reason_of(error: OSError) -> Reason:
    """What an error says about the node; LOCAL_FAULT if it says nothing about it."""
    if isinstance(error, socket.gaierror):
        local = error.errno in (socket.EAI_MEMORY, socket.EAI_SYSTEM)
        return Reason.LOCAL_FAULT if local else Reason.NAME_NOT_RESOLVED
    if isinstance(error, TimeoutError):
        return Reason.TIMEOUT
    return next(
        (reason for reason, numbers in _REASONS.items() if error.errno in numbers),
        Reason.LOCAL_FAULT,
    )
