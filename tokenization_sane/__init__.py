"""Checkpoints to weight tokens and back: layout, tokenizer, symmetries."""

from transformers import AutoFeatureExtractor, AutoTokenizer, PreTrainedConfig

from .alignment_sane import Alignment, WeightMatcher, align, match_weights, weight_distance
from .canonical_sane import canonical_order
from .checkpoint_sane import CheckpointFiles
from .checkpoint_writer_sane import CheckpointWriter
from .find_symmetries_sane import find_symmetries
from .layout_sane import LAYER_KINDS, PACKINGS, CheckpointLayout, LayerLayout, TensorLayout, TensorSpec
from .symmetry_sane import SymmetryGroup, SymmetryItem, SymmetrySpec
from .tokenization_sane import SaneWeightTokenizer, check_finite, merge_moments, moments_of


class SaneWeightTokenizerKey(PreTrainedConfig):
    """The Auto classes find a tokenizer by a configuration class; the weight tokenizer has none of its own."""

    model_type = "sane_weight_tokenizer"


SaneWeightTokenizer.register_for_auto_class("AutoFeatureExtractor")
AutoFeatureExtractor.register(SaneWeightTokenizerKey, SaneWeightTokenizer, exist_ok=True)
AutoTokenizer.register(SaneWeightTokenizerKey, slow_tokenizer_class=SaneWeightTokenizer, exist_ok=True)
