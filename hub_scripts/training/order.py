"""Which samples each epoch shows and each optimizer step takes: functions of seed and step alone."""

from collections.abc import Iterator, Sequence

import numpy as np
from torch.utils.data import Sampler

from hub_scripts.zoos.views import Sample


class Order:
    """Which rows an epoch shows, and in which order: a function of seed and epoch alone.

    Without weights an epoch shows each row once. With weights it is as long, but each part gets its share of it, going
    round its own rows as often as that takes.

    Args:
        sizes (`Sequence[int]`): rows of each part.
        seed (`int`): of the order.
        weights (`Sequence[float]`, *optional*): shares of the parts.
    """

    def __init__(self, sizes: Sequence[int], seed: int, weights: Sequence[float] | None = None):
        self.sizes, self.seed = list(sizes), seed
        self.count = sum(sizes)
        self.shares = None
        if weights is not None:
            total = sum(weights)
            self.shares = [round(self.count * weight / total) for weight in weights]
            self.count = sum(self.shares)

    def __len__(self) -> int:
        return self.count

    def epoch(self, epoch: int) -> list[Sample]:
        """The samples of an epoch; `Sample.epoch` says how often that row has been shown before."""
        shuffle = self._generator(epoch).permutation
        if self.shares is None:
            return [Sample(epoch, int(row)) for row in shuffle(self.count)]
        samples = [sample for part, share in enumerate(self.shares) for sample in self._share(part, share, epoch)]
        return [samples[place] for place in shuffle(self.count)]

    def _share(self, part: int, share: int, epoch: int) -> Iterator[Sample]:
        """Rows of a part, from where the epochs before have ended in its endless sequence of permutations."""
        size, start = self.sizes[part], sum(self.sizes[:part])
        order, number = None, -1
        for place in range(epoch * share, (epoch + 1) * share):
            if place // size != number:
                number = place // size
                order = self._generator(number, 1 + part).permutation(size)
            yield Sample(number, start + int(order[place % size]))

    def _generator(self, epoch: int, part: int = 0) -> np.random.Generator:
        return np.random.Generator(np.random.Philox(key=self.seed, counter=[1, part, epoch, 0]))


class StepSampler(Sampler[list[Sample]]):
    """The samples of each optimizer step, for one of several processes.

    Step `s` takes the same samples whatever the number of processes; so a run goes on exactly where it stopped, by its
    step number.

    Args:
        order ([`Order`]): the samples of each epoch; a last incomplete step of an epoch is left out.
        batch_size (`int`): samples in a step, over all processes.
        first_step (`int`): where to start.
        last_step (`int`): where to stop, not included.
        rank (`int`): this process.
        num_processes (`int`): all of them.
    """

    def __init__(
        self, order: Order, batch_size: int, first_step: int, last_step: int, rank: int = 0, num_processes: int = 1
    ):
        if batch_size % num_processes:
            raise ValueError(f"a batch of {batch_size} does not divide among {num_processes} processes.")
        self.steps_per_epoch = len(order) // batch_size
        if not self.steps_per_epoch:
            raise ValueError(
                f"a batch of {batch_size} is more than the {len(order)} checkpoints of the split; use a smaller one."
            )
        self.order, self.batch_size = order, batch_size
        self.first_step, self.last_step = first_step, last_step
        self.rank, self.num_processes = rank, num_processes

    def __len__(self) -> int:
        return self.last_step - self.first_step

    def __iter__(self) -> Iterator[list[Sample]]:
        samples, samples_epoch = [], -1
        share = self.batch_size // self.num_processes
        for step in range(self.first_step, self.last_step):
            epoch, place = divmod(step, self.steps_per_epoch)
            if epoch != samples_epoch:
                samples, samples_epoch = self.order.epoch(epoch), epoch
            first = place * self.batch_size + self.rank * share
            yield samples[first : first + share]
