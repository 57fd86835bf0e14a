import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, AutoModel, AutoModelForPreTraining

from modeling_sane import (
    SaneConfig,
    SaneForPreTraining,
    SaneModel,
    nt_xent_loss,
    reconstruction_loss,
)
from modeling_sane.modeling_sane import plan_windows, sinusoidal_encoding

B, N, D, L, H = 3, 11, 7, 5, 8  # batch, tokens, token_size, latent_size, hidden_size


@pytest.fixture(autouse=True)
def fixed_seed():
    torch.manual_seed(0)


ROOT = Path(__file__).parents[2]


def make_config(**changes):
    sizes = {
        "token_size": D,
        "latent_size": L,
        "hidden_size": H,
        "num_attention_heads": 2,
        "num_hidden_layers": 2,
        "window_size": 13,
        "halo": 2,
        "initializer_range": 0.3,
    }
    return SaneConfig(**{**sizes, **changes})


def make_batch(batch=B, tokens=N):
    position_ids = torch.stack([torch.arange(tokens), torch.arange(tokens) // 4, torch.arange(tokens) % 4], dim=-1)
    return {
        "token_values": torch.randn(batch, tokens, D),
        "position_ids": position_ids.expand(batch, tokens, 3),
        "layer_kind_ids": (torch.arange(tokens) // 4 % 6).expand(batch, tokens),
    }


def padded(batch, extra):
    """The same batch with `extra` padding tokens that hold garbage at the end."""
    tokens = batch["token_values"].shape[1]
    wide = make_batch(batch["token_values"].shape[0], tokens + extra)
    wide["token_values"] = wide["token_values"] * 100
    for name, values in batch.items():
        wide[name] = torch.cat([values, wide[name][:, tokens:]], dim=1)
    wide["attention_mask"] = (torch.arange(tokens + extra) < tokens).expand(len(values), -1)
    return wide


def assert_bit_equal(first, second):
    torch.testing.assert_close(first, second, rtol=0, atol=0)


# --- configuration


def test_default_configuration_builds_and_gives_room_for_a_linear_start():
    config = SaneConfig()
    assert config.hidden_size > config.token_size
    assert config.decoder_layers == config.num_hidden_layers
    assert config.mlp_size == 4 * config.hidden_size


def test_configuration_survives_saving(tmp_path):
    config = make_config(position_encoding="learned", max_position_embeddings=(20, 6, 9), normalize_targets=True)
    config.save_pretrained(tmp_path)
    loaded = SaneConfig.from_pretrained(tmp_path)
    skipped = {"transformers_version"}
    assert {k: v for k, v in loaded.to_dict().items() if k not in skipped} == {
        k: v for k, v in config.to_dict().items() if k not in skipped
    }
    assert loaded.max_position_embeddings == [20, 6, 9]
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "sane"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"token_size": "7"}, "token_size"),
        ({"token_size": 0}, "`token_size` is 0, expected more than 0"),
        ({"halo": -1}, "`halo` is -1"),
        ({"hidden_size": 10, "num_attention_heads": 4}, "not a multiple of `num_attention_heads` 4"),
        ({"hidden_size": 10, "num_attention_heads": 5}, "expected a multiple of 4"),
        ({"hidden_dropout": 1.0}, "`hidden_dropout` is 1.0"),
        ({"contrastive_weight": 1.5}, "`contrastive_weight` is 1.5"),
        ({"position_encoding": "rotary"}, "position_encoding"),
        ({"position_encoding": "learned"}, "`max_position_embeddings` must give three numbers"),
        ({"max_position_embeddings": [4, 5]}, r"is \[4, 5\], expected three numbers"),
    ],
)
def test_contradictory_configuration_is_refused(changes, message):
    with pytest.raises(StrictDataclassError, match=message):
        make_config(**changes)


def test_misspelt_keyword_is_refused_with_the_field_meant():
    with pytest.raises(ValueError, match=r"no field `latent_sise`\. Did you mean `latent_size`"):
        make_config(latent_sise=4)


def test_foreign_keyword_is_kept():
    assert make_config(trained_on="digits").trained_on == "digits"


# --- saving and loading


