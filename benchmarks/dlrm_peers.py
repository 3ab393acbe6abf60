"""The same DLRM in PyTorch, with its own embedding bags and with FBGEMM's tables.

- PyTorch: an `EmbeddingBag` for each table. Those with more rows than ids have sparse
  gradients and Adagrad, the others dense gradients and fused Adagrad.
- FBGEMM: all tables are one module, whose `backward` takes the step of Adagrad.

The MLPs have fused Adam. Everything runs eagerly, on as many threads as ours.
"""

import importlib
from collections.abc import Callable
from itertools import cycle
from typing import Any

import numpy as np

from benchmarks.dlrm_data import RATE, START, TABLE_RATE, Batch, Job, pairs, places


class Peer:
    """A DLRM in PyTorch, except its tables."""

    def __init__(self, job: Job, data: list[Batch]) -> None:
        """Makes the MLPs; the tables are a subclass's."""
        self.torch = torch = importlib.import_module("torch")
        torch.set_num_threads(1)
        self.mlps = {
            name: [
                tuple(torch.tensor(array, requires_grad=True) for array in layer)
                for layer in layers
            ]
            for name, layers in job.mlps().items()
        }
        leaves = [x for layers in self.mlps.values() for pair in layers for x in pair]
        self.adam = torch.optim.Adam(leaves, lr=RATE, fused=True)
        self.products = _products_of_pairs(torch, len(job.sizes) + 1)
        self.stream = cycle([self.prepared(batch) for batch in data])

    def prepared(self, batch: Batch) -> Any:
        """The ids as the tables take them, numbers and labels."""
        raise NotImplementedError

    def lookup(self, ids: Any) -> Any:
        """The sums of the bags of a batch, of shape (batch, tables, dim)."""
        raise NotImplementedError

    def step(self) -> None:
        """What is left of the step on the tables once gradients are there."""
        raise NotImplementedError

    def loss(self, rows: Any, numbers: Any, labels: Any) -> Any:
        """The loss, from the sums of bags."""
        torch = self.torch
        bottom = self.mlp("bottom", numbers)
        products = self.products(torch.cat([bottom[:, None], rows], 1))
        logits = self.mlp("top", torch.cat([bottom, products], 1))[:, 0]
        return torch.nn.functional.binary_cross_entropy_with_logits(logits, labels)

    def mlp(self, name: str, x: Any) -> Any:
        """What an MLP makes of its inputs."""
        layers = self.mlps[name]
        for i, (matrix, bias) in enumerate(layers):
            x = self.torch.addmm(bias, x, matrix)
            x = self.torch.relu(x) if i < len(layers) - 1 else x
        return x

    def whole_step(self, ids: Any, *others: Any) -> Any:
        """Takes a step and returns its loss."""
        self.adam.zero_grad()
        loss = self.loss(self.lookup(ids), *others)
        loss.backward()
        self.adam.step()
        self.step()
        return loss

    def first_loss(self) -> float:
        """Takes a step and returns its loss."""
        return float(self.whole_step(*next(self.stream)).detach())

    def whole(self) -> Callable[[], object]:
        """A step of training."""
        ids, *others = next(self.stream)

        def run() -> None:
            self.whole_step(ids, *others)

        return run

    def only_lookups(self) -> Callable[[], object]:
        """The sums of the bags."""
        ids, *_ = next(self.stream)

        def run() -> None:
            with self.torch.no_grad():
                self.lookup(ids)

        return run

    def only_mlps(self) -> Callable[[], object]:
        """A step on the MLPs, and the gradients of the sums."""
        ids, *others = next(self.stream)
        rows = self.lookup(ids).detach().requires_grad_()

        def run() -> None:
            self.adam.zero_grad()
            self.loss(rows, *others).backward()
            self.adam.step()

        return run

    def only_update(self) -> Callable[[], object]:
        """The step on the tables, with gradients that move them little."""
        ids, *_ = next(self.stream)
        rows = self.lookup(ids)
        gradients = self.torch.full(rows.shape, 1e-6)

        def run() -> None:
            rows.backward(gradients)
            self.step()

        return run


