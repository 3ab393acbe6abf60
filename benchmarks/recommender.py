"""How good a recommender gets with each Adam: `python -m benchmarks.recommender`.

Trains the model of `examples/train_recommender.py` with `lazy_rows(optax.adam)`, and
the same model with PyTorch's SparseAdam: the same ratings, initial numbers,
mini-batches and learning rates, for three seeds. Prints the RMSE of the test ratings.
Needs the extras 'examples' and 'bench'.
"""

import argparse
import importlib
from typing import Any

import numpy as np
import train_recommender as example

SEEDS = 0, 1, 2
TABLES = "user", "movie", "user_bias", "movie_bias"


def main() -> None:
    """Prints the errors of each seed, and their mean and spread."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=4000)
    options = parser.parse_args()
    data = example.load_data()
    rows = []
    print("| seed | lazy_rows(optax.adam) | PyTorch, SparseAdam |\n|---|---:|---:|")
    for seed in SEEDS:
        args = argparse.Namespace(
            optimizer="adam",
            learning_rate=None,
            steps=options.steps,
            batch_size=256,
            dim=32,
            seed=seed,
            table_dtype="float32",
        )
        ours = example.train("row-sparse", data, args).error
        rows.append((ours, sparse_adam(data, args)))
        print(f"| {seed} | {rows[-1][0]:.6f} | {rows[-1][1]:.6f} |", flush=True)
    means, spreads = np.mean(rows, 0), np.std(rows, 0, ddof=1)
    print("| mean | {:.6f} | {:.6f} |".format(*means))
    print("| standard deviation | {:.6f} | {:.6f} |".format(*spreads))


def sparse_adam(data: example.Data, args: argparse.Namespace) -> float:
    """Trains the model in PyTorch and returns the RMSE of the test ratings."""
    torch = importlib.import_module("torch")
    torch.set_num_threads(1)  # a batch is small
    start = example.Recommender(data, args.dim, args.seed, args.table_dtype)
    tables = {
        name: torch.nn.Embedding.from_pretrained(
            torch.tensor(np.asarray(getattr(start, name).embedding[...])),
            freeze=False,
            sparse=True,
        )
        for name in TABLES
    }

    def model(batch: example.Ratings) -> tuple[Any, Any]:
        ids = torch.from_numpy(batch.user), torch.from_numpy(batch.movie)
        user, movie = tables["user"](ids[0]), tables["movie"](ids[1])
        biases = tables["user_bias"](ids[0]), tables["movie_bias"](ids[1])
        both = torch.cat(biases, 1)
        stars = start.mean + (user * movie).sum(1) + both.sum(1)
        penalty = example.L2_VECTORS * (user**2 + movie**2).sum(1)
        return stars, penalty + example.L2_BIASES * (both**2).sum(1)

    _, peak = example.OPTIMIZERS["adam"]
    weights = [table.weight for table in tables.values()]
    optimizer = torch.optim.SparseAdam(weights, lr=peak)
    stream = example.batches(data.train, args.batch_size, args.seed)
    for step, batch in zip(range(args.steps), stream, strict=False):
        optimizer.param_groups[0]["lr"] = peak * (1 - step / args.steps)
        optimizer.zero_grad()
        stars, penalty = model(batch)
        error = (stars - torch.from_numpy(batch.stars)) ** 2
        (error + penalty).mean().backward()
        optimizer.step()
    stars, _ = model(data.test)
    return float(example.rmse(stars.detach().numpy(), data.test))


if __name__ == "__main__":
    main()