@pytest.mark.parametrize("position_encoding", ["sinusoidal", "learned"])
def test_save_and_load_are_bit_equal(tmp_path, position_encoding):
    model = SaneModel(make_config(position_encoding=position_encoding, max_position_embeddings=[20, 6, 9])).eval()
    model.save_pretrained(tmp_path)
    loaded, info = SaneModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert model.state_dict().keys() == loaded.state_dict().keys()
    for name, tensor in model.state_dict().items():
        assert_bit_equal(loaded.state_dict()[name], tensor)
    batch = make_batch()
    assert_bit_equal(loaded(**batch).last_hidden_state, model(**batch).last_hidden_state)


def test_sharded_checkpoint_loads_bit_equal(tmp_path):
    model = SaneForPreTraining(make_config())
    model.save_pretrained(tmp_path, max_shard_size="4KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
    loaded = SaneForPreTraining.from_pretrained(tmp_path)
    for name, tensor in model.state_dict().items():
        assert_bit_equal(loaded.state_dict()[name], tensor)


def test_auto_classes_open_a_pretraining_checkpoint_as_either_model(tmp_path):
    model = SaneForPreTraining(make_config()).eval()
    model.save_pretrained(tmp_path)
    assert type(AutoConfig.from_pretrained(tmp_path)) is SaneConfig
    whole = AutoModelForPreTraining.from_pretrained(tmp_path)
    bare, info = AutoModel.from_pretrained(tmp_path, output_loading_info=True)
    assert type(whole) is SaneForPreTraining
    assert type(bare) is SaneModel
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    batch = make_batch()
    assert_bit_equal(whole(**batch).latents, model(**batch).latents)
    assert_bit_equal(bare(**batch).last_hidden_state, model(**batch).latents)


def test_bare_checkpoint_opens_for_pretraining_with_a_fresh_head(tmp_path):
    model = SaneModel(make_config())
    model.save_pretrained(tmp_path)
    loaded, info = SaneForPreTraining.from_pretrained(tmp_path, output_loading_info=True)
    assert info["missing_keys"]
    assert all(name.startswith("projection_head.") for name in info["missing_keys"])
    for name, tensor in model.state_dict().items():
        assert_bit_equal(loaded.sane.state_dict()[name], tensor)
    weight = loaded.projection_head.layers[0].weight
    assert 0.2 < weight.std() < 0.4


def test_other_sizes_are_refused_or_made_anew_on_request(tmp_path):
    model = SaneModel(make_config())
    model.save_pretrained(tmp_path)
    with pytest.raises(RuntimeError):
        SaneModel.from_pretrained(tmp_path, latent_size=L + 1)
    loaded, info = SaneModel.from_pretrained(
        tmp_path, latent_size=L + 1, ignore_mismatched_sizes=True, output_loading_info=True
    )
    assert {name for name, *_ in info["mismatched_keys"]} == {"encoder.readout.weight", "decoder.embedding.weight"}
    assert loaded(**make_batch()).last_hidden_state.shape == (B, N, L + 1)
    assert_bit_equal(loaded.encoder.embedding.weight, model.encoder.embedding.weight)


# --- initial weights


def test_init_weights_fills_every_parameter_and_buffer():
    config = make_config(use_bias=True, position_encoding="learned", max_position_embeddings=[20, 6, 9])
    model = SaneForPreTraining(config)
    for tensor in model.state_dict().values():
        tensor.fill_(1e9)
    model.apply(model._init_weights)
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        assert tensor.abs().max() < 10, name


def test_initial_distributions_are_those_of_the_docstring():
    model = SaneModel(SaneConfig(token_size=40, latent_size=30, hidden_size=80, num_attention_heads=4, use_bias=True))
    residual = 0.06 / math.sqrt(2 * 4)
    block = model.encoder.blocks[1]
    for tensor, std in [
        (model.encoder.embedding.weight, 0.06),
        (block.attention.qkv_proj.weight, 0.06),
        (block.mlp.in_proj.weight, 0.06),
        (model.decoder.readout.weight, 0.06),
        (block.attention.out_proj.weight, residual),
        (block.mlp.out_proj.weight, residual),
    ]:
        assert tensor.std().item() == pytest.approx(std, rel=0.05)
    assert block.attention_norm.weight.eq(1).all()
    assert block.mlp.in_proj.bias.eq(0).all()


def test_the_model_without_biases_has_none():
    assert not [name for name, _ in SaneForPreTraining(make_config()).named_parameters() if name.endswith("bias")]


def correlated_tokens(batch, tokens, size, generator):
    """Tokens of rank 9 plus noise, around a mean that differs from token to token, and their value mask."""
    mixing = torch.randn(9, size, generator=generator)
    values = torch.randn(batch, tokens, 9, generator=generator) @ mixing
    values = values + 0.3 * torch.randn(batch, tokens, size, generator=generator)
    values = values + torch.randn(1, tokens, size, generator=generator)
    mask = torch.ones(batch, tokens, size, dtype=torch.bool)
    mask[:, tokens // 2 :, size // 2 :] = False
    return values, mask


def r_squared(values, reconstruction, mask):
    values, reconstruction = values[mask], reconstruction[mask]
    return 1 - (values - reconstruction).square().sum() / (values - values.mean()).square().sum()


@pytest.mark.parametrize(
    ("latent_size", "hidden_size", "block_scale", "use_bias"),
    [(6, 64, 0.0, False), (6, 64, 0.0, True), (6, 64, 0.01, False), (6, 20, 0.0, False), (25, 64, 0.0, False)],
)
def test_linear_start_is_as_good_as_pca(latent_size, hidden_size, block_scale, use_bias):
    size, tokens = 18, 23
    config = make_config(
        token_size=size, latent_size=latent_size, hidden_size=hidden_size, initializer_range=0.06, use_bias=use_bias
    )
    model = SaneModel(config).eval()
    values, mask = correlated_tokens(60, tokens, size, torch.Generator().manual_seed(1))
    ids = make_batch(60, tokens)
    position_ids, kinds = ids["position_ids"], ids["layer_kind_ids"]
    model.initialize_linear(values, position_ids, value_mask=mask, layer_kind_ids=kinds, block_scale=block_scale)
    with torch.no_grad():
        latents = model(values, position_ids, value_mask=mask, layer_kind_ids=kinds).last_hidden_state
        reconstruction = model.decode(latents, position_ids, layer_kind_ids=kinds)

    rows = values.masked_fill(~mask, 0).flatten(0, 1)
    centered = rows - rows.mean(0)
    axes = torch.linalg.svd(centered, full_matrices=False)[2][:latent_size]
    pca = (centered @ axes.T @ axes + rows.mean(0)).view_as(values)
    assert r_squared(values, reconstruction, mask) >= r_squared(values, pca, mask) - 0.01
    assert r_squared(values, pca, mask) > 0.6


def test_linear_start_ignores_padding_tokens():
    first, second = SaneModel(make_config()), SaneModel(make_config())
    batch = make_batch(20)
    first.initialize_linear(**batch)
    second.initialize_linear(**padded(batch, 4))
    # the blocks and the layer kinds are random, the rest must agree
    second.positions.load_state_dict(first.positions.state_dict())
    second.initialize_linear(**padded(batch, 4))
    for name in ("encoder", "decoder"):
        torch.testing.assert_close(getattr(first, name).readout.weight, getattr(second, name).readout.weight)


# --- forward


@pytest.mark.parametrize("position_encoding", ["sinusoidal", "learned"])
def test_forward_shapes_and_pooling(position_encoding):
    config = make_config(position_encoding=position_encoding, max_position_embeddings=[20, 6, 9])
    model = SaneModel(config).eval()
    output = model(**padded(make_batch(), 2), output_hidden_states=True)
    assert output.last_hidden_state.shape == (B, N + 2, L)
    assert output.last_hidden_state[:, N:].eq(0).all()
    torch.testing.assert_close(output.pooler_output, output.last_hidden_state[:, :N].mean(dim=1))
    assert [tuple(states.shape) for states in output.hidden_states] == [(B, N + 2, H)] * 3


def test_two_calls_give_the_same_bits():
    model, batch = SaneModel(make_config()).eval(), make_batch()
    assert_bit_equal(model(**batch).last_hidden_state, model(**batch).last_hidden_state)


def test_dropout_acts_in_training_only():
    model, batch = SaneModel(make_config(hidden_dropout=0.5, attention_dropout=0.5)), make_batch()
    assert not torch.equal(model(**batch)[0], model(**batch)[0])
    model.eval()
    assert_bit_equal(model(**batch)[0], model(**batch)[0])


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_a_window_alone_equals_the_same_window_in_a_padded_batch(implementation):
    model = SaneModel(make_config(attn_implementation=implementation)).eval()
    assert model.config._attn_implementation == implementation
    batch = make_batch()
    alone, among = model(**batch), model(**padded(batch, 6))
    torch.testing.assert_close(among.last_hidden_state[:, :N], alone.last_hidden_state)
    torch.testing.assert_close(among.pooler_output, alone.pooler_output)
    ids = {name: ids for name, ids in padded(batch, 6).items() if name != "token_values"}
    decoded = model.decode(among.last_hidden_state, **ids)
    alone = model.decode(alone.last_hidden_state, batch["position_ids"], layer_kind_ids=batch["layer_kind_ids"])
    torch.testing.assert_close(decoded[:, :N], alone)
    assert decoded[:, N:].eq(0).all()


def test_eager_attention_equals_sdpa():
    config = make_config()
    eager, sdpa = SaneModel(make_config(attn_implementation="eager")).eval(), SaneModel(config).eval()
    assert sdpa.config._attn_implementation == "sdpa"
    sdpa.load_state_dict(eager.state_dict())
    batch = padded(make_batch(), 3)
    torch.testing.assert_close(eager(**batch)[0], sdpa(**batch)[0], rtol=1e-5, atol=1e-6)


def test_every_token_sees_every_other_one():
    model, batch = SaneModel(make_config()).eval(), make_batch(1)
    values = batch.pop("token_values").requires_grad_()
    for token in (0, N - 1):
        (seen,) = torch.autograd.grad(model(values, **batch)[0][0, token].sum(), values)
        assert seen[0].abs().sum(dim=-1).gt(0).all()


def test_values_that_are_not_real_do_not_matter():
    model, batch = SaneModel(make_config()).eval(), make_batch()
    mask = torch.rand(B, N, D) < 0.6
    values = batch.pop("token_values")
    garbage = torch.where(mask, values, torch.nan)
    zeroed = torch.where(mask, values, 0.0)
    assert_bit_equal(model(garbage, value_mask=mask, **batch)[0], model(zeroed, **batch)[0])


def test_one_position_table_serves_the_whole_batch():
    model, batch = SaneModel(make_config()).eval(), make_batch()
    expected = model(**batch)[0]
    expected_sequence = model.encode_sequence(**batch, window_size=3, halo=1)
    batch["position_ids"] = batch["position_ids"][0]
    assert_bit_equal(model(**batch)[0], expected)
    assert_bit_equal(model.encode_sequence(**batch, window_size=3, halo=1), expected_sequence)


@pytest.mark.parametrize("axis", [0, 1, 2])
@pytest.mark.parametrize("position_encoding", ["sinusoidal", "learned"])
def test_each_position_index_matters(axis, position_encoding):
    config = make_config(position_encoding=position_encoding, max_position_embeddings=[20, 6, 9])
    model, batch = SaneModel(config).eval(), make_batch()
    before = model(**batch)[0]
    batch["position_ids"] = batch["position_ids"].clone()
    batch["position_ids"][..., axis] += 1
    assert (model(**batch)[0] - before).abs().max() > 1e-3


def test_sinusoidal_encoding_against_hand_values():
    encoded = sinusoidal_encoding(torch.tensor([0, 3]), 4)
    expected = [[0, 0, 1, 1], [math.sin(3), math.sin(0.03), math.cos(3), math.cos(0.03)]]
    torch.testing.assert_close(encoded, torch.tensor(expected, dtype=torch.float32))


def test_layer_kinds_matter_only_with_their_embedding():
    batch = make_batch()
    others = {**batch, "layer_kind_ids": (batch["layer_kind_ids"] + 1) % 6}
    with_kinds = SaneModel(make_config()).eval()
    assert (with_kinds(**batch)[0] - with_kinds(**others)[0]).abs().max() > 1e-3
    without = SaneModel(make_config(use_layer_kind_embedding=False)).eval()
    assert_bit_equal(without(**batch)[0], without(**others)[0])


@pytest.mark.parametrize("name", ["sequence", "layer", "channel"])
def test_positions_beyond_the_learned_maximum_are_refused(name):
    axis = ("sequence", "layer", "channel").index(name)
    model = SaneModel(make_config(position_encoding="learned", max_position_embeddings=[N, 3, 4])).eval()
    batch = make_batch()
    model(**batch)
    batch["position_ids"] = batch["position_ids"].clone()
    batch["position_ids"][1, 2, axis] = 12
    with pytest.raises(
        ValueError, match=rf"largest {name} index is 12, but config.max_position_embeddings is \[11, 3"
    ):
        model(**batch)


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("token_values", (B, N, D + 1), r"shape \(3, 11, 8\), this model expects \(batch, tokens, 7\)"),
        ("token_values", (N, D), r"shape \(11, 7\), this model expects"),
        ("position_ids", (B, N, 2), r"position_ids has shape \(3, 11, 2\), expected \(3, 11, 3\)"),
        ("position_ids", (B + 1, N, 3), "position_ids has shape"),
        ("attention_mask", (B, N + 1), r"attention_mask has shape \(3, 12\), expected \(3, 11\)"),
        ("layer_kind_ids", (N,), "layer_kind_ids has shape"),
    ],
)
def test_wrong_shapes_are_refused(name, shape, message):
    batch = make_batch()
    batch[name] = torch.zeros(shape) if name == "token_values" else torch.zeros(shape, dtype=torch.long)
    with pytest.raises(ValueError, match=message):
        SaneModel(make_config())(**batch)


