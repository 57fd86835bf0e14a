"""Nearest networks: copies are found whatever the order of their units, and other models' indices are refused."""

import json
import shutil
from itertools import zip_longest
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file, save_file

from hub_scripts import search as module
from hub_scripts.embed import EmbedArguments, embed
from hub_scripts.evaluation.index import EmbeddingIndex
from hub_scripts.search import SearchArguments, search
from hub_scripts.zoos.zoo import Zoo


@pytest.fixture(scope="module")
def folder(tiny_zoo, tiny_model, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("index") / "index"
    args = EmbedArguments(model=str(tiny_model), output_dir=str(folder))
    args.sources = [str(tiny_zoo)]
    embed(args)
    return folder


def run(folder: Path, *queries, **settings):
    args = SearchArguments(index=str(folder), **settings)
    args.queries = list(map(str, queries))
    return search(args)


def save(network, path: Path) -> Path:
    save_file({name: tensor.contiguous() for name, tensor in network.items()}, path)
    return path


def toy(**layouts) -> EmbeddingIndex:
    """Rows of the layouts in turn, as long as there are any."""
    places = zip_longest(*([(name, row) for row in array.tolist()] for name, array in layouts.items()))
    pairs = [pair for place in places for pair in place if pair is not None]
    return EmbeddingIndex(Dataset.from_list([{"layout_id": name, "embedding": row} for name, row in pairs]))


# ---------------------------------------------------------------------------------------------------- the index
def test_distances_are_exact_between_standardised_rows_of_one_layout():
    a, b = (np.random.default_rng(0).normal(5, [1, 100, 1e-3], (n, 3)) for n in (30, 4))
    index = toy(a=a, b=b[:, :2])
    distances, rows = index.query(b, "a", k=3)
    z, q = (a - a.mean(0)) / a.std(0), (b - a.mean(0)) / a.std(0)
    exact = np.linalg.norm(q[:, None] - z, axis=-1)
    number = np.r_[0:8:2, 8:34]  # of each row of the first layout: those of the second stand between the first four
    np.testing.assert_array_equal(rows, number[exact.argsort(1)[:, :3]])
    np.testing.assert_allclose(distances, np.sort(exact, 1)[:, :3], rtol=1e-3)
    assert index.query(b[:, :2], "b", k=9)[1][:, 0].tolist() == [1, 3, 5, 7]  # row numbers of the whole index
    assert index.query(b[:, :2], "b", k=9)[0].shape == (4, 4)
    # a row is no distance from itself, also where many are asked for at once
    assert index.query(a, "a", k=1)[0].max() < 1e-6


def test_a_constant_feature_changes_nothing():
    a = np.random.default_rng(0).normal(size=(10, 3)).astype(np.float32)
    a[:, 1] = 7
    distances, _ = toy(a=a).query(a[:1], "a", k=10)
    without, _ = toy(a=a[:, [0, 2]]).query(a[:1, [0, 2]], "a", k=10)
    np.testing.assert_allclose(distances, without, rtol=1e-5)
    assert toy(a=a[:1]).spacing("a") == 1.0  # a single row


def test_what_an_index_refuses(tmp_path, monkeypatch):
    index = toy(a=np.eye(3))
    for arguments, message in (
        ((np.ones((1, 3)), "a", 0), "k is 0, expected at least 1"),
        ((np.ones((1, 3)), "z", 1), "holds no network of the layout z"),
        ((np.ones((1, 2)), "a", 1), r"expected \(n, 3\)"),
    ):
        with pytest.raises(ValueError, match=message):
            index.query(*arguments)
    with pytest.raises(ValueError, match="has no rows"):
        EmbeddingIndex(Dataset.from_dict({"layout_id": [], "embedding": []}))
    with pytest.raises(ValueError, match=r"has no embeddings\.parquet"):
        EmbeddingIndex.from_folder(tmp_path)
    monkeypatch.setattr("hub_scripts.evaluation.index.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"pip install 'sane-hub\[search\]'"):
        toy(a=np.eye(3))


# ---------------------------------------------------------------------------------------------------- the command
def test_a_permuted_twin_is_a_near_duplicate_and_a_child_finds_its_parent(tiny_zoo, folder, tmp_path):
    zoo = Zoo(tiny_zoo)
    network, spec = zoo.state_dict("train", 3), zoo.symmetries.of_kind("permutation", "sign")
    twin = save(spec.apply(network, spec.draw(torch.Generator().manual_seed(1))), tmp_path / "twin.safetensors")
    noise = torch.Generator().manual_seed(0)
    moved = {name: t + 0.02 * t.std() * torch.randn(t.shape, generator=noise) for name, t in network.items()}
    child = save(moved, tmp_path / "child.safetensors")
    found, changed = run(folder, twin, child, output_dir=str(tmp_path / "out"))

    first = found["hits"][0]
    expected = zoo.rows("train")[3]
    assert (first["rank"], first["model_id"], first["epoch"]) == (1, expected["model_id"], expected["epoch"])
    assert first["near_duplicate"]
    assert not any(hit["near_duplicate"] for hit in found["hits"][1:])
    assert found["likely_parent"]["model_id"] != expected["model_id"]  # the copy's own checkpoints are no parents
    assert not changed["hits"][0]["near_duplicate"]
    assert changed["hits"][0]["likely_parent"]
    assert changed["likely_parent"]["model_id"] == expected["model_id"]

    assert {path.name for path in (tmp_path / "out").iterdir()} == {"results.json", "clusters.png"}
    assert json.loads((tmp_path / "out" / "results.json").read_text())["queries"] == [found, changed]


def test_a_row_is_searched_without_the_model(folder, monkeypatch, capsys):
    def never(*_):
        raise AssertionError("no model is needed")

    monkeypatch.setattr(module, "load_embedder", never)
    row = EmbeddingIndex.from_folder(folder).rows[4]
    name = f"{row['model_id']}@{row['epoch']}"
    (found,) = run(folder, name, k=3)
    assert len(found["hits"]) == 3
    assert 4 not in [hit["row"] for hit in found["hits"]]
    distances = [hit["distance"] for hit in found["hits"]]
    assert distances == sorted(distances)
    assert found["likely_parent"]["model_id"] != row["model_id"]
    module.main(["--index", str(folder), "--k", "3", name])
    printed = capsys.readouterr().out
    assert printed.splitlines()[1].split() == ["rank", "distance", "source", "model_id", "epoch"]
    assert "likely parent" in printed


def test_a_layout_that_the_index_does_not_have_is_said_to_be_missing(mlp_zoo, folder, tmp_path, capsys):
    other = save(Zoo(mlp_zoo).state_dict("train", 0), tmp_path / "mlp.safetensors")
    module.main(["--index", str(folder), str(other)])
    assert "the index holds no network of the layout of" in capsys.readouterr().out


def test_an_index_of_another_model_or_tokenizer_is_refused(tiny_model, folder, tmp_path):
    other = shutil.copytree(tiny_model, tmp_path / "other")
    weights = load_file(other / "model.safetensors")
    save_file({name: tensor + 1 for name, tensor in weights.items()}, other / "model.safetensors", {"format": "pt"})
    row = EmbeddingIndex.from_folder(folder).rows[0]
    query = f"{row['model_id']}@{row['epoch']}"
    assert run(folder, query, model=str(tiny_model))
    with pytest.raises(ValueError, match="made by another model than that of"):
        run(folder, query, model=str(other))

    other = shutil.copytree(tiny_model, tmp_path / "fitted")
    config = json.loads((other / "preprocessor_config.json").read_text())
    next(iter(config["zoo"].values()))["statistics"]["fc1.weight"][0] += 0.1
    (other / "preprocessor_config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="made by another tokenizer than that of"):
        run(folder, query, model=str(other))


def test_queries_that_are_not_there_are_refused(folder, tmp_path):
    row = EmbeddingIndex.from_folder(folder).rows[0]
    for query, message in (
        (f"{row['model_id']}@99", "the index has no epoch 99 of model"),
        ("nobody@1", "the index has no model 'nobody'"),
        (row["model_id"], f"which of its checkpoints you mean: {row['model_id']}@EPOCH"),
        (tmp_path / "none.safetensors", "the query .* does not exist"),
    ):
        with pytest.raises(ValueError, match=message):
            run(folder, query)
    with pytest.raises(ValueError, match="--k is 0, expected at least 1"):
        SearchArguments(index=str(folder), k=0)
