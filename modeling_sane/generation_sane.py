"""Latent samplers: fit a density to the latents of a few good models (anchors), draw the latents of new ones.

All samplers share one protocol: `fit(latents, condition=None)`, `sample(n, condition=None, generator=None)`,
`save_pretrained(folder)` and `from_pretrained(folder)`. Anchors must be aligned with each other, or draws that combine
several of them mix neurons that have nothing to do with each other.
"""

import json
import math
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file


class LatentSampler:
    """What every sampler does the same way: checks, noise, saving and loading.

    A sampler names its options in `options` (keyword arguments of the constructor, kept as attributes) and, once
    fitted, its tensors in `tensors` (attributes).
    """

    options: tuple[str, ...] = ()
    tensors: tuple[str, ...] = ()
    minimum_anchors = 1
    config_name = "sampler_config.json"
    weights_name = "sampler.safetensors"

    @property
    def fitted(self) -> bool:
        """Whether `fit` has run."""
        return all(getattr(self, name, None) is not None for name in self.tensors)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write options (JSON) and fitted tensors (safetensors) into `folder`, which is made if missing."""
        self._check_fitted()
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        config = {"sampler": type(self).__name__, **{name: getattr(self, name) for name in self.options}}
        save_file({name: getattr(self, name).contiguous() for name in self.tensors}, folder / self.weights_name)
        (folder / self.config_name).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> "LatentSampler":
        """Read what `save_pretrained` wrote.

        Raises:
            ValueError: the folder holds no sampler, or one of another class.
        """
        folder = Path(folder)
        for name in (cls.config_name, cls.weights_name):
            if not (folder / name).is_file():
                raise ValueError(
                    f"{folder} holds no {name}. Expected a folder written by {cls.__name__}.save_pretrained."
                )
        config = json.loads((folder / cls.config_name).read_text(encoding="utf-8"))
        found = config.pop("sampler", None)
        if found != cls.__name__:
            raise ValueError(f"{folder} holds a {found}, not a {cls.__name__}. Load it with {found}.from_pretrained.")
        sampler = cls(**config)
        for name, tensor in load_file(folder / cls.weights_name).items():
            setattr(sampler, name, tensor)
        sampler._check_fitted()
        return sampler

    def _check_fitted(self):
        if not self.fitted:
            raise ValueError(f"This {type(self).__name__} is not fitted. Call fit(latents) first.")

    def _check_latents(self, latents, condition):
        if condition is not None:
            raise ValueError(
                f"{type(self).__name__} knows no conditions. Choose the anchors by the condition and fit those."
            )
        if latents.ndim != 3:
            raise ValueError(
                f"latents has shape {tuple(latents.shape)}, expected (anchors, tokens, latent_size): stack the latents "
                "of whole models."
            )
        if len(latents) < self.minimum_anchors:
            raise ValueError(
                f"Got {len(latents)} anchors, {type(self).__name__} needs at least {self.minimum_anchors}."
            )
        if not latents.is_floating_point():
            raise ValueError(f"latents has dtype {latents.dtype}, expected floating-point values.")
        bad = (~latents.isfinite()).flatten(1).any(dim=1).nonzero().flatten().tolist()
        if bad:
            raise ValueError(
                f"The latents of anchors {bad} hold NaN or infinite values. Leave these models out; their weights are "
                "probably not finite either."
            )
        return latents.detach()

    def _check_draw(self, n, condition):
        self._check_fitted()
        if condition is not None:
            raise ValueError(f"{type(self).__name__} knows no conditions, so sample(condition=...) has no meaning.")
        if n < 1:
            raise ValueError(f"Asked for {n} samples, expected at least 1.")


class KernelDensitySampler(LatentSampler):
    """Gaussian kernel density around the latents of the anchors.

    A draw is an anchor's latents plus normal noise, independent for every token and dimension. Memory and time are
    proportional to what is drawn.

    Args:
        mode (`"joint"`, `"token"` or `"dimension"`): For what an anchor is chosen: once for the whole sequence, for
            each token, or for each token and dimension (the paper's "individual").
        bandwidth (`float`, defaults to 0.2): Standard deviation of the noise.
        scale (`"absolute"` or `"std"`): Unit of the bandwidth: latent units, as the paper and our figures have it, or
            the standard deviation of each latent dimension over all anchors and tokens, which makes bandwidths
            comparable between models whose latents differ in size.
    """

    options = ("mode", "bandwidth", "scale")
    tensors = ("anchors",)

    def __init__(self, mode: str = "joint", bandwidth: float = 0.2, scale: str = "absolute"):
        if mode not in ("joint", "token", "dimension"):
            raise ValueError(f'mode is "{mode}", expected "joint", "token" or "dimension".')
        if scale not in ("absolute", "std"):
            raise ValueError(f'scale is "{scale}", expected "absolute" or "std".')
        if not 0 <= bandwidth < math.inf:
            raise ValueError(f"bandwidth is {bandwidth}, expected a finite number of at least 0.")
        self.mode, self.bandwidth, self.scale = mode, bandwidth, scale
        self.anchors = None

    def fit(self, latents: torch.Tensor, condition: None = None) -> "KernelDensitySampler":
        """Keep the anchors' latents `(anchors, tokens, latent_size)`.

        Raises:
            ValueError: wrong rank or dtype, no anchor, values that are not finite, or a condition.
        """
        self.anchors = self._check_latents(latents, condition).clone()
        return self

    def sample(self, n: int, condition: None = None, generator: torch.Generator | None = None) -> torch.Tensor:
        """Draw latents.

        Args:
            n (`int`): How many models.
            condition: Not supported; must be None.
            generator (`torch.Generator`, *optional*): Source of randomness, on any device.

        Returns:
            `torch.Tensor` of shape `(n, tokens, latent_size)`: dtype and device of the fitted latents.

        Raises:
            ValueError: not fitted, n below 1, or a condition.
        """
        self._check_draw(n, condition)
        A, N, L = self.anchors.shape
        chosen_shape = {"joint": (n, 1, 1), "token": (n, N, 1), "dimension": (n, N, L)}[self.mode]
        device = self.anchors.device if generator is None else generator.device
        chosen = torch.randint(A, chosen_shape, generator=generator, device=device).to(self.anchors.device)
        centers = self.anchors.gather(0, chosen.expand(n, N, L))
        noise = draw_normal(centers.shape, self.anchors, generator)
        if self.scale == "std":
            noise = noise * self.anchors.flatten(0, 1).std(dim=0, correction=0)
        return centers + self.bandwidth * noise


class GaussianSampler(LatentSampler):
    """Normal distribution with the anchors' mean and covariance over the whole sequence.

    The covariance has rank anchors - 1, so a draw is the mean plus a random combination of the anchors' deviations from
    it: correlations between all tokens stay. Unlike a kernel density it reaches between and beyond the anchors.

    Args:
        rest (`float`, defaults to 0.0): Standard deviation, in latent units, of independent noise that is added to
            every token and dimension, for what the few anchors do not span.
    """

    options = ("rest",)
    tensors = ("mean", "deviations")
    minimum_anchors = 2

    def __init__(self, rest: float = 0.0):
        if not 0 <= rest < math.inf:
            raise ValueError(f"rest is {rest}, expected a finite number of at least 0.")
        self.rest = rest
        self.mean = self.deviations = None

    def fit(self, latents: torch.Tensor, condition: None = None) -> "GaussianSampler":
        """Take mean and deviations of the anchors' latents `(anchors, tokens, latent_size)`.

        Raises:
            ValueError: wrong rank or dtype, fewer than two anchors, values that are not finite, or a condition.
        """
        latents = self._check_latents(latents, condition)
        self.mean = latents.mean(dim=0)
        self.deviations = latents - self.mean
        return self

    def sample(self, n: int, condition: None = None, generator: torch.Generator | None = None) -> torch.Tensor:
        """Draw latents `(n, tokens, latent_size)`; arguments, dtype, device and errors as in `KernelDensitySampler`."""
        self._check_draw(n, condition)
        A = len(self.deviations)
        weights = draw_normal((n, A), self.deviations, generator) / math.sqrt(A - 1)
        drawn = self.mean + torch.einsum("na,atl->ntl", weights, self.deviations)
        return drawn + self.rest * draw_normal(drawn.shape, drawn, generator) if self.rest else drawn


def draw_normal(shape: tuple[int, ...], like: torch.Tensor, generator: torch.Generator | None) -> torch.Tensor:
    """Return standard normal values with dtype and device of `like`, drawn where the generator lives."""
    device = like.device if generator is None else generator.device
    return torch.randn(shape, generator=generator, device=device, dtype=like.dtype).to(like.device)


__all__ = ["GaussianSampler", "KernelDensitySampler", "LatentSampler"]
