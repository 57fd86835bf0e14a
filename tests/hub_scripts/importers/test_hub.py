"""Repositories on the Hub: most tests with a made-up one, the last ones against the protocol."""

import json
import re
from types import SimpleNamespace

import pytest
import torch
from huggingface_hub.errors import GatedRepoError, HTTPError, RepositoryNotFoundError, RevisionNotFoundError
from safetensors.torch import save
from transformers import BertConfig

from hub_scripts.zoos.importers import ImportOptions, importer
from hub_scripts.zoos.importers import hub as module
from hub_scripts.zoos.importers.hub import list_checkpoints
from tests.hub.conftest import clean_python, hub, run  # noqa: F401 (fixtures)

CONFIG = {**BertConfig(hidden_size=8).to_diff_dict(), "architectures": ["BertModel"], "_name_or_path": "x"}
CARD = """---
model-index:
- name: m
  results:
  - task: {type: image-classification}
    dataset: {name: MNIST, type: mnist}
    metrics:
    - {type: accuracy, value: 0.75}
    - {type: f1, value: 0.5}
    - {type: note, value: fine}
  - task: {type: image-classification}
    dataset: {name: Fashion-MNIST, type: f, split: "validation[:10%]"}
    metrics:
    - {type: accuracy, value: 0.25}
    - {type: loss, value: 2}
    - {type: f1, value: 0.125}
---
"""


class FakeHub:
    """Repositories as `{repo: {revision: files}}`; the commit of revision r is `commit-r`, or what `commits` says."""

    def __init__(self, folder):
        self.folder = folder
        self.repos: dict[str, dict[str, dict[str, str]]] = {}
        self.commits: dict[str, str] = {}
        self.error: Exception | None = None

    def commit(self, revision):
        return self.commits.get(revision, f"commit-{revision}")

    def model_info(self, repo_id, revision=None):
        if self.error:
            raise self.error
        if repo_id not in self.repos:
            raise refusal(RepositoryNotFoundError)
        if (revision or "main") not in self.repos[repo_id]:
            raise refusal(RevisionNotFoundError)
        files = self.repos[repo_id][revision or "main"]
        siblings = [SimpleNamespace(rfilename=name) for name in files]
        return SimpleNamespace(sha=self.commit(revision or "main"), siblings=siblings)

    def list_repo_refs(self, repo_id):
        if repo_id not in self.repos:
            raise refusal(RepositoryNotFoundError)
        refs = [SimpleNamespace(name=name, target_commit=self.commit(name)) for name in self.repos[repo_id]]
        return SimpleNamespace(branches=refs[:1], tags=refs[1:])

    def download(self, repo_id, name, revision):
        wanted = next(files for key, files in self.repos[repo_id].items() if self.commit(key) == revision)
        path = self.folder / repo_id.replace("/", "--") / revision / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(wanted[name])
        return str(path)


def refusal(kind):
    return kind("404 Client Error.\nsome more lines", response=SimpleNamespace(headers={}, request=None))


@pytest.fixture
def fake(tmp_path, monkeypatch):
    fake = FakeHub(tmp_path / "cache")
    monkeypatch.setattr(module, "HfApi", lambda: fake)
    monkeypatch.setattr(module, "hf_hub_download", fake.download)
    monkeypatch.setattr(module, "read_checkpoint", lambda source, allow_pickle: {"read": source})
    fake.repos["org/a"] = {
        "main": {"model.safetensors": "", "config.json": json.dumps(CONFIG), "README.md": CARD, "sub/x.bin": ""}
    }
    fake.repos["org/b"] = {"main": {"model.safetensors": ""}}
    return fake


def test_a_repository_is_a_model_pinned_to_its_commit(fake):
    (found,) = importer("hub")("org/a", ImportOptions())
    assert (found.model_id, found.epoch, found.where) == ("org/a", 0, "org/a@commit-main")
    assert found.read() == {"read": "org/a@commit-main"}
    assert found.architecture == "transformers:BertModel"
    assert found.architecture_kwargs["hidden_size"] == 8
    assert "_name_or_path" not in found.architecture_kwargs


