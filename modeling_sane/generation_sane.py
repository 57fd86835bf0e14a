"""Latent samplers: fit a density to the latents of a few good models (anchors), draw the latents of new ones.

All samplers share one protocol: `fit(latents, condition=None)`, `sample(n, condition=None, generator=None)`,
`save_pretrained(folder)` and `from_pretrained(folder)`. Anchors must be aligned with each other, or draws that combine
several of them mix neurons that have nothing to do with each other.
"""

import json
import math
from pathlib import Path
from typing import ClassVar

import torch
from safetensors.torch import load_file, save_file
from torch.nn import functional as F


class LatentSampler:
    """What every sampler does the same way: checks, noise, saving and loading.

    A sampler names its options in `options` (keyword arguments of the constructor, kept as attributes) and, once
    fitted, its tensors in `tensors` (attributes). `classes` holds every sampler class by its name, for `load_sampler`.
    """

    options: tuple[str, ...] = ()
    tensors: tuple[str, ...] = ()
    minimum_anchors = 1
    config_name = "sampler_config.json"
    weights_name = "sampler.safetensors"
    classes: ClassVar[dict[str, type["LatentSampler"]]] = {}

    def __init_subclass__(cls, **kwargs):
        super().__init_subclass__(**kwargs)
        if cls.options:  # what has none is a base of others
            LatentSampler.classes[cls.__name__] = cls

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
        save_file({name: tensor.contiguous() for name, tensor in self._state().items()}, folder / self.weights_name)
        (folder / self.config_name).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> "LatentSampler":
        """Read what `save_pretrained` wrote.

        Raises:
            ValueError: the folder holds no sampler, or one of another class.
        """
        config = cls._read_config(folder)
        found = config.pop("sampler", None)
        if found != cls.__name__:
            raise ValueError(f"{folder} holds a {found}, not a {cls.__name__}. Load it with {found}.from_pretrained.")
        sampler = cls(**config)
        sampler._set_state(load_file(Path(folder) / cls.weights_name))
        sampler._check_fitted()
        return sampler

    def to(self, device: str | torch.device) -> "LatentSampler":
        """Move the fitted tensors, in place; what is drawn lives there too. Returns the sampler itself."""
        self._check_fitted()
        self._set_state({name: tensor.to(device) for name, tensor in self._state().items()})
        return self

    @classmethod
    def _read_config(cls, folder):
        folder = Path(folder)
        for name in (cls.config_name, cls.weights_name):
            if not (folder / name).is_file():
                raise ValueError(
                    f"{folder} holds no {name}. Expected a folder written by {cls.__name__}.save_pretrained."
                )
        return json.loads((folder / cls.config_name).read_text(encoding="utf-8"))

    def _state(self):
        """All that `fit` has learned, tensors by name; `_set_state` takes it back."""
        return {name: getattr(self, name) for name in self.tensors}

    def _set_state(self, state):
        for name, tensor in state.items():
            setattr(self, name, tensor)

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
        rank (`int`, *optional*): Number of directions in which draws differ: the leading principal components of the
            anchors over the whole sequence. `None`, or a number from anchors - 1, keeps all that the anchors span.
    """

    options = ("rest", "rank")
    tensors = ("mean", "deviations")
    minimum_anchors = 2

    def __init__(self, rest: float = 0.0, rank: int | None = None):
        if not 0 <= rest < math.inf:
            raise ValueError(f"rest is {rest}, expected a finite number of at least 0.")
        if rank is not None and rank < 1:
            raise ValueError(f"rank is {rank}, expected at least 1, or None for all that the anchors span.")
        self.rest, self.rank = rest, rank
        self.mean = self.deviations = None

    def fit(self, latents: torch.Tensor, condition: None = None) -> "GaussianSampler":
        """Take mean and deviations of the anchors' latents `(anchors, tokens, latent_size)`.

        Raises:
            ValueError: wrong rank or dtype, fewer than two anchors, values that are not finite, or a condition.
        """
        latents = self._check_latents(latents, condition)
        self.mean = latents.mean(dim=0)
        self.deviations = latents - self.mean
        if self.rank is not None and self.rank < len(latents) - 1:
            flat = self.deviations.flatten(1)
            flat = flat.float() if flat.element_size() < 4 else flat  # eigh knows no half precision
            # the anchors are far fewer than the values, so their products are the smaller matrix
            leading = torch.linalg.eigh(flat @ flat.T).eigenvectors[:, -self.rank :]
            self.deviations = (leading @ (leading.T @ flat)).view_as(latents).to(latents.dtype)
        return self

    def sample(self, n: int, condition: None = None, generator: torch.Generator | None = None) -> torch.Tensor:
        """Draw latents `(n, tokens, latent_size)`; arguments, dtype, device and errors as in `KernelDensitySampler`."""
        self._check_draw(n, condition)
        A = len(self.deviations)
        weights = draw_normal((n, A), self.deviations, generator) / math.sqrt(A - 1)
        drawn = self.mean + torch.einsum("na,atl->ntl", weights, self.deviations)
        return drawn + self.rest * draw_normal(drawn.shape, drawn, generator) if self.rest else drawn


class InterpolationSampler(LatentSampler):
    """Draws between the anchors, and beyond them: a random weighted mean of a few anchors, the same for all tokens.

    The weights of a draw are uniform among all that are positive and sum to one. A factor then moves the draw along the
    line from the plain mean of its anchors: `mean + factor * (draw - mean)`; the sum of the weights stays one.

    Args:
        mixed (`int`, defaults to 2): Different anchors in one draw, chosen at random; at least 2.
        factor_range (`tuple[float, float]`, defaults to `(1.0, 1.0)`): Smallest and largest factor; each draw takes one
            between them, uniformly. 1 is plain interpolation, less pulls towards the mean, more reaches beyond the
            anchors: at factor 2, two anchors span a line that goes on for half their distance on both sides.
    """

    options = ("mixed", "factor_range")
    tensors = ("anchors",)

    def __init__(self, mixed: int = 2, factor_range: tuple[float, float] = (1.0, 1.0)):
        if mixed < 2:
            raise ValueError(f"mixed is {mixed}, expected at least 2 anchors in a draw.")
        if len(factor_range) != 2 or not 0 <= factor_range[0] <= factor_range[1] < math.inf:
            raise ValueError(
                f"factor_range is {factor_range}, expected two finite numbers of at least 0, the smaller one first."
            )
        self.mixed, self.factor_range = mixed, tuple(factor_range)
        self.minimum_anchors = mixed
        self.anchors = None

    def fit(self, latents: torch.Tensor, condition: None = None) -> "InterpolationSampler":
        """Keep the anchors' latents `(anchors, tokens, latent_size)`.

        Raises:
            ValueError: wrong rank or dtype, fewer anchors than are mixed, values that are not finite, or a condition.
        """
        self.anchors = self._check_latents(latents, condition).clone()
        return self

    def sample(self, n: int, condition: None = None, generator: torch.Generator | None = None) -> torch.Tensor:
        """Draw latents `(n, tokens, latent_size)`; arguments, dtype, device and errors as in `KernelDensitySampler`."""
        self._check_draw(n, condition)
        weights = draw_weights(n, len(self.anchors), self.mixed, self.factor_range, self.anchors.device, generator)
        return torch.einsum("na,atl->ntl", weights.to(self.anchors.dtype), self.anchors)


def load_sampler(folder: str | Path) -> LatentSampler:
    """Read the sampler in `folder`, whichever class wrote it.

    Raises:
        ValueError: the folder holds no sampler, or one of a class that is not known here.
    """
    name = LatentSampler._read_config(folder).get("sampler")
    if name not in LatentSampler.classes:
        raise ValueError(
            f"{folder} holds a {name}, which is none of {', '.join(sorted(LatentSampler.classes))}. Import the module "
            "that defines it first."
        )
    return LatentSampler.classes[name].from_pretrained(folder)


def draw_weights(
    n: int,
    anchors: int,
    mixed: int,
    factor_range: tuple[float, float],
    device: torch.device,
    generator: torch.Generator | None,
) -> torch.Tensor:
    """Return `(n, anchors)` float64 weights that sum to one in each row, where `mixed` of them differ from zero.

    `factor_range` is that of `InterpolationSampler`. The result lives on `device`; it is drawn where the generator lives.
    """
    source = {"generator": generator, "device": device if generator is None else generator.device}
    chosen = torch.rand(n, anchors, **source).topk(mixed).indices  # different ones, each set equally likely
    # the gaps between sorted uniform values are uniform among all positive weights that sum to one
    cuts = torch.rand(n, mixed - 1, dtype=torch.float64, **source).sort().values
    weights = F.pad(F.pad(cuts, (1, 0)), (0, 1), value=1.0).diff()
    smallest, largest = factor_range
    factors = smallest + (largest - smallest) * torch.rand(n, 1, dtype=torch.float64, **source)
    weights = 1 / mixed + factors * (weights - 1 / mixed)
    return torch.zeros(n, anchors, dtype=weights.dtype, device=weights.device).scatter(1, chosen, weights).to(device)


def draw_normal(shape: tuple[int, ...], like: torch.Tensor, generator: torch.Generator | None) -> torch.Tensor:
    """Return standard normal values with dtype and device of `like`, drawn where the generator lives."""
    device = like.device if generator is None else generator.device
    return torch.randn(shape, generator=generator, device=device, dtype=like.dtype).to(like.device)


__all__ = ["GaussianSampler", "InterpolationSampler", "KernelDensitySampler", "LatentSampler", "load_sampler"]
