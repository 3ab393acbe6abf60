"""Training across processes: tables sharded by rows over all devices of a cluster.

    python examples/train_multihost.py

starts two processes on this machine, with four virtual CPU devices each, and trains a
small model of the kind that predicts clicks: categorical fields and pairs of them are
looked up in two embedding tables, and a dense part turns what was found into one
probability. The data are the handwritten digits that scikit-learn ships: the fields
are how dark sixteen blocks are, and the question is whether the digit is odd. Every
device holds an eighth of the rows of each table and of its slots, and an eighth of
each batch.

On a real cluster, start it on every host with the addresses of all processes, in the
same order everywhere, and the number of its own:

    python train_multihost.py --addresses HOST0:PORT,HOST1:PORT --process-id I

With `--checkpoint-dir`, a run that was cut short continues from its last checkpoint.
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
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from sklearn.datasets import load_digits
from tqdm import tqdm

import monolith_optax
from monolith_optax.net import (
    NodesDownError,
    parse_address,
    wait_for_coordinator,
    wait_for_nodes,
)

# Each optimizer with a learning rate that suits this problem.
OPTIMIZERS: dict[str, tuple[Callable[..., optax.GradientTransformation], float]] = {
    "adamom": (functools.partial(monolith_optax.adamom, mom_decay=0.9), 0.003),
    "rmsprop": (functools.partial(monolith_optax.rmsprop, beta1=0.9), 0.0003),
}
TABLES = {"fields": True, "pairs": True, "hidden": False, "output": False}
SIDE, SHADES = 4, 17  # blocks of two by two pixels, from white to black
LOCAL_DEVICES = 8  # of all processes together, when they run on this machine
STEPS_BETWEEN_POINTS = 5

Params = dict[str, jax.Array]
Carry = tuple[Params, optax.OptState]
Step = Callable[[Carry, "Batch"], tuple[Carry, jax.Array]]


class Batch(NamedTuple):
    """Row ids of shape (examples, 16) for each table, and labels, which are 0 or 1."""

    fields: Any
    pairs: Any
    label: Any


def load_data() -> tuple[Batch, Batch]:
    """The digits, four fifths of them for training and the rest."""
    images, digits = load_digits(return_X_y=True)
    blocks = images.reshape(-1, SIDE, 2, SIDE, 2).mean((2, 4)).astype(np.int32)
    block = np.arange(SIDE**2, dtype=np.int32).reshape(SIDE, SIDE)
    fields = block * SHADES + blocks
    pairs = fields * SHADES + np.roll(blocks, -1, axis=2)  # a block and the next one
    fields, pairs = (x.reshape(len(digits), -1) for x in (fields, pairs))
    data = Batch(fields, pairs, digits.astype(np.float32) % 2)
    cut = len(digits) * 4 // 5
    return Batch(*(x[:cut] for x in data)), Batch(*(x[cut:] for x in data))


def batches(
    data: Batch, batch_size: int, mesh: Mesh, *, seed: int, start: int
) -> Iterator[Batch]:
    """Endless global mini-batches, from step `start`.

    A batch depends only on the seed and the step, so a run that continues sees the same
    ones. Each process provides the examples of its own devices.
    """
    sharding = NamedSharding(mesh, PartitionSpec("x"))
    for step in itertools.count(start):
        rng = np.random.default_rng((seed, step))
        chosen = rng.choice(len(data.label), batch_size, replace=False)
        yield Batch(
            *(
                jax.make_array_from_callback(
                    (batch_size, *x.shape[1:]), sharding, x[chosen].__getitem__
                )
                for x in data
            )
        )


def logits(params: Any, batch: Batch) -> jax.Array:
    """The model: a logit for each example of the batch."""
    fields = params["fields"][batch.fields].sum(1)
    pairs = params["pairs"][batch.pairs].sum(1)
    found = jnp.concatenate([fields, pairs, fields * pairs], axis=1)
    result: jax.Array = jax.nn.relu(found @ params["hidden"]) @ params["output"]
    return result


def loss_fn(params: Any, batch: Batch) -> jax.Array:
    """The mean log loss."""
    losses = optax.sigmoid_binary_cross_entropy(logits(params, batch), batch.label)
    return jnp.mean(losses)


def round_up(num_rows: int) -> int:
    """The next multiple of 256, which splits evenly over 2, 4, ... 256 devices."""
    return -(-num_rows // 256) * 256


def init_params(dim: int, seed: int) -> Params:
    """Small random rows and weights."""
    shapes = {
        "fields": (round_up(SIDE**2 * SHADES), dim),
        "pairs": (round_up(SIDE**2 * SHADES**2), dim),
        "hidden": (3 * dim, 2 * dim),
        "output": (2 * dim,),
    }
    keys = jax.random.split(jax.random.key(seed), len(shapes))
    return {
        name: 0.1 * jax.random.normal(key, shape)
        for key, (name, shape) in zip(keys, shapes.items(), strict=True)
    }


def carry_like(
    tx: optax.GradientTransformation, init: Callable[[], Params], mesh: Mesh
) -> Any:
    """Shapes and shardings of params and state: tables and their slots by rows."""
    rows = NamedSharding(mesh, PartitionSpec("x"))
    whole = NamedSharding(mesh, PartitionSpec())
    params, state = jax.eval_shape(lambda: make_carry(tx, init))
    by_param = {name: rows if table else whole for name, table in TABLES.items()}
    by_slot = optax.tree.map_params(
        tx,
        lambda _, sharding: sharding,
        state,
        by_param,
        transform_non_params=lambda _: whole,  # counts, and the c of compact_c
    )
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(
            leaf.shape, leaf.dtype, sharding=sharding
        ),
        (params, state),
        (by_param, by_slot),
    )


def make_carry(tx: optax.GradientTransformation, init: Callable[[], Params]) -> Carry:
    """Params and state before the first step."""
    params = init()
    return params, tx.init(params)


def make_step(tx: optax.GradientTransformation, like: Any, *, dense: bool) -> Step:
    """A jitted training step that keeps the shardings of params and state."""
    shardings = jax.tree.map(lambda leaf: leaf.sharding, like)
    whole = shardings[0]["output"]
    if dense:
        value_and_grad, where = jax.value_and_grad(loss_fn), shardings[0]
    else:
        # Every device gets the rows of the whole batch and picks out its own.
        value_and_grad = monolith_optax.value_and_row_grad(loss_fn, TABLES)
        where = whole

    # Donated, so that it writes into the old arrays instead of copying them.
    @functools.partial(jax.jit, donate_argnums=0, out_shardings=(shardings, whole))
    def step(carry: Carry, batch: Batch) -> tuple[Any, jax.Array]:
        params, state = carry
        loss, gradients = value_and_grad(params, batch)
        gradients = jax.lax.with_sharding_constraint(gradients, where)
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


def held_out(params: Params, test: Batch) -> str:
    """How well the model does on other digits, computed on all devices."""

    def both(params: Params) -> tuple[jax.Array, jax.Array]:
        right = (logits(params, test) > 0) == (test.label > 0)
        return loss_fn(params, test), jnp.mean(right, dtype=jnp.float32)

    # The weights are on all devices, and so is the result.
    evaluate = jax.jit(both, out_shardings=params["output"].sharding)
    loss, accuracy = jax.device_get(evaluate(params))
    return f"Held out: log loss {loss:.4f}, {accuracy:.1%} of digits right."


def plot(curve: list[tuple[int, float]], path: str) -> None:
    """Draws the loss."""
    from matplotlib.figure import Figure  # here, as only one process needs it

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    axes.plot(*np.transpose(curve))
    axes.set(xlabel="step", ylabel="log loss", title="Is the digit odd?")
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
        "--steps": (100, default),
        "--batch-size": (64, f"examples per step {default}"),
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
    if args.batch_size % jax.device_count() or args.batch_size > len(training.label):
        sys.exit(
            f"--batch-size must be a multiple of the {jax.device_count()} devices and "
            f"at most {len(training.label)}, not {args.batch_size}."
        )
    make, rate = OPTIMIZERS[args.optimizer]
    tx = monolith_optax.lazy_rows(make(rate))
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
    say("\n" + held_out(carry[0], test))
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
