"""Networks to latents and back: a SANE model and its tokenizer on the networks of one layout."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch

from hub_scripts.arguments import require_source
from modeling_sane import SaneModel
from tokenization_sane import CheckpointLayout, SaneWeightTokenizer

CACHED_VALUES = 2**22  # of an activation; 16 MB, above which encoding a ResNet-18 was a quarter slower


def load_pretrained(source: str | Path) -> tuple[SaneModel, SaneWeightTokenizer]:
    """Model (in eval mode) and tokenizer from one folder or Hub repository."""
    require_source(source, "the model")
    return SaneModel.from_pretrained(source).eval(), SaneWeightTokenizer.from_pretrained(source)


def compression(layouts: Sequence[CheckpointLayout], latent_size: int) -> float:
    """Real weight values per latent value, one network of each layout together."""
    values = sum(layout.num_parameters for layout in layouts)
    return values / (latent_size * sum(layout.num_tokens for layout in layouts))


class Codec:
    """Encodes and decodes many networks of one layout, a chunk at a time.

    Args:
        model ([`SaneModel`]): in eval mode.
        tokenizer ([`SaneWeightTokenizer`]): the model's own.
        layout ([`CheckpointLayout`]): of the networks; it is cut as the tokenizer does.
        chunk_size (`int`): networks at a time.
        window_size (`int`, *optional*), halo (`int`, *optional*): how long sequences are cut; default the model's own.
    """

    def __init__(
        self,
        model: SaneModel,
        tokenizer: SaneWeightTokenizer,
        layout: CheckpointLayout,
        chunk_size: int = 64,
        window_size: int | None = None,
        halo: int | None = None,
    ):
        if model.config.token_size != tokenizer.token_size:
            raise ValueError(
                f"the model reads tokens of {model.config.token_size} values, the tokenizer makes tokens of "
                f"{tokenizer.token_size}; load both from one folder."
            )
        self.model, self.tokenizer, self.chunk_size = model, tokenizer, chunk_size
        self.window_size, self.halo = window_size, halo
        self.layout = layout.repack(tokenizer.token_size, tokenizer.packing)
        self.mean, self.std = tokenizer.token_statistics(self.layout)

    @classmethod
    def from_pretrained(cls, source: str | Path, layout: CheckpointLayout) -> "Codec":
        """Load model and tokenizer from a folder or a Hub repository."""
        return cls(*load_pretrained(source), layout)

    def tokens(self, tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Normalised tokens `(networks, tokens, token_size)` of stacked tensors `(networks, *shape)`."""
        return self.normalize(self.layout.pack(tensors))

    def normalize(self, raw: torch.Tensor) -> torch.Tensor:
        """Normalised tokens of raw ones, both `(networks, tokens, token_size)`."""
        return (raw - self.mean) / self.std

    def tensors(self, token_values: torch.Tensor) -> dict[str, torch.Tensor]:
        """Undo [`~Codec.tokens`]; differentiable. Running variances of norms that were decoded below zero become zero."""
        device = token_values.device
        tensors = self.layout.unpack(token_values * self.std.to(device) + self.mean.to(device))
        return {name: t.clamp(min=0) if name.endswith("running_var") else t for name, t in tensors.items()}

    def encode(self, token_values: torch.Tensor | np.ndarray) -> torch.Tensor:
        """Latents `(networks, tokens, latent_size)` of normalised tokens `(networks, tokens, token_size)`."""
        with torch.no_grad():
            return self._run(self.model.encode_sequence, token_values)

    def decode(self, latents: torch.Tensor, gradient: bool = False) -> torch.Tensor:
        """Normalised tokens of latents, with a gradient if asked for; padding inside tokens is set to zero."""
        with torch.set_grad_enabled(gradient):
            return self._run(self.model.decode_sequence, latents).masked_fill(~self.layout.value_mask, 0.0)

    def _run(self, function, sequences: torch.Tensor | np.ndarray) -> torch.Tensor:
        chunks, windows = [], self._windows()
        sizes = {"window_size": self.window_size, "halo": self.halo, "batch_size": windows}
        for start in range(0, len(sequences), self.chunk_size):
            chunk = torch.as_tensor(sequences[start : start + self.chunk_size], device=self.model.device)
            kinds = self.layout.layer_kind_ids.to(chunk.device).expand(len(chunk), -1)
            out = function(chunk, self.layout.position_ids.to(chunk.device), layer_kind_ids=kinds, **sizes)
            chunks.append(out.float().cpu())
        return torch.cat(chunks)

    def _windows(self) -> int:
        """Windows at a time: on a CPU as many as keep the widest activation of a block in its cache."""
        if self.model.device.type != "cpu":
            return self.chunk_size
        config = self.model.config
        core = config.window_size if self.window_size is None else self.window_size
        halo = config.halo if self.halo is None else self.halo
        tokens = min(self.layout.num_tokens, core + 2 * halo)
        return max(1, min(self.chunk_size, CACHED_VALUES // (tokens * config.mlp_size)))
