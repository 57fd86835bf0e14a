"""Data prompts: some labelled samples of a task become a network that solves it, without training.

A set encoder makes one vector of the samples of each class. From these, a generator makes latents: for each layer a mixture of
anchors, latents that come from the zoo's networks, and a correction; the decoder of a SANE model, which stays as it is, makes
weights of them. After WeightCLIP (arXiv 2607.03551), which aligns data sets and networks in one space; class vectors are those of prototypical
networks (Snell, Swersky and Zemel 2017).

P, S, C = prompts, samples of a prompt, classes. A, T, L = anchors, tokens, latent size.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional as F

from hub_scripts.codec import Codec
from hub_scripts.evaluation.functional import build_module, condition_norms
from hub_scripts.outputs import read_json, write_json
from tokenization_sane import CheckpointLayout

CONFIG_FILE, WEIGHTS_FILE, LAYOUT_FILE, MODEL_FOLDER = "prompt.json", "prompt.safetensors", "layout.json", "sane"
SHARPNESS = 8.0  # of the distances between samples and class vectors, in mean squared differences


@dataclass(frozen=True)
class PromptConfig:
    """Sizes of a prompted generator.

    Args:
        image_shape (`tuple[int, int, int]`): channels, height and width of a sample.
        num_classes (`int`): classes of a task, outputs of a network.
        width (`int`): channels of the set encoder's convolutions.
        feature_size (`int`): values of a class vector.
        hidden_size (`int`): width of the generator.
        key_size (`int`): values that anchors are chosen by.
        correct (`bool`): True adds a correction to the mixture of anchors; False makes a generator that only mixes.
    """

    image_shape: tuple[int, int, int]
    num_classes: int
    width: int = 32
    feature_size: int = 64
    hidden_size: int = 256
    key_size: int = 32
    correct: bool = True


# --- from samples to class vectors


def check_samples(images: torch.Tensor, labels: torch.Tensor, config: PromptConfig) -> None:
    """Refuse samples that are no prompt.

    Args:
        images (`torch.Tensor` of shape `(prompts, samples, channels, height, width)`): float.
        labels (`torch.Tensor` of shape `(prompts, samples)`): int64.
        config ([`PromptConfig`]): what is expected.

    Raises:
        ValueError: If the images have another shape, a label is not among the classes, or a class has no sample.
    """
    if images.dim() != 5 or labels.shape != images.shape[:2]:
        raise ValueError(
            f"images have shape {tuple(images.shape)} and labels {tuple(labels.shape)}, expected "
            "(prompts, samples, channels, height, width) and (prompts, samples)."
        )
    if tuple(images.shape[2:]) != tuple(config.image_shape):
        found, expected = (" x ".join(map(str, shape)) for shape in (images.shape[2:], config.image_shape))
        raise ValueError(f"the samples are {found}, the networks read {expected} (channels, height, width).")
    if labels.numel() and (int(labels.min()) < 0 or int(labels.max()) >= config.num_classes):
        raise ValueError(
            f"labels are from {int(labels.min())} to {int(labels.max())}, expected 0 to {config.num_classes - 1}: networks of "
            f"this prompt know {config.num_classes} classes; name those of a larger task, as in digits[3,1,4,5]."
        )
    counts = F.one_hot(labels, config.num_classes).sum(1)  # (P, C)
    if (counts == 0).any():
        prompt, number = (counts == 0).nonzero()[0].tolist()
        raise ValueError(
            f"prompt {prompt} has no sample of class {number}; give at least one of each of the {config.num_classes} classes."
        )


class DataPrompt(nn.Module):
    """Set encoder: one vector for each class, the mean over its samples, whatever their order and number.

    Args:
        config ([`PromptConfig`]): sizes.
    """

    def __init__(self, config: PromptConfig):
        super().__init__()
        self.config = config
        width, size = config.width, config.feature_size
        self.features = nn.Sequential(
            nn.Conv2d(config.image_shape[0], width, 3, padding=1),
            nn.GELU(),
            nn.MaxPool2d(2),
            nn.Conv2d(width, width, 3, padding=1),
            nn.GELU(),
            nn.AdaptiveAvgPool2d(2),
            nn.Flatten(),
            nn.Linear(4 * width, size),
            nn.LayerNorm(size, elementwise_affine=False),
        )

    def embed(self, images: torch.Tensor) -> torch.Tensor:
        """Features `(prompts, samples, feature_size)` of samples `(prompts, samples, channels, height, width)`."""
        return self.features(images.flatten(0, 1)).view(*images.shape[:2], -1)

    def forward(self, images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Class vectors of prompts.

        Args:
            images (`torch.Tensor` of shape `(prompts, samples, channels, height, width)`): float32.
            labels (`torch.Tensor` of shape `(prompts, samples)`): int64, 0 to `num_classes - 1`.

        Returns:
            `torch.Tensor` of shape `(prompts, num_classes, feature_size)`: float32, classes in the order of their numbers.

        Raises:
            ValueError: As in [`check_samples`].
        """
        check_samples(images, labels, self.config)
        members = F.one_hot(labels, self.config.num_classes).to(images.dtype)  # (P, S, C)
        sums = torch.einsum("psc,psd->pcd", members, self.embed(images))
        return sums / members.sum(1)[..., None]


