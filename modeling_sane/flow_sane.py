"""A flow over latents: a transformer learns to turn noise into the latents of whole networks, on wish with given properties.

Rectified flow: between the latents x of a network and noise e lies the straight line (1 - s) x + s e, where s is the share
of noise. The transformer learns the velocity e - x that is expected at a point of such lines, and a draw follows it from
s = 1, pure noise, to s = 0.

Sources: flow matching (Lipman et al. 2022, arXiv 2210.02747), rectified flow (Liu et al. 2022, arXiv 2209.03003), adaptive
layer norm (Peebles and Xie 2022, DiT, arXiv 2212.09748), guidance without a classifier (Ho and Salimans 2022, arXiv
2207.12598), scaling by the known variance of the noisy input (Karras et al. 2022, arXiv 2206.00364).

Axes used in comments: B batch, N tokens, L latent_size, H hidden_size, C conditions.
"""

import copy
import math

import torch
from torch import nn
from torch.nn import functional as F
from transformers import get_cosine_schedule_with_warmup
from transformers.utils import logging

from .configuration_sane import SaneConfig
from .generation_sane import LatentSampler, draw_normal
from .modeling_sane import SaneAttention, SaneMLP, SanePositionEmbedding, sinusoidal_encoding

MAX_GRADIENT_NORM = 1.0


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

    def __init__(self, hidden_size: int, parts: int):
        super().__init__(hidden_size, parts * hidden_size)
        self.parts = parts
        nn.init.zeros_(self.weight)
        nn.init.zeros_(self.bias)

    def forward(self, context: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Map `(batch, hidden_size)` to `parts` tensors of shape `(batch, 1, hidden_size)`."""
        return super().forward(F.silu(context))[:, None].chunk(self.parts, dim=-1)


class FlowBlock(nn.Module):
    """SANE's attention and MLP, with shifts, scales and gates that depend on time and condition."""

    def __init__(self, config: SaneConfig):
        super().__init__()
        self.attention = SaneAttention(config, config.num_hidden_layers)
        self.mlp = SaneMLP(config, config.num_hidden_layers)
        self.modulation = FlowModulation(config.hidden_size, 6)

    def forward(self, hidden_states: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
        """Map `(batch, tokens, hidden_size)` to the same shape; `context` is `(batch, hidden_size)`."""
        shift, scale, gate, mlp_shift, mlp_scale, mlp_gate = self.modulation(context)
        mixed = self.attention(modulated_norm(hidden_states, shift, scale), None)
        hidden_states = torch.addcmul(hidden_states, gate, mixed)
        return torch.addcmul(hidden_states, mlp_gate, self.mlp(modulated_norm(hidden_states, mlp_shift, mlp_scale)))


class FlowNetwork(nn.Module):
    """Velocity of noisy, standardised latents in one window.

    Were the latents independent standard normal values, the best velocity would be a known multiple of the input; the
    blocks learn the difference from it. Before any training a draw thus has the right mean and variance everywhere.
    """

    def __init__(self, config: SaneConfig, num_conditions: int):
        super().__init__()
        H = config.hidden_size
        self.positions = SanePositionEmbedding(config)
        self.embedding = nn.Linear(config.latent_size, H)
        self.time = two_layers(H)
        self.condition = FlowConditionEmbedding(num_conditions, H) if num_conditions else None
        self.blocks = nn.ModuleList([FlowBlock(config) for _ in range(config.num_hidden_layers)])
        self.modulation = FlowModulation(H, 2)
        self.readout = nn.Linear(H, config.latent_size)
        nn.init.zeros_(self.readout.weight)
        nn.init.zeros_(self.readout.bias)

    def forward(
        self,
        noisy: torch.Tensor,
        noise_share: torch.Tensor,
        position_ids: torch.Tensor,
        layer_kind_ids: torch.Tensor | None,
        condition: torch.Tensor | None,
    ) -> torch.Tensor:
        """Predict noise minus latents.

        Args:
            noisy (`torch.FloatTensor` of shape `(batch, tokens, latent_size)`): Latents and noise, mixed.
            noise_share (`torch.FloatTensor` of shape `(batch,)`): Share of noise, from 0 to 1.
            position_ids (`torch.LongTensor` of shape `(batch or 1, tokens, 3)`): Positions of the window's tokens.
            layer_kind_ids (`torch.LongTensor` of shape `(batch or 1, tokens)`): Layer kinds; None without them.
            condition (`torch.FloatTensor` of shape `(batch, conditions)`): NaN where unknown; None without conditions.

        Returns:
            `torch.FloatTensor` of shape `(batch, tokens, latent_size)`.
        """
        context = self.time(sinusoidal_encoding(1000 * noise_share, self.embedding.out_features))
        if self.condition is not None:
            context = context + self.condition(condition)
        share = noise_share[:, None, None]
        variance = share**2 + (1 - share) ** 2  # of noisy, if that of the latents is 1
        hidden_states = self.embedding(noisy * variance.rsqrt()) + self.positions(position_ids, layer_kind_ids)
        for block in self.blocks:
            hidden_states = block(hidden_states, context)
        shift, scale = self.modulation(context)
        learned = self.readout(modulated_norm(hidden_states, shift, scale))
        return (2 * share - 1) / variance * noisy + variance.rsqrt() * learned


class LatentFlowSampler(LatentSampler):
    """Rectified flow over the latents of whole networks: a small transformer, conditioned on properties if they are given.

    It can be asked for networks of a given task or quality, and what it draws is no copy of single anchors, if there are
    enough of them. With few networks of many weights it learns little more than mean and variance of each value, and with
    many more steps it learns the networks by heart: compare accuracy and distance to the nearest training network with
    those of a kernel density. A default training takes two to three minutes on one core for 150 networks of 80 tokens.

    What is learned are differences between networks: latents are shifted and scaled by mean and standard deviation over
    the networks, for each token and dimension. Tokens of another layout take mean and scale from the most similar token
    of the fitted one (`nearest_tokens`), so a draw can have any length; how good it is there, only the decoded
    networks can tell.

    Sequences of more than `window_size` tokens are learned in random windows of that length. A draw then holds one noise
    for the whole sequence, and at every step each of its windows moves its part of it, seeing `halo` tokens of its
    neighbours. Memory and time of a step are those of a window.

    Args:
        hidden_size (`int`, defaults to 128): Width of the transformer; a multiple of 4 and of `num_attention_heads`.
        num_hidden_layers (`int`, defaults to 4): Blocks.
        num_attention_heads (`int`, defaults to 4): Attention heads of each block.
        intermediate_size (`int`, *optional*): Width inside the MLPs; `None` means twice `hidden_size`.
        window_size (`int`, defaults to 256): Tokens that are seen together, in training and in drawing.
        halo (`int`, defaults to 32): Tokens on each side of such a window that are context only when a longer sequence
            is drawn; less than half of `window_size`.
        train_steps (`int`, defaults to 800): Optimizer steps of `fit`.
        batch_size (`int`, defaults to 32): Windows in an optimizer step, and windows treated at a time in drawing.
        learning_rate (`float`, defaults to 2e-3): Of AdamW at its peak, after a linear warm-up; a cosine leads to zero.
        weight_decay (`float`, defaults to 0.01): Of AdamW.
        warmup_steps (`int`, defaults to 100): Optimizer steps of the warm-up.
        ema_decay (`float`, defaults to 0.995): Decay for each step of the moving average of weights that is kept; it is
            lower in the first steps.
        condition_dropout (`float`, defaults to 0.1): Share of the training windows that see no condition, and share of
            single conditions that are hidden from the others. 0 leaves draws without a condition, and guidance, to what
            `fit` gets as NaN.
        num_steps (`int`, defaults to 32): Euler steps of a draw.
        guidance (`float`, defaults to 1.0): How far the velocity goes from that without condition (0) to that with it
            (1) and beyond. Above 1 draws are closer to the condition and to each other.
        seed (`int`, defaults to 0): Decides initial weights, windows and noise of `fit`.
    """

    options = (
        *("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "window_size", "halo"),
        *("train_steps", "batch_size", "learning_rate", "weight_decay", "warmup_steps", "ema_decay"),
        *("condition_dropout", "num_steps", "guidance", "seed"),
    )
    tensors = ("mean", "scale", "position_ids")
    optional_tensors = ("layer_kind_ids", "condition_mean", "condition_scale")
    minimum_anchors = 2

    def __init__(
        self,
        hidden_size: int = 128,
        num_hidden_layers: int = 4,
        num_attention_heads: int = 4,
        intermediate_size: int | None = None,
        window_size: int = 256,
        halo: int = 32,
        train_steps: int = 800,
        batch_size: int = 32,
        learning_rate: float = 2e-3,
        weight_decay: float = 0.01,
        warmup_steps: int = 100,
        ema_decay: float = 0.995,
        condition_dropout: float = 0.1,
        num_steps: int = 32,
        guidance: float = 1.0,
        seed: int = 0,
    ):
        given = {name: value for name, value in locals().items() if name in self.options}
        for name in ("hidden_size", "num_attention_heads", "window_size", "train_steps", "batch_size", "num_steps"):
            if given[name] < 1:
                raise ValueError(f"{name} is {given[name]}, expected at least 1.")
        for name in ("num_hidden_layers", "halo", "weight_decay", "warmup_steps"):
            if not 0 <= given[name] < math.inf:
                raise ValueError(f"{name} is {given[name]}, expected a finite number of at least 0.")
        for name in ("ema_decay", "condition_dropout"):
            if not 0 <= given[name] < 1:
                raise ValueError(f"{name} is {given[name]}, expected at least 0 and less than 1.")
        if not 0 < learning_rate < math.inf:
            raise ValueError(f"learning_rate is {learning_rate}, expected a finite number of more than 0.")
        if hidden_size % num_attention_heads or hidden_size % 4:
            raise ValueError(
                f"hidden_size is {hidden_size}, expected a multiple of 4 and of num_attention_heads "
                f"({num_attention_heads})."
            )
        if 2 * halo >= window_size:
            raise ValueError(f"halo is {halo}, expected less than half of window_size ({window_size}).")
        for name, value in given.items():
            setattr(self, name, value)
        for name in (*self.tensors, *self.optional_tensors, "network"):
            setattr(self, name, None)

    @torch.enable_grad()
    def fit(
        self,
        latents: torch.Tensor,
        condition: torch.Tensor | None = None,
        *,
        position_ids: torch.Tensor | None = None,
        layer_kind_ids: torch.Tensor | None = None,
        progress: bool = False,
    ) -> "LatentFlowSampler":
        """Train the flow, on the device of the latents; a sampler that was fitted before starts anew.

        Args:
            latents (`torch.Tensor` of shape `(networks, tokens, latent_size)`): Latents of aligned networks of one
                layout.
            condition (`torch.Tensor` of shape `(networks, conditions)`, *optional*): Properties of the networks, in any
                units, NaN where unknown. A class is best given as one column of 0 and 1 for each.
            position_ids (`torch.LongTensor` of shape `(tokens, 3)`, *optional*): Sequence, layer and channel index of
                each token, the tokenizer's; by default the sequence index and zeros.
            layer_kind_ids (`torch.LongTensor` of shape `(tokens,)`, *optional*): Kind of each token's layer.
            progress (`bool`, defaults to `False`): Whether to show a progress bar.

        Returns:
            The sampler itself.

        Raises:
            ValueError: fewer than two networks, wrong ranks, shapes or dtypes, values that are not finite, or a
                condition that is unknown or the same for all networks.
            RuntimeError: the training diverged.
        """
        latents = self._check_latents(latents, None)
        _, N, _ = latents.shape
        if position_ids is None:
            position_ids = F.pad(torch.arange(N)[:, None], (0, 2))
        position_ids, layer_kind_ids = check_layout(position_ids, layer_kind_ids, latents.device)
        if len(position_ids) != N:
            raise ValueError(f"latents has {N} tokens, position_ids {len(position_ids)}; both must be of one layout.")

        state = {"position_ids": position_ids, **self._statistics(latents)}
        if layer_kind_ids is not None:
            state["layer_kind_ids"] = layer_kind_ids
        if condition is not None:
            state |= self._condition_statistics(condition, latents)
            condition = condition.detach().to(latents.device).float()
            condition = (condition - state["condition_mean"]) / state["condition_scale"]
        network = self._train(latents, condition, state, progress)
        self._set_state(state | {f"network.{name}": tensor for name, tensor in network.state_dict().items()})
        return self

    @torch.no_grad()
    def sample(
        self,
        n: int,
        condition: torch.Tensor | None = None,
        generator: torch.Generator | None = None,
        *,
        position_ids: torch.Tensor | None = None,
        layer_kind_ids: torch.Tensor | None = None,
        num_steps: int | None = None,
        guidance: float | None = None,
    ) -> torch.Tensor:
        """Draw latents; needs diffusers, for the schedule of its steps.

        Args:
            n (`int`): How many networks.
            condition (`torch.Tensor` of shape `(conditions,)` or `(n, conditions)`, *optional*): What is asked for, in the
                units of `fit`; NaN for what may be anything. None leaves all open.
            generator (`torch.Generator`, *optional*): Source of randomness, on any device.
            position_ids (`torch.LongTensor` of shape `(tokens, 3)`, *optional*): Positions of the layout to draw for, of
                any length; default the fitted one.
            layer_kind_ids (`torch.LongTensor` of shape `(tokens,)`, *optional*): Layer kinds of that layout; needed with
                `position_ids` if the sampler was fitted with layer kinds.
            num_steps (`int`, *optional*): Euler steps; default as in the options.
            guidance (`float`, *optional*): Strength of the condition; default as in the options.

        Returns:
            `torch.Tensor` of shape `(n, tokens, latent_size)`: dtype and device of the fitted latents.

        Raises:
            ValueError: not fitted, n or num_steps below 1, a condition of wrong shape or for a sampler that was fitted
                without, or positions and layer kinds that do not fit.
            ImportError: diffusers is missing.
        """
        self._check_draw(n, None)
        num_steps = self.num_steps if num_steps is None else num_steps
        guidance = self.guidance if guidance is None else guidance
        if num_steps < 1:
            raise ValueError(f"num_steps is {num_steps}, expected at least 1.")
        condition = self._standardised_condition(n, condition)
        position_ids, layer_kind_ids, like = self._layout_to_draw(position_ids, layer_kind_ids)
        scheduler = euler_scheduler(num_steps)
        shape = (n, len(position_ids), self.mean.shape[-1])
        latents = draw_normal(shape, self.network.readout.weight, generator)
        for timestep, share in zip(scheduler.timesteps, scheduler.sigmas, strict=False):  # sigmas ends with 0
            layout = (float(share), position_ids, layer_kind_ids)
            velocity = self._velocity(latents, *layout, condition)
            if guidance != 1 and condition is not None and not condition.isnan().all():
                unconditional = self._velocity(latents, *layout, torch.full_like(condition, torch.nan))
                velocity = unconditional.lerp(velocity, guidance)
            latents = scheduler.step(velocity, timestep, latents, return_dict=False)[0]
        return (self.mean[like] + self.scale[like] * latents).to(self.mean.dtype)

    def _statistics(self, latents):
        mean = latents.float().mean(dim=0)
        std = latents.float().std(dim=0, correction=0)
        # what hardly varies would have its rounding errors blown up
        floor = (1e-3 * std.square().mean().sqrt()).clamp(min=1e-6)
        # in the latents' dtype, so that a loaded sampler still knows what to return
        return {"mean": mean.to(latents.dtype), "scale": std.maximum(floor).to(latents.dtype)}

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

    def _build_network(self, state):
        """The untrained network that belongs to statistics and positions; the global random state stays as it is."""
        kinds = state.get("layer_kind_ids")
        config = SaneConfig(
            latent_size=state["mean"].shape[-1],
            hidden_size=self.hidden_size,
            num_hidden_layers=self.num_hidden_layers,
            num_attention_heads=self.num_attention_heads,
            intermediate_size=self.intermediate_size or 2 * self.hidden_size,
            use_bias=True,
            use_layer_kind_embedding=kinds is not None,
            attn_implementation="sdpa",
        )
        if kinds is not None:
            config.num_layer_kinds = max(config.num_layer_kinds, int(kinds.max()) + 1)
        num_conditions = len(state["condition_mean"]) if "condition_mean" in state else 0
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            return FlowNetwork(config, num_conditions).to(state["mean"].device)

    def _train(self, latents, condition, state, progress):
        A, N, L = latents.shape
        B, device = self.batch_size, latents.device
        width = min(self.window_size, N)
        mean, scale = state["mean"].float(), state["scale"].float()
        network = self._build_network(state)
        average = copy.deepcopy(network)
        optimizer = torch.optim.AdamW(
            network.parameters(), lr=self.learning_rate, weight_decay=self.weight_decay, betas=(0.9, 0.99), fused=True
        )
        schedule = get_cosine_schedule_with_warmup(optimizer, self.warmup_steps, self.train_steps)
        generator = torch.Generator().manual_seed(self.seed)
        for step in logging.tqdm(range(self.train_steps), desc="Flow", disable=not progress):
            rows = torch.randint(A, (B,), generator=generator)
            # a uniform start would show the first and last tokens less often than the others
            starts = torch.randint(-self.halo, N - width + self.halo + 1, (B,), generator=generator)
            window = starts.clamp(0, N - width)[:, None] + torch.arange(width)  # (B, width)
            # one share of noise from each of B equal intervals: a loss that varies less from step to step
            share = (torch.arange(B) + torch.rand(B, generator=generator)) / B
            noise = torch.randn(B, width, L, generator=generator).to(device)
            hidden = torch.rand(B, 1 + (0 if condition is None else condition.shape[1]), generator=generator)
            rows, window, share, hidden = (part.to(device) for part in (rows, window, share, hidden))
            hidden = hidden < self.condition_dropout
            asked = None
            if condition is not None:
                asked = condition[rows].masked_fill(hidden[:, :1] | hidden[:, 1:], torch.nan)

            clean = (latents[rows[:, None], window].float() - mean[window]) / scale[window]
            noisy = torch.lerp(clean, noise, share[:, None, None])
            places = window[:1] if width == N else window  # one table of positions serves all
            kinds = state["layer_kind_ids"][places] if "layer_kind_ids" in state else None
            velocity = network(noisy, share, state["position_ids"][places], kinds, asked)
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
        return average

    def _velocity(self, noisy, share, position_ids, layer_kind_ids, condition):
        """Velocity of whole sequences, a batch of windows at a time; each window contributes what is not its halo."""
        n, N, _ = noisy.shape
        width, halo = (N, 0) if self.window_size >= N else (self.window_size, self.halo)
        core = width - 2 * halo
        velocity = torch.empty_like(noisy)
        for rows in torch.arange(n).split(self.batch_size):
            rows = slice(int(rows[0]), int(rows[-1]) + 1)
            shares = noisy.new_full((rows.stop - rows.start,), share)
            for first in range(0, N, core):
                # at the ends the window moves inward, as in encode_sequence
                start = min(max(first - halo, 0), N - width)
                window, kept = slice(start, start + width), slice(first, min(first + core, N))
                kinds = None if layer_kind_ids is None else layer_kind_ids[None, window]
                moved = self.network(
                    noisy[rows, window],
                    shares,
                    position_ids[None, window],
                    kinds,
                    None if condition is None else condition[rows],
                )
                velocity[rows, kept] = moved[:, kept.start - start : kept.stop - start]
        return velocity

    def _standardised_condition(self, n, condition):
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

    def _layout_to_draw(self, position_ids, layer_kind_ids):
        """Positions, layer kinds, and for each token the fitted one whose mean and scale it takes."""
        fitted = self.position_ids, self.layer_kind_ids
        if position_ids is None:
            if layer_kind_ids is not None:
                raise ValueError("layer_kind_ids was given without position_ids; pass both of one layout.")
            return *fitted, torch.arange(len(self.position_ids), device=self.mean.device)
        position_ids, layer_kind_ids = check_layout(position_ids, layer_kind_ids, self.mean.device)
        if (layer_kind_ids is None) != (self.layer_kind_ids is None):
            has = "without" if self.layer_kind_ids is None else "with"
            raise ValueError(f"This sampler was fitted {has} layer_kind_ids, so it must be asked {has} them.")
        if layer_kind_ids is not None:
            known = self.network.positions.layer_kind.num_embeddings
            if layer_kind_ids.max() >= known:
                raise ValueError(
                    f"layer_kind_ids reaches {int(layer_kind_ids.max())}, this sampler knows 0 to {known - 1}."
                )
        return position_ids, layer_kind_ids, nearest_tokens((position_ids, layer_kind_ids), fitted)

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


def check_layout(
    position_ids: torch.Tensor, layer_kind_ids: torch.Tensor | None, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Refuse positions that are not `(tokens, 3)` and layer kinds that are not `(tokens,)`; return both on `device`."""
    if position_ids.ndim != 2 or position_ids.shape[1] != 3 or not len(position_ids):
        raise ValueError(
            f"position_ids has shape {tuple(position_ids.shape)}, expected (tokens, 3), those of one layout."
        )
    if layer_kind_ids is not None and layer_kind_ids.shape != position_ids.shape[:1]:
        raise ValueError(
            f"layer_kind_ids has shape {tuple(layer_kind_ids.shape)}, expected {tuple(position_ids.shape[:1])}."
        )
    for name, ids in (("position_ids", position_ids), ("layer_kind_ids", layer_kind_ids)):
        if ids is not None and (ids.is_floating_point() or ids.min() < 0):
            raise ValueError(f"{name} holds values that are negative or no integers.")
    layer_kind_ids = None if layer_kind_ids is None else layer_kind_ids.to(device).long()
    return position_ids.to(device).long(), layer_kind_ids


def check_not_infinite(condition: torch.Tensor) -> torch.Tensor:
    """Return the condition itself, which may be NaN but not infinite."""
    if condition.isinf().any():
        raise ValueError("condition holds infinite values; use NaN for what is unknown.")
    return condition


def nearest_tokens(
    wanted: tuple[torch.Tensor, torch.Tensor | None], known: tuple[torch.Tensor, torch.Tensor | None]
) -> torch.Tensor:
    """For each token of a layout, say which one of another layout is most similar to it.

    A token of the same layer kind comes first, then the nearest layer, then the nearest channel, then the nearest part of
    a channel that takes several tokens.

    Args:
        wanted: `position_ids` `(tokens, 3)` and `layer_kind_ids` `(tokens,)` or None.
        known: The same of the other layout.

    Returns:
        `torch.LongTensor` of shape `(tokens,)`: indices into the other layout.
    """
    wanted, known = (token_keys(*layout) for layout in (wanted, known))
    _, layers, channels, parts = torch.maximum(wanted.amax(dim=0), known.amax(dim=0)) + 1
    nearest = []
    for some in wanted.split(64):  # all pairs of tokens at once would fill the memory
        kind, layer, channel, part = (some[:, None] - known).abs().unbind(dim=-1)
        distance = ((kind.clamp(max=1) * layers + layer) * channels + channel) * parts + part
        nearest.append(distance.argmin(dim=1))
    return torch.cat(nearest)


def token_keys(position_ids: torch.Tensor, layer_kind_ids: torch.Tensor | None) -> torch.Tensor:
    """Return `(tokens, 4)`: layer kind, layer, channel, and which of the tokens of that channel it is."""
    sequence = position_ids[:, 0]
    _, group = torch.unique(position_ids[:, 1:], dim=0, return_inverse=True)
    first = torch.zeros_like(sequence).scatter_reduce(0, group, sequence, "amin", include_self=False)
    kind = torch.zeros_like(sequence) if layer_kind_ids is None else layer_kind_ids
    return torch.stack([kind, position_ids[:, 1], position_ids[:, 2], sequence - first[group]], dim=1)


__all__ = ["LatentFlowSampler"]