def test_bfloat16_model_keeps_its_dtype_and_stays_close():
    model, batch = SaneModel(make_config()).eval(), make_batch()
    expected = model(**batch)[0]
    half = model.to(torch.bfloat16)(**batch)
    assert half.last_hidden_state.dtype == half.pooler_output.dtype == torch.bfloat16
    assert (half.last_hidden_state - expected).abs().max() < 0.05 * expected.abs().max()


def test_saved_bfloat16_weights_come_back_as_bfloat16(tmp_path):
    SaneModel(make_config()).to(torch.bfloat16).save_pretrained(tmp_path)
    assert SaneModel.from_pretrained(tmp_path).dtype == torch.bfloat16


# --- sequences in halo windows


class Witness(torch.nn.Module):
    """Stands in for the encoder: each token tells the first and last real token of the window it was treated in."""

    def __init__(self):
        super().__init__()
        self.embedding = torch.nn.Linear(D, L)
        self.widths, self.batches = set(), []

    def forward(self, values, positions, attention_mask=None):
        index = values[..., 0]
        real = torch.ones_like(index, dtype=torch.bool) if attention_mask is None else attention_mask
        self.widths.add(values.shape[1])
        self.batches.append(len(values))
        first = index.masked_fill(~real, 1e6).amin(1, keepdim=True).expand_as(index)
        last = index.masked_fill(~real, -1).amax(1, keepdim=True).expand_as(index)
        return torch.stack([index, first, last], dim=-1), ()


