"""Embeddings of networks: from weights to one vector each, the same for permuted twins."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch

from hub_scripts.codec import Codec, load_pretrained
from hub_scripts.evaluation.features import DEFAULT_FEATURE, FEATURES
from hub_scripts.evaluation.moments import layer_moments
from modeling_sane import SaneModel
from tokenization_sane import CheckpointLayout, SaneWeightTokenizer, SymmetrySpec, canonical_order

# what an embedding may be: pooled latents; moments of the weights; or both, which finds relatives best (docs/analysis.md)
DEFAULT_EMBEDDING = "latents_and_moments"
EMBEDDINGS = (DEFAULT_EMBEDDING, "moments", *FEATURES)


class Embedder:
    """Encodes networks of any layout and makes one vector of each.

    Where the tokenizer knows the symmetries of a layout, networks are first brought into their canonical order, so that twins
    with other permutations and signs get the same embedding.

    Args:
        model ([`SaneModel`]): in eval mode.
        tokenizer ([`SaneWeightTokenizer`]): the model's own.
        feature (`str`): one of `EMBEDDINGS`.
        chunk_size (`int`): networks at a time.
    """

    def __init__(
        self,
        model: SaneModel,
        tokenizer: SaneWeightTokenizer,
        feature: str = DEFAULT_EMBEDDING,
        chunk_size: int = 64,
    ):
        self.model, self.tokenizer, self.feature, self.chunk_size = model, tokenizer, feature, chunk_size
        self._codecs: dict[tuple, tuple[Codec, SymmetrySpec | None]] = {}

    @classmethod
    def from_pretrained(cls, source: str | Path, feature: str = DEFAULT_EMBEDDING) -> "Embedder":
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
        return self._encoded(self.canonical(tensors, layout), layout)

    def __call__(self, tensors: Mapping[str, torch.Tensor], layout: CheckpointLayout) -> np.ndarray:
        """Embeddings `(networks, features)`, float32, of stacked networks `(networks, *shape)`."""
        ordered, parts = self.canonical(tensors, layout), []
        if self.feature != "moments":
            pool = FEATURES[DEFAULT_FEATURE if self.feature == DEFAULT_EMBEDDING else self.feature]
            parts.append(pool(self._encoded(ordered, layout), self.codec(layout).layout.layer_ids))
        if self.feature not in FEATURES:
            # in the layout's order of tensors, whatever order the file has
            parts.append(layer_moments({name: ordered[name] for name in self.codec(layout).layout.tensors}))
        return np.concatenate(parts, axis=1).astype(np.float32)

    def _encoded(self, ordered: Mapping[str, torch.Tensor], layout: CheckpointLayout) -> torch.Tensor:
        codec = self.codec(layout)
        return codec.encode(codec.tokens(ordered))

    def _known(self, layout: CheckpointLayout) -> tuple[Codec, SymmetrySpec | None]:
        key = (layout.fingerprint, *layout.tensors)  # a fingerprint does not tell the order of the tensors
        if key not in self._codecs:
            text = self.tokenizer.symmetries.get(layout.fingerprint)
            spec = None if text is None else SymmetrySpec.from_json(text).of_kind("permutation", "sign")
            codec = Codec(self.model, self.tokenizer, layout, self.chunk_size)
            self._codecs[key] = (codec, spec)
        return self._codecs[key]
