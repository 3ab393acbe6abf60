"""The node checker: which nodes of a cluster are up, and why the others are not.

It imports no JAX. `python -m monolith_optax.net --help` is its command line.
"""

from monolith_optax.net._address import Address as Address
from monolith_optax.net._address import AddressFamily as AddressFamily
from monolith_optax.net._address import concat_ip_and_port as concat_ip_and_port
from monolith_optax.net._address import get_local_ip as get_local_ip
from monolith_optax.net._address import get_local_server_addr as get_local_server_addr
from monolith_optax.net._address import is_ipv4_supported as is_ipv4_supported
from monolith_optax.net._address import is_ipv6_address as is_ipv6_address
from monolith_optax.net._address import parse_address as parse_address
from monolith_optax.net._check import check_nodes as check_nodes
from monolith_optax.net._checker import NodeAliveChecker as NodeAliveChecker
from monolith_optax.net._cluster import coordinator_addresses as coordinator_addresses
from monolith_optax.net._cluster import read_addresses as read_addresses
from monolith_optax.net._cluster import tf_config_addresses as tf_config_addresses
from monolith_optax.net._coordinator import (
    wait_for_coordinator as wait_for_coordinator,
)
from monolith_optax.net._probe import Connector as Connector
from monolith_optax.net._probe import NodeStatus as NodeStatus
from monolith_optax.net._probe import Reason as Reason
from monolith_optax.net._probe import TcpConnector as TcpConnector
from monolith_optax.net._report import NodeReport as NodeReport
from monolith_optax.net._report import NodesDownError as NodesDownError
from monolith_optax.net._report import Transition as Transition
from monolith_optax.net._watch import wait_for_nodes as wait_for_nodes
from monolith_optax.net._watch import watch_nodes as watch_nodes