@pytest.mark.parametrize(
    ("tokens", "window_size", "halo"),
    [(29, 5, 2), (30, 5, 2), (31, 5, 0), (23, 2, 6), (17, 1, 3), (12, 8, 2), (13, 8, 2)],
)
def test_every_token_has_its_halo_of_context_unless_at_the_border(tokens, window_size, halo):
    model = SaneModel(make_config())
    model.encoder = witness = Witness()
    lengths = [tokens, tokens - 4, 3]  # the second ends within the last window, the third within the first
    batch = make_batch(3, tokens)
    batch["token_values"][..., 0] = torch.arange(tokens)
    mask = torch.arange(tokens) < torch.tensor(lengths)[:, None]
    index, first, last = model.encode_sequence(
        **batch, window_size=window_size, halo=halo, batch_size=2, attention_mask=mask
    ).unbind(-1)
    for row, length in enumerate(lengths):
        here = torch.arange(length)
        assert index[row, :length].tolist() == here.tolist()
        assert ((here - first[row, :length] >= halo) | (first[row, :length] == 0)).all()
        assert ((last[row, :length] - here >= halo) | (last[row, :length] == length - 1)).all()
        assert index[row, length:].eq(0).all()
    assert witness.widths == {min(tokens, window_size + 2 * halo)}
    assert max(witness.batches) <= 2