def test_the_card_tells_properties(fake):
    (found,) = list_checkpoints("org/a", ImportOptions())
    assert found.columns == {
        "test_accuracy": 0.75,
        "f1": 0.5,
        "validation_accuracy": 0.25,
        "validation_loss": 2,
        "f1_Fashion_MNIST": 0.125,
    }


@pytest.mark.parametrize(
    "card", ["# nothing", "---\n: : [\n---\n", "---\nmodel-index: {a: 1}\n---\n", "---\n[1]\n---\n"]
)
def test_a_damaged_card_is_as_none(fake, card):
    fake.repos["org/a"]["main"]["README.md"] = card
    assert list_checkpoints("org/a", ImportOptions())[0].columns == {}


def test_a_list_has_a_repository_a_line(fake, tmp_path):
    fake.repos["org/b"]["step5"] = fake.repos["org/b"]["step20"] = {"model.safetensors": ""}
    (tmp_path / "list.txt").write_text("# mine\norg/b@step20\n\n  org/a  # good\norg/b@step5\n")
    found = list_checkpoints(str(tmp_path / "list.txt"), ImportOptions())
    assert [(c.model_id, c.epoch, c.where) for c in found] == [
        ("org/b", 5, "org/b@commit-step5"),
        ("org/b", 20, "org/b@commit-step20"),
        ("org/a", 0, "org/a@commit-main"),
    ]
    assert found[0].architecture is None


@pytest.mark.parametrize(
    ("revisions", "asked", "epochs"),
    [
        (["main", "step10", "step9", "v1.0"], ["all"], [("step9", 9), ("step10", 10), ("main", 11), ("v1.0", 12)]),
        (["main", "second", "first"], ["all"], [("first", 0), ("main", 1), ("second", 2)]),
        (["main", "second", "first"], ["second", "first"], [("second", 0), ("first", 1)]),
        (["main", "step10", "step9"], ["step10"], [("step10", 10)]),
    ],
)
def test_revisions_are_epochs(fake, revisions, asked, epochs):
    fake.repos["org/r"] = {name: {"model.safetensors": ""} for name in revisions}
    found = list_checkpoints("org/r", ImportOptions(revisions=asked))
    assert [(checkpoint.where, checkpoint.epoch) for checkpoint in found] == [
        (f"org/r@commit-{name}", epoch) for name, epoch in epochs
    ]


def test_of_all_revisions_each_commit_is_taken_once(fake):
    fake.repos["org/r"] = {name: {"model.safetensors": ""} for name in ("main", "step1", "step2")}
    fake.commits["main"] = "commit-step2"
    found = list_checkpoints("org/r", ImportOptions(revisions=["all"]))
    assert [(checkpoint.where, checkpoint.epoch) for checkpoint in found] == [
        ("org/r@commit-step1", 1),
        ("org/r@commit-step2", 2),
    ]


