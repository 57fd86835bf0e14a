"""Windows of token sequences in two views: as they are, and after a random symmetry of the network; both with noise.

A view is a pure function of (seed, epoch, checkpoint): the same whatever the number of processes, workers or restarts. A
permuted view is a gather through the symmetries' index maps, restricted to the tensors that stand in the window, so it costs
what its window costs, not what the network costs.
"""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch.utils.data import Dataset, Sampler

from tokenization_sane import CheckpointLayout, SymmetrySpec


class SymmetryGather:
    """Where each value of a window comes from after a random function-preserving permutation of the network.

    Args:
        layout ([`CheckpointLayout`]): what stands where.
        spec ([`SymmetrySpec`]): the network's symmetries.
    """

    def __init__(self, layout: CheckpointLayout, spec: SymmetrySpec):
        self.sizes = [group.size for group in spec.groups]
        moves: dict[
            str, list[tuple[int, int, np.ndarray]]
        ] = {}  # tensor -> (group, axis, index of each unit along the axis)
        for number, group in enumerate(spec.groups):
            for item in group.items:
                moves.setdefault(item.tensor, []).append((number, item.axis, np.asarray(item.rows(group.size))))
        self.tensors = []
        rows = columns = 0
        row_map, column_map = torch.zeros(2, layout.num_tokens, layout.token_size, dtype=torch.int64)
        for layer in layout.layers:
            if not layer.numel:
                continue
            row_table, column_table = {}, {}
            for tensor in layer.tensors:
                row_index = rows + torch.arange(tensor.rows)[:, None].expand(-1, tensor.columns)
                column_index = columns + torch.arange(tensor.columns).expand(tensor.rows, -1)
                row_table[tensor.name] = tensor.from_table(row_index)
                column_table[tensor.name] = tensor.from_table(column_index)
                self.tensors.append(_Moved(tensor, rows, columns, layer, moves.get(tensor.name, [])))
                rows, columns = rows + tensor.rows, columns + tensor.columns
            layer.pack_into(layout.tokens_of(row_map, layer), row_table)
            layer.pack_into(layout.tokens_of(column_map, layer), column_table)
        self.row_map, self.column_map, self.mask = row_map.numpy(), column_map.numpy(), layout.value_mask.numpy()
        self.row_address, self.column_address = np.zeros(rows, np.int64), np.zeros(columns, np.int64)
        for tensor in self.tensors:
            self.row_address[tensor.row_slice] = tensor.row_offsets
            self.column_address[tensor.column_slice] = np.arange(tensor.columns)

    def draw(self, start: int, stop: int, rng: np.random.Generator) -> np.ndarray:
        """Draw a symmetry and say where the values of tokens `start:stop` come from.

        Args:
            start (`int`): first token.
            stop (`int`): end token, not included.
            rng (`np.random.Generator`): where the permutations come from.

        Returns:
            `np.ndarray` of shape `(stop - start, token_size)`, int64: positions in the network's flattened tokens. Padding
            points to position 0; mask it.
        """
        inside = [tensor for tensor in self.tensors if tensor.first_token < stop and tensor.end_token > start]
        touched = sorted({group for tensor in inside for group, _, _ in tensor.moves})
        permutations = {group: rng.permutation(self.sizes[group]) for group in touched}
        row_address, column_address = self.row_address.copy(), self.column_address.copy()
        for tensor in inside:
            tensor.move(permutations, row_address, column_address)
        source = row_address[self.row_map[start:stop]] + column_address[self.column_map[start:stop]]
        return np.where(self.mask[start:stop], source, 0)


class _Moved:
    """How the symmetries move the rows and columns of one tensor."""

    def __init__(self, tensor, first_row: int, first_column: int, layer, moves: list):
        self.moves = moves
        self.columns = tensor.columns
        self.row_slice = slice(first_row, first_row + tensor.rows)
        self.column_slice = slice(first_column, first_column + tensor.columns)
        self.first_token, self.end_token = layer.first_token, layer.first_token + layer.num_tokens
        self.row_offsets = (layer.row_offsets() + tensor.column).numpy()
        self.row_axis = tensor.row_axis
        self.column_axes = [axis for axis in range(len(tensor.real_shape)) if axis != tensor.row_axis]
        self.shape = tensor.real_shape

    def move(self, permutations: dict, row_address: np.ndarray, column_address: np.ndarray) -> None:
        """Write the addresses of the moved rows and columns."""
        axes: dict[int, np.ndarray] = {}
        for group, axis, units in self.moves:
            index = axes.setdefault(axis, np.arange(self.shape[axis]))
            index[units] = units[permutations[group]]
        if self.row_axis in axes:
            row_address[self.row_slice] = self.row_offsets[axes[self.row_axis]]
        if len(axes) > (self.row_axis in axes):
            column, stride = np.zeros((), np.int64), 1
            for place, axis in enumerate(reversed(self.column_axes)):
                index = axes.get(axis, np.arange(self.shape[axis])) * stride
                column = column + index.reshape(-1, *[1] * place)
                stride *= self.shape[axis]
            column_address[self.column_slice] = column.ravel()