def test_windows_are_shifted_inward_at_both_ends():
    rows, firsts, starts = plan_windows(torch.tensor([14, 9]), 14, core=4, halo=1)
    assert rows.tolist() == [0, 0, 0, 0, 1, 1, 1]
    assert firsts.tolist() == [0, 4, 8, 12, 0, 4, 8]
    assert starts.tolist() == [0, 3, 7, 8, 0, 3, 3]


def test_sequence_no_longer_than_a_window_equals_one_pass():
    model, batch = SaneModel(make_config()).eval(), make_batch()
    ids = {name: batch[name] for name in ("position_ids", "layer_kind_ids")}
    latents = model.encode(**batch)
    assert_bit_equal(model.encode_sequence(**batch), latents)
    assert_bit_equal(model.encode_sequence(**batch, window_size=N - 4, halo=2), latents)
    assert_bit_equal(model.decode_sequence(latents, **ids), model.decode(latents, **ids))
    cut = model.encode_sequence(**batch, window_size=N - 5, halo=2)
    assert (cut - latents).abs().max() > 1e-4


def test_padded_sequences_equal_each_sequence_alone():
    model = SaneModel(make_config()).eval()
    batch = make_batch(3, 31)
    lengths = [31, 19, 4]
    mask = torch.arange(31) < torch.tensor(lengths)[:, None]
    together = model.encode_sequence(**batch, attention_mask=mask, window_size=5, halo=2, batch_size=4)
    for row, length in enumerate(lengths):
        single = {name: values[row : row + 1, :length] for name, values in batch.items()}
        torch.testing.assert_close(
            together[row : row + 1, :length], model.encode_sequence(**single, window_size=5, halo=2)
        )