# --- from class vectors to latents


class Generated(NamedTuple):
    """What a generator makes of prompts.

    Args:
        latents (`torch.Tensor` of shape `(prompts, tokens, latent_size)`): float32.
        class_vectors (`torch.Tensor` of shape `(prompts, num_classes, feature_size)`): float32.
        mixture (`torch.Tensor` of shape `(prompts, layers, anchors)`): float32, share of each anchor in each layer.
    """

    latents: torch.Tensor
    class_vectors: torch.Tensor
    mixture: torch.Tensor


class PromptedGenerator(nn.Module):
    """From prompts to latents: a mixture of anchors for each layer, and a correction for each token.

    One anchor, the mean of a zoo's aligned networks, is as good a start as all of them (benchmarks/generation_prompts.py). When tried
    with the best network of a zoo instead, which knows other classes, the loss stayed at chance. The correction has `hidden_size`
    weights for each value of the latents: for networks of up to some hundred thousand weights.

    Args:
        config ([`PromptConfig`]): sizes.
        anchors (`torch.Tensor` of shape `(anchors, tokens, latent_size)`): latents of aligned networks, or their mean alone.
        layer_ids (`torch.Tensor` of shape `(tokens,)`): int64, the layer of each token.
    """

    def __init__(self, config: PromptConfig, anchors: torch.Tensor, layer_ids: torch.Tensor):
        super().__init__()
        self.config = config
        A, T, L = anchors.shape  # anchors, tokens, latent size
        numbers = layer_ids.unique(return_inverse=True)[1]
        layers = int(numbers.max()) + 1
        self.prompt = DataPrompt(config)
        self.trunk = nn.Sequential(
            nn.Linear(config.num_classes * config.feature_size, config.hidden_size),
            nn.GELU(),
            nn.Linear(config.hidden_size, config.hidden_size),
            nn.GELU(),
        )
        self.query = nn.Linear(config.hidden_size, layers * config.key_size)
        self.keys = nn.Parameter(torch.randn(A, config.key_size))
        self.correction = nn.Linear(config.hidden_size, T * L)
        nn.init.zeros_(self.correction.weight)
        nn.init.zeros_(self.correction.bias)
        self.register_buffer("anchors", anchors.detach().clone().float())
        self.register_buffer("layer_numbers", numbers)

    def forward(self, images: torch.Tensor, labels: torch.Tensor) -> Generated:
        """Latents of prompts; arguments and errors as in [`DataPrompt.forward`]."""
        P, (T, L) = len(images), self.anchors.shape[1:]
        vectors = self.prompt(images, labels)
        hidden = self.trunk(vectors.flatten(1))
        queries = self.query(hidden).view(P, -1, self.config.key_size)  # (P, layers, key_size)
        scores = torch.einsum("plk,ak->pla", queries, self.keys) / self.config.key_size**0.5
        mixture = scores.softmax(-1)
        latents = torch.einsum("pta,atl->ptl", mixture[:, self.layer_numbers], self.anchors)
        if self.config.correct:
            latents = latents + self.correction(hidden).view(P, T, L)
        return Generated(latents, vectors, mixture)

    def prototype_loss(self, vectors: torch.Tensor, images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Cross-entropy of other samples classified by their nearest class vector; keeps class vectors apart.

        Args:
            vectors (`torch.Tensor` of shape `(prompts, num_classes, feature_size)`): of the prompts.
            images (`torch.Tensor` of shape `(prompts, samples, channels, height, width)`): other samples of their tasks.
            labels (`torch.Tensor` of shape `(prompts, samples)`): int64.
        """
        distances = torch.cdist(self.prompt.embed(images), vectors).square() / vectors.shape[-1]
        return F.cross_entropy((-SHARPNESS * distances).flatten(0, 1), labels.flatten())


# --- from latents to networks


class Prompter:
    """Makes networks from labelled samples: a generator, the SANE model that decodes, and the architecture of the networks.

    Args:
        generator ([`PromptedGenerator`]): from samples to latents.
        codec ([`Codec`]): decodes latents; its model's weights are not changed.
        architecture (`str`): `"package.module:Name"` of the networks.
        architecture_kwargs (`Mapping`): its arguments.
        task (`str`): whose classes the training tasks were made of.
    """

    def __init__(
        self,
        generator: PromptedGenerator,
        codec: Codec,
        architecture: str,
        architecture_kwargs: Mapping[str, Any],
        task: str,
    ):
        self.generator, self.codec = generator, codec
        codec.model.requires_grad_(False)
        self.architecture, self.architecture_kwargs, self.task = architecture, dict(architecture_kwargs), task
        self.module = build_module(architecture, self.architecture_kwargs).eval()

    @property
    def config(self) -> PromptConfig:
        """Sizes of the generator."""
        return self.generator.config

    def decode(self, latents: torch.Tensor) -> dict[str, torch.Tensor]:
        """Stacked networks of latents `(networks, tokens, latent_size)`, with gradients."""
        return self.codec.tensors(self.codec.decode(latents, gradient=True))

    @torch.no_grad()
    def __call__(self, images: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        """One network for each prompt.

        Args:
            images (`torch.Tensor` of shape `(prompts, samples, channels, height, width)`): float32, standardised as a [`Task`]'s.
            labels (`torch.Tensor` of shape `(prompts, samples)`): int64.

        Returns:
            `dict[str, torch.Tensor]`: stacked state dicts, each `(prompts, *shape)`; running statistics of norms fit the samples.

        Raises:
            ValueError: As in [`check_samples`].
        """
        self.generator.eval()
        tensors = self.decode(self.generator(images, labels).latents)
        parts = [
            condition_norms(self.module, {name: t[i : i + 1] for name, t in tensors.items()}, own, batches=1)
            for i, own in enumerate(images)
        ]
        return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}

    def save_pretrained(self, folder: str | Path) -> None:
        """Write generator, layout and SANE model, so that the folder stands alone.

        ```
        folder/
          prompt.json         sizes, architecture, task
          prompt.safetensors  generator with its anchors
          layout.json         CheckpointLayout of the networks
          sane/               the SANE model and its tokenizer
        ```
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        info = {
            "config": asdict(self.config),
            "architecture": self.architecture,
            "architecture_kwargs": self.architecture_kwargs,
            "task": self.task,
        }
        write_json(folder / CONFIG_FILE, info)
        write_json(folder / LAYOUT_FILE, self.codec.layout.to_dict())
        tensors = {name: tensor.contiguous() for name, tensor in self.generator.state_dict().items()}
        save_file(tensors, folder / WEIGHTS_FILE, metadata={"format": "pt"})
        self.codec.model.save_pretrained(folder / MODEL_FOLDER)
        self.codec.tokenizer.save_pretrained(folder / MODEL_FOLDER)

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> "Prompter":
        """Read what [`~Prompter.save_pretrained`] wrote.

        Raises:
            ValueError: If the folder lacks a file, or its weights do not fit its sizes.
        """
        folder = Path(folder)
        missing = [name for name in (CONFIG_FILE, WEIGHTS_FILE, LAYOUT_FILE) if not (folder / name).is_file()]
        if missing:
            raise ValueError(f"{folder} has no {missing[0]}, expected a folder that `sane prompt --zoo ...` wrote.")
        info, tensors = read_json(folder / CONFIG_FILE), load_file(folder / WEIGHTS_FILE)
        config = PromptConfig(**info["config"])
        config = replace(config, image_shape=tuple(config.image_shape))  # JSON gives lists back
        layout = CheckpointLayout.from_json((folder / LAYOUT_FILE).read_text(encoding="utf-8"))
        codec = Codec.from_pretrained(folder / MODEL_FOLDER, layout)
        generator = PromptedGenerator(config, tensors["anchors"], tensors["layer_numbers"])
        try:
            generator.load_state_dict(tensors)
        except RuntimeError as error:
            raise ValueError(f"{folder / WEIGHTS_FILE} does not fit {CONFIG_FILE}: {error}") from error
        return cls(generator, codec, info["architecture"], info["architecture_kwargs"], info["task"])
