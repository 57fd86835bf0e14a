"""Samplers by name, fitted to anchors: what `--mode` means."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from hub_scripts.codec import Codec
from hub_scripts.generation.conditions import condition_values
from hub_scripts.generation.sensitivity import latent_gradients
from hub_scripts.zoos.zoo import Zoo
from modeling_sane import (
    ComponentFlowSampler,
    GaussianSampler,
    InterpolationSampler,
    KernelDensitySampler,
    LaplaceSampler,
    LatentFlowSampler,
)
from modeling_sane.generation_sane import LatentSampler

KERNELS = ("joint", "token", "dimension")
FLOWS = ("flow", "token_flow")
MODES = ("laplace", *KERNELS, "gaussian", "interpolation", *FLOWS)
NEED_TWO = ("gaussian", "interpolation")


@dataclass(frozen=True)
class Sensitivity:
    """What a Laplace sampler needs beside latents: inputs on which the anchors' functions are compared.

    Args:
        module (`nn.Module`): architecture of the networks.
        images (`torch.Tensor` of shape `(images, channels, height, width)`): of the task's train split; no labels.
    """

    module: nn.Module
    images: torch.Tensor


def check_modes(modes: list[str], num_anchors: int) -> None:
    """Refuse modes that do not exist or that need more anchors.

    Raises:
        ValueError: The mode is named.
    """
    unknown = set(modes) - set(MODES)
    if unknown or not modes:
        raise ValueError(f"--mode is {modes}, expected some of {', '.join(MODES)}.")
    for mode in modes:
        if mode in NEED_TWO and num_anchors < 2:
            raise ValueError(
                f"--mode {mode} needs at least two anchors, there is one; take more (--anchors top:5) or --mode joint."
            )


def fit_sampler(
    mode: str,
    codec: Codec,
    latents: torch.Tensor,
    bandwidth: float,
    sensitivity: Sensitivity,
    generator: torch.Generator,
) -> LatentSampler:
    """A sampler around anchors.

    Args:
        mode (`str`): one of `MODES`, but for `FLOWS`, which [`fit_flow`] fits to a whole zoo.
        codec ([`Codec`]): of the networks.
        latents (`torch.Tensor` of shape `(anchors, tokens, latent_size)`): of the anchors.
        bandwidth (`float`): of kernels, in latent units; for `"gaussian"` the noise beside the anchors' span; unused by
            `"interpolation"`.
        sensitivity ([`Sensitivity`]): for `"laplace"`.
        generator (`torch.Generator`): source of randomness.
    """
    if mode in KERNELS:
        return KernelDensitySampler(mode=mode, bandwidth=bandwidth).fit(latents)
    if mode == "gaussian":
        return GaussianSampler(rest=bandwidth).fit(latents)
    if mode == "interpolation":
        return InterpolationSampler().fit(latents)
    gradients = latent_gradients(codec, sensitivity.module, latents, sensitivity.images, generator)
    return LaplaceSampler(bandwidth=bandwidth).fit(latents, gradients=gradients)


def fit_flow(
    mode: str, zoo: Zoo, codec: Codec, conditions: Mapping[str, float], steps: int | None, seed: int
) -> LatentSampler:
    """A flow over the latents of a zoo's train split.

    Args:
        mode (`str`): one of `FLOWS`: `"flow"` over whole networks, `"token_flow"` over their tokens.
        zoo ([`Zoo`]): without conditions its last train checkpoints are learned, with conditions all of them.
        codec ([`Codec`]): encodes them.
        conditions (`Mapping[str, float]`): names of numeric columns that the flow is told.
        steps (`int`, *optional*): of training; default the sampler's.
        seed (`int`): of training.

    Raises:
        ValueError: If a condition is no numeric column.
    """
    rows = np.arange(len(zoo.rows("train"))) if conditions else zoo.last_rows("train")
    values = (
        torch.as_tensor(condition_values(zoo, list(conditions))[rows], dtype=torch.float32) if conditions else None
    )
    latents = codec.encode(codec.tokens(zoo.stacked("train", rows)))
    options = {"seed": seed} | ({} if steps is None else {"train_steps": steps})
    if mode == "flow":
        return ComponentFlowSampler(**options).fit(latents, values, progress=True)
    places = {"position_ids": codec.layout.position_ids, "layer_kind_ids": codec.layout.layer_kind_ids}
    return LatentFlowSampler(**options).fit(latents, values, **places, progress=True)
