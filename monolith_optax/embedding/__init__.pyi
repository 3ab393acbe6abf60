# What the package exports, for type checkers and for __init__.py, which reads it.
from monolith_optax.embedding._adadelta import AdadeltaState as AdadeltaState
from monolith_optax.embedding._adadelta import adadelta as adadelta
from monolith_optax.embedding._adagrad import AdagradState as AdagradState
from monolith_optax.embedding._adagrad import adagrad as adagrad
from monolith_optax.embedding._adam import AdamState as AdamState
from monolith_optax.embedding._adam import adam as adam
from monolith_optax.embedding._amsgrad import AmsgradState as AmsgradState
from monolith_optax.embedding._amsgrad import amsgrad as amsgrad
from monolith_optax.embedding._batch_softmax import (
    BatchSoftmaxState as BatchSoftmaxState,
)
from monolith_optax.embedding._batch_softmax import batch_softmax as batch_softmax
from monolith_optax.embedding._delay_compensation import (
    delay_compensation as delay_compensation,
)
from monolith_optax.embedding._ftrl import FtrlState as FtrlState
from monolith_optax.embedding._ftrl import ftrl as ftrl
from monolith_optax.embedding._group_adagrad import (
    GroupAdagradState as GroupAdagradState,
)
from monolith_optax.embedding._group_adagrad import group_adagrad as group_adagrad
from monolith_optax.embedding._group_ftrl import GroupFtrlState as GroupFtrlState
from monolith_optax.embedding._group_ftrl import group_ftrl as group_ftrl
from monolith_optax.embedding._momentum import MomentumState as MomentumState
from monolith_optax.embedding._momentum import momentum as momentum
from monolith_optax.embedding._moving_average import (
    MovingAverageState as MovingAverageState,
)
from monolith_optax.embedding._moving_average import moving_average as moving_average
from monolith_optax.embedding._rmsprop import RmspropState as RmspropState
from monolith_optax.embedding._rmsprop import rmsprop as rmsprop
from monolith_optax.embedding._rmspropv2 import RmspropV2State as RmspropV2State
from monolith_optax.embedding._rmspropv2 import rmspropv2 as rmspropv2
from monolith_optax.embedding._rowwise_adagrad import (
    RowwiseAdagradState as RowwiseAdagradState,
)
from monolith_optax.embedding._rowwise_adagrad import rowwise_adagrad as rowwise_adagrad
from monolith_optax.embedding._sgd import SgdState as SgdState
from monolith_optax.embedding._sgd import sgd as sgd
