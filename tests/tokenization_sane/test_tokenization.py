"""The tokenizer: every checkpoint comes back bit for bit, and with its own statistics."""

import json
import os
import pickle
import subprocess
import sys

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import nn
from transformers import AutoFeatureExtractor, AutoTokenizer

from tokenization_sane import CheckpointLayout, SaneWeightTokenizer
from tokenization_sane.checkpoint_writer_sane import CheckpointWriter

torch.set_num_threads(1)

FLOAT8 = [getattr(torch, name) for name in sorted(vars(torch)) if name.startswith("float8_")]
FLOATS = [torch.float32, torch.float16, torch.bfloat16, *FLOAT8, torch.complex64, torch.complex32]
OTHERS = [torch.int64, torch.int8, torch.uint8, torch.uint16, torch.uint32, torch.uint64, torch.bool]
BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def bits(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor's bytes as integers: tells 0.0 from -0.0, and compares dtypes that have no ==."""
    return (
        tensor.resolve_conj().contiguous().view(BITS[tensor.element_size()]) if tensor.dtype != torch.bool else tensor
    )


def assert_same(found: dict, expected: dict):
    assert list(found) == list(expected)
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype, name
        assert found[name].shape == tensor.shape, name
        assert torch.equal(bits(found[name]), bits(tensor)), name


def round_trip(tokenizer: SaneWeightTokenizer, source, **kwargs) -> dict:
    batch = tokenizer(source, **kwargs)
    return tokenizer.decode(
        batch["token_values"][0], batch["layouts"][0], batch["passthrough"][0], batch["statistics"][0]
    )


def random_tensor(shape: tuple, dtype: torch.dtype, seed: int) -> torch.Tensor:
    values = torch.randn(*shape, 2, generator=torch.Generator().manual_seed(seed)) * 3
    if dtype.is_complex:
        return torch.view_as_complex(values.to(dtype.to_real()))
    return values[..., 0].abs().to(dtype) if dtype not in FLOATS else values[..., 0].to(dtype)


@st.composite
def state_dicts(draw) -> dict[str, torch.Tensor]:
    """Modules with a few tensors each: any rank, size (0 too) and dtype; transposed, cut out of a buffer, or tied."""
    tensors: dict[str, torch.Tensor] = {}
    for number in range(draw(st.integers(0, 4))):
        prefix = draw(st.sampled_from(["", f"block.{number}.", f"layer{number}."]))
        for name in draw(
            st.lists(st.sampled_from(["weight", "bias", "scale", "running", "x"]), unique=True, max_size=4)
        ):
            shape = tuple(draw(st.lists(st.integers(0, 5), max_size=4)))
            tensor = random_tensor(shape, draw(st.sampled_from(FLOATS + OTHERS)), draw(st.integers(0, 99)))
            how = draw(st.sampled_from(["plain", "plain", "transposed", "view"]))
            if how == "transposed" and tensor.dim() >= 2:
                tensor = tensor.transpose(0, -1)
            if how == "view":
                tensor = torch.stack([tensor, tensor])[1]
            tensors[prefix + name] = tensor
    floats = [name for name, tensor in tensors.items() if tensor.numel()]
    if floats and draw(st.booleans()):
        tensors["tied.weight"] = tensors[floats[0]]
    return tensors


@pytest.mark.parametrize("packing", ["dense", "flat", "paper"])
def test_any_state_dict_comes_back_bit_for_bit(packing):
    count = 0

    @settings(max_examples=700, deadline=None, suppress_health_check=[HealthCheck.too_slow])
    @given(state_dict=state_dicts(), token_size=st.integers(1, 13))
    def check(state_dict, token_size):
        nonlocal count
        count += 1
        tokenizer = SaneWeightTokenizer(token_size, packing)
        assert_same(round_trip(tokenizer, state_dict), state_dict)
        layout = tokenizer.layout(state_dict)
        assert CheckpointLayout.from_json(layout.to_json()) == layout
        assert int(layout.value_mask.sum()) == layout.num_parameters

    check()
    assert count >= 700  # 2,100 with all three packings


# ---------------------------------------------------------------------------------------------------- every dtype
def every_pattern(dtype: torch.dtype) -> torch.Tensor:
    count = 256**dtype.itemsize
    return torch.arange(count, dtype=torch.int32).to({1: torch.uint8, 2: torch.int16}[dtype.itemsize]).view(dtype)


@pytest.mark.parametrize("tokens", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, *FLOAT8], ids=str)
def test_every_bit_pattern_comes_back_signalling_nans_and_negative_zeros_too(dtype, tokens):
    state_dict = {"w": every_pattern(dtype)}
    for packing, size in [("dense", 7), ("flat", 288)]:
        assert_same(round_trip(SaneWeightTokenizer(size, packing), state_dict, dtype=tokens), state_dict)
    table = every_pattern(dtype).reshape(16, -1).T  # strided, several columns
    assert_same(round_trip(SaneWeightTokenizer(7), {"w": table}, dtype=tokens), {"w": table})


