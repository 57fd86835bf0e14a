"""The published training step and data loading of SANE (Schürholt et al., ICML 2024), written anew from the paper.

It is the other side of `benchmarks/training.py`: it does what the published code does, the plain way, in today's
PyTorch. What a step and a sample are was checked against the published source (HSG-AIML/SANE), none of which is copied.
It leaves out what is only for logs (explained variance, variance of the latents), and mixed precision.

* Model: linear, learned positions `[pe(n) + pe(l) ‖ pe(k)]`, GPT-2's pre-norm blocks without biases and without a
  causal mask (PyTorch's scaled dot product attention), linear to the latents; the decoder mirrors it; no attention
  mask.
* Step: each view goes forward on its own; mean squared error between masked output and view; NT-Xent over cosine
  similarities of all pairs; AdamW with weight decay on matrices alone; gradients are not clipped.
* Data: a sample is one `torch.load` of its standardised tokens, mask, positions and properties (or an entry of a
  Python list, where a zoo is held in memory). Its second view is an `index_select` over the whole flattened sequence
  by one of five permutations that were made beforehand; then the window is cut, PyTorch's own collation stacks the
  samples, and noise is drawn for the batch.
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import Dataset

PERMUTATIONS = 5  # made beforehand


class Sizes(NamedTuple):
    """Of a model; `maxima` are the numbers of positions n, l and k."""

    token_size: int
    latent_size: int
    hidden_size: int
    layers: int
    heads: int
    window: int
    maxima: tuple[int, int, int]


class Attention(nn.Module):
    """Attention of all tokens to all tokens."""

    def __init__(self, sizes: Sizes):
        super().__init__()
        self.heads = sizes.heads
        self.joint = nn.Linear(sizes.hidden_size, 3 * sizes.hidden_size, bias=False)
        self.residual = nn.Linear(sizes.hidden_size, sizes.hidden_size, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map `(batch, tokens, hidden)` to the same shape."""
        batch, tokens, width = x.shape
        query, key, value = (
            part.view(batch, tokens, self.heads, width // self.heads).transpose(1, 2)
            for part in self.joint(x).split(width, dim=2)
        )
        mixed = F.scaled_dot_product_attention(query, key, value)
        return self.residual(mixed.transpose(1, 2).contiguous().view(batch, tokens, width))


class Block(nn.Module):
    """A pre-norm transformer block."""

    def __init__(self, sizes: Sizes):
        super().__init__()
        width = sizes.hidden_size
        self.norm_1, self.attention = nn.LayerNorm(width, bias=False), Attention(sizes)
        self.norm_2, self.wide = nn.LayerNorm(width, bias=False), nn.Linear(width, 4 * width, bias=False)
        self.residual = nn.Linear(4 * width, width, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map `(batch, tokens, hidden)` to the same shape."""
        x = x + self.attention(self.norm_1(x))
        return x + self.residual(F.gelu(self.wide(self.norm_2(x))))


class PublishedSane(nn.Module):
    """Encoder, decoder and projection head."""

    def __init__(self, sizes: Sizes):
        super().__init__()
        width, half = sizes.hidden_size, sizes.hidden_size // 2
        self.positions = nn.ModuleList(nn.Embedding(maximum, half) for maximum in sizes.maxima)
        self.token_in, self.latent_out = (
            nn.Linear(sizes.token_size, width, bias=False),
            nn.Linear(width, sizes.latent_size, bias=False),
        )
        self.latent_in, self.token_out = (
            nn.Linear(sizes.latent_size, width, bias=False),
            nn.Linear(width, sizes.token_size, bias=False),
        )
        self.encoder, self.decoder = (nn.Sequential(*(Block(sizes) for _ in range(sizes.layers))) for _ in range(2))
        self.head = nn.Sequential(
            nn.Linear(sizes.window * sizes.latent_size, 30, bias=False), nn.LayerNorm(30), nn.ReLU(),
            nn.Linear(30, 30, bias=False), nn.LayerNorm(30), nn.ReLU(),
        )  # fmt: skip
        for name, parameter in self.named_parameters():
            if parameter.ndim > 1:
                std = 0.02 / math.sqrt(2 * sizes.layers) if name.endswith("residual.weight") else 0.02
                nn.init.normal_(parameter, std=std)

    def place(self, x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Add the positions `(batch, tokens, 3)`."""
        n, l, k = (table(positions[..., axis]) for axis, table in enumerate(self.positions))  # noqa: E741
        return x + torch.cat([n + l, k], dim=2)

    def forward(self, x: torch.Tensor, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Latents, reconstruction and projection of one view."""
        latents = self.latent_out(self.encoder(self.place(self.token_in(x), positions)))
        decoded = self.token_out(self.decoder(self.place(self.latent_in(latents), positions)))
        return latents, decoded, self.head(latents.flatten(1))


def nt_xent(first: torch.Tensor, second: torch.Tensor, temperature: float = 0.1) -> torch.Tensor:
    """NT-Xent over cosine similarities of all pairs of projections."""
    count = len(first)
    views = torch.cat([first, second])
    similarity = F.cosine_similarity(views[:, None], views[None], dim=2) / temperature
    similarity = similarity.masked_fill(torch.eye(2 * count, dtype=torch.bool), -torch.inf)
    return F.cross_entropy(similarity, torch.arange(2 * count).roll(count))


class PublishedStep:
    """A model with its optimizer; called on a batch it takes one step and gives the loss.

    Args:
        sizes ([`Sizes`]): of the model.
        gamma (`float`): weight of NT-Xent.
    """

    def __init__(self, sizes: Sizes, gamma: float = 0.05):
        self.model, self.gamma = PublishedSane(sizes).train(), gamma
        matrices = [parameter for parameter in self.model.parameters() if parameter.ndim > 1]
        vectors = [parameter for parameter in self.model.parameters() if parameter.ndim == 1]
        groups = [{"params": matrices, "weight_decay": 3e-9}, {"params": vectors, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(groups, lr=1e-4)

    def __call__(self, batch: Sequence[torch.Tensor]) -> torch.Tensor:
        """Take a step on both views, each `(tokens, mask, positions)`."""
        x_1, mask_1, positions_1, x_2, mask_2, positions_2 = batch
        self.optimizer.zero_grad(set_to_none=True)
        _, decoded_1, projected_1 = self.model(x_1, positions_1)
        _, decoded_2, projected_2 = self.model(x_2, positions_2)
        target, mask = torch.cat([x_1, x_2]), torch.cat([mask_1, mask_2])
        reconstruction = F.mse_loss(mask * torch.cat([decoded_1, decoded_2]), target)
        loss = self.gamma * nt_xent(projected_1, projected_2) + (1 - self.gamma) * reconstruction
        loss.backward()
        self.optimizer.step()
        return loss.detach()


class PublishedDataset(Dataset):
    """Windows of both views of one checkpoint.

    Args:
        samples (`Sequence`): files that `torch.load` reads, or their contents: `(tokens, mask, positions, properties)`.
        permutations (`Sequence[torch.Tensor]`): for each, where all values of a flattened sequence come from.
        window (`int`): tokens.
    """

    def __init__(self, samples: Sequence[Path | tuple], permutations: Sequence[torch.Tensor], window: int):
        self.samples, self.permutations, self.window = samples, permutations, window

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, ...]:
        """Tokens, tokens of the second view, mask, positions, properties."""
        sample = self.samples[index]
        tokens, mask, positions, properties = (
            torch.load(sample, weights_only=True) if isinstance(sample, Path) else sample
        )
        permutation = self.permutations[int(torch.randint(len(self.permutations), ()))]
        permuted = tokens.view(-1).index_select(0, permutation).view_as(tokens)
        start = int(torch.randint(len(tokens) - self.window + 1, ()))
        place = torch.arange(start, start + self.window)
        cut = (each.index_select(0, place) for each in (tokens, permuted, mask, positions))
        return *cut, properties


def two_views(batch: Sequence[torch.Tensor], noise: float = 0.1) -> tuple[torch.Tensor, ...]:
    """What a step takes, out of what the collation gives: both views with noise."""
    tokens, permuted, mask, positions, _ = batch
    first, second = (view * (1 + noise * torch.randn(view.shape)) for view in (tokens, permuted))
    return first, mask, positions, second, mask.clone(), positions.clone()
