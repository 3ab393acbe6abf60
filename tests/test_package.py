"""The package as a whole: what importing it costs, what it names, what it leans on."""

import ast
import doctest
import importlib.metadata
import re
import subprocess
import sys
from pathlib import Path

import pytest

import monolith_optax

PACKAGE = Path(monolith_optax.__file__).parent
ROOT = Path(__file__).parents[1]
API = ROOT / "docs" / "api.md"
MODULES = (
    monolith_optax,
    monolith_optax.checkpoint,
    monolith_optax.embedding,
    monolith_optax.net,
)


def run(code, **environment):
    """Runs code in a new interpreter, which must succeed."""
    subprocess.run([sys.executable, "-c", code], check=True, env=environment)


def test_import_loads_neither_jax_nor_optax():
    run(
        "import sys, monolith_optax; "
        "assert not {'jax', 'jaxlib', 'optax', 'numpy'} & set(sys.modules)"
    )


def test_submodules_are_there_without_an_import_of_their_own():
    run(
        "import sys, monolith_optax as m; "
        "m.net.check_nodes; assert 'jax' not in sys.modules; "
        "m.checkpoint.import_slots; m.embedding.adagrad"
    )


def test_making_an_optimizer_touches_no_device():
    # JAX fails on first use of a device when it is told to use one that is not there.
    no_device = {"JAX_PLATFORMS": "nonexistent"}
    run("import monolith_optax as m; m.adamom(1e-3); m.rmsprop(1e-3)", **no_device)
    with pytest.raises(subprocess.CalledProcessError):
        run("import jax.numpy as jnp; jnp.zeros(1)", **no_device)


@pytest.mark.parametrize(
    ("module", "name"),
    [(module, name) for module in MODULES for name in module.__all__],
    ids=lambda value: getattr(value, "__name__", value),
)
def test_public_name(module, name):
    value = getattr(module, name)
    assert value.__doc__
    assert name in dir(module)
    if isinstance(value, type):  # pickles name this place
        assert value.__module__ == module.__name__
        # It is not that of the file, which is where --doctest-modules looks.
        runner = doctest.DocTestRunner()
        for test in doctest.DocTestFinder().find(value, name, globs={name: value}):
            assert runner.run(test).failed == 0


def test_the_reference_has_all_public_names_and_no_others():
    names = re.findall(
        r"^(?::::|##) (monolith_optax\S*)$", API.read_text(), re.MULTILINE
    )
    public = {
        f"{module.__name__}.{name}" for module in MODULES for name in module.__all__
    }
    assert sorted(names) == sorted(public | {"monolith_optax"})


def test_names_that_are_not_there():
    with pytest.raises(AttributeError, match="'adam'"):
        monolith_optax.adam  # noqa: B018 (the access is the test)


def test_version_and_types_are_in_the_distribution():
    installed = importlib.metadata.version("monolith_optax")
    assert installed == monolith_optax.__version__, "run pip install -e . again"
    assert (PACKAGE / "py.typed").exists()


def test_the_citation_and_the_changelog_begin_with_this_version():
    for name, line in ("CITATION.cff", "version: "), ("CHANGELOG.md", "## "):
        text = (ROOT / name).read_text()
        [version, *_] = re.findall(rf"^{line}(\S+)", text, re.MULTILINE)
        assert version == monolith_optax.__version__, name


def test_private_modules_of_optax_and_jax_are_imported_nowhere():
    sources = [*PACKAGE.rglob("*.py"), *ROOT.glob("*/**/*.py")]
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
                private = re.match(r"(optax|jax)\._(?!_)", name)
                assert not private, f"{source}: {name}"
