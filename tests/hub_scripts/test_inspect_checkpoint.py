"""`sane inspect-checkpoint`: a table of what the headers say, and symmetries where they are saved or asked for."""

import json
import re

import pytest
import torch
from safetensors.torch import save_file
from transformers import BertConfig, BertModel, ResNetConfig, ResNetModel

from hub_scripts.inspect_checkpoint import inspect_checkpoint, main
from hub_scripts.zoos.architectures import SmallCNN
from tokenization_sane import SymmetryGroup, SymmetryItem, SymmetrySpec

torch.set_num_threads(1)


@pytest.fixture
def network(tmp_path):
    """A matrix of 5 x 3 and its bias; an integer, and a second name for the matrix."""
    path = tmp_path / "n.safetensors"
    save_file(
        {"a.weight": torch.ones(5, 3), "a.bias": torch.ones(5, dtype=torch.bfloat16), "steps": torch.tensor(1)},
        path,
        {"b.weight": "a.weight"},
    )
    return path


def run(capsys, *words) -> str:
    main([str(word) for word in words])
    return capsys.readouterr().out


def refused(capsys, *words) -> str:
    with pytest.raises(SystemExit) as stopped:
        main([str(word) for word in words])
    assert stopped.value.code in (1, 2)
    return capsys.readouterr().err


def test_inspecting_reads_the_header_alone(network):
    found, layout = inspect_checkpoint(network, token_size=8)
    # dense: the bias in 1 token of 8, the matrix in 3 tokens of 2 rows; flat: 15 values in 2 tokens; paper: a row a token
    assert found["packings"] == {
        "dense": {"num_tokens": 4, "fill": 20 / 32},
        "flat": {"num_tokens": 3, "fill": 20 / 24},
        "paper": {"num_tokens": 5, "fill": 20 / 40},
    }
    assert (found["num_parameters"], found["num_tokens"], found["fill"]) == (20, 4, 20 / 32)
    assert found["parameters_by_kind"] == {"linear": 20}
    assert found["parameters_by_dtype"] == {"float32": 15, "bfloat16": 5}
    assert found["passthrough"] == [{"name": "steps", "shape": [], "dtype": "int64"}]
    assert found["ties"] == {"b.weight": "a.weight"}
    assert [(layer["kind"], layer["rows"], layer["columns"]) for layer in found["layers"]] == [
        ("linear", 5, 1),
        ("linear", 5, 3),
    ]
    assert found["fingerprint"] == layout.fingerprint


def test_the_table_says_it_in_words_and_json_says_all(network, capsys):
    table = run(capsys, network, "--token-size", 8)
    for text in (
        "20 values in 2 layers",
        "tokens of 8: dense 4, fill 0.625; flat 3, fill 0.833; paper 5, fill 0.500",
        "kinds: linear 100.0 %",
        "dtypes: float32 75.0 %, bfloat16 25.0 %",
        "tied, 1: b.weight = a.weight",
        "passed through, 1: steps (int64 ())",
    ):
        assert text in table
    (found,) = json.loads(run(capsys, network, "--token-size", 8, "--json"))
    assert found == inspect_checkpoint(network, token_size=8)[0]


def test_leaves_of_a_pickle_that_are_no_tensors_are_shown(tmp_path, capsys):
    torch.save({"net": {"w": torch.ones(2, 3)}, "epoch": 3}, tmp_path / "m.pt")
    assert "m.pt is a pickle, which can hold code; pass --allow-pickle" in refused(capsys, tmp_path / "m.pt")
    assert "ignored, no tensors, 1: epoch (int)" in run(capsys, tmp_path / "m.pt", "--allow-pickle")


def test_the_axis_of_the_rows_is_shown_where_it_is_not_the_first(tmp_path, capsys):
    h5py = pytest.importorskip("h5py", reason="reading Keras files is an extra")
    with h5py.File(tmp_path / "m.h5", "w") as file:
        file["dense/kernel:0"] = torch.ones(3, 5).numpy()
    line = run(capsys, tmp_path / "m.h5").splitlines()[2]
    assert line.split() == ["dense", "linear", "5", "3", "1", "float32", "rows", "are", "axis", "1"]


def test_files_that_are_not_read_are_named(network, capsys):
    save_file({"w": torch.ones(2)}, network.parent / "model.safetensors")
    table = run(capsys, network.parent)
    assert table.splitlines()[0] == f"{network.parent} (model.safetensors)"
    assert "files not read, 1: n.safetensors" in table


