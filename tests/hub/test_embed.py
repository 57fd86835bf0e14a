"""Networks and zoos on the Hub are embedded like those in files, and what the Hub fails to send is not skipped."""

import pytest
import torch
from safetensors.torch import save_file

from modeling_sane import SaneConfig, SaneModel
from tests.hub.test_zoos import make_zoo, network
from tokenization_sane import SaneWeightTokenizer

CONFIG = {"token_size": 16, "latent_size": 5, "hidden_size": 16, "num_attention_heads": 2, "num_hidden_layers": 1}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A zoo, and a model that has seen its networks."""
    folder = tmp_path_factory.mktemp("embed")
    torch.manual_seed(0)
    make_zoo(folder)
    SaneModel(SaneConfig(**CONFIG)).save_pretrained(folder / "model")
    networks = [network(number, 30) for number in range(4)]
    SaneWeightTokenizer(token_size=16, normalization="zoo").fit(networks).save_pretrained(folder / "model")
    save_file(network(1, 30), folder / "v1.safetensors")
    save_file(network(2, 30), folder / "v2.safetensors")
    return folder


def put(hub, folder):
    files = {p.relative_to(folder / "zoo").as_posix(): p for p in (folder / "zoo").rglob("*") if p.is_file()}
    hub.put("me/zoo", {name: path.read_bytes() for name, path in files.items()}, "dataset")
    hub.put("me/network", {"model.safetensors": (folder / "v1.safetensors").read_bytes()})
    hub.put("me/network", {"model.safetensors": (folder / "v2.safetensors").read_bytes()}, branch="v2")


def rows(path):
    import pyarrow.parquet as pq

    return pq.read_table(path / "embeddings.parquet").to_pylist()


def test_repositories_give_the_embeddings_of_their_files(hub, run, folder, tmp_path):
    put(hub, folder)
    command = ["sane", "embed", "--model", folder / "model", "--output-dir"]
    printed = run([*command, tmp_path / "hub", "me/network", "me/zoo", "me/network@v2"]).stdout
    assert "26 embeddings" in printed
    run([*command, tmp_path / "files", folder / "v1.safetensors", folder / "zoo", folder / "v2.safetensors"])
    for here, there in zip(rows(tmp_path / "files"), rows(tmp_path / "hub"), strict=True):
        assert here["embedding"] == pytest.approx(there["embedding"], rel=1e-4, abs=1e-5)
        assert here["model_id"] == there["model_id"]
    assert [row["source"] for row in rows(tmp_path / "hub")][::25] == ["me/network", "me/network@v2"]
    found = run(["sane", "search", "--index", tmp_path / "hub", "--k", "1", "me/network@v2"])
    assert "near-duplicate" in found.stdout
    assert not hub.leaks


def test_a_missing_repository_is_skipped_and_one_that_did_not_come_is_not(hub, run, folder, tmp_path):
    put(hub, folder)
    command = ["sane", "embed", "--model", folder / "model", "--on-error", "skip", "--output-dir"]
    printed = run([*command, tmp_path / "e", "me/network", "me/nothing"]).stdout
    assert "1 embeddings" in printed
    assert "1 skipped" in printed
    offline = run([*command, tmp_path / "f", folder / "v1.safetensors", "me/network"], expect=1, HF_HUB_OFFLINE="1")
    assert "the Hub cannot be reached" in offline.stderr
    assert not (tmp_path / "f" / "embeddings.parquet").exists()
