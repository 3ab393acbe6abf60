"""The node checker: which nodes of a cluster are up, and why the others are not.

It imports no JAX. `monolith-net --help` describes its command line.
"""

from monolith_optax.net._address import (
    Address,
    AddressFamily,
    concat_ip_and_port,
    get_local_ip,
    get_local_server_addr,
    is_ipv4_supported,
    is_ipv6_address,
    parse_address,
)
from monolith_optax.net._cluster import (
    coordinator_addresses,
    read_addresses,
    tf_config_addresses,
)
from monolith_optax.net._connect import Connector, TcpConnector
from monolith_optax.net._coordinator import wait_for_coordinator
from monolith_optax.net._http import HttpConnector
from monolith_optax.net._monolith import NodeAliveChecker
from monolith_optax.net._probe import NodeStatus
from monolith_optax.net._reason import Reason
from monolith_optax.net._report import NodeReport, NodesDownError, Transition
from monolith_optax.net._round import check_nodes
from monolith_optax.net._wait import wait_for_nodes
from monolith_optax.net._watch import watch_nodes

__all__ = [
    "Address",
    "AddressFamily",
    "Connector",
    "HttpConnector",
    "NodeAliveChecker",
    "NodeReport",
    "NodeStatus",
    "NodesDownError",
    "Reason",
    "TcpConnector",
    "Transition",
    "check_nodes",
    "concat_ip_and_port",
    "coordinator_addresses",
    "get_local_ip",
    "get_local_server_addr",
    "is_ipv4_supported",
    "is_ipv6_address",
    "parse_address",
    "read_addresses",
    "tf_config_addresses",
    "wait_for_coordinator",
    "wait_for_nodes",
    "watch_nodes",
]

# Pickles, tracebacks and help name the public module, so that files can move.
for _name in __all__:
    globals()[_name].__module__ = __name__
del _name
