"""Strict JAX on eight virtual CPU devices, for the tests, docstrings and documents."""

import os
import random
import signal
from contextlib import ExitStack
from importlib.util import find_spec

import jax
import pytest
from console_blocks import ConsoleBlockParser, folder_with_checkpoints
from hypothesis import settings
from steps_in_place import steps_are_checked
from sybil import Sybil
from sybil.parsers.markdown import PythonCodeBlockParser, SkipParser

jax.config.update("jax_platforms", os.environ.get("JAX_PLATFORMS", "cpu"))
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")

# Shells start background commands with SIGINT ignored, and so would be the processes
# that tests start and interrupt.
signal.signal(signal.SIGINT, signal.default_int_handler)

# Examples that trace and compile have no meaningful deadline on a shared machine.
settings.register_profile("default", deadline=None, derandomize=True)
# --hypothesis-profile=explore tries other examples in every run, and prints its seed.
settings.register_profile("explore", deadline=None, max_examples=50)
settings.load_profile("default")


def pytest_addoption(parser):
    parser.addoption(
        "--share",
        type=int,
        default=1,
        help="take one in N cases of each test with cases",
    )
    parser.addoption(
        "--optimize",
        action="store_true",
        help="compile programs as users do, with all optimizations",
    )


@pytest.hookimpl(trylast=True)  # what -m leaves out does not count
def pytest_collection_modifyitems(config, items):
    """Cases are the same in every run, and at least one of each test is taken."""
    share, of_test, left_out = config.getoption("--share"), {}, []
    for item in items:
        name = item.nodeid.split("[")[0]
        if of_test.setdefault(name, 0) % share:
            left_out.append(item)
        of_test[name] += 1
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        dropped = set(map(id, left_out))
        items[:] = [item for item in items if id(item) not in dropped]


def compile_quickly():
    """Without optimizing machine code, which takes most of the tests' time.

    XLA's older emitters give LLVM less to do, but copy other arrays.
    Processes that tests start compile as users do.
    """
    jax.config.update("jax_disable_most_optimizations", True)
    if jax.__version_info__ < (0, 11):  # later ones have no older emitters
        flags = os.environ.get("XLA_FLAGS", "")
        os.environ["XLA_FLAGS"] = f"{flags} --xla_cpu_use_fusion_emitters=false"
        jax.block_until_ready(jax.numpy.zeros(()))  # XLA reads them now, and only once
        os.environ["XLA_FLAGS"] = flags


compiled_quickly = False


@pytest.hookimpl(tryfirst=True)  # Hypothesis reads the seed in the same hook
def pytest_configure(config):
    global compiled_quickly
    option = config.option
    # Of pyproject.toml's `-m` pytest keeps a space.
    compiled_quickly = option.markexpr.strip() == "not slow" and not option.optimize
    if compiled_quickly:
        compile_quickly()
    if option.hypothesis_profile == "explore" and option.hypothesis_seed is None:
        option.hypothesis_seed = str(random.randrange(2**32))


def pytest_report_header(config):
    seed = config.option.hypothesis_seed
    return seed and f"--hypothesis-profile=explore --hypothesis-seed={seed}"


# Their models compile for longer than most tests.
SLOW_DOCUMENTS = {"models.md", "keras.md"}


def pytest_itemcollected(item):
    if item.path.name in SLOW_DOCUMENTS:
        item.add_marker("slow")
    if compiled_quickly and item.get_closest_marker("as_users_compile"):
        item.add_marker(pytest.mark.skip(reason="needs --optimize"))


# They belong to the site, which has requirements of its own.
collect_ignore_glob = ["docs/*.py"]


def prepare_document(namespace):
    namespace["find_spec"] = find_spec  # to skip by
    namespace["COMPILED_QUICKLY"] = compiled_quickly
    namespace["CONSOLE_FOLDER"] = folder_with_checkpoints()
    namespace["CHECKED"] = ExitStack()
    namespace["CHECKED"].enter_context(steps_are_checked())


def leave_document(namespace):
    namespace["CONSOLE_FOLDER"].cleanup()
    namespace["CHECKED"].close()


pytest_collect_file = Sybil(
    parsers=[PythonCodeBlockParser(), ConsoleBlockParser(), SkipParser()],
    patterns=["README.md", "docs/*.md"],
    setup=prepare_document,
    teardown=leave_document,
).pytest()