def test_revisions_of_one_number_are_refused(fake):
    fake.repos["org/r"] = {name: {"model.safetensors": ""} for name in ("a-step1", "b-step1")}
    with pytest.raises(ValueError, match=r"org/r: the revisions a-step1 and b-step1 would both be epoch 1; choose"):
        list_checkpoints("org/r", ImportOptions(revisions=["all"]))


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("org/gone", "org/gone is no model repository that can be read; check the name, and if it is private, log in"),
        ("org/a@gone", "org/a@gone does not exist: the repository has no such branch, tag or commit"),
        ("org/empty", "org/empty@commit-main holds no weights; expected a file that ends in .safetensors"),
        ("org/old", "org/old@commit-main/pytorch_model.bin is a pickle, which can hold code; pass --allow-pickle"),
    ],
)
def test_a_repository_that_cannot_be_read_is_refused_or_left_out(fake, tmp_path, source, message):
    fake.repos["org/empty"] = {"main": {"README.md": ""}}
    fake.repos["org/old"] = {"main": {"pytorch_model.bin": ""}}
    with pytest.raises(ValueError, match=f"^{re.escape(message)}[^\n]*$"):
        list_checkpoints(source, ImportOptions())

    (tmp_path / "list.txt").write_text(f"{source}\norg/b\n")
    options = ImportOptions(on_error="skip")
    assert [checkpoint.model_id for checkpoint in list_checkpoints(str(tmp_path / "list.txt"), options)] == ["org/b"]
    assert [reason.startswith(message) for reason in options.skipped] == [True]


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (refusal(GatedRepoError), "org/a is gated; ask for access"),
        (HTTPError("no route"), "org/a cannot be read from the Hub: no route"),
        (TimeoutError(), "org/a cannot be read from the Hub: TimeoutError"),
    ],
)
def test_faults_of_the_hub_name_the_repository(fake, error, message):
    fake.error = error
    with pytest.raises(ValueError, match=f"^{re.escape(message)}[^\n]*$"):
        list_checkpoints("org/a", ImportOptions())


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("# nothing\n", r"list\.txt names no repository, expected one a line"),
        ("org/a\nno repo here\n", r"list\.txt, line 2: 'no repo here' is no repository, expected namespace/name"),
        ("org/a\n\norg/a\n", r"list\.txt, line 3: org/a stands in line 1 already"),
        ("org/a/b\n", r"line 1: 'org/a/b' is no repository"),
    ],
)
def test_a_wrong_list_names_its_line(fake, tmp_path, text, message):
    (tmp_path / "list.txt").write_text(text)
    with pytest.raises(ValueError, match=message):
        list_checkpoints(str(tmp_path / "list.txt"), ImportOptions())


def test_a_wrong_source_is_told(fake, tmp_path):
    with pytest.raises(ValueError, match=r"repos\.txt is neither a text file nor the name of a repository"):
        list_checkpoints("repos.txt", ImportOptions())
    (tmp_path / "x.safetensors").write_bytes(b"\xff\xff")
    with pytest.raises(ValueError, match=r"is a folder; it looks like --format folder"):
        list_checkpoints(str(tmp_path), ImportOptions())
    with pytest.raises(ValueError, match=r"x\.safetensors is no text file; --format hub expects"):
        list_checkpoints(str(tmp_path / "x.safetensors"), ImportOptions())


def _list_and_read(source, revisions):
    from hub_scripts.zoos.importers import ImportOptions, importer

    found = importer("hub")(source, ImportOptions(revisions=revisions))
    return [[c.model_id, c.epoch, c.where, c.read()["w"].tolist(), dict(c.columns)] for c in found]


def _refused(source):
    from hub_scripts.zoos.importers import ImportOptions, importer

    try:
        importer("hub")(source, ImportOptions())
    except ValueError as error:
        return str(error)


def test_revisions_are_read_at_their_commits(hub, run):  # noqa: F811 (pytest's way to give fixtures)
    first = hub.put("me/net", {"model.safetensors": save({"w": torch.tensor([1.0])})}, branch="main")
    second = hub.put("me/net", {"model.safetensors": save({"w": torch.tensor([2.0])}), "README.md": CARD.encode()})
    result = run(_list_and_read, "me/net", [first, "main"]).value
    assert [row[:4] for row in result] == [
        ["me/net", 0, f"me/net@{first}", [1.0]],
        ["me/net", 1, f"me/net@{second}", [2.0]],
    ]
    assert [row[4].get("test_accuracy") for row in result] == [None, 0.75]  # the card is that of the revision


def test_what_is_private_is_told(hub, run):  # noqa: F811
    hub.put("me/secret", {"model.safetensors": save({"w": torch.ones(1)})}, private=True)
    assert run(_refused, "me/secret", token=None).value.startswith("me/secret is no model repository that can be read")
