"""SANE, an autoencoder over windows of weight tokens: outputs, layers, encoder, decoder, model, pre-training.

Axes used in comments: B batch, N tokens, D token_size, H hidden_size, L latent_size. In every mask True means real.
"""

import math
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional as F
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.masking_utils import create_bidirectional_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils import ModelOutput, can_return_tuple, logging

from .configuration_sane import SaneConfig

logger = logging.get_logger(__name__)


@dataclass
class SaneModelOutput(ModelOutput):
    """What `SaneModel` returns.

    Args:
        last_hidden_state (`torch.FloatTensor` of shape `(batch, tokens, latent_size)`):
            The latents; zeros on padding tokens.
        pooler_output (`torch.FloatTensor` of shape `(batch, latent_size)`):
            Mean of the latents over the real tokens.
        hidden_states (`tuple` of `torch.FloatTensor` of shape `(batch, tokens, hidden_size)`, *optional*):
            Input of the first encoder block and output of each block, with `output_hidden_states=True`.
    """

    last_hidden_state: torch.FloatTensor | None = None
    pooler_output: torch.FloatTensor | None = None
    hidden_states: tuple[torch.FloatTensor, ...] | None = None


@dataclass
class SaneForPreTrainingOutput(ModelOutput):
    """What `SaneForPreTraining` returns. Losses are float32 scalars.

    Args:
        loss (`torch.FloatTensor`): The weighted sum of the two losses.
        loss_reconstruction (`torch.FloatTensor`): Mean squared error over the real values of all views.
        loss_contrastive (`torch.FloatTensor`, *optional*): NT-Xent between the views; only with a second view.
        reconstruction (`torch.FloatTensor` of shape `(batch, tokens, token_size)`): The decoded first view.
        latents (`torch.FloatTensor` of shape `(batch, tokens, latent_size)`): Latents of the first view.
        second_reconstruction (`torch.FloatTensor`, *optional*): The decoded second view.
        second_latents (`torch.FloatTensor`, *optional*): Latents of the second view.
    """

    loss: torch.FloatTensor | None = None
    loss_reconstruction: torch.FloatTensor | None = None
    loss_contrastive: torch.FloatTensor | None = None
    reconstruction: torch.FloatTensor | None = None
    latents: torch.FloatTensor | None = None
    second_reconstruction: torch.FloatTensor | None = None
    second_latents: torch.FloatTensor | None = None


