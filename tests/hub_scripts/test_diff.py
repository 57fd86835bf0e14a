"""`sane diff`: which layers moved; permuted twins do not differ once they are aligned, and nothing is left out silently."""

import json
import math

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from hub_scripts.codec import Codec
from hub_scripts.diff import DiffArguments, compare, diff, main
from hub_scripts.evaluation.layer_profiles import layer_embeddings
from hub_scripts.zoos.architectures import SmallCNN
from hub_scripts.zoos.zoo import Zoo
from tokenization_sane import CheckpointFiles

ARCHITECTURE = (
    "--architecture",
    "hub_scripts.zoos.architectures:SmallCNN",
    "--architecture-kwargs",
    '{"channels": [3, 5], "hidden_size": 7}',
    "--input-shape",
    "1,8,8",
)
# as above, for the arguments' class
SMALL_CNN = dict(zip((word[2:].replace("-", "_") for word in ARCHITECTURE[::2]), ARCHITECTURE[1::2], strict=True))


@pytest.fixture(scope="module")
def zoo(tiny_zoo) -> Zoo:
    return Zoo(tiny_zoo)


@pytest.fixture(scope="module")
def network(zoo) -> dict[str, torch.Tensor]:
    return zoo.state_dict("train", 2)


@pytest.fixture(scope="module")
def twin(zoo, network) -> dict[str, torch.Tensor]:
    """The same function with the units in another order and with other signs."""
    spec = zoo.symmetries.of_kind("permutation", "sign")
    moved = spec.apply(network, spec.draw(torch.Generator().manual_seed(3)))
    assert any(not torch.equal(moved[name], network[name]) for name in network)
    return moved


@pytest.fixture
def files(tmp_path, network, twin):
    """Paths of the network, its twin, and the network after one layer was changed."""
    changed = network | {"fc1.weight": network["fc1.weight"] * 1.5}
    paths = {}
    for name, tensors in {"a": network, "twin": twin, "changed": changed}.items():
        paths[name] = str(tmp_path / f"{name}.safetensors")
        save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, paths[name])
    return paths


def arguments(a: str, b: str, **settings) -> DiffArguments:
    args = DiffArguments(**settings)
    args.a, args.b = a, b
    return args


def run(capsys, *words) -> str:
    main([str(word) for word in words])
    return capsys.readouterr().out


def refused(capsys, *words) -> str:
    with pytest.raises(SystemExit) as stopped:
        main([str(word) for word in words])
    assert stopped.value.code in (1, 2)
    return capsys.readouterr().err


# ---------------------------------------------------------------------------------------------------- figures
def test_figures_of_a_tensor_are_those_of_its_values():
    a, b = torch.tensor([[3.0, 0.0], [0.0, 4.0]]), torch.tensor([[3.0, 0.0], [0.0, -1.0]])
    (found,) = compare(CheckpointFiles({"w": a}), CheckpointFiles({"w": b}))["tensors"]
    assert (found["values"], found["different_values"], found["norm_a"]) == (4, 1, 5)
    assert found["norm_b"] == pytest.approx(math.sqrt(10))
    assert found["relative_change"] == pytest.approx(5 / 5)
    assert found["cosine"] == pytest.approx((9 - 4) / (5 * math.sqrt(10)))
    assert (found["spectral_norm_a"], found["spectral_norm_b"]) == (pytest.approx(4), pytest.approx(3))


def test_what_has_no_figures_is_told_without():
    a = {"zero": torch.zeros(3), "bad": torch.tensor([1.0, math.nan]), "steps": torch.tensor([1, 2, 3])}
    b = {"zero": torch.ones(3), "bad": torch.ones(2), "steps": torch.tensor([1, 2, 4])}
    zero, bad, steps = compare(CheckpointFiles(a), CheckpointFiles(b))["tensors"]
    assert (zero["relative_change"], zero["cosine"], zero["spectral_norm_a"]) == (None, None, None)
    assert (bad["not_finite_a"], bad["not_finite_b"], bad["norm_a"]) == (1, 0, None)
    assert (steps["different_values"], "norm_a" in steps) == (1, False)


def test_a_layer_that_was_changed_is_marked(files, capsys):
    lines = run(capsys, files["a"], files["changed"]).splitlines()
    assert [line.split()[1] for line in lines if line.startswith("* ")] == ["fc1.weight"]
    (line,) = (line for line in lines if line.startswith("* "))
    assert line.split()[2] == "140"
    assert line.split()[4:6] == ["0.5", "1.0000"]  # relative change, cosine
    assert "+50.0 %" in line
    assert "8 tensors compared, 7 of them unchanged; only in A 0" in "\n".join(lines)
    assert "not aligned: symmetries are not known; give --architecture" in lines[-1]


