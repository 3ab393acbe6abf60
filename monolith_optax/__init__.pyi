# What the package exports, for type checkers and for __init__.py, which reads it.
from monolith_optax import checkpoint as checkpoint
from monolith_optax import embedding as embedding
from monolith_optax import net as net
from monolith_optax._compiled.check_in_place import check_in_place as check_in_place
from monolith_optax._ids.bags import Bags as Bags
from monolith_optax._ids.id_map import IdMap as IdMap
from monolith_optax._ids.initial_rows import uniform_rows as uniform_rows
from monolith_optax._ids.moves import Moves as Moves
from monolith_optax._ids.raw import split_ids as split_ids
from monolith_optax._ids.row_cache import RowCache as RowCache
from monolith_optax._ids.traffic import CacheCounts as CacheCounts
from monolith_optax._nnx import nnx_value_and_row_grad as nnx_value_and_row_grad
from monolith_optax._optimizers.adamom import AdamomState as AdamomState
from monolith_optax._optimizers.adamom import adamom as adamom
from monolith_optax._optimizers.rmsprop import RmspropState as RmspropState
from monolith_optax._optimizers.rmsprop import rmsprop as rmsprop
from monolith_optax._optimizers.shampoo import ShampooState as ShampooState
from monolith_optax._optimizers.shampoo import shampoo as shampoo
from monolith_optax._optimizers.stochastic_rounding import (
    StochasticRoundingState as StochasticRoundingState,
)
from monolith_optax._optimizers.stochastic_rounding import (
    stochastic_rounding as stochastic_rounding,
)
from monolith_optax._rows.gradients.sparse_tables import sparse_tables as sparse_tables
from monolith_optax._rows.gradients.value_and_row_grad import (
    ValueAndRowGrad as ValueAndRowGrad,
)
from monolith_optax._rows.gradients.value_and_row_grad import (
    value_and_row_grad as value_and_row_grad,
)
from monolith_optax._rows.gradients.with_row_lookups import (
    with_row_lookups as with_row_lookups,
)
from monolith_optax._rows.slices.bag_lookup import bag_lookup as bag_lookup
from monolith_optax._rows.slices.exchange_metrics import (
    ExchangeMetrics as ExchangeMetrics,
)
from monolith_optax._rows.slices.exchange_metrics import (
    exchange_metrics as exchange_metrics,
)
from monolith_optax._rows.slices.row_slices import RowSlices as RowSlices
from monolith_optax._rows.slices.table_stack import TableStack as TableStack
from monolith_optax._rows.slices.trees import apply_updates as apply_updates
from monolith_optax._rows.slices.trees import global_norm as global_norm
from monolith_optax._rows.slices.trees import pmean as pmean
from monolith_optax._rows.slices.trees import psum as psum
from monolith_optax._rows.steps.accumulate import accumulate as accumulate
from monolith_optax._rows.steps.grow_rows import grow_rows as grow_rows
from monolith_optax._rows.steps.grow_rows import restack as restack
from monolith_optax._rows.steps.lazy_rows import lazy_rows as lazy_rows
from monolith_optax._rows.steps.plan_tables import LeafPlan as LeafPlan
from monolith_optax._rows.steps.plan_tables import TablePlan as TablePlan
from monolith_optax._rows.steps.plan_tables import plan_tables as plan_tables
from monolith_optax._rows.steps.read_rows import read_rows as read_rows
from monolith_optax._rows.steps.read_rows import write_rows as write_rows
from monolith_optax._rows.steps.reset_rows import reset_rows as reset_rows
from monolith_optax._rows.steps.slot_shardings import slot_shardings as slot_shardings

__version__: str
