"""Pages list what is elsewhere in the repository, and their steps are in place."""

import functools
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import optax
import pytest
from steps_in_place import steps_are_checked

from monolith_optax import RowSlices, lazy_rows
from monolith_optax.checkpoint import __main__ as checkpoint
from monolith_optax.checkpoint._segments import KINDS, PER_ROW, PER_WEIGHT, STEP
from monolith_optax.net import __main__ as net

ROOT = Path(__file__).parents[1]


def page(name):
    return (ROOT / "docs" / name).read_text()


@pytest.mark.parametrize("program", [checkpoint, net])
def test_every_command_has_its_help(program):
    """The help itself is compared where the blocks of the page are run."""
    parser = program.parser()
    [commands] = parser._subparsers._group_actions
    for command in ["", *commands.choices]:
        line = " ".join([parser.prog, *command.split(), "--help"])
        assert f"$ {line}\n" in page("commands.md")


def test_promises_name_tests_that_exist():
    named = re.findall(r"`([\w/]+\.py)::(\w+)`", page("numbers.md"))
    for file, test in named:
        assert f"\ndef {test}(" in (ROOT / "tests" / file).read_text()
    assert len(named) == page("numbers.md").count("::")


def test_slots_of_hash_tables_are_those_that_are_read():
    kinds = {PER_WEIGHT: "D", PER_ROW: "one", STEP: "integer"}
    for name, kind in KINDS.items():
        row = rf"\n\| {kind.number or 'none'} \| `{name}` \| (.*) \|\n"
        slots = re.search(row, page("formats.md"))[1]
        described = ", ".join(f"`{slot}`: {kinds[x]}" for slot, x in kind.slots.items())
        assert slots == described or not kind.slots


@pytest.mark.parametrize("donated", [(), (0,), (0, 1)])
def test_steps_of_documents_are_checked(donated):
    tx = lazy_rows(optax.adagrad(0.1))
    params = jnp.ones((10_000, 8))
    with steps_are_checked() as checked:

        @functools.partial(jax.jit, donate_argnums=donated)
        def step(params, state):
            gradient = RowSlices(jnp.arange(2), jnp.ones((2, 8)))
            updates, state = tx.update(gradient, state, params)
            return optax.apply_updates(params, updates), state

        if donated == (0, 1):
            step(params, tx.init(params))
            assert checked == ["step"]
        else:
            with pytest.raises((ValueError, AssertionError), match=r"donate[sd]"):
                step(params, tx.init(params))