def test_missing_tensors_and_other_shapes_and_dtypes_are_listed(tmp_path, capsys):
    a = {"w": torch.ones(2, 3), "gone": torch.ones(2), "cut": torch.ones(4, 2), "half": torch.ones(3)}
    b = {"w": torch.ones(2, 3), "new": torch.ones(2), "cut": torch.ones(3, 2), "half": torch.ones(3).bfloat16()}
    a["packed"], b["packed"] = torch.ones(4), torch.ones(4, dtype=torch.int8)
    paths = [tmp_path / "a.safetensors", tmp_path / "b.safetensors"]
    save_file(a, paths[0], {"alias": "w"})
    save_file(b, paths[1], {"alias": "w"})
    found = json.loads(run(capsys, *paths, "--json"))
    assert (found["only_in_a"], found["only_in_b"]) == (["gone"], ["new"])
    assert found["other_shapes"] == [{"name": "cut", "shape_a": [4, 2], "shape_b": [3, 2]}]
    assert found["other_dtypes"] == [
        {"name": "half", "dtype_a": "float32", "dtype_b": "bfloat16", "compared": True},
        {"name": "packed", "dtype_a": "float32", "dtype_b": "int8", "compared": False},
    ]
    assert {entry["name"]: entry["relative_change"] for entry in found["tensors"]} == {"half": 0, "w": 0}
    assert found["counts"] == {
        "compared": 2,
        "unchanged": 2,
        "tied": 1,
        "only_in_a": 1,
        "only_in_b": 1,
        "other_shapes": 1,
        "other_dtypes": 2,
    }
    table = run(capsys, *paths)
    for text in ("only in A", "only in B", "other shapes: (4, 2) and (3, 2)", "float32 and int8, not compared"):
        assert text in table
    assert "*" not in table


def test_a_name_that_is_tied_in_one_of_them_is_compared(tmp_path):
    save_file({"w": torch.ones(2, 3)}, tmp_path / "tied.safetensors", {"head": "w"})
    save_file({"w": torch.ones(2, 3), "head": torch.ones(2, 3) * 2}, tmp_path / "untied.safetensors")
    found = diff(arguments(str(tmp_path / "tied.safetensors"), str(tmp_path / "untied.safetensors")))
    assert {entry["name"]: entry["relative_change"] for entry in found["tensors"]} == {"w": 0, "head": 1}
    assert found["counts"]["tied"] == 0


# ---------------------------------------------------------------------------------------------------- alignment
def test_a_permuted_twin_differs_by_nothing_once_aligned(files, capsys):
    apart = diff(arguments(files["a"], files["twin"]))
    assert max(entry["relative_change"] for entry in apart["tensors"]) > 0.1
    together = diff(arguments(files["a"], files["twin"], **SMALL_CNN))
    assert together["counts"]["unchanged"] == together["counts"]["compared"] == 8
    assert all(entry["relative_change"] == 0 for entry in together["tensors"])
    found = together["alignment"]
    assert (found["distance_before"] > 1, found["distance_after"]) == (True, 0)
    assert 0 < found["units_moved"] <= found["units"] == 3 + 5 + 7
    table = run(capsys, files["a"], files["twin"], *ARCHITECTURE)
    assert f"{found['units_moved']} of 15 units moved" in table
    assert "signs flipped; distance" in table  # of a tanh network


def test_symmetries_beside_a_checkpoint_are_used(files, zoo, tmp_path):
    (tmp_path / "symmetries").mkdir()
    (tmp_path / "symmetries" / f"{zoo.layout.fingerprint}.json").write_text(zoo.symmetries.to_json())
    found = diff(arguments(files["a"], files["twin"]))
    assert found["alignment"]["symmetries"] == f"saved beside {files['a']}"
    assert found["counts"]["unchanged"] == 8
    assert diff(arguments(files["a"], files["twin"], align="never"))["counts"]["unchanged"] < 8


def test_scales_are_no_symmetry_here(tmp_path, capsys):
    torch.manual_seed(0)
    a = SmallCNN(channels=[3, 5], hidden_size=7, activation="relu").state_dict()
    b = dict(a)
    b["fc1.weight"], b["fc1.bias"], b["fc2.weight"] = a["fc1.weight"] * 2, a["fc1.bias"] * 2, a["fc2.weight"] / 2
    for name, tensors in (("a", a), ("b", b)):
        save_file(tensors, tmp_path / f"{name}.safetensors")
    kwargs = '{"channels": [3, 5], "hidden_size": 7, "activation": "relu"}'
    settings = SMALL_CNN | {"architecture_kwargs": kwargs}
    found = diff(arguments(str(tmp_path / "a.safetensors"), str(tmp_path / "b.safetensors"), **settings))
    moved = {entry["name"] for entry in found["tensors"] if entry["relative_change"]}
    assert moved == {"fc1.weight", "fc1.bias", "fc2.weight"}


