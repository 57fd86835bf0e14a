"""The tokenizer: every checkpoint comes back bit for bit, and with its own statistics."""

import json
import os
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

torch.set_num_threads(1)

FLOATS = [torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2, torch.complex64]
OTHERS = [torch.int64, torch.int8, torch.uint8, torch.bool]
BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def bits(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor's bytes as integers: tells 0.0 from -0.0, and compares dtypes that have no ==."""
    return tensor.contiguous().view(BITS[tensor.element_size()]) if tensor.dtype != torch.bool else tensor


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
    return torch.view_as_complex(values) if dtype.is_complex else values[..., 0].to(dtype)


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


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(state_dict=state_dicts(), token_size=st.integers(1, 13), packing=st.sampled_from(["dense", "flat", "paper"]))
def test_any_state_dict_comes_back_bit_for_bit(state_dict, token_size, packing):
    tokenizer = SaneWeightTokenizer(token_size, packing)
    assert_same(round_trip(tokenizer, state_dict), state_dict)
    layout = tokenizer.layout(state_dict)
    assert CheckpointLayout.from_json(layout.to_json()) == layout
    assert int(layout.value_mask.sum()) == layout.num_parameters


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
        ("pickled.pt", "pickled.pt is no safetensors file"),
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
