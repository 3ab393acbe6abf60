"""Where the addresses of a cluster's nodes are written down."""

import json
import os
import re
from collections.abc import Iterable, Sequence
from typing import Any


def tf_config_addresses(
    tf_config: str | None = None, *, roles: Sequence[str] | None = None
) -> list[str]:
    """The addresses in a TensorFlow cluster description.

    A role has a list of addresses, or a mapping from the numbers of tasks to addresses,
    in which some may be missing. Kubeflow's `sparseCluster` is read like `cluster`.

    Args:
      tf_config: the JSON text. None: the environment variable `TF_CONFIG`.
      roles: the roles to take, in this order; each must be in the description. None:
        all of them, in the description's order.

    Raises:
      TypeError: roles is a string.
      ValueError: the description is missing or malformed, or lacks a role.

    Example:
      >>> tf_config_addresses('{"cluster": {"ps": ["a:1"], "worker": ["b:1", "c:1"]}}')
      ['a:1', 'b:1', 'c:1']
    """
    if isinstance(roles, str):
        raise TypeError(f"roles must be a list such as ['ps'], but it is {roles!r}.")
    if tf_config is None and not (tf_config := os.environ.get("TF_CONFIG")):
        raise ValueError("The environment variable TF_CONFIG is not set.")
    try:
        nodes = _by_role(json.loads(tf_config))
    except (
        ValueError,
        TypeError,
        LookupError,
        AttributeError,
        RecursionError,  # thousands of brackets
    ) as error:
        raise ValueError(
            'TF_CONFIG must be JSON such as {"cluster": {"worker": ["host:2222"]}}, '
            f"but it is {tf_config!r}."
        ) from error
    if roles is None:
        roles = list(nodes)
    if missing := [role for role in roles if role not in nodes]:
        raise ValueError(
            f"roles must be among TF_CONFIG's {list(nodes)}, but {missing} are not."
        )
    return [address for role in roles for address in nodes[role]]


def coordinator_addresses(address: str | None = None) -> list[str]:
    """The address of a JAX coordinator, as a list of one.

    Args:
      address: what `jax.distributed.initialize` is given as `coordinator_address`.
        None: the environment variable `JAX_COORDINATOR_ADDRESS`.

    Raises:
      ValueError: there is none.

    Example:
      >>> coordinator_addresses("10.0.0.1:8476")
      ['10.0.0.1:8476']
    """
    if address is None:
        address = os.environ.get("JAX_COORDINATOR_ADDRESS")
    if not address:
        raise ValueError("The environment variable JAX_COORDINATOR_ADDRESS is not set.")
    return [address]


def read_addresses(lines: Iterable[str]) -> list[str]:
    """The addresses in a text with one on each line; blanks and # comments are skipped.

    Args:
      lines: an open file, or any lines of text.

    Example:
      >>> read_addresses(["a:1  # the chief", "", "b:1"])
      ['a:1', 'b:1']
    """
    texts = (line.partition("#")[0].strip() for line in lines)
    return [text for text in texts if text]


def _by_role(config: Any) -> dict[str, list[str]]:
    """The addresses of each role, in the order of its tasks."""
    roles: dict[str, dict[int, str]] = {}
    for key in ("cluster", "sparseCluster"):
        for role, tasks in config.get(key, {}).items():
            known = roles.setdefault(role, {})
            for number, address in _by_task(tasks).items():
                if known.setdefault(number, address) != address:
                    raise ValueError(f"{role} {number} has two addresses")
    if not ("cluster" in config or "sparseCluster" in config):
        raise KeyError("cluster")
    return {
        role: [address for _, address in sorted(tasks.items())]
        for role, tasks in roles.items()
    }


def _by_task(tasks: Any) -> dict[int, str]:
    if isinstance(tasks, list):
        tasks = dict(enumerate(tasks))
    else:
        if not all(re.fullmatch("0|[1-9][0-9]{0,9}", number) for number in tasks):
            raise ValueError(tasks)
        tasks = {int(number): address for number, address in tasks.items()}
    if not all(isinstance(address, str) for address in tasks.values()):
        raise TypeError(tasks)
    return dict(tasks)
