"""A flow over all tokens of networks: a transformer with positions, so that a draw may have any length.

What flows are and where they come from says `flow_sane.py`, which also has the meaning of the axes in comments.
"""

import torch
from torch import nn
from torch.nn import functional as F

from .configuration_sane import SaneConfig
from .flow_sane import FlowConditionEmbedding, FlowModulation, FlowSampler, modulated_norm, two_layers
from .generation_sane import draw_normal
from .modeling_sane import SaneAttention, SaneMLP, SanePositionEmbedding, sinusoidal_encoding


class FlowBlock(nn.Module):
    """SANE's attention and MLP, with shifts, scales and gates that depend on time and condition."""

    def __init__(self, config: SaneConfig):
        super().__init__()
        self.attention = SaneAttention(config, config.num_hidden_layers)
        self.mlp = SaneMLP(config, config.num_hidden_layers)
        self.modulation = FlowModulation(config.hidden_size, config.hidden_size, 6)

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
        self.modulation = FlowModulation(H, H, 2)
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


class LatentFlowSampler(FlowSampler):
    """Rectified flow over the tokens of networks: a small transformer, conditioned on properties if they are given.

    It can be asked for networks of a given task or quality, and for layouts that were not fitted. It needs networks that share
    what their tokens have to do with each other: of some hundred networks that were trained independently it learns
    little more than mean and variance of each value (`ComponentFlowSampler` takes those). Compare accuracy and distance to the
    nearest training network with those of a kernel density. A default training takes about five minutes on one core for
    150 networks of 80 tokens.

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
        train_steps (`int`, defaults to 1500): Optimizer steps of `fit`.
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
        *FlowSampler.training_options,
    )
    tensors = ("mean", "scale", "position_ids")
    optional_tensors = ("layer_kind_ids", *FlowSampler.optional_tensors)

    def __init__(
        self,
        hidden_size: int = 128,
        num_hidden_layers: int = 4,
        num_attention_heads: int = 4,
        intermediate_size: int | None = None,
        window_size: int = 256,
        halo: int = 32,
        train_steps: int = 1500,
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
        if hidden_size % num_attention_heads or hidden_size % 4:
            raise ValueError(
                f"hidden_size is {hidden_size}, expected a multiple of 4 and of num_attention_heads "
                f"({num_attention_heads})."
            )
        if 2 * halo >= window_size:
            raise ValueError(f"halo is {halo}, expected less than half of window_size ({window_size}).")
        self._set_options(locals())

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
        conditions, condition = self._standardised(condition, latents)
        width = min(self.window_size, N)
        mean, scale = state["mean"].float(), state["scale"].float()

        def clean_batch(rows: torch.Tensor, generator: torch.Generator) -> tuple[torch.Tensor, tuple]:
            # a uniform start would show the first and last tokens less often than the others
            starts = torch.randint(-self.halo, N - width + self.halo + 1, (len(rows),), generator=generator)
            window = (starts.clamp(0, N - width)[:, None] + torch.arange(width)).to(rows.device)  # (B, width)
            clean = (latents[rows[:, None], window].float() - mean[window]) / scale[window]
            places = window[:1] if width == N else window  # one table of positions serves all
            kinds = None if layer_kind_ids is None else layer_kind_ids[places]
            return clean, (position_ids[places], kinds)

        self._train(state | conditions, len(latents), clean_batch, condition, progress)
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
        condition = self._asked(n, condition)
        position_ids, layer_kind_ids, like = self._layout_to_draw(position_ids, layer_kind_ids)
        noise = draw_normal((n, len(position_ids), self.mean.shape[-1]), self.network.readout.weight, generator)

        def velocity(noisy: torch.Tensor, share: float, asked: torch.Tensor | None) -> torch.Tensor:
            return self._velocity(noisy, share, position_ids, layer_kind_ids, asked)

        latents = self._draw(noise, condition, velocity, num_steps, guidance)
        return (self.mean[like] + self.scale[like] * latents).to(self.mean.dtype)

    def _statistics(self, latents):
        mean = latents.float().mean(dim=0)
        std = latents.float().std(dim=0, correction=0)
        # what hardly varies would have its rounding errors blown up
        floor = (1e-3 * std.square().mean().sqrt()).clamp(min=1e-6)
        # in the latents' dtype, so that a loaded sampler still knows what to return
        return {"mean": mean.to(latents.dtype), "scale": std.maximum(floor).to(latents.dtype)}

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

    def _velocity(self, noisy, share, position_ids, layer_kind_ids, condition):
        """Velocity of whole sequences, a batch of windows at a time; each window contributes what is not its halo."""
        n, N, _ = noisy.shape
        width, halo = (N, 0) if self.window_size >= N else (self.window_size, self.halo)
        core = width - 2 * halo
        velocity = torch.empty_like(noisy)
        for rows in self._parts(n):
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
