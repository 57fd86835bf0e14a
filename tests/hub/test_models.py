"""A model and its tokenizer go to the Hub and come back, with and without our package, also when the Hub falters."""

import hashlib

import pytest
import torch
from safetensors.torch import load_file, save_file

from modeling_sane import SaneConfig, SaneModel
from tests.hub.processes import Runner
from tests.hub.server import HubServer
from tokenization_sane import SaneWeightTokenizer

MODEL = {"token_size": 7, "latent_size": 5, "hidden_size": 16, "num_attention_heads": 2, "num_hidden_layers": 2}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A model, a tokenizer fitted to networks, and another network for it to read."""
    folder = tmp_path_factory.mktemp("saved")
    torch.manual_seed(0)
    networks = [torch.nn.Sequential(torch.nn.Linear(6, 5), torch.nn.Linear(5, 3)).state_dict() for _ in range(4)]
    SaneModel(SaneConfig(**MODEL)).save_pretrained(folder / "model")
    # means and deviations that no short decimal number holds
    SaneWeightTokenizer(token_size=7, normalization="zoo").fit(networks[:3]).save_pretrained(folder / "tokenizer")
    save_file(networks[3], folder / "network.safetensors")
    return folder


def push(folder, latents):
    import torch
    from safetensors.torch import load_file, save_file

    from modeling_sane import SaneModel
    from tokenization_sane import SaneWeightTokenizer

    torch.set_num_threads(1)
    model = SaneModel.from_pretrained(f"{folder}/model")
    tokenizer = SaneWeightTokenizer.from_pretrained(f"{folder}/tokenizer")
    model.push_to_hub("me/model")
    tokenizer.push_to_hub("me/model")
    model.push_to_hub("me/sharded", max_shard_size="4KB")
    tokenizer.push_to_hub("me/private", private=True)

    batch = tokenizer(load_file(f"{folder}/network.safetensors"))
    found = {}
    with torch.no_grad():
        for repo in ("me/model", "me/sharded"):
            model = SaneModel.from_pretrained(
                repo
            )  # pulled: a product's last bits can depend on where its factors stand
            inputs = {name: batch[name] for name in ("token_values", "position_ids", "layer_kind_ids")}
            found[repo] = model.encode_sequence(**inputs)
    save_file(found, latents)
    pulled = SaneWeightTokenizer.from_pretrained("me/model")
    return {"type": type(model).__module__, "zoo": pulled.zoo}


def pull(folder, latents):
    import importlib.util

    import torch
    from safetensors.torch import load_file, save_file
    from transformers import AutoFeatureExtractor, AutoModel, AutoTokenizer

    torch.set_num_threads(1)
    assert importlib.util.find_spec("modeling_sane") is None
    assert importlib.util.find_spec("tokenization_sane") is None
    tokenizer = AutoTokenizer.from_pretrained("me/model", trust_remote_code=True)
    extractor = AutoFeatureExtractor.from_pretrained("me/model", trust_remote_code=True)
    network = load_file(f"{folder}/network.safetensors")
    batch = tokenizer(network)
    decoded = tokenizer.decode(batch["token_values"][0], batch["layouts"][0])
    found, modules = {}, {type(tokenizer).__module__, type(extractor).__module__}
    with torch.no_grad():
        for repo in ("me/model", "me/sharded"):
            model = AutoModel.from_pretrained(repo, trust_remote_code=True)
            inputs = {name: batch[name] for name in ("token_values", "position_ids", "layer_kind_ids")}
            found[repo] = model.encode_sequence(**inputs)
            found |= {f"{repo}/{name}": tensor.clone() for name, tensor in model.state_dict().items()}
            modules.add(type(model).__module__)
    save_file(found, latents)

    refused = {}
    for function in (AutoModel, AutoTokenizer, AutoFeatureExtractor):
        try:
            function.from_pretrained("me/private", trust_remote_code=True, token=False)
        except Exception as error:
            cause = error.__cause__
            status = getattr(getattr(cause, "response", None), "status_code", None)
            refused[function.__name__] = [str(error), type(cause).__name__, status]
    return {
        "modules": sorted(name.split(".")[0] for name in modules),
        "names": [type(model).__name__, type(tokenizer).__name__, type(extractor).__name__],
        "zoo": tokenizer.zoo,
        "extractor": extractor.to_dict() == tokenizer.to_dict(),
        "decoded": {name: float((decoded[name] - tensor).abs().max()) for name, tensor in network.items()},
        "private": AutoTokenizer.from_pretrained("me/private", trust_remote_code=True).zoo == tokenizer.zoo,
        "refused": refused,
    }


@pytest.fixture(scope="module")
def trip(saved, clean_python, tmp_path_factory):
    """Pushed by one process, pulled by another that has never heard of us."""
    folder = tmp_path_factory.mktemp("trip")
    with HubServer() as hub:
        run = Runner(hub, folder, clean_python)
        pushed = run(push, saved, folder / "pushed.safetensors", client="pusher")
        pulled = run(pull, saved, folder / "pulled.safetensors", client="puller", package=False)
        hub.check()
        assert not hub.leaks
        assert not hub.strays
        yield {
            "hub": hub,
            "pushed": pushed.value | {"latents": load_file(folder / "pushed.safetensors")},
            "pulled": pulled.value | {"latents": load_file(folder / "pulled.safetensors")},
        }


def test_the_repositories_hold_weights_code_and_configuration(trip):
    hub = trip["hub"]
    assert hub.repos() == {"models/me/model": False, "models/me/sharded": False, "models/me/private": True}
    files = hub.files("me/model")
    model = {"config.json", "model.safetensors", "configuration_sane.py", "modeling_sane.py"}
    assert model | {"preprocessor_config.json", "tokenizer_config.json", "tokenization_sane.py"} <= files.keys()
    shards = {name for name in hub.files("me/sharded") if name.endswith(".safetensors")}
    assert len(shards) > 1
    assert "model.safetensors" not in shards
    assert [commit.title for commit in hub.commits("me/model")][:2] == ["Upload tokenizer", "Upload model"]


def test_weights_are_bit_equal_and_latents_equal_without_the_package(trip, saved):
    found = trip["pulled"]["latents"]
    weights = load_file(saved / "model" / "model.safetensors")
    for repo in ("me/model", "me/sharded"):
        assert weights
        for name, tensor in weights.items():
            torch.testing.assert_close(found[f"{repo}/{name}"], tensor, rtol=0, atol=0)
        assert found[repo].abs().sum() > 0
        torch.testing.assert_close(found[repo], trip["pushed"]["latents"][repo], rtol=0, atol=1e-6)
    torch.testing.assert_close(found["me/model"], found["me/sharded"], rtol=0, atol=1e-6)


def test_code_comes_from_the_repository_only_where_the_package_is_missing(trip):
    assert trip["pushed"]["type"] == "modeling_sane.modeling_sane"
    assert trip["pulled"]["modules"] == ["transformers_modules"] * 3
    assert trip["pulled"]["names"] == ["SaneModel", "SaneWeightTokenizer", "SaneWeightTokenizer"]
    assert len(trip["hub"].reads("/modeling_sane.py", "puller")) == 2  # one a repository
    assert not trip["hub"].reads("/modeling_sane.py", "pusher")


def test_fitted_statistics_are_bit_equal_with_and_without_the_package(trip, saved):
    expected = SaneWeightTokenizer.from_pretrained(saved / "tokenizer").zoo
    (entry,) = expected.values()
    assert all(std not in (0.0, 1.0) for _, std in entry["statistics"].values())
    assert trip["pushed"]["zoo"] == trip["pulled"]["zoo"] == expected
    assert trip["pulled"]["extractor"]
    assert trip["pulled"]["decoded"].keys() == entry["statistics"].keys()
    assert max(trip["pulled"]["decoded"].values()) < 1e-6


def test_a_private_repository_opens_with_its_token_and_is_the_hubs_refusal_without(trip):
    assert trip["pulled"]["private"]
    refused = trip["pulled"]["refused"]
    assert refused.keys() == {"AutoModel", "AutoTokenizer", "AutoFeatureExtractor"}
    for message, cause, status in refused.values():
        assert "me/private" in message
        assert "make sure to pass a token" in message
        assert (cause, status) == ("RepositoryNotFoundError", 401)


# ---------------------------------------------------------------------------------------------------- faults
# repository: kind, request, and what the one error says; None if the client gets over it
FAULTS = {
    "asked-500": ("500", "HEAD /me/{}/.*/model.safetensors", None),
    "asked-503": ("503", "HEAD /me/{}/.*/config.json", None),
    "sent-500": ("500", "GET /models/me/{}/.*/model.safetensors", "500 Internal Server Error"),
    "sent-503": ("503", "GET /me/{}/.*/modeling_sane.py", "503 Service Unavailable"),
    "slow": ("slow", "GET /models/me/{}/.*/model.safetensors", None),
    "cut": ("cut", "GET /models/me/{}/.*/model.safetensors", None),
    "cut-code": ("cut", "GET /me/{}/.*/configuration_sane.py", None),
    "expired": ("expired_token", "HEAD /me/{}/.*/config.json", "Invalid credentials in Authorization header"),
    "checksum": ("checksum", "GET /models/me/{}/.*/model.safetensors", None),
}


def pull_all(names, force):
    """What came of loading each: digest of the weights or the error; and what the cache holds of it."""
    import hashlib
    import os
    from pathlib import Path

    from huggingface_hub import HfApi
    from transformers import AutoModel

    found = {}
    for name in names:
        entry = found[name] = {"error": None, "weights": None, "damaged": []}
        try:
            model = AutoModel.from_pretrained(f"me/{name}", trust_remote_code=True, force_download=name in force)
        except Exception as error:
            entry["error"] = f"{type(error).__name__}: {error}"
        else:
            data = b"".join(tensor.numpy().tobytes() for _, tensor in sorted(model.state_dict().items()))
            entry["weights"] = hashlib.sha256(data).hexdigest()
            entry["damaged"] = [m["path"] for m in HfApi().verify_repo_checksums(f"me/{name}").mismatches]
        cache = Path(os.environ["HF_HOME"], "hub", f"models--me--{name}")
        entry["blobs"] = {blob.name: blob.read_bytes().hex() for blob in cache.glob("blobs/*")}
    return found


def wrong_blobs(blobs):
    """Names of files in the cache whose content has another checksum than their name says."""
    wrong = []
    for name, content in blobs.items():
        data = bytes.fromhex(content)
        if len(name) == 64:
            digest = hashlib.sha256(data).hexdigest()
        else:
            digest = hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
        wrong += [name] if digest != name else []
    return wrong


def test_a_pull_gets_over_a_fault_or_says_what_it_was_and_the_next_run_is_whole(hub, run, saved):
    files = {path.name: path.read_bytes() for path in (saved / "model").iterdir()}
    faults = {}
    for name, (kind, match, _) in FAULTS.items():
        hub.put(f"me/{name}", files)
        faults[name] = hub.fault(kind, match.format(name))
    state = sorted(load_file(saved / "model" / "model.safetensors").items())
    whole = hashlib.sha256(b"".join(tensor.numpy().tobytes() for _, tensor in state)).hexdigest()
    weights = hashlib.sha256(files["model.safetensors"]).hexdigest()

    first = run(pull_all, list(FAULTS), [], home="same", package=False, HF_HUB_DOWNLOAD_TIMEOUT="1").value
    assert {name: fault.hits for name, fault in faults.items()} == dict.fromkeys(FAULTS, 1)
    damaged = first.pop("checksum")
    for name, entry in first.items():
        message = FAULTS[name][2]
        if message is None:
            assert (entry["error"], entry["weights"]) == (None, whole), name
        else:
            assert message in entry["error"], name
            assert f"me/{name}" in entry["error"], name
        assert not wrong_blobs(entry["blobs"]), name  # nothing half-written, not even beside the rest
        assert entry["damaged"] == [], name
    # the client looks at the size of a download, not at its checksum: that, and another download, must be asked for
    assert damaged["error"] is None
    assert damaged["weights"] != whole
    assert damaged["damaged"] == ["model.safetensors"]
    assert wrong_blobs(damaged["blobs"]) == [weights]

    again = run(pull_all, list(FAULTS), ["checksum"], home="same", package=False, client="again").value
    for name, entry in again.items():
        assert (entry["error"], entry["weights"], entry["damaged"]) == (None, whole, []), name
        assert not wrong_blobs(entry["blobs"]), name
    # and what was whole is not fetched again
    fetched = {entry.path.split("/")[3] for entry in hub.entries("/model.safetensors", "again", "GET") if entry.sent}
    assert fetched == {"sent-500", "sent-503", "expired", "checksum"}
    assert not hub.leaks
    assert not hub.strays