def _products_of_pairs(torch: Any, count: int) -> Callable[[Any], Any]:
    """The same products as ours, with the same gradient."""
    of_pairs, of_places = map(torch.from_numpy, (pairs(count), places(count)))

    class Products(torch.autograd.Function):  # type: ignore[misc]
        @staticmethod
        def forward(ctx: Any, vectors: Any) -> Any:
            ctx.save_for_backward(vectors)
            products = torch.bmm(vectors, vectors.transpose(1, 2)).flatten(1)
            return products.index_select(1, of_pairs)

        @staticmethod
        def backward(ctx: Any, gradients: Any) -> Any:
            [vectors] = ctx.saved_tensors
            padded = torch.nn.functional.pad(gradients, (0, 1))
            of_products = padded.index_select(1, of_places)
            return torch.bmm(of_products.unflatten(1, (count, count)), vectors)

    apply: Callable[[Any], Any] = Products.apply
    return apply


class PyTorch(Peer):
    """With an embedding bag for each table."""

    def __init__(self, job: Job, data: list[Batch]) -> None:
        """Makes the tables."""
        super().__init__(job, data)
        torch = self.torch
        ids = [len(of_table) for of_table in data[0].ids]
        self.bags = [
            torch.nn.EmbeddingBag.from_pretrained(
                torch.from_numpy(table),
                freeze=False,
                mode="sum",
                sparse=len(table) > count,
                include_last_offset=True,
            )
            for table, count in zip(job.tables(), ids, strict=True)
        ]
        self.adagrads = [
            torch.optim.Adagrad(
                [bag.weight for bag in self.bags if bag.sparse is sparse],
                lr=TABLE_RATE,
                initial_accumulator_value=START,
                fused=not sparse,
            )
            for sparse in {bag.sparse for bag in self.bags}
        ]

    def prepared(self, batch: Batch) -> Any:
        """The ids and offsets of each table, numbers and labels."""
        convert = self.torch.from_numpy
        pairs = zip(batch.ids, batch.offsets, strict=True)
        ids = [(convert(i), convert(o)) for i, o in pairs]
        return ids, convert(batch.numbers), convert(batch.labels)

    def lookup(self, ids: Any) -> Any:
        """The sums of the bags of a batch."""
        pairs = zip(self.bags, ids, strict=True)
        return self.torch.stack([bag(*of_table) for bag, of_table in pairs], 1)

    def step(self) -> None:
        """The steps of Adagrad."""
        for adagrad in self.adagrads:
            adagrad.step()
            adagrad.zero_grad()


class Fbgemm(Peer):
    """With FBGEMM's tables."""

    def __init__(self, job: Job, data: list[Batch]) -> None:
        """Makes the tables."""
        super().__init__(job, data)
        package = "fbgemm_gpu.split_table_batched_embeddings_ops"
        common = importlib.import_module(f"{package}_common")
        training = importlib.import_module(f"{package}_training")
        device = common.EmbeddingLocation.HOST, training.ComputeDevice.CPU
        self.shape = job.batch, len(job.sizes), job.dim
        self.tables = training.SplitTableBatchedEmbeddingBagsCodegen(
            [(size, job.dim, *device) for size in job.sizes],
            optimizer=training.OptimType.EXACT_ADAGRAD,
            learning_rate=TABLE_RATE,
            eps=1e-10,
        )
        weights = self.tables.split_embedding_weights()
        for weight, table in zip(weights, job.tables(), strict=True):
            weight.copy_(self.torch.from_numpy(table))
        for states in self.tables.split_optimizer_states():
            states[0].fill_(START)

    def prepared(self, batch: Batch) -> Any:
        """The ids and offsets of all tables, numbers and labels."""
        convert = self.torch.from_numpy
        before = np.cumsum([0, *map(len, batch.ids)])
        starts = zip(batch.offsets, before[:-1], strict=True)
        parts = [offsets[:-1] + first for offsets, first in starts]
        offsets = np.concatenate([*parts, before[-1:]])
        ids = convert(np.concatenate(batch.ids)), convert(offsets)
        return ids, convert(batch.numbers), convert(batch.labels)

    def lookup(self, ids: Any) -> Any:
        """The sums of the bags of a batch."""
        return self.tables(*ids).reshape(self.shape)

    def step(self) -> None:
        """Its gradients are its step."""