def sinusoidal_encoding(positions: torch.Tensor, size: int) -> torch.Tensor:
    """Sines and cosines of integer positions at geometrically spaced wavelengths from 2π to about 20,000π.

    Args:
        positions (`torch.LongTensor` of any shape): Positions from 0.
        size (`int`): Number of values for each position; even.

    Returns:
        `torch.FloatTensor` of shape `(*positions.shape, size)`: float32, all sines before all cosines.
    """
    exponents = torch.arange(size // 2, device=positions.device, dtype=torch.float32) / (size // 2)
    angles = positions[..., None].float() * torch.exp(-math.log(10_000.0) * exponents)
    return torch.cat([angles.sin(), angles.cos()], dim=-1)


class SanePositionEmbedding(nn.Module):
    """Vectors for where a token stands: `[pe(n) + pe(l) ‖ pe(k)]`, each half of `hidden_size`, plus its layer's kind."""

    axes = ("sequence", "layer", "channel")

    def __init__(self, config: SaneConfig):
        super().__init__()
        self.config = config
        if config.position_encoding == "learned":
            for axis, maximum in zip(self.axes, config.max_position_embeddings, strict=True):
                self.add_module(axis, nn.Embedding(maximum, config.hidden_size // 2))
        if config.use_layer_kind_embedding:
            self.layer_kind = nn.Embedding(config.num_layer_kinds, config.hidden_size)

    def forward(self, position_ids: torch.Tensor, layer_kind_ids: torch.Tensor | None = None) -> torch.Tensor:
        """Return `(batch, tokens, hidden_size)` for `position_ids` `(batch, tokens, 3)`; float32 where sinusoidal."""
        if self.config.position_encoding == "learned":
            self._check_maxima(position_ids)
            encoded = [getattr(self, axis)(position_ids[..., i]) for i, axis in enumerate(self.axes)]
        else:
            encoded = sinusoidal_encoding(position_ids, self.config.hidden_size // 2).unbind(dim=-2)
        sequence, layer, channel = encoded  # each (B, N, H / 2)
        positions = torch.cat([sequence + layer, channel], dim=-1)
        if not self.config.use_layer_kind_embedding:
            return positions
        if layer_kind_ids is None:
            logger.warning_once(
                "This SANE model uses a layer-kind embedding but got no layer_kind_ids, so none is added. Pass the "
                "weight tokenizer's layer_kind_ids as well."
            )
            return positions
        return positions + self.layer_kind(layer_kind_ids)

    def _check_maxima(self, position_ids):
        # nn.Embedding would fail too, but on a GPU as an unreadable device assertion
        largest = position_ids.flatten(0, -2).amax(dim=0).tolist()
        for axis, found, maximum in zip(self.axes, largest, self.config.max_position_embeddings, strict=True):
            if found >= maximum:
                raise ValueError(
                    f"The largest {axis} index is {found}, but config.max_position_embeddings is "
                    f"{self.config.max_position_embeddings} (sequence, layer, channel), which ends at {maximum - 1}. "
                    'Build the model with a larger maximum or with position_encoding="sinusoidal".'
                )


def eager_attention_forward(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention step by step; arguments and returns as transformers' attention functions have them."""
    scores = torch.matmul(query, key.transpose(2, 3)) * scaling  # (B, heads, N, N)
    if attention_mask is not None:
        scores = scores + attention_mask
    weights = F.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype)
    weights = F.dropout(weights, p=dropout, training=module.training)
    return torch.matmul(weights, value).transpose(1, 2).contiguous(), weights  # (B, N, heads, head size)


class SaneResidualProjection(nn.Linear):
    """Linear layer that ends a branch of a block and is added to its residual stream.

    It has a class of its own to get smaller initial weights: transformers does not offer `_init_weights` modules of
    foreign code that hold no parameter themselves, so the module around this one could not set them.
    """

    def __init__(self, input_size: int, config: SaneConfig, num_layers: int):
        super().__init__(input_size, config.hidden_size, bias=config.use_bias)
        self.num_layers = num_layers


class SaneAttention(nn.Module):
    """Multi-head attention over all real tokens of a window, in both directions."""

    def __init__(self, config: SaneConfig, num_layers: int):
        super().__init__()
        self.config = config
        self.head_size = config.hidden_size // config.num_attention_heads
        self.scaling = self.head_size**-0.5
        self.is_causal = False
        self.qkv_proj = nn.Linear(config.hidden_size, 3 * config.hidden_size, bias=config.use_bias)
        self.out_proj = SaneResidualProjection(config.hidden_size, config, num_layers)

    def forward(self, hidden_states: torch.Tensor, attention_mask: torch.Tensor | None) -> torch.Tensor:
        """Mix `(batch, tokens, hidden_size)`; the mask is the one that `create_bidirectional_mask` makes."""
        B, N, H = hidden_states.shape
        # a split, because the backward of one permuted tensor would stack its three gradients and copy them
        query, key, value = (
            part.view(B, N, -1, self.head_size).transpose(1, 2)  # (B, heads, N, head size)
            for part in self.qkv_proj(hidden_states).split(H, dim=-1)
        )
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention_forward)
        dropout = self.config.attention_dropout if self.training else 0.0
        mixed, _ = attend(self, query, key, value, attention_mask, dropout=dropout, scaling=self.scaling)
        return self.out_proj(mixed.reshape(B, N, H))


class SaneMLP(nn.Module):
    """Two linear layers with a GELU between them, for each token alone."""

    def __init__(self, config: SaneConfig, num_layers: int):
        super().__init__()
        self.in_proj = nn.Linear(config.hidden_size, config.mlp_size, bias=config.use_bias)
        self.out_proj = SaneResidualProjection(config.mlp_size, config, num_layers)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Map `(batch, tokens, hidden_size)` to the same shape."""
        return self.out_proj(F.gelu(self.in_proj(hidden_states)))


class SaneBlock(GradientCheckpointingLayer):
    """Pre-norm transformer block, as GPT-2's without the causal mask."""

    def __init__(self, config: SaneConfig, num_layers: int):
        super().__init__()
        self.attention_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps, bias=config.use_bias)
        self.attention = SaneAttention(config, num_layers)
        self.mlp_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps, bias=config.use_bias)
        self.mlp = SaneMLP(config, num_layers)
        self.dropout = nn.Dropout(config.hidden_dropout)

    def forward(self, hidden_states: torch.Tensor, attention_mask: torch.Tensor | None) -> torch.Tensor:
        """Map `(batch, tokens, hidden_size)` to the same shape."""
        mixed = self.attention(self.attention_norm(hidden_states), attention_mask)
        hidden_states = hidden_states + self.dropout(mixed)
        return hidden_states + self.dropout(self.mlp(self.mlp_norm(hidden_states)))


class SaneStack(nn.Module):
    """Linear, plus positions, blocks, linear: the encoder from tokens to latents, the decoder from latents to tokens.

    No norm stands before the last linear layer, so a purely linear path leads from input to output beside the blocks.
    """

    def __init__(self, config: SaneConfig, input_size: int, output_size: int, num_layers: int):
        super().__init__()
        self.config = config
        self.embedding = nn.Linear(input_size, config.hidden_size, bias=config.use_bias)
        self.dropout = nn.Dropout(config.hidden_dropout)
        self.blocks = nn.ModuleList([SaneBlock(config, num_layers) for _ in range(num_layers)])
        self.readout = nn.Linear(config.hidden_size, output_size, bias=config.use_bias)

    def forward(
        self, values: torch.Tensor, positions: torch.Tensor, attention_mask: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
        """Run one window.

        Args:
            values (`torch.FloatTensor` of shape `(batch, tokens, input_size)`): Tokens or latents.
            positions (`torch.FloatTensor` of shape `(batch, tokens, hidden_size)`): Added to the embedded values.
            attention_mask (`torch.BoolTensor` of shape `(batch, tokens)`, *optional*): True on real tokens.

        Returns:
            The output `(batch, tokens, output_size)`, zeros on padding tokens, and the hidden states: the input of the
            first block and the output of each.
        """
        embedded = self.embedding(values.to(self.embedding.weight.dtype))
        # positions may be float32 where the model is not: adding them as they are would promote everything after.
        # Under autocast the weights, and so the residual stream, stay float32.
        hidden_states = self.dropout(embedded + positions.to(self.embedding.weight.dtype))
        mask = create_bidirectional_mask(self.config, hidden_states, attention_mask)
        collected = [hidden_states]
        for block in self.blocks:
            hidden_states = block(hidden_states, mask)
            collected.append(hidden_states)
        output = self.readout(hidden_states)
        if attention_mask is not None:
            output = output.masked_fill(~attention_mask[..., None], 0.0)
        return output, tuple(collected)


class SanePreTrainedModel(PreTrainedModel):
    """Initial weights, saving and loading for all SANE models."""

    config_class = SaneConfig
    base_model_prefix = "sane"
    main_input_name = "token_values"
    supports_gradient_checkpointing = True
    _no_split_modules = ["SaneBlock"]  # noqa: RUF012
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True

    @torch.no_grad()
    def _init_weights(self, module):
        """Fill every tensor; there are no buffers.

        With s = `config.initializer_range`:

        * weights of linear layers, all embeddings (learned positions, layer kinds): normal(0, s);
        * weights of the two output projections of a block: normal(0, s / sqrt(2 x blocks of that stack)), so that the
          variance of the residual stream does not grow with depth;
        * weights of layer norms: ones;
        * all biases: zeros.
        """
        std = float(self.config.initializer_range)
        if isinstance(module, SaneResidualProjection):
            init.normal_(module.weight, std=std / math.sqrt(2 * module.num_layers))
        elif isinstance(module, nn.Linear | nn.Embedding):
            init.normal_(module.weight, std=std)
        elif isinstance(module, nn.LayerNorm):
            init.ones_(module.weight)
        if getattr(module, "bias", None) is not None:
            init.zeros_(module.bias)

    def save_pretrained(self, save_directory, *args, **kwargs):
        """Save weights, configuration and code; a pre-training checkpoint also opens as the bare model."""
        self.config.auto_map = {
            "AutoConfig": "configuration_sane.SaneConfig",
            "AutoModel": "modeling_sane.SaneModel",
            "AutoModelForPreTraining": "modeling_sane.SaneForPreTraining",
        }
        return super().save_pretrained(save_directory, *args, **kwargs)


class SaneModel(SanePreTrainedModel):
    """Encoder from weight tokens to latents and decoder back.

    `encode` and `decode` treat one window of any length, `encode_sequence` and `decode_sequence` whole sequences.
    """

    _keys_to_ignore_on_load_unexpected = [r"^projection_head\."]  # noqa: RUF012

    def __init__(self, config: SaneConfig):
        super().__init__(config)
        self.positions = SanePositionEmbedding(config)  # one for both directions
        self.encoder = SaneStack(config, config.token_size, config.latent_size, config.num_hidden_layers)
        self.decoder = SaneStack(config, config.latent_size, config.token_size, config.decoder_layers)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        """Return the linear layer that embeds tokens."""
        return self.encoder.embedding

    def set_input_embeddings(self, value: nn.Module):
        """Replace the linear layer that embeds tokens."""
        self.encoder.embedding = value

    @can_return_tuple
    def forward(
        self,
        token_values: torch.Tensor,
        position_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        value_mask: torch.Tensor | None = None,
        layer_kind_ids: torch.Tensor | None = None,
        output_hidden_states: bool | None = None,
    ) -> SaneModelOutput:
        """Encode one window and pool its latents.

        Args:
            token_values (`torch.FloatTensor` of shape `(batch, tokens, token_size)`): Weights cut into tokens.
            position_ids (`torch.LongTensor` of shape `(batch, tokens, 3)`): Sequence, layer and channel index; one
                table of shape `(tokens, 3)` serves the whole batch.
            attention_mask (`torch.BoolTensor` of shape `(batch, tokens)`, *optional*): True on real tokens.
            value_mask (`torch.BoolTensor` of shape `(batch, tokens, token_size)`, *optional*): True on real values;
                others are set to zero first.
            layer_kind_ids (`torch.LongTensor` of shape `(batch, tokens)`, *optional*): Kind of each token's layer.
            output_hidden_states (`bool`, *optional*): Whether to return the hidden states of the encoder.
            return_dict (`bool`, *optional*): False gives a plain tuple.

        Returns:
            [`SaneModelOutput`], or a tuple.

        Raises:
            ValueError: shapes do not fit the configuration, or a position is beyond a learned maximum.
        """
        if value_mask is not None:
            token_values = token_values.masked_fill(~value_mask, 0.0)
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        latents, hidden_states = self._run(self.encoder, token_values, position_ids, attention_mask, layer_kind_ids)
        return SaneModelOutput(
            last_hidden_state=latents,
            pooler_output=masked_mean(latents, attention_mask),
            hidden_states=hidden_states if output_hidden_states else None,
        )

    def encode(
        self,
        token_values: torch.Tensor,
        position_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        layer_kind_ids: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Map one window of tokens `(batch, tokens, token_size)` to latents `(batch, tokens, latent_size)`.

        Every token sees every other one, so time and memory grow with the square of the length; `encode_sequence` does
        not. Arguments as in `forward`; latents of padding tokens are zero.
        """
        return self._run(self.encoder, token_values, position_ids, attention_mask, layer_kind_ids)[0]

    def decode(
        self,
        latents: torch.Tensor,
        position_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        layer_kind_ids: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Map one window of latents `(batch, tokens, latent_size)` to tokens `(batch, tokens, token_size)`.

        The counterpart of `encode`; values of padding tokens are zero.
        """
        return self._run(self.decoder, latents, position_ids, attention_mask, layer_kind_ids)[0]

    def reconstruct(
        self,
        token_values: torch.Tensor,
        position_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        layer_kind_ids: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """`encode`, then `decode`: latents and tokens; the positions are embedded once for both."""
        positions, attention_mask = self._placed(
            token_values, position_ids, attention_mask, layer_kind_ids, self.config.token_size
        )
        latents, _ = self.encoder(token_values, positions, attention_mask)
        return latents, self.decoder(latents, positions, attention_mask)[0]

    def encode_sequence(
        self,
        token_values: torch.Tensor,
        position_ids: torch.Tensor,
        window_size: int | None = None,
        halo: int | None = None,
        batch_size: int = 8,
        attention_mask: torch.Tensor | None = None,
        layer_kind_ids: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Encode sequences of any length in windows that overlap by a halo of context; differentiable.

        A window is `window_size` tokens plus `halo` tokens on both sides, whose outputs are dropped. At the ends of a
        sequence the window moves inward instead of being padded. A sequence no longer than such a window is one window
        and gives what `encode` gives. With the defaults a window is longer than those of the training by the halos;
        pass `window_size=config.window_size - 2 * halo` to keep to the length that was trained.

        Args:
            token_values (`torch.FloatTensor` of shape `(batch, tokens, token_size)`): Weights cut into tokens.
            position_ids (`torch.LongTensor` of shape `(batch, tokens, 3)` or `(tokens, 3)`): Positions.
            window_size (`int`, *optional*): Tokens that each window contributes; default `config.window_size`.
            halo (`int`, *optional*): Context tokens on each side; default `config.halo`.
            batch_size (`int`, defaults to 8): Windows treated at a time.
            attention_mask (`torch.BoolTensor` of shape `(batch, tokens)`, *optional*): True on real tokens; padding
                stands at the end of a sequence.
            layer_kind_ids (`torch.LongTensor` of shape `(batch, tokens)`, *optional*): Kind of each token's layer.

        Returns:
            `torch.FloatTensor` of shape `(batch, tokens, latent_size)`: zeros on padding tokens.

        Raises:
            ValueError: a size is out of range, or shapes do not fit.
        """
        return self._run_sequence(
            self.encoder, token_values, position_ids, window_size, halo, batch_size, attention_mask, layer_kind_ids
        )

    def decode_sequence(
        self,
        latents: torch.Tensor,
        position_ids: torch.Tensor,
        window_size: int | None = None,
        halo: int | None = None,
        batch_size: int = 8,
        attention_mask: torch.Tensor | None = None,
        layer_kind_ids: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Decode latents of any length to tokens `(batch, tokens, token_size)`, the counterpart of `encode_sequence`."""
        return self._run_sequence(
            self.decoder, latents, position_ids, window_size, halo, batch_size, attention_mask, layer_kind_ids
        )

    def _run(self, stack, values, position_ids, attention_mask, layer_kind_ids):
        width = stack.embedding.in_features
        return stack(values, *self._placed(values, position_ids, attention_mask, layer_kind_ids, width))

    def _placed(self, values, position_ids, attention_mask, layer_kind_ids, width):
        """Embedded positions and mask of a window, after checking that they fit its values."""
        position_ids = check_window(values, position_ids, attention_mask, layer_kind_ids, width)
        mask = None if attention_mask is None else attention_mask.bool()
        return self.positions(position_ids, layer_kind_ids), mask

    def _run_sequence(
        self, stack, values, position_ids, window_size, halo, batch_size, attention_mask, layer_kind_ids
    ):
        position_ids = check_window(values, position_ids, attention_mask, layer_kind_ids, stack.embedding.in_features)
        B, N, _ = values.shape
        core = self.config.window_size if window_size is None else window_size
        halo = self.config.halo if halo is None else halo
        if core < 1 or halo < 0 or batch_size < 1:
            raise ValueError(
                f"Got window_size {core}, halo {halo}, batch_size {batch_size}; expected a window_size and a "
                "batch_size of at least 1 and a halo of at least 0."
            )
        if attention_mask is None:
            lengths = torch.full((B,), N, device=values.device)
        else:
            attention_mask = attention_mask.bool()
            steps = torch.arange(1, N + 1, device=values.device)
            lengths = (attention_mask * steps).amax(dim=1)  # up to the last real token
        if core + 2 * halo >= N:
            core, halo = N, 0
        width = core + 2 * halo
        rows, firsts, starts = plan_windows(lengths, N, core, halo)
        outputs = []
        for row, first, start in torch.stack([rows, firsts, starts]).split(batch_size, dim=1):
            window = start[:, None] + torch.arange(width, device=values.device)
            at = (row[:, None], window)
            output, _ = self._run(
                stack,
                values[at],
                position_ids[at],
                None if attention_mask is None else attention_mask[at],
                None if layer_kind_ids is None else layer_kind_ids[at],
            )
            kept = (first - start)[:, None] + torch.arange(core, device=values.device)
            # the last core may reach over the end: what is read there lands behind the sequence and is cut off below
            kept = kept.clamp(max=width - 1)
            outputs.append(output.gather(1, kept[..., None].expand(-1, -1, output.shape[-1])))
        outputs = torch.cat(outputs)  # (windows, core, output size)
        num_cores = -(-N // core)
        tokens = outputs.new_zeros(B, num_cores, core, outputs.shape[-1])
        tokens = tokens.index_put((rows, firsts // core), outputs)
        tokens = tokens.flatten(1, 2)[:, :N]
        return tokens if attention_mask is None else tokens.masked_fill(~attention_mask[..., None], 0.0)

    @torch.no_grad()
    def initialize_linear(
        self,
        token_values: torch.Tensor,
        position_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        value_mask: torch.Tensor | None = None,
        layer_kind_ids: torch.Tensor | None = None,
        block_scale: float = 0.1,
        ridge: float = 1e-3,
    ) -> "SaneModel":
        """Start from the best linear autoencoder of the given tokens, in place.

        Afterwards, with the blocks silent, token -> latent -> token subtracts what is linear in the positions, projects
        the rest on its `latent_size` leading principal components, and undoes both. The blocks learn what is missing.
        To keep tokens and positions apart in the residual stream, values are embedded along the directions that carry
        the least position energy; the readouts are least-squares fits that see both. Exact up to the ridge if
        `hidden_size` has room for a token besides the positions, a compromise otherwise.

        Args:
            token_values (`torch.FloatTensor` of shape `(batch, tokens, token_size)`): Windows of the training data; a
                few thousand tokens suffice.
            position_ids (`torch.LongTensor` of shape `(batch, tokens, 3)` or `(tokens, 3)`): Their positions.
            attention_mask (`torch.BoolTensor` of shape `(batch, tokens)`, *optional*): True on real tokens.
            value_mask (`torch.BoolTensor` of shape `(batch, tokens, token_size)`, *optional*): True on real values.
            layer_kind_ids (`torch.LongTensor` of shape `(batch, tokens)`, *optional*): Kind of each token's layer.
            block_scale (`float`, defaults to 0.1): Factor on the output projections of all blocks, so that the linear
                path dominates at first. 0 silences them.
            ridge (`float`, defaults to 1e-3): Strength of the fits, relative to the mean square of the regressors. It keeps the
                readouts small, so that they do not amplify what the blocks add.

        Returns:
            The model itself.
        """
        position_ids = check_window(token_values, position_ids, attention_mask, layer_kind_ids, self.config.token_size)
        if value_mask is not None:
            token_values = token_values.masked_fill(~value_mask, 0.0)
        positions = self.positions(position_ids, layer_kind_ids)
        real = slice(None) if attention_mask is None else attention_mask.bool()
        x, positions = token_values[real].flatten(0, -2).double(), positions[real].flatten(0, -2).double()

        # the part of the tokens that is linear in their positions needs no latents
        rest = x - positions @ least_squares(positions, x, ridge)
        _, axes = torch.linalg.eigh(rest.T @ rest)
        axes = axes.flip(1)  # (D, D), columns by falling variance
        _, directions = torch.linalg.eigh(positions.T @ positions)  # (H, H), columns by rising position energy

        def embed(size):
            # column i of the embedding is a direction of the residual stream; leading components get the quietest
            matrix = directions.new_zeros(self.config.hidden_size, size)
            matrix[:, : min(size, self.config.hidden_size)] = directions[:, :size]
            return matrix

        encoder_embedding = embed(self.config.token_size) @ axes.T
        components = near_axes(axes[:, : self.config.latent_size])
        wanted = F.pad(rest @ components, (0, max(self.config.latent_size - self.config.token_size, 0)))
        encoder_hidden = x @ encoder_embedding.T + positions
        encoder_readout = least_squares(encoder_hidden, wanted, ridge).T
        latents = encoder_hidden @ encoder_readout.T
        decoder_embedding = embed(self.config.latent_size)
        decoder_readout = least_squares(latents @ decoder_embedding.T + positions, x, ridge).T

        self.encoder.embedding.weight.copy_(encoder_embedding)
        self.encoder.readout.weight.copy_(encoder_readout)
        self.decoder.embedding.weight.copy_(decoder_embedding)
        self.decoder.readout.weight.copy_(decoder_readout)
        for stack in (self.encoder, self.decoder):
            if self.config.use_bias:
                stack.embedding.bias.zero_()
                stack.readout.bias.zero_()
            for block in stack.blocks:
                block.attention.out_proj.weight.mul_(block_scale)
                block.mlp.out_proj.weight.mul_(block_scale)
        return self


class SaneProjectionHead(nn.Module):
    """From all latents of a window to the few values that the contrastive loss compares."""

    def __init__(self, config: SaneConfig):
        super().__init__()
        self.window_size = config.window_size
        self.layers = nn.Sequential(
            nn.Linear(config.window_size * config.latent_size, config.projection_size, bias=config.use_bias),
            nn.LayerNorm(config.projection_size, eps=config.layer_norm_eps, bias=config.use_bias),
            nn.ReLU(),
            nn.Linear(config.projection_size, config.projection_size, bias=config.use_bias),
            nn.LayerNorm(config.projection_size, eps=config.layer_norm_eps, bias=config.use_bias),
            nn.ReLU(),
        )

    def forward(self, latents: torch.Tensor) -> torch.Tensor:
        """Map latents `(batch, tokens, latent_size)`, zero on padding tokens, to `(batch, projection_size)`."""
        missing = self.window_size - latents.shape[1]
        if missing < 0:
            raise ValueError(
                f"The window has {latents.shape[1]} tokens, the projection head takes at most config.window_size = "
                f"{self.window_size}. Train on windows of that length, or build the model with a larger window_size."
            )
        return self.layers(F.pad(latents, (0, 0, 0, missing)).flatten(1))


class SaneForPreTraining(SanePreTrainedModel):
    """SANE with the losses of its pre-training: masked reconstruction, and NT-Xent between two views of a window."""

    def __init__(self, config: SaneConfig):
        super().__init__(config)
        self.sane = SaneModel(config)
        # without the loss there is no head: parameters that get no gradient make distributed training fail
        self.projection_head = SaneProjectionHead(config) if config.contrastive_weight > 0 else None
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        token_values: torch.Tensor,
        position_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        value_mask: torch.Tensor | None = None,
        layer_kind_ids: torch.Tensor | None = None,
        second_token_values: torch.Tensor | None = None,
        second_value_mask: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        second_labels: torch.Tensor | None = None,
    ) -> SaneForPreTrainingOutput:
        """Encode and decode one or two views of a batch of windows and compute the losses.

        `loss = contrastive_weight * NT-Xent + (1 - contrastive_weight) * masked mean squared error`. Without a second
        view, or with a contrastive weight of 0, the loss is the reconstruction's alone. Under torch.distributed,
        negatives come from all processes, which must hold batches of equal size.

        Args:
            token_values (`torch.FloatTensor` of shape `(batch, tokens, token_size)`): The first view.
            position_ids (`torch.LongTensor` of shape `(batch, tokens, 3)` or `(tokens, 3)`): Positions, both views.
            attention_mask (`torch.BoolTensor` of shape `(batch, tokens)`, *optional*): True on real tokens, both views.
            value_mask (`torch.BoolTensor` of shape `(batch, tokens, token_size)`, *optional*): True on real values of
                the first view. Others are set to zero and do not count in the loss.
            layer_kind_ids (`torch.LongTensor` of shape `(batch, tokens)`, *optional*): Layer kinds, both views.
            second_token_values (`torch.FloatTensor` of shape `(batch, tokens, token_size)`, *optional*): Second view.
            second_value_mask (`torch.BoolTensor`, *optional*): Real values of the second view; default `value_mask`.
            labels (`torch.FloatTensor` of shape `(batch, tokens, token_size)`, *optional*): What the first view should
                be reconstructed to, say without its noise; default the view itself.
            second_labels (`torch.FloatTensor`, *optional*): The same for the second view.
            return_dict (`bool`, *optional*): False gives a plain tuple.

        Returns:
            [`SaneForPreTrainingOutput`], or a tuple.

        Raises:
            ValueError: shapes do not fit, the window is too long for the projection head, or a contrastive loss was
                asked for a single window.
        """
        B = token_values.shape[0]
        if value_mask is None:
            value_mask = torch.ones_like(token_values, dtype=torch.bool)
        labels = token_values if labels is None else labels
        two_views = second_token_values is not None
        if two_views:
            if second_token_values.shape != token_values.shape:
                raise ValueError(
                    f"second_token_values has shape {tuple(second_token_values.shape)}, token_values "
                    f"{tuple(token_values.shape)}; both views must show the same window."
                )
            second_value_mask = value_mask if second_value_mask is None else second_value_mask
            second_labels = second_token_values if second_labels is None else second_labels
            token_values = torch.cat([token_values, second_token_values])
            value_mask = torch.cat([value_mask, second_value_mask])
            labels = torch.cat([labels, second_labels])
        values = token_values.masked_fill(~value_mask, 0.0)
        views = [self.sane.reconstruct(view, position_ids, attention_mask, layer_kind_ids) for view in values.split(B)]
        latents, reconstruction = (torch.cat(parts) for parts in zip(*views, strict=True))
        if two_views and attention_mask is not None and attention_mask.ndim == 2:
            attention_mask = torch.cat([attention_mask, attention_mask])

        counted = value_mask if attention_mask is None else value_mask & attention_mask.bool()[..., None]
        loss_reconstruction = reconstruction_loss(reconstruction, labels, counted, self.config.normalize_targets)
        loss, loss_contrastive = loss_reconstruction, None
        if two_views and self.projection_head is not None:
            first, second = self.projection_head(latents).chunk(2)
            loss_contrastive = nt_xent_loss(first, second, self.config.nt_xent_temperature)
            weight = self.config.contrastive_weight
            loss = weight * loss_contrastive + (1 - weight) * loss_reconstruction
        return SaneForPreTrainingOutput(
            loss=loss,
            loss_reconstruction=loss_reconstruction,
            loss_contrastive=loss_contrastive,
            reconstruction=reconstruction[:B],
            latents=latents[:B],
            second_reconstruction=reconstruction[B:] if two_views else None,
            second_latents=latents[B:] if two_views else None,
        )


def reconstruction_loss(
    reconstruction: torch.Tensor, target: torch.Tensor, value_mask: torch.Tensor, normalize: bool = False
) -> torch.Tensor:
    """Mean squared error over real values, in float32.

    Args:
        reconstruction (`torch.FloatTensor` of shape `(batch, tokens, token_size)`): What the decoder gave.
        target (`torch.FloatTensor` of the same shape): What it should have given.
        value_mask (`torch.BoolTensor` of the same shape): True on real values.
        normalize (`bool`): Shift and scale target and reconstruction by mean and standard deviation of the real values
            of each target token. The shift cancels out. The scale is at least 0.05 of the root mean square of all real
            values: a token of equal values, such as a fresh norm layer's, would get infinite weight otherwise.

    Returns:
        A float32 scalar, 0 if there is no real value.
    """
    with torch.autocast(device_type=reconstruction.device.type, enabled=False):
        target = target.float().masked_fill(~value_mask, 0.0)
        error = (reconstruction.float() - target).masked_fill(~value_mask, 0.0)
        # padding would count as zero error, so the means run over value_mask only
        count = value_mask.sum().clamp(min=1)
        if normalize:
            size = value_mask.sum(dim=-1, keepdim=True).clamp(min=1)
            mean = target.sum(dim=-1, keepdim=True) / size
            deviation = (target - mean).masked_fill(~value_mask, 0.0)
            std = (deviation.square().sum(dim=-1, keepdim=True) / size).sqrt()
            floor = 0.05 * (target.square().sum() / count).sqrt()
            error = error / torch.maximum(std, floor).clamp(min=torch.finfo(torch.float32).tiny)
        return error.square().sum() / count


class GatherWithGradient(torch.autograd.Function):
    """Tensors of all processes one below the other; each process gets the gradient that all of them have for its part."""

    @staticmethod
    def forward(ctx, values: torch.Tensor) -> torch.Tensor:
        """Gather `(batch, ...)` to `(processes * batch, ...)`."""
        parts = [torch.empty_like(values) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, values.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx, gradient: torch.Tensor) -> torch.Tensor:
        """Sum the gradients of all processes and take the own part."""
        total = gradient.clone(memory_format=torch.contiguous_format)  # autograd may still need the one it gave
        dist.all_reduce(total)
        return total.chunk(dist.get_world_size())[dist.get_rank()]


def nt_xent_loss(first: torch.Tensor, second: torch.Tensor, temperature: float) -> torch.Tensor:
    """Normalised temperature-scaled cross entropy: each view must find its partner among all other views.

    Under torch.distributed the candidates come from all processes, with gradients, and the result is the mean over the
    views of this process; averaging gradients over processes, as DDP does, gives those of the whole batch at once.

    Args:
        first (`torch.FloatTensor` of shape `(batch, size)`): Projections of the first views.
        second (`torch.FloatTensor` of shape `(batch, size)`): Projections of the second views, in the same order.
        temperature (`float`): Divides the cosine similarities.

    Returns:
        A float32 scalar.

    Raises:
        ValueError: there is only one pair, thus no negative.
    """
    with torch.autocast(device_type=first.device.type, enabled=False):
        first, second = F.normalize(first.float(), dim=-1), F.normalize(second.float(), dim=-1)
        B = first.shape[0]
        all_first, all_second, offset = first, second, 0
        if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            pairs = GatherWithGradient.apply(torch.stack([first, second], dim=1))  # (all pairs, 2, size)
            all_first, all_second = pairs.unbind(dim=1)
            offset = dist.get_rank() * B
        total = all_first.shape[0]
        if total < 2:
            raise ValueError(
                "The contrastive loss compares different windows, but the batch holds only one. Use a batch of at least "
                "2, leave second_token_values away, or set contrastive_weight=0."
            )
        views = torch.cat([first, second])  # (2B, size)
        candidates = torch.cat([all_first, all_second])  # (2 total, size)
        logits = views @ candidates.T / temperature
        own = torch.arange(B, device=first.device) + offset
        own, partner = torch.cat([own, own + total]), torch.cat([own + total, own])
        logits = logits.scatter(1, own[:, None], -torch.inf)
        return F.cross_entropy(logits, partner)


def masked_mean(values: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """Mean over tokens of `(batch, tokens, size)` where `mask` `(batch, tokens)` is True; zeros where it never is."""
    if mask is None:
        return values.mean(dim=1)
    mask = mask.to(values.dtype)[..., None]
    return (values * mask).sum(dim=1) / mask.sum(dim=1).clamp(min=1)


def near_axes(components: torch.Tensor) -> torch.Tensor:
    """Another basis of the subspace that `components` `(D, L)` with orthonormal columns span, near L of the D axes.

    A reconstruction does not depend on the basis, but what can be read from the codes does: statistics of values along
    the axes say more of the weights than those of mixtures of all of them. The axes are those that a pivoted
    orthogonalisation takes first, the rotation is the solution of the orthogonal Procrustes problem (Schönemann 1966).
    """
    L = components.shape[1]
    rest, chosen = components.clone(), []  # (D, L)
    for _ in range(L):
        axis = int(rest.square().sum(dim=1).argmax())
        direction = F.normalize(rest[axis], dim=0)
        rest = rest - (rest @ direction)[:, None] * direction
        chosen.append(axis)
    left, _, right = torch.linalg.svd(components[sorted(chosen)])
    return components @ (left @ right).T


def least_squares(x: torch.Tensor, y: torch.Tensor, ridge: float) -> torch.Tensor:
    """Return `(inputs, outputs)` weights that map `x` `(samples, inputs)` to `y` `(samples, outputs)` at best."""
    gram = x.T @ x
    gram.diagonal().add_(ridge * gram.diagonal().mean())
    return torch.linalg.solve(gram, x.T @ y)


def plan_windows(
    lengths: torch.Tensor, num_tokens: int, core: int, halo: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Say which windows of `core + 2 * halo` tokens cover a batch of sequences.

    Args:
        lengths (`torch.LongTensor` of shape `(batch,)`): Tokens of each sequence before its padding.
        num_tokens (`int`): Tokens of each sequence with its padding, at least those of a window.
        core (`int`): Tokens that a window contributes.
        halo (`int`): Context tokens on both sides of them.

    Returns:
        `rows`, `firsts` and `starts`, each of shape `(windows,)`: the sequence, the first token that the window
        contributes, and the first token that it reads.
    """
    firsts = torch.arange(0, num_tokens, core, device=lengths.device).expand(len(lengths), -1)
    # windows behind the end of a sequence are not run; its first one always is
    rows, index = (firsts < lengths[:, None].clamp(min=1)).nonzero(as_tuple=True)
    firsts = firsts[rows, index]
    starts = torch.minimum(firsts - halo, lengths[rows] - (core + 2 * halo)).clamp(min=0)
    return rows, firsts, starts


def check_window(
    values: torch.Tensor,
    position_ids: torch.Tensor,
    attention_mask: torch.Tensor | None,
    layer_kind_ids: torch.Tensor | None,
    size: int,
) -> torch.Tensor:
    """Refuse shapes that do not fit each other; return `position_ids` for the whole batch."""
    if values.ndim != 3 or values.shape[-1] != size:
        raise ValueError(
            f"The values have shape {tuple(values.shape)}, this model expects (batch, tokens, {size}). "
            "Cut weights with a tokenizer of the same token_size, or build the model with the tokenizer's."
        )
    B, N, _ = values.shape
    if N == 0:
        raise ValueError(f"The values have shape {tuple(values.shape)}: there is no token.")
    if position_ids.shape[-2:] != (N, 3) or position_ids.ndim > 3 or position_ids.shape[:-2].numel() not in (1, B):
        raise ValueError(f"position_ids has shape {tuple(position_ids.shape)}, expected {(B, N, 3)} or {(N, 3)}.")
    for name, ids in (("attention_mask", attention_mask), ("layer_kind_ids", layer_kind_ids)):
        if ids is not None and ids.shape != (B, N):
            raise ValueError(f"{name} has shape {tuple(ids.shape)}, expected {(B, N)}.")
    return position_ids.expand(B, N, 3)


__all__ = ["SaneForPreTraining", "SaneModel", "SanePreTrainedModel"]