@pytest.mark.parametrize(("window_size", "halo", "batch_size"), [(1, 0, 3), (4, 1, 1), (6, 5, 50)])
def test_windows_do_not_matter_to_a_model_that_treats_tokens_alone(window_size, halo, batch_size):
    model, batch = SaneModel(make_config()).eval(), make_batch(2, 29)
    for block in [*model.encoder.blocks, *model.decoder.blocks]:
        torch.nn.init.zeros_(block.attention.out_proj.weight)
    windows = {"window_size": window_size, "halo": halo, "batch_size": batch_size}
    ids = {name: batch[name] for name in ("position_ids", "layer_kind_ids")}
    latents = model.encode(**batch)
    torch.testing.assert_close(model.encode_sequence(**batch, **windows), latents)
    torch.testing.assert_close(model.decode_sequence(latents, **ids, **windows), model.decode(latents, **ids))


def test_sequences_are_differentiable():
    model, batch = SaneModel(make_config()).eval(), make_batch(2, 29)
    values = batch.pop("token_values").requires_grad_()
    latents = model.encode_sequence(values, **batch, window_size=3, halo=1)
    model.decode_sequence(latents, **batch, window_size=3, halo=1).square().sum().backward()
    assert values.grad.abs().sum(dim=-1).gt(0).all()


@pytest.mark.parametrize("sizes", [{"window_size": 0}, {"halo": -1}, {"batch_size": 0}])
def test_impossible_windows_are_refused(sizes):
    with pytest.raises(ValueError, match=f"{next(iter(sizes))} {next(iter(sizes.values()))}"):
        SaneModel(make_config()).encode_sequence(**make_batch(), **sizes)


# --- losses


def test_masked_loss_against_hand_values():
    target = torch.tensor([[[1.0, 2.0, 9.0], [3.0, 9.0, 9.0]]])
    reconstruction = torch.tensor([[[1.5, 0.0, -50.0], [2.0, torch.nan, 7.0]]])
    mask = torch.tensor([[[True, True, False], [True, False, False]]])
    loss = reconstruction_loss(reconstruction, target, mask)
    assert loss.item() == pytest.approx((0.5**2 + 2**2 + 1**2) / 3)


def test_normalised_loss_against_hand_values():
    target = torch.tensor([[[1.0, 3.0, 9.0], [100.0, 300.0, 9.0], [5.0, 5.0, 5.0]]])
    reconstruction = torch.tensor([[[1.5, 3.0, 0.0], [100.0, 350.0, 0.0], [5.0, 5.0, 6.0]]])
    mask = torch.tensor([[[True, True, False], [True, True, False], [True, True, True]]])
    floor = 0.05 * math.sqrt((1 + 9 + 100**2 + 300**2 + 3 * 25) / 7)
    assert 1 < floor < 100  # premise: the stds of the tokens are 1, 100 and 0
    expected = ((0.5 / floor) ** 2 + (50 / 100) ** 2 + (1 / floor) ** 2) / 7
    loss = reconstruction_loss(reconstruction, target, mask, normalize=True)
    assert loss.item() == pytest.approx(expected, rel=1e-5)


def test_normalised_loss_of_zeros_is_finite():
    zeros = torch.zeros(1, 2, 3)
    assert reconstruction_loss(zeros, zeros, zeros.eq(0), normalize=True) == 0