def test_long_lists_are_cut_in_the_table(tmp_path, capsys):
    save_file({f"n{number}": torch.tensor(number) for number in range(7)}, tmp_path / "m.safetensors")
    assert "passed through, 7: n0 (int64 ()), n1" in (table := run(capsys, tmp_path / "m.safetensors"))
    assert "n4 (int64 ()), and 2 more (--json shows all)" in table


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["./no.safetensors"], "no.safetensors does not exist"),
        (["x", "--packing", "loose"], "packing is 'loose', expected one of dense, flat, paper"),
        (["x", "--token-size", "0"], "token_size is 0"),
        (["x", "--input-shape", "3,-1", "--symmetries"], "--input-shape is '3,-1', expected sizes"),
        (["x", "--input-shape", "3,32,32"], "--input-shape is for --symmetries"),
        (["x", "--architecture-kwargs", "{", "--symmetries"], "--architecture-kwargs is no JSON"),
        (["x", "--architecture-kwargs", '{"a": 1}'], "--architecture-kwargs needs --architecture"),
        (["x", "--architecture", "a:b", "--architecture-kwargs", '{"trust_remote_code": true}'], "without trust_remote"),
    ],
)  # fmt: skip
def test_mistakes_are_one_sentence(words, message, capsys):
    assert message in refused(capsys, *words)


# ---------------------------------------------------------------------------------------------------- symmetries
def test_symmetries_of_a_network_that_is_named(tmp_path, capsys):
    torch.manual_seed(0)
    kwargs = {"channels": [3, 5], "hidden_size": 7}
    save_file(SmallCNN(**kwargs).state_dict(), tmp_path / "n.safetensors")
    words = [tmp_path / "n.safetensors", "--architecture", "hub_scripts.zoos.architectures:SmallCNN"]
    words += ["--architecture-kwargs", json.dumps(kwargs), "--input-shape", "1,8,8"]
    (found,) = json.loads(run(capsys, *words, "--json"))
    symmetries = found["symmetries"]
    assert symmetries["groups"]["permutation"] == 3  # 3 and 5 channels, 7 hidden units
    assert symmetries["units"]["permutation"] == 15
    assert symmetries["tensors_not_in_network"] == []
    # all but the biases of the classes have a hidden axis
    total, free = found["num_parameters"], list(SmallCNN(**kwargs).state_dict().values())[-1].numel()
    assert symmetries["covered"] == pytest.approx((total - free) / total)
    assert "symmetry groups, found in SmallCNN: 3 permutation (15 units)" in run(capsys, *words)


@pytest.mark.parametrize(
    ("model_class", "config", "covered"),
    [
        (BertModel, BertConfig(vocab_size=11, hidden_size=12, num_hidden_layers=1, num_attention_heads=3,
                               intermediate_size=20, max_position_embeddings=16),
         # query, key, value, output without its bias, and both matrices and the first bias of the MLP, of all 1712 values
         (3 * (12 * 12 + 12) + 12 * 12 + (12 * 20 + 20) + 20 * 12) / 1712),
        (ResNetModel, ResNetConfig(embedding_size=3, hidden_sizes=[5, 7], depths=[1, 1], layer_type="basic"), 0.9),
    ],
)  # fmt: skip
def test_symmetries_of_a_transformers_model_come_from_its_config(model_class, config, covered, tmp_path, capsys):
    model_class(config).save_pretrained(tmp_path)
    (found,) = json.loads(run(capsys, tmp_path, "--symmetries", "--json"))
    assert found["symmetries"]["groups"]["permutation"] >= 3
    assert found["symmetries"]["covered"] >= covered - 1e-9
    assert found["symmetries"]["tensors_not_in_network"] == []


def test_without_a_config_the_flag_is_named(network, capsys):
    assert "there is no config.json beside" in refused(capsys, network, "--symmetries")
    for config, message in [
        ({"model_type": "bert", "architectures": ["Unheard"]}, "transformers has none such"),
        ({"model_type": "bert", "architectures": ["AutoModel"]}, "transformers has none such"),
        ({"model_type": "bert", "vocab_size": 11, "hidden_size": 6, "num_hidden_layers": 1, "num_attention_heads": 2,
          "architectures": ["BertModel"]}, "BertModel has no tensor called like any in"),
        ({"model_type": "unheard", "auto_map": {"AutoConfig": "evil.Config"}}, "config.json of .* cannot be used"),
    ]:  # fmt: skip
        (network.parent / "config.json").write_text(json.dumps(config))
        error = refused(capsys, network, "--symmetries")
        assert re.search(message, error), error


def test_symmetries_saved_beside_the_checkpoint_are_shown_without_a_search(network, capsys):
    layout = inspect_checkpoint(network)[1]
    # 4 of the 5 rows trade places: 4 of 5 biases and 12 of 15 weights
    items = (SymmetryItem("a.weight", 0, (0, 1, 1, 1)), SymmetryItem("a.bias", 0, (0, 1, 1, 1)))
    spec = SymmetrySpec((SymmetryGroup("a", "permutation", 4, items),))
    folder = network.parent / "symmetries"
    folder.mkdir()
    (folder / f"{layout.fingerprint}.json").write_text(spec.to_json())
    (found,) = json.loads(run(capsys, network, "--json"))
    assert (found["symmetries"]["groups"], found["symmetries"]["covered"]) == ({"permutation": 1}, 16 / 20)
    assert (
        "symmetry groups, as saved beside it: 1 permutation (4 units); permutations move 80.0 % of the values"
        in run(capsys, network)
    )
    (folder / f"{layout.fingerprint}.json").write_text("{")
    assert f"{layout.fingerprint}.json: Symmetry JSON cannot be read" in refused(capsys, network)
