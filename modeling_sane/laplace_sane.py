"""A kernel density whose kernels are wide where the network's function does not change, and narrow where it does."""

import math
from collections.abc import Iterable

import torch

from .generation_sane import LatentSampler, draw_normal


class LaplaceSampler(LatentSampler):
    """Kernel density with a kernel of its own for each anchor: the Laplace approximation of its posterior, in latents.

    Noise that is the same in all directions soon breaks a network: a few of its directions change the function, most do not.
    With `g` the gradients of the log-likelihood of a network's answers in its latents, one for each input, the Fisher
    information is `F = mean(g gᵀ)`, and noise is drawn with covariance proportional to `(1 + stiffness * F)⁻¹`
    (MacKay 1992; Daxberger et al. 2021, arXiv 2106.14806). The gradients need inputs of the task, but no labels.

    Args:
        bandwidth (`float`, defaults to 0.2): Root mean square of the noise over all tokens and dimensions, in latent units. It
            is what it is for a joint `KernelDensitySampler`, so that both go equally far from the anchors.
        stiffness (`float`, defaults to 1e7): How much less a direction moves the more it changes the function; 0 is a joint
            kernel density.
        rank (`int`, *optional*): Directions of each anchor that are held, those with the largest Fisher information; memory
            is `anchors * rank * tokens * latent_size`. Default all, as many as there were inputs.
    """

    options = ("bandwidth", "stiffness", "rank")
    tensors = ("anchors", "directions", "information")

    def __init__(self, bandwidth: float = 0.2, stiffness: float = 1e7, rank: int | None = None):
        for name, value in (("bandwidth", bandwidth), ("stiffness", stiffness)):
            if not 0 <= value < math.inf:
                raise ValueError(f"{name} is {value}, expected a finite number of at least 0.")
        if rank is not None and rank < 1:
            raise ValueError(f"rank is {rank}, expected at least 1, or None.")
        self.bandwidth, self.stiffness, self.rank = bandwidth, stiffness, rank
        self.anchors = self.directions = self.information = None

    def fit(
        self, latents: torch.Tensor, condition: None = None, *, gradients: Iterable[torch.Tensor] | None = None
    ) -> "LaplaceSampler":
        """Keep the anchors and the directions that their function depends on.

        Args:
            latents (`torch.Tensor` of shape `(anchors, tokens, latent_size)`): Latents of the anchors.
            condition: Not supported; must be None.
            gradients (iterable of `torch.Tensor` of shape `(inputs, tokens, latent_size)`): For each anchor in turn and for each
                input, the gradient of the log-likelihood of an answer drawn from the network's own outputs. A generator
                keeps the gradients of one anchor in memory at a time.

        Raises:
            ValueError: gradients are missing, not finite or of another shape, or as for `KernelDensitySampler`.
        """
        latents = self._check_latents(latents, condition)
        if gradients is None:
            raise ValueError("LaplaceSampler needs gradients: fit(latents, gradients=...); see its docstring.")
        found = [self._principal(number, one, latents) for number, one in enumerate(gradients)]
        if len(found) != len(latents):
            raise ValueError(
                f"Got gradients of {len(found)} networks for {len(latents)} anchors; give one tensor for each."
            )
        self.anchors = latents.clone()
        self.directions = torch.stack([directions for directions, _ in found])
        self.information = torch.stack([information for _, information in found])
        return self

    def _principal(
        self, number: int, gradients: torch.Tensor, latents: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Eigenvectors `(rank, values)` and eigenvalues `(rank,)` of an anchor's Fisher information."""
        if gradients.ndim != 3 or gradients.shape[1:] != latents.shape[1:] or not len(gradients):
            raise ValueError(
                f"The gradients of anchor {number} have shape {tuple(gradients.shape)}, expected (inputs, tokens, latent_size) "
                f"with the latents' {tuple(latents.shape[1:])}."
            )
        if not gradients.isfinite().all():
            raise ValueError(f"The gradients of anchor {number} hold NaN or infinite values. Leave this model out.")
        _, singular, directions = torch.linalg.svd(
            gradients.flatten(1) / math.sqrt(len(gradients)), full_matrices=False
        )
        return directions[: self.rank].clone(), singular[: self.rank].square()

    def sample(self, n: int, condition: None = None, generator: torch.Generator | None = None) -> torch.Tensor:
        """Draw latents `(n, tokens, latent_size)` around anchors in turn; arguments and errors as in `KernelDensitySampler`.

        Draw `i` stands around anchor `i % anchors`: every anchor is used equally often.
        """
        self._check_draw(n, condition)
        A = len(self.anchors)
        drawn = torch.empty(n, *self.anchors.shape[1:], dtype=self.anchors.dtype, device=self.anchors.device)
        noise = draw_normal(drawn.shape, drawn, generator).flatten(1)
        shrink = 1 - (1 + self.stiffness * self.information).rsqrt()  # (anchors, rank)
        for anchor in range(min(A, n)):  # one matrix of directions at a time
            own, directions = noise[anchor::A], self.directions[anchor]
            own = own - (own @ directions.T * shrink[anchor]) @ directions
            size = own.square().mean(1, keepdim=True).sqrt().clamp(min=torch.finfo(own.dtype).tiny)
            drawn[anchor::A] = self.anchors[anchor] + (self.bandwidth * own / size).unflatten(
                1, self.anchors.shape[1:]
            )
        return drawn


__all__ = ["LaplaceSampler"]