def test_nt_xent_against_hand_values():
    views = [[3.0, 4.0], [1.0, 0.0], [0.0, 2.0], [1.0, 1.0]]  # two first views, two second views
    units = [[x / math.hypot(x, y), y / math.hypot(x, y)] for x, y in views]
    expected = 0.0
    for i, partner in enumerate([2, 3, 0, 1]):
        similarity = [sum(a * b for a, b in zip(units[i], other, strict=True)) / 0.5 for other in units]
        total = sum(math.exp(s) for j, s in enumerate(similarity) if j != i)
        expected -= math.log(math.exp(similarity[partner]) / total) / 4
    loss = nt_xent_loss(torch.tensor(views[:2]), torch.tensor(views[2:]), temperature=0.5)
    assert loss.item() == pytest.approx(expected, rel=1e-5)


def test_nt_xent_is_small_for_matching_pairs_and_large_for_swapped_ones():
    first, second = torch.eye(4)[:3], torch.eye(4)[:3] * 2
    assert nt_xent_loss(first, second, 0.1) < 0.01
    assert nt_xent_loss(first, second.flip(0), 0.1) > 5


def test_nt_xent_refuses_a_single_pair():
    with pytest.raises(ValueError, match=r"holds only one\. Use a batch of at least 2"):
        nt_xent_loss(torch.ones(1, 4), torch.ones(1, 4), 0.1)


# --- pre-training


def make_views(batch=B, tokens=N):
    views = make_batch(batch, tokens)
    views["value_mask"] = torch.rand(batch, tokens, D) < 0.7
    views["second_token_values"] = views["token_values"] + 0.1 * torch.randn(batch, tokens, D)
    return views


def test_loss_is_the_weighted_sum_and_every_part_belongs_to_its_view():
    model, views = SaneForPreTraining(make_config(contrastive_weight=0.3)).eval(), make_views()
    output = model(**views)
    torch.testing.assert_close(output.loss, 0.3 * output.loss_contrastive + 0.7 * output.loss_reconstruction)
    single = {name: views[name] for name in ("position_ids", "layer_kind_ids", "value_mask")}
    first = model(views["token_values"], **single)
    second = model(views["second_token_values"], **single)
    assert first.loss_contrastive is None
    assert_bit_equal(first.loss, first.loss_reconstruction)
    torch.testing.assert_close(output.latents, first.latents)
    torch.testing.assert_close(output.reconstruction, first.reconstruction)
    torch.testing.assert_close(output.second_reconstruction, second.reconstruction)
    torch.testing.assert_close(output.loss_reconstruction, (first.loss + second.loss) / 2)
    projected = [model.projection_head(latents) for latents in (output.latents, output.second_latents)]
    torch.testing.assert_close(output.loss_contrastive, nt_xent_loss(*projected, 0.1))


def test_labels_replace_the_views_as_targets():
    model, views = SaneForPreTraining(make_config()).eval(), make_views()
    labels, second_labels = torch.randn(2, B, N, D)
    output = model(**views, labels=labels, second_labels=second_labels)
    mask = views["value_mask"]
    errors = [(output.reconstruction - labels)[mask], (output.second_reconstruction - second_labels)[mask]]
    torch.testing.assert_close(output.loss_reconstruction, torch.cat(errors).square().mean())


def test_padding_values_and_padding_tokens_do_not_matter_to_the_losses():
    model, views = SaneForPreTraining(make_config()).eval(), make_views()
    expected = model(**views)
    wide = padded(make_batch(), 2)
    for name in ("token_values", "second_token_values", "value_mask"):
        wide[name] = torch.cat([views[name], torch.ones(B, 2, D, dtype=views[name].dtype)], dim=1)
    for name in ("token_values", "second_token_values"):
        wide[name] = wide[name].masked_fill(~wide["value_mask"], 77.0)
        wide[name][:, N:] = 55.0
    output = model(**wide)
    torch.testing.assert_close(output.loss_reconstruction, expected.loss_reconstruction)
    torch.testing.assert_close(output.loss_contrastive, expected.loss_contrastive)


def test_tuple_output_equals_dict_output():
    model, views = SaneForPreTraining(make_config()).eval(), make_views()
    for part, expected in zip(model(**views, return_dict=False), model(**views).values(), strict=True):
        assert_bit_equal(part, expected)
    batch = make_batch()
    for part, expected in zip(model.sane(**batch, return_dict=False), model.sane(**batch).values(), strict=True):
        assert_bit_equal(part, expected)


