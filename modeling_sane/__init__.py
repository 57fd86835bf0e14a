"""SANE as a transformers model: configuration, model, pre-training head and latent samplers.

Importing this package registers the classes with `AutoConfig`, `AutoModel` and `AutoModelForPreTraining`, and makes
`save_pretrained` put the code beside the weights, so that a saved folder opens where this package is missing.
"""

from transformers import AutoConfig, AutoModel, AutoModelForPreTraining

from .component_flow_sane import ComponentFlowSampler
from .configuration_sane import SaneConfig
from .generation_sane import GaussianSampler, InterpolationSampler, KernelDensitySampler, load_sampler
from .laplace_sane import LaplaceSampler
from .modeling_sane import (
    SaneForPreTraining,
    SaneForPreTrainingOutput,
    SaneModel,
    SaneModelOutput,
    SanePreTrainedModel,
    nt_xent_loss,
    reconstruction_loss,
)
from .token_flow_sane import LatentFlowSampler

AutoConfig.register(SaneConfig.model_type, SaneConfig, exist_ok=True)
AutoModel.register(SaneConfig, SaneModel, exist_ok=True)
AutoModelForPreTraining.register(SaneConfig, SaneForPreTraining, exist_ok=True)
SaneConfig.register_for_auto_class()
SaneModel.register_for_auto_class("AutoModel")
SaneForPreTraining.register_for_auto_class("AutoModelForPreTraining")

__all__ = [
    "ComponentFlowSampler",
    "GaussianSampler",
    "InterpolationSampler",
    "KernelDensitySampler",
    "LaplaceSampler",
    "LatentFlowSampler",
    "SaneConfig",
    "SaneForPreTraining",
    "SaneForPreTrainingOutput",
    "SaneModel",
    "SaneModelOutput",
    "SanePreTrainedModel",
    "load_sampler",
    "nt_xent_loss",
    "reconstruction_loss",
]
