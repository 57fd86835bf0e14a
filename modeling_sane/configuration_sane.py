"""Configuration of SANE: everything that is needed to rebuild the weights, and the weights of its losses."""

import difflib
from typing import Literal

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig


@strict
class SaneConfig(PreTrainedConfig):
    """Sizes and switches of a SANE model.

    Values are checked when the configuration is built and when it is saved. A keyword that looks like a misspelt field
    is refused; other unknown keywords are kept as attributes, as everywhere in transformers.

    Args:
        token_size (`int`, defaults to 288):
            Weight values in one token.
        latent_size (`int`, defaults to 128):
            Latent values for one token. `token_size / latent_size` is the compression of a full token.
        hidden_size (`int`, defaults to 384):
            Width of the transformer blocks. Must be a multiple of 4 and of `num_attention_heads`. At least
            `token_size` plus some room for positions lets a data-driven linear start be exact
            (`SaneModel.initialize_linear`).
        num_hidden_layers (`int`, defaults to 4):
            Transformer blocks of the encoder.
        num_decoder_layers (`int`, *optional*):
            Transformer blocks of the decoder; `None` means as many as the encoder has.
        num_attention_heads (`int`, defaults to 6):
            Attention heads of each block.
        intermediate_size (`int`, *optional*):
            Width inside the MLP of each block; `None` means four times `hidden_size`.
        use_bias (`bool`, defaults to `False`):
            Whether linear layers and layer norms of the blocks have biases. The paper's have none.
        hidden_dropout (`float`, defaults to 0.0):
            Dropout probability of the embeddings and of each block's two outputs.
        attention_dropout (`float`, defaults to 0.0):
            Dropout probability of the attention weights.
        layer_norm_eps (`float`, defaults to 1e-5):
            Added to the variance inside layer norms.
        position_encoding (`"sinusoidal"` or `"learned"`, defaults to `"sinusoidal"`):
            How the positions (sequence index n, layer index l, channel index k) enter. `"sinusoidal"` has no maximum,
            so that one model reads every architecture; `"learned"` is the paper's.
        max_position_embeddings (`list[int]` of length 3, *optional*):
            Number of learned positions for n, l and k; the paper takes `[55000, 100, 550]` for ResNet-18. Needed for
            `"learned"`, unused for `"sinusoidal"`.
        use_layer_kind_embedding (`bool`, defaults to `True`):
            Whether a learned vector for the kind of layer (conv, linear, norm, embedding, recurrent, other) is added
            to the positions.
        num_layer_kinds (`int`, defaults to 6):
            Number of layer kinds.
        window_size (`int`, defaults to 256):
            Tokens in a training window, and tokens that one window of a long sequence contributes. The projection head
            of pre-training is built for this length.
        halo (`int`, defaults to 32):
            Extra context tokens on both sides of a window when a long sequence is encoded or decoded.
        initializer_range (`float`, defaults to 0.06):
            Standard deviation of the initial weights. The paper takes GPT-2's 0.02; 0.06 reached a far better
            reconstruction in the same training time when we measured it, because the blocks of a small
            model hardly act on their residual stream at 0.02.
        projection_size (`int`, defaults to 30):
            Width of the projection head, which serves the contrastive loss only.
        contrastive_weight (`float`, defaults to 0.05):
            Weight of the contrastive loss, between 0 and 1; the reconstruction loss has one minus it. At 0 the model
            has no projection head.
        nt_xent_temperature (`float`, defaults to 0.1):
            Temperature of the contrastive loss.
        normalize_targets (`bool`, defaults to `False`):
            Whether the reconstruction error of a token is measured in units of that token's own standard deviation, so
            that layers of small magnitude count as much as the others (arXiv 2504.10141). For mixed zoos.

    Raises:
        huggingface_hub.errors.StrictDataclassError: a value has the wrong type, is out of range, or does not fit the
            others.
        ValueError: a keyword looks like a misspelt field.
    """

    model_type = "sane"

    token_size: int = 288
    latent_size: int = 128
    hidden_size: int = 384
    num_hidden_layers: int = 4
    num_decoder_layers: int | None = None
    num_attention_heads: int = 6
    intermediate_size: int | None = None
    use_bias: bool = False
    hidden_dropout: float | int = 0.0
    attention_dropout: float | int = 0.0
    layer_norm_eps: float = 1e-5
    position_encoding: Literal["sinusoidal", "learned"] = "sinusoidal"
    max_position_embeddings: list[int] | tuple[int, int, int] | None = None
    use_layer_kind_embedding: bool = True
    num_layer_kinds: int = 6
    window_size: int = 256
    halo: int = 32
    initializer_range: float | int = 0.06
    projection_size: int = 30
    contrastive_weight: float | int = 0.05
    nt_xent_temperature: float | int = 0.1
    normalize_targets: bool = False

    def __post_init__(self, **kwargs):
        for name in kwargs:
            close = difflib.get_close_matches(name, SaneConfig.__annotations__, n=1, cutoff=0.85)
            if close:
                raise ValueError(f"SaneConfig has no field `{name}`. Did you mean `{close[0]}`?")
        if self.max_position_embeddings is not None:
            self.max_position_embeddings = list(self.max_position_embeddings)  # JSON gives lists back
        super().__post_init__(**kwargs)

    @property
    def decoder_layers(self) -> int:
        """Transformer blocks of the decoder."""
        return self.num_hidden_layers if self.num_decoder_layers is None else self.num_decoder_layers

    @property
    def mlp_size(self) -> int:
        """Width inside the MLP of each block."""
        return 4 * self.hidden_size if self.intermediate_size is None else self.intermediate_size

    def validate_sizes(self):
        """Refuse sizes that are not positive."""
        positive = [
            *("token_size", "latent_size", "hidden_size", "num_attention_heads", "num_layer_kinds", "window_size"),
            *("projection_size", "initializer_range", "nt_xent_temperature", "layer_norm_eps"),
        ]
        for name in positive:
            if not getattr(self, name) > 0:
                raise ValueError(f"`{name}` is {getattr(self, name)}, expected more than 0.")
        for name in ("num_hidden_layers", "num_decoder_layers", "halo"):
            if (getattr(self, name) or 0) < 0:
                raise ValueError(f"`{name}` is {getattr(self, name)}, expected 0 or more.")
        if self.intermediate_size is not None and self.intermediate_size <= 0:
            raise ValueError(f"`intermediate_size` is {self.intermediate_size}, expected more than 0, or None.")

    def validate_hidden_size(self):
        """Refuse a width that does not divide into heads and position encodings."""
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"`hidden_size` {self.hidden_size} is not a multiple of `num_attention_heads` "
                f"{self.num_attention_heads}."
            )
        if self.hidden_size % 4:
            raise ValueError(
                f"`hidden_size` is {self.hidden_size}, expected a multiple of 4: each half holds pairs of sine and cosine."
            )

    def validate_probabilities(self):
        """Refuse dropouts and loss weights outside of their range."""
        for name in ("hidden_dropout", "attention_dropout"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"`{name}` is {getattr(self, name)}, expected at least 0 and less than 1.")
        if not 0 <= self.contrastive_weight <= 1:
            raise ValueError(f"`contrastive_weight` is {self.contrastive_weight}, expected a value from 0 to 1.")

    def validate_positions(self):
        """Refuse learned positions without three maxima."""
        maxima = self.max_position_embeddings
        if maxima is None:
            if self.position_encoding == "learned":
                raise ValueError(
                    '`position_encoding` is "learned", so `max_position_embeddings` must give three numbers: how many '
                    "sequence, layer and channel indices there are, e.g. [55000, 100, 550]."
                )
        elif len(maxima) != 3 or min(maxima) < 1:
            raise ValueError(f"`max_position_embeddings` is {maxima}, expected three numbers of at least 1.")


__all__ = ["SaneConfig"]