@pytest.mark.parametrize("position_encoding", ["sinusoidal", "learned"])
def test_every_parameter_gets_a_gradient(position_encoding):
    config = make_config(
        position_encoding=position_encoding, max_position_embeddings=[20, 6, 9], use_bias=True, num_decoder_layers=1
    )
    model = SaneForPreTraining(config)
    model(**make_views()).loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().max() > 0, name


def test_without_contrastive_weight_there_is_no_head_and_every_parameter_gets_a_gradient():
    model = SaneForPreTraining(make_config(contrastive_weight=0.0))
    output = model(**make_views())
    assert output.loss_contrastive is None
    output.loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_activation_checkpointing_gives_equal_gradients():
    model, views = SaneForPreTraining(make_config()).train(), make_views()
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            model.activation_checkpointing_enable()
            assert model.sane.encoder.blocks[0].gradient_checkpointing
        model.zero_grad()
        model(**views).loss.backward()
        gradients.append([parameter.grad.clone() for parameter in model.parameters()])
    torch.testing.assert_close(gradients[0], gradients[1])


def test_losses_are_float32_under_autocast_and_in_bfloat16():
    model, views = SaneForPreTraining(make_config()), make_views()
    expected = model(**views)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = model(**views)
    half = model.to(torch.bfloat16)(**views)
    for output in (mixed, half):
        assert output.reconstruction.dtype == torch.bfloat16
        for name in ("loss", "loss_reconstruction", "loss_contrastive"):
            assert output[name].dtype == torch.float32
            assert output[name].item() == pytest.approx(expected[name].item(), rel=0.1)


def test_windows_beyond_the_projection_head_are_refused():
    with pytest.raises(ValueError, match=r"has 14 tokens, the projection head takes at most config\.window_size = 13"):
        SaneForPreTraining(make_config())(**make_views(tokens=14))


def test_views_of_different_windows_are_refused():
    views = make_views()
    views["second_token_values"] = views["second_token_values"][:, 1:]
    with pytest.raises(ValueError, match=r"second_token_values has shape \(3, 10, 7\)"):
        SaneForPreTraining(make_config())(**views)


def test_a_few_steps_of_training_lower_the_loss():
    model, views = SaneForPreTraining(make_config()), make_views()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(30):
        loss = model(**views).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]


HALF_OF_THE_BATCH = """
import sys, torch, torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from modeling_sane import SaneForPreTraining
folder, rank = sys.argv[1], int(sys.argv[2])
torch.set_num_threads(1)
dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
model = SaneForPreTraining.from_pretrained(f"{folder}/model")
views = torch.load(f"{folder}/views.pt")
parallel = DistributedDataParallel(model)  # kept: it joins the gradients in backward
output = parallel(**{name: values.chunk(2)[rank] for name, values in views.items()})
output.loss.backward()
gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
torch.save({"loss": output.loss.item(), "gradients": gradients}, f"{folder}/rank{rank}.pt")
del parallel, output  # they hold threads of the group
dist.barrier()
dist.destroy_process_group()
"""


def test_two_processes_with_half_a_batch_equal_one_with_the_whole(tmp_path):
    views = make_views(batch=4)
    del views["value_mask"]  # so that both halves hold equally many values
    model = SaneForPreTraining(make_config())
    output = model(**views)
    output.loss.backward()
    model.save_pretrained(tmp_path / "model")
    torch.save({name: values.contiguous() for name, values in views.items()}, tmp_path / "views.pt")
    words = [sys.executable, "-c", HALF_OF_THE_BATCH, str(tmp_path)]
    processes = [subprocess.Popen([*words, rank], cwd=ROOT, stderr=subprocess.PIPE, text=True) for rank in "01"]
    for process in processes:
        errors = process.communicate(timeout=120)[1]
        assert process.returncode == 0, errors
    halves = [torch.load(tmp_path / f"rank{rank}.pt") for rank in (0, 1)]
    assert (halves[0]["loss"] + halves[1]["loss"]) / 2 == pytest.approx(output.loss.item(), rel=1e-5)
    for half in halves:
        for name, parameter in model.named_parameters():
            torch.testing.assert_close(
                half["gradients"][name], parameter.grad, rtol=1e-4, atol=1e-6, msg=lambda m, name=name: f"{name}: {m}"
            )
