"""Flows over latents: a network learns to turn noise into the latents of whole networks, on wish with given properties.

Rectified flow: between the latents x of a network and noise e lies the straight line (1 - s) x + s e, where s is the share
of noise. The flow's network learns the velocity e - x that is expected at a point of such lines, and a draw follows it from
s = 1, pure noise, to s = 0. What x is, the classes say: `token_flow_sane.py` has all tokens, `component_flow_sane.py` the
coordinates of whole networks.

Sources: flow matching (Lipman et al. 2022, arXiv 2210.02747), rectified flow (Liu et al. 2022, arXiv 2209.03003), adaptive
layer norm (Peebles and Xie 2022, DiT, arXiv 2212.09748), guidance without a classifier (Ho and Salimans 2022, arXiv
2207.12598), scaling by the known variance of the noisy input (Karras et al. 2022, arXiv 2206.00364).

Axes used in comments: A networks, B batch, N tokens, L latent_size, H hidden_size, C conditions.
"""

import copy
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers import get_cosine_schedule_with_warmup
from transformers.utils import logging

from .generation_sane import LatentSampler

MAX_GRADIENT_NORM = 1.0
COUNTS = (  # options of which there must be at least one
    *("hidden_size", "num_attention_heads", "window_size", "num_components"),
    *("train_steps", "batch_size", "num_steps"),
)