def test_float32_keeps_nan_payloads_infinities_and_subnormals_in_tokens_of_either_width():
    patterns = [0x7F800001, 0x7FC00000, 0x7FFFFFFF, 0xFF800001, 0xFFFFFFFF, 0x7F800000, 0xFF800000, 0x80000000, 1]
    state_dict = {"w": torch.tensor(patterns, dtype=torch.int64).to(torch.int32).view(torch.float32)}
    for dtype in (torch.float32, torch.float64):
        assert_same(round_trip(SaneWeightTokenizer(4), state_dict, dtype=dtype), state_dict)


def test_a_nan_that_a_narrow_dtype_has_no_payload_for_stays_a_nan():
    layout = SaneWeightTokenizer(4).layout({"w": torch.zeros(2, dtype=torch.bfloat16)})
    tokens = torch.tensor([[0x7F800001, 0x3F800000, 0, 0]], dtype=torch.int32).view(torch.float32)
    assert tokens.isnan().tolist() == [[True, False, False, False]]
    assert layout.restore(tokens)["w"].isnan().tolist() == [True, False]


def test_tensors_of_every_dtype_come_back_in_tokens_or_beside_them():
    state_dict = {}
    for name in sorted(vars(torch)):
        dtype = getattr(torch, name)
        if isinstance(dtype, torch.dtype) and name == str(dtype).removeprefix("torch.") and dtype.itemsize <= 4:
            if name.startswith(("q", "bits1x", "bits2x", "bits4x")):
                continue  # quantised tensors follow; the packed bits have no memory of their own
            raw = torch.arange(24, dtype=torch.uint8) % (2 if dtype == torch.bool else 3)
            state_dict[name] = raw.view(dtype) if dtype != torch.bool else raw.bool()
    values = torch.randn(5, 3)
    state_dict["qint8"] = torch.quantize_per_tensor(values, 0.1, 2, torch.qint8)
    state_dict["quint8"] = torch.quantize_per_channel(
        values, torch.ones(5), torch.zeros(5, dtype=torch.int64), 0, torch.quint8
    )
    tokenizer = SaneWeightTokenizer(5)
    layout = tokenizer.layout(state_dict)
    assert {"float32", "bfloat16", "float16", "complex32", *(str(d).removeprefix("torch.") for d in FLOAT8)} == set(
        layout.tensors
    )
    beside = {spec.name for spec in layout.passthrough}
    assert {"float4_e2m1fn_x2", "uint16", "uint32", "qint8", "quint8"} <= beside
    decoded = round_trip(tokenizer, state_dict)
    for name in layout.tensors:
        assert torch.equal(decoded[name].view(torch.uint8), state_dict[name].view(torch.uint8)), name
    assert all(decoded[name] is state_dict[name] for name in beside)


def test_conjugated_numbers_come_back_by_value():
    state_dict = {"z": torch.randn(3, 2, dtype=torch.complex64).conj(), "s": torch.tensor(1 + 2j).conj()}
    assert state_dict["z"].is_conj()
    for token_size in (1, 5):
        assert_same(round_trip(SaneWeightTokenizer(token_size), state_dict), state_dict)


def test_sparse_tensors_are_refused_by_name():
    with pytest.raises(ValueError, match=r"w is .*sparse_coo.*dense"):
        SaneWeightTokenizer(4)({"good": torch.ones(2), "w": torch.eye(3).to_sparse()})


