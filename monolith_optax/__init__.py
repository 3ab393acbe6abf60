"""The optimizers of ByteDance's Monolith as optax gradient transformations.

Public names and submodules are imported on first use, so that `import monolith_optax`
loads neither JAX nor optax and touches no device. `__init__.pyi` lists them.
"""

from monolith_optax._exports import exports as _exports

__version__ = "0.3.0"

__all__, __getattr__, __dir__ = _exports(__name__)