class FlowSampler(LatentSampler):
    """What every flow does the same way: its training, the steps of a draw, and conditions.

    A class gives `_build_network(state)`, whose result has the arguments `(noisy, noise_share, *where, condition)`, and calls
    `_train` and `_draw` with what it calls x.
    """

    training_options = (
        *("train_steps", "batch_size", "learning_rate", "weight_decay", "warmup_steps", "ema_decay"),
        *("condition_dropout", "num_steps", "guidance", "seed"),
    )
    optional_tensors: tuple[str, ...] = ("condition_mean", "condition_scale")
    minimum_anchors = 2

    def _set_options(self, given: dict[str, Any]) -> None:
        """Check the constructor's arguments and keep them; nothing is fitted yet."""
        for name in COUNTS:
            if name in given and given[name] < 1:
                raise ValueError(f"{name} is {given[name]}, expected at least 1.")
        for name in ("num_hidden_layers", "halo", "weight_decay", "warmup_steps"):
            if name in given and not 0 <= given[name] < math.inf:
                raise ValueError(f"{name} is {given[name]}, expected a finite number of at least 0.")
        for name in ("ema_decay", "condition_dropout"):
            if not 0 <= given[name] < 1:
                raise ValueError(f"{name} is {given[name]}, expected at least 0 and less than 1.")
        if not 0 < given["learning_rate"] < math.inf:
            raise ValueError(f"learning_rate is {given['learning_rate']}, expected a finite number of more than 0.")
        for name in self.options:
            setattr(self, name, given[name])
        for name in (*self.tensors, *self.optional_tensors, "network"):
            setattr(self, name, None)

    # --- training

    def _train(
        self,
        state: dict[str, torch.Tensor],
        count: int,
        clean_batch: Callable[[torch.Tensor, torch.Generator], tuple[torch.Tensor, tuple]],
        condition: torch.Tensor | None,
        progress: bool,
    ) -> None:
        """Train the network that belongs to `state`, and take the state with its weights.

        `clean_batch` gives for rows `(batch,)` of the `count` networks what shall be drawn, standardised, `(batch, ...)`, and
        what the network is told of its place.
        """
        network = self._build_network(state)
        device, B = next(network.parameters()).device, self.batch_size
        average = copy.deepcopy(network)
        optimizer = torch.optim.AdamW(
            network.parameters(), lr=self.learning_rate, weight_decay=self.weight_decay, betas=(0.9, 0.99), fused=True
        )
        schedule = get_cosine_schedule_with_warmup(optimizer, self.warmup_steps, self.train_steps)
        generator = torch.Generator().manual_seed(self.seed)
        for step in logging.tqdm(range(self.train_steps), desc="Flow", disable=not progress):
            rows = torch.randint(count, (B,), generator=generator)
            clean, where = clean_batch(rows.to(device), generator)
            # one share of noise from each of B equal intervals: a loss that varies less from step to step
            share = (torch.arange(B) + torch.rand(B, generator=generator)) / B
            noise = torch.randn(clean.shape, generator=generator).to(device)
            hidden = torch.rand(B, 1 + (0 if condition is None else condition.shape[1]), generator=generator)
            rows, share, hidden = (part.to(device) for part in (rows, share, hidden))
            hidden = hidden < self.condition_dropout
            asked = None
            if condition is not None:
                asked = condition[rows].masked_fill(hidden[:, :1] | hidden[:, 1:], torch.nan)

            noisy = torch.lerp(clean, noise, share[:, None, None])
            velocity = network(noisy, share, *where, asked)
            loss = F.mse_loss(velocity, noise - clean)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(network.parameters(), MAX_GRADIENT_NORM)
            optimizer.step()
            schedule.step()
            with torch.no_grad():
                decay = min(self.ema_decay, (1 + step) / (10 + step))
                for kept, new in zip(average.parameters(), network.parameters(), strict=True):
                    kept.lerp_(new, 1 - decay)
        if not loss.isfinite():
            raise RuntimeError(f"The training diverged: its loss is {loss.item()}. Lower learning_rate.")
        self._set_state(state | {f"network.{name}": tensor for name, tensor in average.state_dict().items()})

    def _build_network(self, state: dict[str, torch.Tensor]) -> nn.Module:
        """The untrained network that belongs to the fitted tensors; the global random state stays as it is."""
        raise NotImplementedError

    # --- drawing

    def _draw(
        self,
        noise: torch.Tensor,
        condition: torch.Tensor | None,
        velocity_of: Callable[[torch.Tensor, float, torch.Tensor | None], torch.Tensor],
        num_steps: int | None,
        guidance: float | None,
    ) -> torch.Tensor:
        """Follow the velocity from noise to what was learned, standardised."""
        num_steps = self.num_steps if num_steps is None else num_steps
        guidance = self.guidance if guidance is None else guidance
        if num_steps < 1:
            raise ValueError(f"num_steps is {num_steps}, expected at least 1.")
        scheduler = euler_scheduler(num_steps)
        drawn = noise
        for timestep, share in zip(scheduler.timesteps, scheduler.sigmas, strict=False):  # sigmas ends with 0
            velocity = velocity_of(drawn, float(share), condition)
            if guidance != 1 and condition is not None and not condition.isnan().all():
                unconditional = velocity_of(drawn, float(share), torch.full_like(condition, torch.nan))
                velocity = unconditional.lerp(velocity, guidance)
            drawn = scheduler.step(velocity, timestep, drawn, return_dict=False)[0]
        return drawn

    def _parts(self, n: int) -> Iterator[slice]:
        """Rows of a draw, a batch at a time."""
        for start in range(0, n, self.batch_size):
            yield slice(start, min(start + self.batch_size, n))

    # --- conditions

    def _standardised(
        self, condition: torch.Tensor | None, latents: torch.Tensor
    ) -> tuple[dict[str, torch.Tensor], torch.Tensor | None]:
        """Mean and scale of the conditions of `fit`, and the conditions in that unit."""
        if condition is None:
            return {}, None
        state = self._condition_statistics(condition, latents)
        condition = condition.detach().to(latents.device).float()
        return state, (condition - state["condition_mean"]) / state["condition_scale"]

    def _condition_statistics(self, condition, latents):
        if condition.ndim != 2 or len(condition) != len(latents) or condition.shape[1] < 1:
            raise ValueError(
                f"condition has shape {tuple(condition.shape)}, expected (networks, conditions) with "
                f"{len(latents)} networks; a single property is condition[:, None]."
            )
        condition = check_not_infinite(condition).detach().to(latents.device).float()
        mean = condition.nanmean(dim=0)
        scale = (condition - mean).square().nanmean(dim=0).sqrt()
        useless = (~(scale > 1e-6 * mean.abs())).nonzero().flatten().tolist()
        if useless:
            raise ValueError(
                f"Conditions {useless} are unknown or the same for all networks, so nothing can be learned of them. "
                "Leave these columns out."
            )
        return {"condition_mean": mean, "condition_scale": scale}

    def _asked(self, n, condition):
        if self.condition_mean is None:
            if condition is not None:
                raise ValueError(
                    "This sampler was fitted without conditions, so sample(condition=...) has no meaning. Fit it with "
                    "fit(latents, condition)."
                )
            return None
        C = len(self.condition_mean)
        if condition is None:
            return self.condition_mean.new_full((n, C), torch.nan)
        if condition.shape not in ((C,), (n, C)):
            raise ValueError(f"condition has shape {tuple(condition.shape)}, expected {(C,)} or {(n, C)}.")
        condition = check_not_infinite(condition).to(self.condition_mean)
        return ((condition - self.condition_mean) / self.condition_scale).expand(n, C)

    # --- what was learned

    def _state(self):
        optional = {name: getattr(self, name) for name in self.optional_tensors if getattr(self, name) is not None}
        network = {f"network.{name}": tensor for name, tensor in self.network.state_dict().items()}
        return super()._state() | optional | network

    def _set_state(self, state):
        weights = {name: state[name] for name in state if name.startswith("network.")}
        super()._set_state(dict.fromkeys(self.optional_tensors))
        super()._set_state({name: state[name] for name in state if name not in weights})
        self._check_fitted()
        self.network = self._build_network(state).eval().requires_grad_(False)
        self.network.load_state_dict({name.removeprefix("network."): weights[name] for name in weights})


