"""Embeddings of networks: from weights to one vector each, the same for permuted twins."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch

from hub_scripts.codec import Codec, load_pretrained
from hub_scripts.evaluation.features import DEFAULT_FEATURE, FEATURES
from modeling_sane import SaneModel
from tokenization_sane import CheckpointLayout, SaneWeightTokenizer, SymmetrySpec, canonical_order


class Embedder:
    """Encodes networks of any layout and pools their latents.

    Where the tokenizer knows the symmetries of a layout, networks are first brought into their canonical order, so that twins
    with other permutations and signs get the same embedding.

    Args:
        model ([`SaneModel`]): in eval mode.
        tokenizer ([`SaneWeightTokenizer`]): the model's own.
        feature (`str`): a key of `FEATURES`.
        chunk_size (`int`): networks at a time.
    """

    def __init__(
        self,
        model: SaneModel,
        tokenizer: SaneWeightTokenizer,
        feature: str = DEFAULT_FEATURE,
        chunk_size: int = 64,
    ):
        self.model, self.tokenizer, self.feature, self.chunk_size = model, tokenizer, feature, chunk_size
        self._codecs: dict[tuple, tuple[Codec, SymmetrySpec | None]] = {}

    @classmethod
    def from_pretrained(cls, source: str | Path, feature: str = DEFAULT_FEATURE) -> "Embedder":
        """Load model and tokenizer from a folder or a Hub repository."""
        return cls(*load_pretrained(source), feature)

    def codec(self, layout: CheckpointLayout) -> Codec:
        """The codec of a layout."""
        return self._known(layout)[0]

    def has_symmetries(self, layout: CheckpointLayout) -> bool:
        """True if networks of the layout are brought into their canonical order."""
        return self._known(layout)[1] is not None

    def canonical(self, tensors: Mapping[str, torch.Tensor], layout: CheckpointLayout) -> dict[str, torch.Tensor]:
        """Stacked networks `(networks, *shape)` in canonical order; as they are where no symmetries are known."""
        spec = self._known(layout)[1]
        return dict(tensors) if spec is None else canonical_order(spec, tensors)

    def latents(self, tensors: Mapping[str, torch.Tensor], layout: CheckpointLayout) -> torch.Tensor:
        """Latents `(networks, tokens, latent_size)` of stacked networks, in canonical order."""
        codec = self.codec(layout)
        return codec.encode(codec.tokens(self.canonical(tensors, layout)))

    def __call__(self, tensors: Mapping[str, torch.Tensor], layout: CheckpointLayout) -> np.ndarray:
        """Embeddings `(networks, features)`, float32, of stacked networks `(networks, *shape)`."""
        return FEATURES[self.feature](self.latents(tensors, layout), self.codec(layout).layout.layer_ids)

    def _known(self, layout: CheckpointLayout) -> tuple[Codec, SymmetrySpec | None]:
        key = (layout.fingerprint, *layout.tensors)  # a fingerprint does not tell the order of the tensors
        if key not in self._codecs:
            text = self.tokenizer.symmetries.get(layout.fingerprint)
            spec = None if text is None else SymmetrySpec.from_json(text).of_kind("permutation", "sign")
            codec = Codec(self.model, self.tokenizer, layout, self.chunk_size)
            self._codecs[key] = (codec, spec)
        return self._codecs[key]
