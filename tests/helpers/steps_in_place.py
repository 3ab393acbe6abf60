"""Steps that are jitted while this is on are checked when they are first called."""

import contextlib
import functools

import jax
import jax.numpy as jnp
import optax
import pytest

import monolith_optax
from monolith_optax import RowSlices, check_in_place


@contextlib.contextmanager
def steps_are_checked():
    """Yields the names of the steps: what is jitted and adds updates to parameters.

    Flax, Equinox and others call `jax.jit` in the end.
    """
    checked, adding = [], []

    def noticing(apply_updates):
        @functools.wraps(apply_updates)
        def noticed(params, updates):
            slices = jax.tree.leaves(updates, is_leaf=is_slices)
            adding.append(any(map(is_slices, slices)))
            return apply_updates(params, updates)

        return noticed

    def jit(*args, **kwargs):
        if not args:  # as in @jax.jit(donate_argnums=0)
            return functools.partial(jit, **kwargs)
        return Jitted(original(*args, **kwargs), checked, adding)

    original = jax.jit
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax, "jit", jit)
        for package in optax, monolith_optax:
            patch.setattr(package, "apply_updates", noticing(package.apply_updates))
        yield checked


class Jitted:
    """What `jax.jit` returned; its first call also says whether it is in place."""

    def __init__(self, jitted, checked, adding):
        self.jitted, self.checked, self.adding = jitted, checked, adding
        self.is_new = True
        functools.update_wrapper(self, jitted)

    def __call__(self, *args, **kwargs):
        leaves = jax.tree.leaves((args, kwargs))
        if self.is_new and not any(isinstance(x, jax.core.Tracer) for x in leaves):
            self.is_new = False
            self.adding.clear()
            lowered = self.jitted.lower(*args, **kwargs)
            if self.adding:
                check(lowered, leaves, by_rows=any(self.adding))
                self.checked.append(self.jitted.__name__)
        return self.jitted(*args, **kwargs)

    def __getattr__(self, name):
        return getattr(self.jitted, name)

    def __get__(self, instance, owner=None):
        return self if instance is None else functools.partial(self, instance)


def check(lowered, leaves, *, by_rows):
    donated = any(info.donated for info in jax.tree.leaves(lowered.args_info))
    assert donated, "A training step donates nothing."
    # XLA for CPUs before JAX 0.12 widens every bfloat16 table that it scatters to.
    if by_rows and not any(getattr(x, "dtype", None) == jnp.bfloat16 for x in leaves):
        check_in_place(lowered.compile())


def is_slices(node):
    return isinstance(node, RowSlices)
