"""The order in which training pairs are drawn."""

import random
from collections import Counter
from collections.abc import Iterator

import torch
from torch.utils.data import Sampler

from .pairs import PADDING


class PairSampler(Sampler[int]):
    """All pairs in a random order, drawn by seed and epoch alone: the same on every rank and after a resume.

    Args:
        num_pairs: `len` of the [`CaptionPairs`].
        seed: of the order.
        multiple_of: [`PADDING`] at the end fills the epoch up to a multiple of it.
    """

    def __init__(self, num_pairs: int, seed: int = 0, multiple_of: int = 1):
        self.num_pairs, self.seed, self.multiple_of, self.epoch = num_pairs, seed, multiple_of, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return -(-self.num_pairs // self.multiple_of) * self.multiple_of

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        order = torch.randperm(self.num_pairs, generator=generator) + self.epoch * self.num_pairs
        return iter(order.tolist() + [PADDING] * (len(self) - self.num_pairs))


class IdentitySampler(Sampler[int]):
    """Batches of N persons with K pairs each, drawn by seed and epoch alone: the same on every rank and after a resume.

    Every person comes up equally often, all of them before one comes again, and no batch has a person twice. A person
    goes through its own pairs in a random order before one is repeated; one with fewer than K pairs repeats them within
    the batch, differently augmented. Indices are those of [`CaptionPairs`].

    Args:
        person_labels: `(pairs,)`: the person of each pair, labels `0 .. persons - 1`.
        persons_per_batch: N, of the batch over all processes; no more than there are persons.
        pairs_per_person: K.
        seed: of the order.

    Raises:
        ValueError: N or K out of range.
    """

    def __init__(self, person_labels: torch.Tensor, persons_per_batch: int, pairs_per_person: int, seed: int = 0):
        counts = torch.bincount(person_labels)
        if not 1 <= persons_per_batch <= len(counts):
            raise ValueError(
                f"persons_per_batch is {persons_per_batch}, it must be between 1 and the {len(counts)} persons"
            )
        if pairs_per_person < 1:
            raise ValueError(f"pairs_per_person is {pairs_per_person}, it must be at least 1")
        self.persons_per_batch, self.pairs_per_person, self.seed, self.epoch = (
            persons_per_batch,
            pairs_per_person,
            seed,
            0,
        )
        self.pairs_of_person = person_labels.argsort(stable=True).split(counts.tolist())
        self.num_pairs = len(person_labels)

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        """As many whole batches as it takes to draw no fewer items than there are pairs."""
        batch_size = self.persons_per_batch * self.pairs_per_person
        return -(-self.num_pairs // batch_size) * batch_size

    def __iter__(self) -> Iterator[int]:
        rng = random.Random(f"{self.seed}/{self.epoch}")
        waiting: list[int] = []
        stacks: list[list[int]] = [[] for _ in self.pairs_of_person]
        times_drawn = [0] * self.num_pairs
        for _ in range(len(self) // (self.persons_per_batch * self.pairs_per_person)):
            batch: list[int] = []
            while len(batch) < self.persons_per_batch:
                if not waiting:
                    waiting = rng.sample(range(len(stacks)), len(stacks))
                    # Who is in this batch already waits longest: persons are taken from the end.
                    waiting.sort(key=lambda person: person not in batch)
                batch.append(waiting.pop())
            for person in batch:
                stack, own = stacks[person], self.pairs_of_person[person].tolist()
                in_batch: Counter[int] = Counter()
                for _ in range(self.pairs_per_person):
                    if not stack:
                        # What this batch has already comes last.
                        stack.extend(sorted(rng.sample(own, len(own)), key=lambda pair: -in_batch[pair]))
                    pair = stack.pop()
                    # Each draw of a pair, in this epoch or another, is augmented by chance of its own.
                    yield (self.epoch * len(self) + times_drawn[pair]) * self.num_pairs + pair
                    times_drawn[pair] += 1
                    in_batch[pair] += 1
