"""The optimizers of embedding tables: Monolith's, and row-wise Adagrad.

Names, arguments and defaults are Monolith's; row-wise Adagrad has FBGEMM's. A
row is an index of a parameter's leading axis. Inside `monolith_optax.lazy_rows`, a step
touches only the rows of a batch, as in Monolith's hash tables.
"""

from monolith_optax._exports import exports as _exports

__all__, __getattr__, __dir__ = _exports(__name__)