class TwoHeads(nn.Module):
    """One net with a hazard each: batch norm, no bias, tied weights, a loose parameter, a 0-d buffer, an LSTM's flat buffer."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(2, 5, 3, bias=False)
        self.norm = nn.BatchNorm2d(5)
        self.words = nn.Embedding(11, 3)
        self.head = nn.Linear(3, 11)
        self.head.weight = self.words.weight
        self.token = nn.Parameter(torch.randn(1, 1, 3))
        self.memory = nn.LSTM(3, 7)
        self.register_buffer("scale", torch.tensor(0.5))


@pytest.mark.parametrize("packing", ["dense", "flat", "paper"])
def test_decode_restores_a_module_with_ties_buffers_and_integers(packing):
    module = TwoHeads()
    tokenizer = SaneWeightTokenizer(13, packing)
    state_dict = round_trip(tokenizer, module)
    assert_same(state_dict, dict(module.state_dict()))
    assert state_dict["head.weight"] is state_dict["words.weight"]
    layout = tokenizer.layout(module)
    assert layout.ties == {"head.weight": "words.weight"}  # and the LSTM's neighbours in one buffer are not tied
    assert [spec.name for spec in layout.passthrough] == ["norm.num_batches_tracked"]
    module.load_state_dict(state_dict)


def test_layouts_of_a_module_and_of_its_state_dict_hold_the_same_tokens():
    module = TwoHeads()
    tokenizer = SaneWeightTokenizer(13)
    assert torch.equal(tokenizer(module)["token_values"], tokenizer(dict(module.state_dict()))["token_values"])


def test_encoding_leaves_its_input_alone_and_decoded_tensors_share_no_memory():
    state_dict = {"a.weight": torch.randn(5, 3), "a.bias": torch.randn(5)}
    before = {name: tensor.clone() for name, tensor in state_dict.items()}
    decoded = round_trip(SaneWeightTokenizer(8, normalization="checkpoint"), state_dict)
    decoded["a.weight"].zero_()
    assert decoded["a.bias"].abs().sum() > 0
    assert_same(state_dict, before)


def test_float64_is_refused_unless_the_tokens_are_float64():
    state_dict = {"w": torch.randn(3, 2, dtype=torch.float64)}
    with pytest.raises(ValueError, match=r"w is float64.*dtype=torch.float64"):
        SaneWeightTokenizer(4)(state_dict)
    assert_same(round_trip(SaneWeightTokenizer(4), state_dict, dtype=torch.float64), state_dict)


def test_nan_passes_an_exact_round_trip_and_is_refused_by_name_where_it_would_spoil_statistics():
    state_dict = {"good": torch.ones(3), "bad": torch.tensor([1.0, float("nan"), float("inf")])}
    assert round_trip(SaneWeightTokenizer(4), state_dict)["bad"].isnan().tolist() == [False, True, False]
    for refuse in (
        lambda: SaneWeightTokenizer(4)(state_dict, non_finite="error"),
        lambda: SaneWeightTokenizer(4, normalization="checkpoint")(state_dict),
        lambda: SaneWeightTokenizer(4).fit([state_dict]),
    ):
        with pytest.raises(ValueError, match="bad holds 2 NaN or infinite values of 3"):
            refuse()


def test_tensors_that_a_given_layout_does_not_know_are_not_dropped():
    tokenizer = SaneWeightTokenizer(4)
    layout = tokenizer.layout({"w": torch.ones(3)})
    with pytest.raises(ValueError, match="does not know extra"):
        tokenizer({"w": torch.ones(3), "extra": torch.ones(2)}, layout=layout)


def test_a_batch_is_padded_and_masked():
    small, large = {"w": torch.randn(2, 3)}, {"w": torch.randn(5, 3)}
    batch = SaneWeightTokenizer(3)([small, large])
    assert batch["token_values"].shape == (2, 5, 3)
    assert batch["attention_mask"].tolist() == [[True, True, False, False, False], [True] * 5]
    assert not batch["value_mask"][0, 2:].any()
    decoded = SaneWeightTokenizer(3).decode(batch["token_values"][0], batch["layouts"][0])
    assert torch.equal(decoded["w"], small["w"])


def test_zoo_statistics_are_those_of_all_values_of_a_tensor():
    zoo = [{"w": torch.tensor([[1.0, 3.0]])}, {"w": torch.tensor([[5.0, 7.0]])}]
    tokenizer = SaneWeightTokenizer(2, normalization="zoo").fit(iter(zoo))
    tokens = tokenizer(zoo[0])["token_values"][0]
    # mean 4, variance (9 + 1 + 1 + 9) / 4 = 5
    torch.testing.assert_close(tokens, (torch.tensor([[1.0, 3.0]]) - 4) / 5**0.5)
    torch.testing.assert_close(round_trip(tokenizer, zoo[1])["w"], zoo[1]["w"])
    with pytest.raises(ValueError, match=r"no statistics.*Call fit"):
        tokenizer({"other": torch.ones(2)})


def test_padding_stays_zero_whatever_the_statistics():
    tokenizer = SaneWeightTokenizer(4, normalization="zoo").fit([{"w": torch.randn(3, 3) + 7}])
    batch = tokenizer({"w": torch.randn(3, 3) + 7})
    assert (batch["token_values"][~batch["value_mask"]] == 0).all()


def test_statistics_of_an_untrained_zero_bias_do_not_blow_up():
    tokenizer = SaneWeightTokenizer(4, normalization="zoo").fit([{"b": torch.zeros(3)}])
    assert (tokenizer({"b": torch.zeros(3)})["token_values"] == 0).all()


def test_checkpoint_statistics_must_be_given_back_to_decode():
    tokenizer = SaneWeightTokenizer(4, normalization="checkpoint")
    state_dict = {"w": torch.randn(5, 3) * 9 + 2}
    batch = tokenizer(state_dict)
    values = batch["token_values"][batch["value_mask"]]
    torch.testing.assert_close(values.std(correction=0), torch.tensor(1.0))
    torch.testing.assert_close(round_trip(tokenizer, state_dict)["w"], state_dict["w"])
    with pytest.raises(ValueError, match="needs statistics="):
        tokenizer.decode(batch["token_values"][0], batch["layouts"][0])


def test_passed_through_tensors_must_be_given_back_to_decode():
    state_dict = {"w": torch.randn(2), "steps": torch.tensor(3)}
    batch = SaneWeightTokenizer(4)(state_dict)
    with pytest.raises(ValueError, match=r"steps is not in the tokens.*passthrough="):
        SaneWeightTokenizer(4).decode(batch["token_values"][0], batch["layouts"][0])


# ---------------------------------------------------------------------------------------------------- files
@pytest.mark.parametrize("packing", ["dense", "flat", "paper"])
def test_windows_of_a_file_are_the_tokens_of_the_whole_checkpoint(tmp_path, packing):
    module = TwoHeads()
    tensors = {name: t.clone() for name, t in module.state_dict().items()}
    save_file(tensors, tmp_path / "m.safetensors")
    tokenizer = SaneWeightTokenizer(5, packing, normalization="zoo").fit([tmp_path / "m.safetensors"])
    whole = tokenizer(tmp_path / "m.safetensors")
    windows = list(tokenizer.iter_windows(tmp_path / "m.safetensors", window_size=7, halo=2))
    cores = []
    for window in windows:
        left = min(2, window["start"])
        cores.append(window["token_values"][0, left : left + window["stop"] - window["start"]])
        assert window["position_ids"][0, 0, 0] == window["start"] - left
    assert torch.equal(torch.cat(cores), whole["token_values"][0])


def sharded(folder, state_dict: dict, shards: int = 3) -> None:
    """A folder as `save_pretrained` leaves it."""
    weight_map = {name: f"model-{number % shards}.safetensors" for number, name in enumerate(state_dict)}
    for file in set(weight_map.values()):
        part = {name: t.contiguous() for name, t in state_dict.items() if weight_map[name] == file}
        save_file(part, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


@pytest.mark.parametrize("normalization", ["none", "checkpoint", "zoo"])
@pytest.mark.parametrize("packing", ["dense", "flat", "paper"])
def test_windows_of_a_folder_of_shards_are_the_tokens_to_the_bit_with_all_that_goes_with_them(
    tmp_path, packing, normalization
):
    module = TwoHeads()
    state_dict = {n: t.clone() for n, t in module.state_dict().items()} | {"wide": torch.randn(2, 3, 50) * 9 + 2}
    sharded(tmp_path, state_dict)
    tokenizer = SaneWeightTokenizer(5, packing, normalization)
    tokenizer = tokenizer.fit([tmp_path]) if normalization == "zoo" else tokenizer
    whole = tokenizer(tmp_path)
    assert normalization == "none" or not torch.equal(
        whole["token_values"], SaneWeightTokenizer(5, packing)(tmp_path)["token_values"]
    )
    for source in (tmp_path, {n: state_dict[n] for n in whole["layouts"][0].order}):
        stop = 0
        for window in tokenizer.iter_windows(source, window_size=7, halo=3):
            left, right = max(0, window["start"] - 3), min(whole["layouts"][0].num_tokens, window["stop"] + 3)
            assert window["start"] == stop
            stop = window["stop"]
            for name in tokenizer.model_input_names:
                assert torch.equal(window[name], whole[name][:, left:right]), name
            assert window["statistics"] == whole["statistics"]
        assert stop == whole["layouts"][0].num_tokens


def test_windows_of_a_module_have_the_kinds_of_its_layers():
    module = TwoHeads()
    tokenizer = SaneWeightTokenizer(5)
    windows = list(tokenizer.iter_windows(module, window_size=1000))
    assert torch.equal(windows[0]["layer_kind_ids"], tokenizer(module)["layer_kind_ids"])


def test_windows_make_no_mask_or_position_of_the_whole_model():
    layout = SaneWeightTokenizer(5).layout(TwoHeads())
    tokenizer = SaneWeightTokenizer(5, normalization="checkpoint")
    state_dict = {"w": torch.randn(300, 7), "v": torch.randn(9)}
    layout = tokenizer.layout(state_dict)
    for window in tokenizer.iter_windows(state_dict, window_size=7):
        assert window["layouts"][0] is layout
    made = vars(layout).keys() & {"value_mask", "position_ids", "layer_kind_ids", "layer_ids"}
    assert not made


def test_statistics_of_chunks_are_those_of_the_whole_tensor(monkeypatch):
    state_dict = {"w": torch.randn(13, 7) * 3 + 1, "wide": torch.randn(2, 3, 11).mT, "v": torch.randn(9)}
    expected = SaneWeightTokenizer(5, normalization="checkpoint")(state_dict)["statistics"][0]
    for chunk in (1, 4, 30):
        monkeypatch.setattr("tokenization_sane.tokenization_sane.MOMENTS_CHUNK", chunk)
        found = SaneWeightTokenizer(5, normalization="checkpoint")(state_dict)["statistics"][0]
        for name, (mean, std) in expected.items():
            assert found[name] == pytest.approx([mean, std], rel=1e-12)
            assert [mean, std] == pytest.approx(
                [float(state_dict[name].mean()), float(state_dict[name].std(correction=0))], rel=1e-4
            )


@pytest.mark.parametrize("normalization", ["checkpoint", "zoo"])
def test_windows_refuse_a_weight_that_is_not_finite_by_name(normalization):
    good = {"good": torch.ones(30), "bad": torch.randn(20, 3)}
    tokenizer = SaneWeightTokenizer(5, normalization=normalization).fit([good])
    bad = good | {"bad": good["bad"].clone()}
    bad["bad"][13, 1] = float("nan")
    with pytest.raises(ValueError, match=r"bad holds .*NaN or infinite values"):
        list(tokenizer.iter_windows(bad, window_size=4))
    assert len(list(tokenizer.iter_windows(bad, window_size=4, non_finite="keep"))) > 1


@settings(
    max_examples=100, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture]
)
@given(
    state_dict=state_dicts(),
    token_size=st.integers(1, 13),
    packing=st.sampled_from(["dense", "flat", "paper"]),
    window_size=st.integers(1, 9),
    random=st.randoms(use_true_random=False),
)
def test_windows_in_any_order_are_written_to_a_file_that_is_equal_bit_for_bit(
    tmp_path, state_dict, token_size, packing, window_size, random
):
    state_dict = {n: t for n, t in state_dict.items() if t.dtype != torch.complex32}  # safetensors has no such
    tokenizer = SaneWeightTokenizer(token_size, packing)
    layout = tokenizer.layout(state_dict)
    windows = list(tokenizer.iter_windows(state_dict, window_size))
    random.shuffle(windows)
    beside = {spec.name: state_dict[spec.name] for spec in layout.passthrough}
    with CheckpointWriter(tmp_path / "copy.safetensors", layout, beside, overwrite=True) as writer:
        for window in windows:
            writer.write(window["start"], window["token_values"])
    decoded = round_trip(tokenizer, tmp_path / "copy.safetensors")
    assert_same({name: decoded[name] for name in state_dict}, state_dict)


# ---------------------------------------------------------------------------------------------------- kept layouts
def test_checkpoints_of_one_architecture_share_a_layout_and_a_changed_setting_or_zoo_makes_another():
    tokenizer = SaneWeightTokenizer(5, normalization="zoo")
    first, second = {"w": torch.zeros(4, 3)}, {"w": torch.ones(4, 3)}
    assert tokenizer.layout(first) is tokenizer.layout(second)
    assert tokenizer.layout(first) != tokenizer.layout({"w": torch.zeros(3, 4)})
    tokenizer.packing = "flat"
    assert tokenizer.layout(first).packing == "flat"
    other = {"v": torch.zeros(2), "w": torch.zeros(4, 3)}
    assert list(tokenizer.layout(other).tensors) == ["v", "w"]
    tokenizer.fit([dict(reversed(other.items()))])
    assert list(tokenizer.layout(other).tensors) == ["w", "v"]


def test_what_a_batch_holds_may_be_changed_without_spoiling_the_next():
    tokenizer, state_dict = SaneWeightTokenizer(5), {"w": torch.zeros(4, 3)}
    expected = {
        name: tensor.clone() for name, tensor in tokenizer(state_dict).items() if isinstance(tensor, torch.Tensor)
    }
    for tensor in tokenizer(state_dict).values():
        if isinstance(tensor, torch.Tensor):
            tensor.zero_()
    for name, tensor in expected.items():
        assert torch.equal(tokenizer(state_dict)[name], tensor), name


def test_kept_layouts_are_neither_saved_nor_pickled(tmp_path):
    tokenizer = SaneWeightTokenizer(5)
    before = len(pickle.dumps(tokenizer)), tokenizer.to_json_string()
    tokenizer({"w": torch.zeros(400, 30)})
    assert (len(pickle.dumps(tokenizer)), tokenizer.to_json_string()) == before


def test_a_pickle_is_opened_only_where_it_is_allowed(tmp_path):
    state_dict = {"w": torch.randn(4, 3)}
    torch.save(state_dict, tmp_path / "m.pt")
    tokenizer = SaneWeightTokenizer(5, normalization="checkpoint")
    for use in (
        tokenizer,
        tokenizer.layout,
        lambda source, **kwargs: tokenizer.fit([source], **kwargs),
        lambda source, **kwargs: list(tokenizer.iter_windows(source, **kwargs)),
    ):
        with pytest.raises(ValueError, match=r"m.pt.*allow.pickle"):
            use(tmp_path / "m.pt")
        use(tmp_path / "m.pt", allow_pickle=True)


def test_a_folder_of_shards_reads_as_one_checkpoint_and_a_missing_shard_is_named(tmp_path):
    save_file({"layer2.weight": torch.ones(2, 3)}, tmp_path / "a.safetensors")
    save_file({"layer10.weight": torch.zeros(4)}, tmp_path / "b.safetensors")
    index = {"weight_map": {"layer2.weight": "a.safetensors", "layer10.weight": "b.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    tokenizer = SaneWeightTokenizer(3)
    assert tokenizer.layout(tmp_path).order == ("layer2.weight", "layer10.weight")
    assert tokenizer(tmp_path)["token_values"][0].tolist() == [[1, 1, 1], [1, 1, 1], [0, 0, 0], [0, 0, 0]]
    (tmp_path / "b.safetensors").unlink()
    with pytest.raises(ValueError, match=r"names b.safetensors, which is not there"):
        tokenizer.layout(tmp_path)


def test_what_is_no_checkpoint_is_refused_by_name(tmp_path):
    (tmp_path / "broken.safetensors").write_bytes(b"\x10\0\0\0\0\0\0\0not a header....")
    (tmp_path / "pickled.pt").write_bytes(b"")
    (tmp_path / "empty").mkdir()
    for name, message in [
        ("broken.safetensors", "no valid safetensors file"),
        ("pickled.pt", "pickled.pt is empty"),
        ("empty", "holds no .safetensors file"),
        ("nothing", "does not exist"),
    ]:
        with pytest.raises(ValueError, match=message):
            SaneWeightTokenizer().layout(tmp_path / name)
    with pytest.raises(ValueError, match="model is a dict"):
        SaneWeightTokenizer().layout({"model": {"w": torch.ones(2)}})


def test_a_file_of_a_known_network_has_the_order_that_the_zoo_had(tmp_path):
    network = nn.Sequential()
    network.add_module("stem", nn.Linear(3, 4))
    network.add_module("body", nn.Linear(4, 2))
    tokenizer = SaneWeightTokenizer(5, normalization="zoo").fit([network.state_dict()])
    save_file(dict(network.state_dict()), tmp_path / "n.safetensors")  # the file sorts body before stem
    assert SaneWeightTokenizer(5).layout(tmp_path / "n.safetensors").order[0].startswith("body")
    assert tokenizer.layout(tmp_path / "n.safetensors").order[0].startswith("stem")
    assert torch.equal(
        tokenizer(tmp_path / "n.safetensors")["token_values"], tokenizer(network.state_dict())["token_values"]
    )


# ---------------------------------------------------------------------------------------------------- saving
def fitted() -> tuple[SaneWeightTokenizer, nn.Module]:
    network = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    return SaneWeightTokenizer(5, "flat", "zoo").fit(
        [network.state_dict()], SaneWeightTokenizer(5).layout(network)
    ), network


def test_saved_statistics_come_back_to_the_digit(tmp_path):
    tokenizer, network = fitted()
    tokenizer.save_pretrained(tmp_path)
    for auto in (SaneWeightTokenizer, AutoTokenizer, AutoFeatureExtractor):
        loaded = auto.from_pretrained(tmp_path)
        assert isinstance(loaded, SaneWeightTokenizer)
        assert loaded.zoo == tokenizer.zoo
        assert torch.equal(loaded(network)["token_values"], tokenizer(network)["token_values"])


def test_settings_are_checked():
    for kwargs, message in [
        ({"token_size": 0}, "token_size is 0"),
        ({"packing": "loose"}, "packing is 'loose'"),
        ({"normalization": "minmax"}, "normalization is 'minmax'"),
    ]:
        with pytest.raises(ValueError, match=message):
            SaneWeightTokenizer(**kwargs)


REMOTE = """
import importlib.abc, sys, torch
class Block(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("tokenization_sane", "modeling_sane", "hub_scripts"):
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Block())
from safetensors.torch import load_file
from transformers import AutoFeatureExtractor, AutoTokenizer
folder = sys.argv[1]
expected = load_file(folder + "/expected.safetensors")
for auto in (AutoTokenizer, AutoFeatureExtractor):
    tokenizer = auto.from_pretrained(folder + "/model", trust_remote_code=True)
    assert type(tokenizer).__module__.startswith("transformers_modules"), type(tokenizer)
    batch = tokenizer(folder + "/network.safetensors")
    assert torch.equal(batch["token_values"], expected["token_values"])
    tokenizer.save_pretrained(folder + "/again")
    again = auto.from_pretrained(folder + "/again", trust_remote_code=True)
    assert torch.equal(again(folder + "/network.safetensors")["token_values"], expected["token_values"])
print("ok")
"""


def test_the_saved_tokenizer_works_where_the_package_is_missing(tmp_path):
    tokenizer, network = fitted()
    tokenizer.save_pretrained(tmp_path / "model")
    save_file(dict(network.state_dict()), tmp_path / "network.safetensors")
    save_file({"token_values": tokenizer(network)["token_values"]}, tmp_path / "expected.safetensors")
    (tmp_path / "use.py").write_text(REMOTE)
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    env |= {"HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(tmp_path / "use.py"), str(tmp_path)]
    done = subprocess.run(command, env=env, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "ok", done.stderr