def test_what_cannot_be_aligned_is_compared_as_it_is(files, network, tmp_path):
    save_file(network | {"fc1.weight": torch.ones(9, 20)}, tmp_path / "wide.safetensors")
    found = diff(arguments(files["a"], str(tmp_path / "wide.safetensors"), **SMALL_CNN))
    assert not found["alignment"]["aligned"]
    assert "fc1.weight has shape (9, 20)" in found["alignment"]["reason"]
    assert [entry["name"] for entry in found["other_shapes"]] == ["fc1.weight"]


# ---------------------------------------------------------------------------------------------------- latents
def test_latents_tell_the_changed_layer_and_are_those_of_twins(files, tiny_model, capsys):
    found = diff(arguments(files["a"], files["changed"], model=str(tiny_model)))
    distances = {entry["name"]: entry["latent_distance"] for entry in found["tensors"]}
    others = [distance for name, distance in distances.items() if name != "fc1.weight"]
    assert distances["fc1.weight"] > 20 * max(others)
    twin = diff(arguments(files["a"], files["twin"], model=str(tiny_model)))
    assert twin["alignment"]["symmetries"] == f"of {tiny_model}"
    assert all(entry["latent_distance"] == 0 for entry in twin["tensors"])
    assert "latents" in run(capsys, files["a"], files["changed"], "--model", tiny_model)


def test_latents_are_those_of_the_zoos_order(files, network, twin, zoo, tiny_model):
    # the file has the tensors by name, biases first; the model knows them in the network's order
    codec = Codec.from_pretrained(tiny_model, zoo.layout)
    stacked = {name: torch.stack([network[name], twin[name]]) for name in network}
    embeddings = layer_embeddings(codec.encode(codec.tokens(stacked)), codec.layout.layer_ids)
    expected = np.linalg.norm(embeddings[1] - embeddings[0], axis=-1)
    found = diff(arguments(files["a"], files["twin"], model=str(tiny_model), align="never"))
    distances = {entry["name"]: entry["latent_distance"] for entry in found["tensors"]}
    for layer, distance in zip(codec.layout.layers, expected, strict=True):
        assert distances[layer.name] == pytest.approx(distance, rel=1e-3, abs=1e-4)


def test_latents_of_other_tensors_are_refused(files, network, tiny_model, tmp_path, capsys):
    save_file({"w": torch.ones(2, 3)}, tmp_path / "other.safetensors")
    message = refused(capsys, files["a"], tmp_path / "other.safetensors", "--model", tiny_model)
    assert "other.safetensors has other tensors or shapes than" in message
    assert "leave out --model" in message


# ---------------------------------------------------------------------------------------------------- output, errors
def test_results_and_plot_are_written(files, tmp_path, capsys):
    run(capsys, files["a"], files["changed"], "--output-dir", tmp_path / "out")
    written = json.loads((tmp_path / "out" / "results.json").read_text())
    assert written["diff"] == diff(arguments(files["a"], files["changed"]))
    assert written["arguments"]["b"] == files["changed"]
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"results.json", "relative_change.png"}
    assert "already holds something" in refused(capsys, files["a"], files["a"], "--output-dir", tmp_path / "out")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("A", "MISSING"), "missing.safetensors"),
        (("A",), "the following arguments are required: B"),
        (("A", "A", "--align", "always"), "--align is 'always', expected auto or never."),
        (("A", "A", "--input-shape", "1,8,8"), "need --architecture."),
        (("A", "A", "--align", "never", *ARCHITECTURE), "--architecture is for aligning"),
        (("A", "A", "--architecture", "a:b", "--architecture-kwargs", "{"), "--architecture-kwargs is no JSON"),
        (("A", "A", *ARCHITECTURE[:2], "--input-shape", "1,8,8"), "conv1.bias has shape (3,) in the file"),
        (("A", "A", *ARCHITECTURE[:4]), "the inputs of SmallCNN are not known"),
    ],
)
def test_bad_input_is_told_in_a_sentence(files, tmp_path, capsys, words, message):
    places = {"A": files["a"], "MISSING": tmp_path / "missing.safetensors"}
    assert message in refused(capsys, *(places.get(word, word) for word in words))


def test_a_damaged_file_of_symmetries_is_named(files, zoo, tmp_path, capsys):
    (tmp_path / "symmetries").mkdir()
    (tmp_path / "symmetries" / f"{zoo.layout.fingerprint}.json").write_text("{}")
    assert f"{zoo.layout.fingerprint}.json" in refused(capsys, files["a"], files["a"])
