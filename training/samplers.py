"""Samplers: the order in which training pairs are drawn. It depends only on the seed and the epoch."""

import random
from collections import Counter
from collections.abc import Iterator

import torch
from torch.utils.data import Sampler

from .pairs import PairDraw


class PairSampler(Sampler[PairDraw]):
    """All pairs in a random order; the order is the same in every process and after a resume.

    Args:
        num_pairs: number of pairs.
        seed: seed of the order.
        multiple_of: the epoch is filled up with padding items to a multiple of this number.
    """

    def __init__(self, num_pairs: int, seed: int = 0, multiple_of: int = 1):
        self.num_pairs, self.seed, self.multiple_of, self.epoch = num_pairs, seed, multiple_of, 0

    def set_epoch(self, epoch: int) -> None:
        """Chooses the epoch whose order the next iteration gives."""
        self.epoch = epoch

    def __len__(self) -> int:
        return -(-self.num_pairs // self.multiple_of) * self.multiple_of

    def __iter__(self) -> Iterator[PairDraw]:
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        order = torch.randperm(self.num_pairs, generator=generator).tolist()
        yield from (PairDraw(pair, self.epoch) for pair in order)
        yield from [PairDraw(0, is_padding=True)] * (len(self) - self.num_pairs)


class IdentitySampler(Sampler[PairDraw]):
    """Batches of N persons with K pairs each; they are the same in every process and after a resume.

    All persons are drawn once before any person is drawn again, and no batch contains a person twice. All pairs of a
    person are drawn in a random order before one of them is repeated. A person with fewer than K pairs repeats them
    within the batch, each time augmented differently.

    Args:
        person_labels: `(pairs,)`: the person of each pair, labels `0 .. persons - 1`.
        persons_per_batch: N, for the batch over all processes; at most the number of persons.
        pairs_per_person: K.
        seed: seed of the order.

    Raises:
        ValueError: N or K is out of range.
    """

    def __init__(self, person_labels: torch.Tensor, persons_per_batch: int, pairs_per_person: int, seed: int = 0):
        counts = torch.bincount(person_labels)
        if not 1 <= persons_per_batch <= len(counts):
            raise ValueError(
                f"persons_per_batch is {persons_per_batch}, it must be between 1 and the {len(counts)} persons"
            )
        if pairs_per_person < 1:
            raise ValueError(f"pairs_per_person is {pairs_per_person}, it must be at least 1")
        self.persons_per_batch, self.pairs_per_person = persons_per_batch, pairs_per_person
        self.seed, self.epoch = seed, 0
        self.pairs_of_person = [pairs.tolist() for pairs in person_labels.argsort(stable=True).split(counts.tolist())]
        self.num_pairs = len(person_labels)

    def set_epoch(self, epoch: int) -> None:
        """Chooses the epoch whose batches the next iteration gives."""
        self.epoch = epoch

    def __len__(self) -> int:
        """The number of items in the fewest whole batches that hold at least as many items as there are pairs."""
        batch_size = self.persons_per_batch * self.pairs_per_person
        return -(-self.num_pairs // batch_size) * batch_size

    def __iter__(self) -> Iterator[PairDraw]:
        rng = random.Random(f"{self.seed}/{self.epoch}")
        waiting_persons: list[int] = []
        waiting_pairs: list[list[int]] = [[] for _ in self.pairs_of_person]
        times_drawn: Counter[int] = Counter()
        for _ in range(len(self) // (self.persons_per_batch * self.pairs_per_person)):
            for person in self._draw_persons(waiting_persons, rng):
                for pair in self._draw_pairs(person, waiting_pairs[person], rng):
                    # The number is unique over epochs, too, so that each draw has an augmentation for itself.
                    yield PairDraw(pair, self.epoch * len(self) + times_drawn[pair])
                    times_drawn[pair] += 1

    def _draw_persons(self, waiting: list[int], rng: random.Random) -> list[int]:
        """The persons of the next batch, taken from the end of `waiting`, which is filled again when it is empty."""
        batch: list[int] = []
        while len(batch) < self.persons_per_batch:
            if not waiting:
                waiting.extend(rng.sample(range(len(self.pairs_of_person)), len(self.pairs_of_person)))
                # The persons already in this batch move to the front, so that they are taken last.
                waiting.sort(key=lambda person: person not in batch)
            batch.append(waiting.pop())
        return batch

    def _draw_pairs(self, person: int, waiting: list[int], rng: random.Random) -> Iterator[int]:
        """The pairs of a person for one batch, taken from the end of `waiting`, which is filled again when empty."""
        pairs, in_batch = self.pairs_of_person[person], Counter[int]()
        for _ in range(self.pairs_per_person):
            if not waiting:
                # The pairs already in this batch move to the front, so that they are taken last.
                waiting.extend(sorted(rng.sample(pairs, len(pairs)), key=lambda pair: -in_batch[pair]))
            pair = waiting.pop()
            yield pair
            in_batch[pair] += 1


__all__ = ["IdentitySampler", "PairSampler"]
