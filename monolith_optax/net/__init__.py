"""The node checker: which nodes of a cluster are up, and why the others are not.

It imports no JAX. `monolith-net --help` describes its command line.
"""

from monolith_optax._exports import exports as _exports

__all__, __getattr__, __dir__ = _exports(__name__)
