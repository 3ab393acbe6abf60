"""Snapshots of a RowCache: the same bits after a restart, and whole at any moment."""

import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from all_rows import (
    ADAGRAD,
    cached_by_id,
    make_cache,
    stream,
    train_all_rows,
    train_on,
)
from choosing import sampled

from monolith_optax import RowCache, embedding, uniform_rows
from monolith_optax._ids import row_store

SIZES = 14, 40


@pytest.mark.parametrize(("users", "items"), sampled([SIZES, (60, 90)], SIZES))
def test_continues_to_the_same_bits(users, items, tmp_path, monkeypatch):
    monkeypatch.setattr(row_store, "_FIRST", 8)
    batches = list(stream(3, 60))
    ways = {"admit_after": 2, "expire_after": 20}
    expected, losses = train_all_rows(ADAGRAD, batches, **ways)
    cache, params, state = make_cache(ADAGRAD, SIZES, admit_after=2)
    for some in batches[:15], batches[15:30]:
        params, state, _ = train_on(
            cache, params, state, ADAGRAD, some, expire_after=20
        )
        cache.save(tmp_path, params, state)
    assert len(list(tmp_path.iterdir())) == 1
    train_on(cache, params, state, ADAGRAD, batches[30:40])  # after the snapshot
    cache, params, state = make_cache(
        ADAGRAD, (users, items), admit_after=2, folder=tmp_path
    )
    params, state = cache.restore(tmp_path, params, state)
    assert cache.counts.batches == 30
    params, state, ours = train_on(
        cache, params, state, ADAGRAD, batches[30:], expire_after=20
    )
    found = cached_by_id(cache, params, state)
    assert found.keys() == expected.keys()
    assert [key for key in found if found[key] != expected[key]] == []
    assert np.array(ours).tobytes() == np.array(losses[30:]).tobytes()


KILLED = """
import os, sys
from pathlib import Path
from monolith_optax._ids.snapshot_folders import last_snapshot, new_snapshot

folder = Path(sys.argv[1])

def write(number):
    with new_snapshot(folder) as path:
        for name in "ab":
            (path / name).write_text(name * number)

def whole():
    path = last_snapshot(folder)
    sizes = [len((path / name).read_text()) for name in "ab"]
    assert len(set(sizes)) == 1, sizes
    return sizes[0]

write(1)
moment, number, before, after = 0, 2, 0, 0
while True:
    child = os.fork()
    if not child:
        events = iter(range(10**6))
        def die(event, _):
            if event.startswith(("os.", "open", "shutil.")) and next(events) == moment:
                os._exit(9)
        sys.addaudithook(die)
        write(number)
        os._exit(0)
    if os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0:
        break
    found = whole()
    assert found in (number - 1, number), (found, number)
    before, after = before + (found == number - 1), after + (found == number)
    write(number)  # clears up after the dead
    assert whole() == number and len(list(folder.iterdir())) == 1
    moment, number = moment + 1, number + 1
print(before, after)
"""


def test_killed_at_any_moment_the_last_snapshot_is_whole(tmp_path):
    command = [sys.executable, "-c", KILLED, tmp_path]
    output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    before, after = map(int, output.split())
    assert before > 5
    assert after > 2


def test_an_error_while_saving_leaves_the_last_snapshot(tmp_path, monkeypatch):
    cache, params, state = small()
    cache.save(tmp_path, params, state)
    monkeypatch.setattr(np, "savez", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        cache.save(tmp_path, params, state)
    assert [path.name for path in tmp_path.iterdir()] == ["snapshot-000000001"]


def small(tx=None, **options):
    params = {"items": jnp.zeros((4, 2), jnp.bfloat16), "bias": jnp.zeros(())}
    tx = tx or embedding.adagrad(0.1)
    cache = RowCache(
        tx, params, {"items": "item", "bias": None}, init=uniform_rows(1.0), **options
    )
    _, moves = cache.assign({"item": [1, 2]})
    params, state = cache.move(params, tx.init(params), moves)
    return cache, params, state


def new(tx, **options):
    params = {"items": jnp.ones((4, 2), jnp.bfloat16), "bias": jnp.ones(())}
    tables = {"items": "item", "bias": None}
    return RowCache(tx, params, tables, **options), params, tx.init(params)


@pytest.mark.parametrize(
    ("tx", "options", "what"),
    [
        (embedding.adam(0.1), {}, "tables"),
        (optax.chain(embedding.adagrad(0.1), optax.scale_by_schedule(abs)), {}, ""),
        (embedding.adagrad(0.1), {"admit_after": 2}, "numbers of sights"),
    ],
)
def test_another_cache_is_refused(tx, options, what, tmp_path):
    cache, params, state = small()
    cache.save(tmp_path, params, state)
    cache, params, state = new(tx, **options)
    with pytest.raises(ValueError, match=f"has other {what}"):
        cache.restore(tmp_path, params, state)


def test_what_is_no_array_of_numbers(tmp_path):
    tx = optax.chain(embedding.adagrad(0.1), noise())
    cache, params, state = small(tx)
    params["items"] = params["items"].at[0].set(3)
    cache.save(tmp_path, params, state)
    cache, others, other_state = new(tx)
    other_state = (other_state[0], jax.random.key(8))
    restored, restored_state = cache.restore(tmp_path, others, other_state)
    assert restored["items"][0].tolist() == [3, 3]
    assert restored["bias"] == 0
    assert (
        jax.random.key_data(restored_state[1]) == jax.random.key_data(state[1])
    ).all()
    rows, moves = cache.assign({"item": [2, 1]})
    restored, _ = cache.move(restored, restored_state, moves)
    assert (restored["items"][rows["item"]] == params["items"][jnp.array([2, 1])]).all()


def noise():
    return optax.GradientTransformation(
        lambda _: jax.random.key(7), lambda updates, state, _: (updates, state)
    )


def test_mistakes(tmp_path):
    cache, params, state = small()
    with pytest.raises(FileNotFoundError, match="no complete snapshot"):
        new(embedding.adagrad(0.1))[0].restore(tmp_path, params, state)
    cache.save(tmp_path, params, state)
    with pytest.raises(RuntimeError, match="needs a new cache"):
        cache.restore(tmp_path, params, state)
    (rows,) = tmp_path.glob("*/rows-0.bin")
    rows.write_bytes(rows.read_bytes()[:-1])
    cache, params, state = new(embedding.adagrad(0.1))
    with pytest.raises(ValueError, match=r"rows-0.bin is shorter"):
        cache.restore(tmp_path, params, state)
