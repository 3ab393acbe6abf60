"""IdMap with ten million ids: `python -m benchmarks.ids`.

Prints ids per second of processor time, which one core does, in batches of 8,192, and
bytes per id.
"""

import time

import numpy as np

from monolith_optax import IdMap

IDS = 10_000_000
BATCH = 8_192


def main() -> None:
    """Fills a map, looks ids up, sees them again, and expires half of them."""
    rng = np.random.default_rng(0)
    raw = rng.integers(-(2**63), 2**63, IDS)
    known = rng.choice(raw, IDS // 4)
    unknown = rng.integers(-(2**63), 2**63, IDS // 4)
    ids = IdMap(IDS + 1)

    def each_batch(name: str, of: np.ndarray, moment: int | None = None) -> None:
        start = time.process_time()
        for first in range(0, len(of), BATCH):
            batch = of[first : first + BATCH]
            if moment is None:
                ids.lookup(batch)
            else:
                ids.assign(batch, time=moment)
        seconds = time.process_time() - start
        print(f"{name}: {len(of) / seconds / 1e6:.1f} million a second", flush=True)

    each_batch("assign, new", raw, 0)
    print(f"memory: {ids.nbytes / len(ids):.1f} bytes per id")
    each_batch("lookup, known", known)
    each_batch("lookup, unknown", unknown)
    each_batch("assign, known", known, 1)
    each_batch("assign, unknown when full", unknown, 1)
    start = time.process_time()
    expired = len(ids.expire(before=1))
    print(f"expire: {time.process_time() - start:.1f} s, {expired} of {IDS} ids")
    each_batch("assign, new in freed rows", unknown, 2)


if __name__ == "__main__":
    main()
