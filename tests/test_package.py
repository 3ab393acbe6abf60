"""The package as a whole: what importing it costs, what it names, what it leans on."""

import ast
import importlib.metadata
import subprocess
import sys
from pathlib import Path

import pytest

import monolith_optax

PACKAGE = Path(monolith_optax.__file__).parent


def run(code, **environment):
    """Runs code in a new interpreter, which must succeed."""
    subprocess.run([sys.executable, "-c", code], check=True, env=environment)


def test_import_loads_neither_jax_nor_optax():
    run(
        "import sys, monolith_optax; "
        "assert not {'jax', 'jaxlib', 'optax', 'numpy'} & set(sys.modules)"
    )


def test_making_an_optimizer_touches_no_device():
    # JAX fails on first use of a device when it is told to use one that is not there.
    no_device = {"JAX_PLATFORMS": "nonexistent"}
    run("import monolith_optax as m; m.adamom(1e-3); m.rmsprop(1e-3)", **no_device)
    with pytest.raises(subprocess.CalledProcessError):
        run("import jax.numpy as jnp; jnp.zeros(1)", **no_device)


def test_every_public_name_is_there():
    for name in monolith_optax.__all__:
        assert getattr(monolith_optax, name).__doc__
        assert name in dir(monolith_optax)
    with pytest.raises(AttributeError, match="'adam'"):
        monolith_optax.adam  # noqa: B018 (the access is the test)


def test_version_and_types_are_in_the_distribution():
    assert importlib.metadata.version("monolith_optax") == monolith_optax.__version__
    assert (PACKAGE / "py.typed").exists()


def test_private_optax_is_imported_nowhere():
    sources = [*PACKAGE.rglob("*.py"), *Path(__file__).parents[1].glob("*/**/*.py")]
    assert len(sources) > 10
    for source in sources:
        for node in ast.walk(ast.parse(source.read_text())):
            names = []
            if isinstance(node, ast.ImportFrom):
                names = [f"{node.module}.{alias.name}" for alias in node.names]
            elif isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.Attribute):
                names = [ast.unparse(node)]
            for name in names:
                assert not name.startswith("optax._"), f"{source}: {name}"