class FlowConditionEmbedding(nn.Module):
    """One vector for the properties of a network; each has a learned vector that stands for "unknown"."""

    def __init__(self, num_conditions: int, hidden_size: int):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(num_conditions, hidden_size))
        self.bias = nn.Parameter(torch.zeros(num_conditions, hidden_size))
        # not zero, which would be the vector of an average value
        self.unknown = nn.Parameter(torch.randn(num_conditions, hidden_size))
        self.layers = two_layers(hidden_size)

    def forward(self, condition: torch.Tensor) -> torch.Tensor:
        """Map standardised `(batch, conditions)`, NaN where unknown, to `(batch, hidden_size)`."""
        unknown = condition.isnan()[..., None]
        values = condition.nan_to_num()[..., None] * self.weight + self.bias  # (B, C, H)
        vectors = torch.where(unknown, self.unknown, values)
        return self.layers(vectors.sum(dim=1) / math.sqrt(vectors.shape[1]))


class FlowModulation(nn.Linear):
    """Shifts, scales and gates for all tokens from time and condition; all zero at first, as DiT's adaLN-Zero has them."""

    def __init__(self, context_size: int, hidden_size: int, parts: int):
        super().__init__(context_size, parts * hidden_size)
        self.parts = parts
        nn.init.zeros_(self.weight)
        nn.init.zeros_(self.bias)

    def forward(self, context: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Map `(batch, context_size)` to `parts` tensors of shape `(batch, 1, hidden_size)`."""
        return super().forward(F.silu(context))[:, None].chunk(self.parts, dim=-1)


def two_layers(hidden_size: int) -> nn.Sequential:
    """Return a small network from `hidden_size` to `hidden_size` values."""
    return nn.Sequential(nn.Linear(hidden_size, hidden_size), nn.SiLU(), nn.Linear(hidden_size, hidden_size))


def modulated_norm(hidden_states: torch.Tensor, shift: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Normalise `(batch, tokens, hidden_size)` over its last axis, then scale by `1 + scale` and shift."""
    return torch.addcmul(shift, F.layer_norm(hidden_states, hidden_states.shape[-1:]), 1 + scale)


def euler_scheduler(num_steps: int):
    """Return diffusers' Euler scheduler with `num_steps` equal steps from noise to latents."""
    try:
        from diffusers import FlowMatchEulerDiscreteScheduler
    except ImportError as error:
        raise ImportError(
            'Drawing from a flow needs diffusers. Install it with: pip install "sane-hub[flow]"'
        ) from error
    scheduler = FlowMatchEulerDiscreteScheduler()
    # its own default would end at a share of 0.001 and spend a whole step on the rest
    scheduler.set_timesteps(sigmas=torch.linspace(1, 0, num_steps + 1)[:-1].tolist())
    return scheduler


def check_not_infinite(condition: torch.Tensor) -> torch.Tensor:
    """Return the condition itself, which may be NaN but not infinite."""
    if condition.isinf().any():
        raise ValueError("condition holds infinite values; use NaN for what is unknown.")
    return condition