class Sample(NamedTuple):
    """Which checkpoint stands where in the order of training: epoch of training and row of the split."""

    epoch: int
    row: int


class WindowDataset(Dataset):
    """Windows of a split's token sequences; made for a sampler that gives [`Sample`]s.

    Args:
        tokens (`np.ndarray` of shape `(checkpoints, tokens, token_size)`): normalised tokens, for instance memory-mapped.
        layout ([`CheckpointLayout`]): their layout.
        window_size (`int`): tokens in a window; a shorter network is padded.
        spec ([`SymmetrySpec`], *optional*): symmetries for the second view; without, it differs by its noise alone.
        noise (`float`): standard deviation of the multiplicative Gaussian noise on both views; 0 for none.
        seed (`int`): of windows, permutations and noise.
    """

    def __init__(
        self,
        tokens: np.ndarray,
        layout: CheckpointLayout,
        window_size: int,
        spec: SymmetrySpec | None = None,
        noise: float = 0.0,
        seed: int = 0,
    ):
        self.tokens, self.layout, self.window_size, self.noise, self.seed = tokens, layout, window_size, noise, seed
        self.gather = SymmetryGather(layout, spec) if spec is not None else None
        self._static = {
            "position_ids": layout.position_ids.numpy(),
            "value_mask": layout.value_mask.numpy(),
            "layer_kind_ids": layout.layer_kind_ids.numpy(),
            "attention_mask": np.ones(layout.num_tokens, bool),
        }

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, sample: Sample) -> dict[str, np.ndarray]:
        """Both views of a window, `token_values` and `second_token_values`, with their clean targets and masks."""
        epoch, row = sample
        # a counter-based generator: cheap to make, and independent for every (seed, epoch, row)
        rng = np.random.Generator(np.random.Philox(key=self.seed, counter=[0, 0, epoch, row]))
        size = min(self.window_size, self.layout.num_tokens)
        start = int(rng.integers(0, self.layout.num_tokens - size + 1))
        window = slice(start, start + size)
        clean = np.array(self.tokens[row, window])
        second = clean
        if self.gather is not None:
            source = self.gather.draw(start, start + size, rng)
            second = np.where(self.gather.mask[window], self.tokens[row].reshape(-1)[source], np.float32(0))
        item = {name: values[window] for name, values in self._static.items()}
        item |= {"labels": clean, "second_labels": second}
        item |= {"token_values": self._noisy(clean, rng), "second_token_values": self._noisy(second, rng)}
        pad = self.window_size - size
        item = {n: np.pad(v, ((0, pad), *[(0, 0)] * (v.ndim - 1))) for n, v in item.items()} if pad else item
        return item | {"row": np.int64(row)}

    def _noisy(self, values: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        if not self.noise:
            return values
        return values * (1 + np.float32(self.noise) * rng.standard_normal(values.shape, dtype=np.float32))


class StepSampler(Sampler[list[Sample]]):
    """The checkpoints of each optimizer step, for one of several processes.

    The order of an epoch depends on seed and epoch alone, and step `s` takes the same checkpoints whatever the number of
    processes; so a run goes on exactly where it stopped, by its step number.

    Args:
        count (`int`): checkpoints in the split.
        batch_size (`int`): checkpoints in a step, over all processes; a last incomplete step of an epoch is left out.
        first_step (`int`): where to start.
        last_step (`int`): where to stop, not included.
        seed (`int`): of the order.
        rank (`int`): this process.
        num_processes (`int`): all of them.
    """

    def __init__(
        self,
        count: int,
        batch_size: int,
        first_step: int,
        last_step: int,
        seed: int,
        rank: int = 0,
        num_processes: int = 1,
    ):
        if batch_size % num_processes:
            raise ValueError(f"a batch of {batch_size} does not divide among {num_processes} processes.")
        self.steps_per_epoch = count // batch_size
        if not self.steps_per_epoch:
            raise ValueError(
                f"a batch of {batch_size} is more than the {count} checkpoints of the split; use a smaller one."
            )
        self.count, self.batch_size, self.seed = count, batch_size, seed
        self.first_step, self.last_step = first_step, last_step
        self.rank, self.num_processes = rank, num_processes

    def __len__(self) -> int:
        return self.last_step - self.first_step

    def __iter__(self) -> Iterator[list[Sample]]:
        order, order_epoch = None, -1
        share = self.batch_size // self.num_processes
        for step in range(self.first_step, self.last_step):
            epoch, place = divmod(step, self.steps_per_epoch)
            if epoch != order_epoch:
                order = np.random.Generator(np.random.Philox(key=self.seed, counter=[1, 0, epoch, 0])).permutation(
                    self.count
                )
                order_epoch = epoch
            first = place * self.batch_size + self.rank * share
            yield [Sample(epoch, int(row)) for row in order[first : first + share]]


def collate(items: list[dict[str, np.ndarray]]) -> dict[str, torch.Tensor]:
    """Stack items into a batch."""
    return {name: torch.from_numpy(np.stack([item[name] for item in items])) for name in items[0]}
