"""A flow over whole networks: their coordinates along the principal components of the networks that were given.

What flows are and where they come from says `flow_sane.py`, which also has the meaning of the axes in comments.
"""

import torch
from torch import nn

from .flow_sane import FlowConditionEmbedding, FlowModulation, FlowSampler, modulated_norm, two_layers
from .generation_sane import draw_normal
from .modeling_sane import sinusoidal_encoding

CONTEXT_SIZE = 128  # of the vector for time and condition; as wide as the MLP it would take most of the time of a step
SMALLEST_COMPONENT = 1e-4  # of the largest; what is smaller are rounding errors


class ComponentFlowBlock(nn.Module):
    """A residual MLP, with a shift, a scale and a gate that depend on time and condition."""

    def __init__(self, hidden_size: int):
        super().__init__()
        H = hidden_size
        self.mlp = nn.Sequential(nn.Linear(H, 2 * H), nn.GELU(), nn.Linear(2 * H, H))
        self.modulation = FlowModulation(CONTEXT_SIZE, H, 3)

    def forward(self, hidden_states: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
        """Map `(batch, 1, hidden_size)` to the same shape; `context` is `(batch, CONTEXT_SIZE)`."""
        shift, scale, gate = self.modulation(context)
        return torch.addcmul(hidden_states, gate, self.mlp(modulated_norm(hidden_states, shift, scale)))


class ComponentFlowNetwork(nn.Module):
    """Velocity of noisy coordinates, from all of them at once.

    Were coordinate k normal with standard deviation `spread[k]`, the best velocity would be a known multiple of the input;
    the blocks learn the difference from it.
    """

    def __init__(self, hidden_size: int, num_hidden_layers: int, spread: torch.Tensor, num_conditions: int):
        super().__init__()
        K, H = len(spread), hidden_size
        self.register_buffer("spread", spread, persistent=False)  # the sampler keeps it
        self.embedding = nn.Linear(K, H)
        self.time = two_layers(CONTEXT_SIZE)
        self.condition = FlowConditionEmbedding(num_conditions, CONTEXT_SIZE) if num_conditions else None
        self.blocks = nn.ModuleList([ComponentFlowBlock(H) for _ in range(num_hidden_layers)])
        self.modulation = FlowModulation(CONTEXT_SIZE, H, 2)
        self.readout = nn.Linear(H, K)
        nn.init.zeros_(self.readout.weight)
        nn.init.zeros_(self.readout.bias)

    def forward(self, noisy: torch.Tensor, noise_share: torch.Tensor, condition: torch.Tensor | None) -> torch.Tensor:
        """Predict noise minus coordinates.

        Args:
            noisy (`torch.FloatTensor` of shape `(batch, 1, components)`): Coordinates and noise, mixed.
            noise_share (`torch.FloatTensor` of shape `(batch,)`): Share of noise, from 0 to 1.
            condition (`torch.FloatTensor` of shape `(batch, conditions)`): NaN where unknown; None without conditions.

        Returns:
            `torch.FloatTensor` of shape `(batch, 1, components)`.
        """
        context = self.time(sinusoidal_encoding(1000 * noise_share, CONTEXT_SIZE))
        if self.condition is not None:
            context = context + self.condition(condition)
        share = noise_share[:, None, None]
        signal = ((1 - share) * self.spread) ** 2
        size = (share**2 + signal).sqrt()  # of noisy
        hidden_states = self.embedding(noisy / size)
        for block in self.blocks:
            hidden_states = block(hidden_states, context)
        shift, scale = self.modulation(context)
        learned = self.readout(modulated_norm(hidden_states, shift, scale))
        known = (share - (1 - share) * self.spread**2) / size**2 * noisy
        return known + self.spread / size * learned


class ComponentFlowSampler(FlowSampler):
    """Rectified flow over whole networks, conditioned on properties if they are given, for zoos of some hundred networks.

    Latents are turned into coordinates along the principal components of the networks, of which there are fewer than
    networks, and a small MLP learns their density: which network it is gets decided once, for all tokens together.
    With networks that were trained independently of each other, as in most zoos, their density is a heap of points far from
    each other, and the flow learns them by heart: its draws are the given networks with small deviations. It is then a way to
    hand on a zoo's networks, with properties that are asked for, in one file; for new networks draw around them
    (`LaplaceSampler`). Compare distances to the nearest training network.

    All coordinates share one unit, so what hardly varies between networks gets little of the loss. Draws have the
    layout of the fitted latents; `LatentFlowSampler` can draw others, but needs networks that share more with each other.

    Args:
        hidden_size (`int`, defaults to 512): Width of the MLP.
        num_hidden_layers (`int`, defaults to 2): Blocks.
        num_components (`int`, defaults to 1024): Components at most; of fewer networks all are kept, and nothing is lost.
        train_steps (`int`, defaults to 5000): Optimizer steps of `fit`.
        batch_size (`int`, defaults to 256): Networks in an optimizer step, and networks treated at a time in drawing.
        learning_rate (`float`, defaults to 1e-3): Of AdamW at its peak, after a linear warm-up; a cosine leads to zero.
        weight_decay (`float`, defaults to 0.01): Of AdamW.
        warmup_steps (`int`, defaults to 100): Optimizer steps of the warm-up.
        ema_decay (`float`, defaults to 0.995): Decay for each step of the moving average of weights that is kept; it is
            lower in the first steps.
        condition_dropout (`float`, defaults to 0.1): Share of the training networks that see no condition, and share of
            single conditions that are hidden from the others.
        num_steps (`int`, defaults to 64): Euler steps of a draw.
        guidance (`float`, defaults to 1.0): As for `LatentFlowSampler`.
        seed (`int`, defaults to 0): Decides initial weights, networks and noise of `fit`.
    """

    options = ("hidden_size", "num_hidden_layers", "num_components", *FlowSampler.training_options)
    tensors = ("mean", "components", "scale", "spread")

    def __init__(
        self,
        hidden_size: int = 512,
        num_hidden_layers: int = 2,
        num_components: int = 1024,
        train_steps: int = 5000,
        batch_size: int = 256,
        learning_rate: float = 1e-3,
        weight_decay: float = 0.01,
        warmup_steps: int = 100,
        ema_decay: float = 0.995,
        condition_dropout: float = 0.1,
        num_steps: int = 64,
        guidance: float = 1.0,
        seed: int = 0,
    ):
        self._set_options(locals())

    @torch.enable_grad()
    def fit(
        self, latents: torch.Tensor, condition: torch.Tensor | None = None, *, progress: bool = False
    ) -> "ComponentFlowSampler":
        """Train the flow, on the device of the latents; a sampler that was fitted before starts anew.

        Args:
            latents (`torch.Tensor` of shape `(networks, tokens, latent_size)`): Latents of aligned networks of one
                layout.
            condition (`torch.Tensor` of shape `(networks, conditions)`, *optional*): Properties of the networks, in any
                units, NaN where unknown. A class is best given as one column of 0 and 1 for each.
            progress (`bool`, defaults to `False`): Whether to show a progress bar.

        Returns:
            The sampler itself.

        Raises:
            ValueError: fewer than two networks, wrong ranks, shapes or dtypes, values that are not finite, networks that
                are all the same, or a condition that is unknown or the same for all networks.
            RuntimeError: the training diverged.
        """
        latents = self._check_latents(latents, None)
        conditions, condition = self._standardised(condition, latents)
        mean = latents.float().mean(dim=0)
        flat = (latents.float() - mean).flatten(1)
        components = self._principal_components(flat)
        coordinates = flat @ components.T  # (A, K)
        scale = coordinates.square().mean().sqrt()
        clean = (coordinates / scale)[:, None]
        state = {
            "mean": mean.to(
                latents.dtype
            ),  # in the latents' dtype, so that a loaded sampler still knows what to return
            "components": components.unflatten(1, mean.shape),
            "scale": scale,
            "spread": clean.std(dim=(0, 1), correction=0),
        }
        self._train(state | conditions, len(latents), lambda rows, _: (clean[rows], ()), condition, progress)
        return self

    @torch.no_grad()
    def sample(
        self,
        n: int,
        condition: torch.Tensor | None = None,
        generator: torch.Generator | None = None,
        *,
        num_steps: int | None = None,
        guidance: float | None = None,
    ) -> torch.Tensor:
        """Draw latents; needs diffusers, for the schedule of its steps.

        Args:
            n (`int`): How many networks.
            condition (`torch.Tensor` of shape `(conditions,)` or `(n, conditions)`, *optional*): What is asked for, in the
                units of `fit`; NaN for what may be anything. None leaves all open.
            generator (`torch.Generator`, *optional*): Source of randomness, on any device.
            num_steps (`int`, *optional*): Euler steps; default as in the options.
            guidance (`float`, *optional*): Strength of the condition; default as in the options.

        Returns:
            `torch.Tensor` of shape `(n, tokens, latent_size)`: dtype and device of the fitted latents.

        Raises:
            ValueError: not fitted, n or num_steps below 1, a condition of wrong shape or for a sampler that was fitted
                without.
            ImportError: diffusers is missing.
        """
        self._check_draw(n, None)
        condition = self._asked(n, condition)
        noise = draw_normal((n, 1, len(self.spread)), self.spread, generator)
        coordinates = self.scale * self._draw(noise, condition, self._velocity, num_steps, guidance)[:, 0]
        return (self.mean + torch.tensordot(coordinates, self.components, dims=1)).to(self.mean.dtype)

    def _principal_components(self, flat):
        """Orthonormal directions `(components, values)` of centred networks `(networks, values)`, the strongest first."""
        most = min(self.num_components, len(flat) - 1)
        if most < min(flat.shape) - 1:
            with torch.random.fork_rng(devices=[]):  # the randomised method is faster where not all are wanted
                torch.manual_seed(self.seed)
                _, sizes, directions = torch.svd_lowrank(flat, q=most, niter=4)
            directions = directions.T
        else:
            _, sizes, directions = torch.linalg.svd(flat, full_matrices=False)
        kept = min(most, int((sizes > SMALLEST_COMPONENT * sizes[0]).sum()))
        if not kept:
            raise ValueError("All networks have the same latents, so there is nothing to learn of them.")
        return directions[:kept].contiguous()

    def _build_network(self, state):
        num_conditions = len(state["condition_mean"]) if "condition_mean" in state else 0
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            network = ComponentFlowNetwork(
                self.hidden_size, self.num_hidden_layers, state["spread"].float(), num_conditions
            )
        return network.to(state["spread"].device)

    def _velocity(self, noisy, share, condition):
        velocity = torch.empty_like(noisy)
        for rows in self._parts(len(noisy)):
            shares = noisy.new_full((rows.stop - rows.start,), share)
            velocity[rows] = self.network(noisy[rows], shares, None if condition is None else condition[rows])
        return velocity


__all__ = ["ComponentFlowSampler"]
