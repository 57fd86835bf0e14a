"""The tests' Hub answers the real clients as the real one does."""

import http.client
import os

import pytest

from tests.hub.server import HubServer, Refusal, Request, _content

LARGE = bytes(range(256)) * 1000  # 256,000 bytes


def ask(hub: HubServer, method: str, path: str, **headers: str) -> http.client.HTTPResponse:
    connection = http.client.HTTPConnection(hub.url.removeprefix("http://"))
    connection.request(method, path, headers=headers)
    return connection.getresponse()


# ---------------------------------------------------------------------------------------------------- up and down
def upload(folder):
    from pathlib import Path

    from huggingface_hub import HfApi

    api = HfApi()
    url = api.create_repo("me/model")
    first = api.upload_folder(repo_id="me/model", folder_path=folder)
    again = api.upload_folder(repo_id="me/model", folder_path=folder)  # nothing to do
    Path(folder, "new.json").write_text("{}")
    Path(folder, "old", "gone.json").unlink()
    second = api.upload_folder(repo_id="me/model", folder_path=folder, delete_patterns="old/*", commit_message="clean")
    try:
        api.create_repo("me/model")
    except Exception as error:
        twice = str(error)
    return {
        "url": str(url),
        "same": str(api.create_repo("me/model", exist_ok=True)),
        "commits": [first.oid, again.oid, second.oid],
        "twice": twice,
        "user": api.whoami()["name"],
    }


def download():
    from pathlib import Path

    from huggingface_hub import HfApi, hf_hub_download, snapshot_download

    folder = Path(snapshot_download("me/model"))
    info = HfApi().model_info("me/model", files_metadata=True)
    return {
        "files": {str(path.relative_to(folder)): path.read_bytes().hex() for path in folder.rglob("*.*")},
        "single": Path(hf_hub_download("me/model", "weights.bin")).read_bytes().hex(),
        "sha": info.sha,
        "siblings": {s.rfilename: [s.size, s.lfs and s.lfs.sha256] for s in info.siblings},
        "private": info.private,
        "card": info.card_data.to_dict()["tags"],
        "damaged": HfApi().verify_repo_checksums("me/model").mismatches,
    }


def test_a_folder_goes_up_in_commits_and_comes_down_in_another_process(hub, run, tmp_path):
    files = {
        "README.md": b"---\ntags: [weights]\n---\n# Model\n",
        "config.json": b"{}",
        "weights.bin": LARGE,
        "deep/er/empty.txt": b"",
        "old/gone.json": b"[]",
    }
    for path, content in files.items():
        (tmp_path / "folder" / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "folder" / path).write_bytes(content)
    sent = run(upload, tmp_path / "folder").value
    assert sent["url"] == sent["same"] == f"{hub.url}/me/model"
    assert "You already created this model repo" in sent["twice"]
    assert sent["user"] == "me"
    first, again, second = sent["commits"]
    assert first == again != second
    assert [commit.oid for commit in hub.commits("me/model")][:2] == [second, first]
    assert hub.commits("me/model")[0].title == "clean"

    del files["old/gone.json"]
    files["new.json"] = b"{}"
    stored = hub.files("me/model")
    assert stored.keys() == {*files, ".gitattributes"}
    assert {path: stored[path] for path in files} == files
    assert hub.files("me/model", revision=first)["old/gone.json"] == b"[]"

    got = run(download).value
    assert {path: bytes.fromhex(content) for path, content in got["files"].items()} == stored
    assert bytes.fromhex(got["single"]) == LARGE
    assert (got["sha"], got["private"], got["card"], got["damaged"]) == (second, False, ["weights"], [])
    assert got["siblings"]["weights.bin"] == [len(LARGE), hub.commits("me/model")[0].files["weights.bin"].sha256]
    assert got["siblings"]["config.json"] == [2, None]
    # the large file was on the other host only, both ways, and no token with it
    assert len(hub.entries(method="PUT", host="storage")) == 1
    assert {entry.host for entry in hub.entries("/weights.bin", method="GET") if entry.sent} == {"storage"}
    assert not hub.leaks
    assert not hub.strays


def read_parts(path, parts):
    from huggingface_hub import HfFileSystem

    fs = HfFileSystem()
    with fs.open(path, block_size=1, cache_type="none") as file:
        found = []
        for start, stop in parts:
            file.seek(start)
            found.append(file.read(stop - start).hex())
    return found


def test_the_log_says_which_process_read_which_bytes(hub, run):
    hub.put("me/zoo", {"data/a.bin": LARGE, "b.txt": LARGE[1:9]}, "dataset")
    parts = {"one": [[5, 9], [255_990, 256_000]], "two": [[0, 100]]}
    for client, wanted in parts.items():
        found = run(read_parts, "datasets/me/zoo/data/a.bin", wanted, client=client).value
        assert [bytes.fromhex(text) for text in found] == [LARGE[start:stop] for start, stop in wanted]
    run(read_parts, "datasets/me/zoo/b.txt", [[2, 4]], client="two")
    assert hub.reads("data/a.bin", "one") == [(5, 9), (255_990, 256_000)]
    assert hub.reads("data/a.bin", "two") == [(0, 100)]
    assert hub.reads("data/a.bin") == [(5, 9), (255_990, 256_000), (0, 100)]
    assert hub.reads("b.txt") == [(2, 4)]  # a small one comes from the Hub itself
    assert hub.bytes_sent("data/a.bin") == 114
    assert hub.bytes_sent("data/a.bin", "two") == 100
    assert {entry.range for entry in hub.entries("data/a.bin", "two", "GET")} == {"bytes=0-99"}
    assert not hub.leaks


@pytest.mark.parametrize(
    ("asked", "found"),
    [("0-3", (0, 4)), ("4-", (4, 10)), ("-3", (7, 10)), ("-30", (0, 10)), ("8-99", (8, 10)), ("9-9", (9, 10))],
)
def test_a_range_is_answered_with_its_part_of_the_file(asked, found):
    answer = _content(Request("GET", "/", {"range": f"bytes={asked}"}, b""), bytes(range(10)), {})
    assert answer.status == 206
    assert answer.body == bytes(range(*found))
    assert answer.headers["Content-Range"] == f"bytes {found[0]}-{found[1] - 1}/10"


@pytest.mark.parametrize("asked", ["10-", "10-12", "5-3", "-0"])
def test_a_range_beyond_the_file_is_refused(asked):
    with pytest.raises(Refusal) as refusal:
        _content(Request("GET", "/", {"range": f"bytes={asked}"}, b""), bytes(range(10)), {})
    assert refusal.value.answer.status == 416
    assert refusal.value.answer.headers["Content-Range"] == "bytes */10"


# ---------------------------------------------------------------------------------------------------- permissions
def outcomes(calls):
    """Call each [function of the client, arguments] and say what came of it: None, or the exception and its status."""
    import huggingface_hub

    found = {}
    for name, (function, kwargs) in calls.items():
        owner = huggingface_hub if hasattr(huggingface_hub, function) else huggingface_hub.HfApi()
        try:
            getattr(owner, function)(**kwargs)
        except Exception as error:
            response = getattr(error, "response", None)
            found[name] = [type(error).__name__, getattr(response, "status_code", None)]
        else:
            found[name] = None
    return found


def test_what_a_token_may_see_and_change(hub, run):
    hub.put("me/private", {"a.json": b"{}"}, private=True)
    hub.put("me/public", {"a.json": b"{}"})
    hub.put("me/gated", {"a.json": b"{}"}, gated=True)
    calls = {
        f"read {name}": ["hf_hub_download", {"repo_id": f"me/{name}", "filename": "a.json"}]
        for name in ("private", "public", "gated", "absent")
    } | {
        "info": ["repo_info", {"repo_id": "me/private"}],
        "list": ["snapshot_download", {"repo_id": "me/private"}],
        "no owner": ["repo_info", {"repo_id": "absent"}],
        "write": ["delete_file", {"path_in_repo": "a.json", "repo_id": "me/public"}],
        "create": ["create_repo", {"repo_id": "me/new"}],
        "who": ["whoami", {}],
    }

    hidden, gone = ["RepositoryNotFoundError", 401], ["RepositoryNotFoundError", 404]
    forbidden = ["HfHubHTTPError", 403]
    anonymous = run(outcomes, calls, token=None).value
    assert anonymous.pop("who")[0] == "LocalTokenNotFoundError"
    assert anonymous == {
        **dict.fromkeys(["read private", "read absent", "info", "list", "no owner"], hidden),
        "read public": None,
        "read gated": ["GatedRepoError", 401],
        "write": ["HfHubHTTPError", 401],
        "create": ["HfHubHTTPError", 401],
    }
    stranger = run(outcomes, calls, token=hub.other_token).value
    assert stranger == {
        **dict.fromkeys(["read private", "read absent", "info", "list", "no owner"], gone),
        "read public": None,
        "read gated": ["GatedRepoError", 403],
        **dict.fromkeys(["write", "create"], forbidden),
        "who": None,
    }
    wrong = run(outcomes, calls, token="hf_nobody").value
    assert (wrong["read private"], wrong["read public"], wrong["who"]) == (gone, None, ["HfHubHTTPError", 401])
    reader = run(outcomes, calls, token=hub.read_token).value
    assert {name for name, found in reader.items() if found is None} == {
        *("read private", "read public", "read gated", "info", "list", "who")
    }
    assert (reader["write"], reader["create"], reader["read absent"]) == (forbidden, forbidden, gone)
    assert hub.repos() == {"models/me/private": True, "models/me/public": False, "models/me/gated": False}
    assert len(hub.commits("me/public")) == 2  # the Hub's own and the test's
    owner = run(outcomes, calls).value
    assert {name for name, found in owner.items() if found} == {"read absent", "no owner"}
    assert hub.repos()["models/me/new"] is False
    assert "a.json" not in hub.files("me/public")


def revisions(first):
    from pathlib import Path

    from huggingface_hub import HfApi, hf_hub_download

    api = HfApi()
    api.create_tag("me/zoo", tag="v1", revision=first, repo_type="dataset")
    api.create_branch("me/zoo", branch="try/out", repo_type="dataset")
    changed = api.upload_file(
        path_or_fileobj=b"3", path_in_repo="deep/a.txt", repo_id="me/zoo", repo_type="dataset", revision="try/out"
    )
    refs = api.list_repo_refs("me/zoo", repo_type="dataset")
    tree = {
        entry.path: [type(entry).__name__, entry.last_commit.title]
        for entry in api.list_repo_tree("me/zoo", repo_type="dataset", recursive=True, expand=True)
    }
    paths = ["deep/a.txt", "deep", "absent"]
    return {
        "read": [
            Path(hf_hub_download("me/zoo", "deep/a.txt", repo_type="dataset", revision=name)).read_text()
            for name in ("v1", "main", "try/out", first, changed.oid)
        ],
        "branches": {ref.name: ref.target_commit for ref in refs.branches},
        "tags": {ref.name: ref.target_commit for ref in refs.tags},
        "changed": changed.oid,
        "tree": tree,
        "top": [entry.path for entry in api.list_repo_tree("me/zoo", repo_type="dataset")],
        "inside": [entry.path for entry in api.list_repo_tree("me/zoo", "deep", repo_type="dataset")],
        "paths": [entry.path for entry in api.get_paths_info("me/zoo", paths, repo_type="dataset")],
        "titles": [commit.title for commit in api.list_repo_commits("me/zoo", repo_type="dataset")],
    }


def test_tags_branches_and_commits_are_revisions_and_others_are_missing(hub, run):
    first = hub.put("me/zoo", {"deep/a.txt": b"1", "b.txt": b"b"}, "dataset", message="one")
    second = hub.put("me/zoo", {"deep/a.txt": b"2"}, "dataset", message="two")
    found = run(revisions, first).value
    assert found["read"] == ["1", "2", "3", "1", "3"]
    assert found["branches"] == {"main": second, "try/out": found["changed"]}
    assert found["tags"] == {"v1": first}
    assert found["titles"] == ["two", "one", "initial commit"]
    assert found["tree"] == {
        ".gitattributes": ["RepoFile", "initial commit"],
        "b.txt": ["RepoFile", "one"],
        "deep": ["RepoFolder", "two"],
        "deep/a.txt": ["RepoFile", "two"],
    }
    assert (found["top"], found["inside"]) == ([".gitattributes", "b.txt", "deep"], ["deep/a.txt"])
    assert found["paths"] == ["deep/a.txt", "deep"]

    where = {"repo_id": "me/zoo", "repo_type": "dataset"}
    remove = {"path_in_repo": "b.txt", "commit_message": "late"}
    errors = run(
        outcomes,
        {
            "revision": ["hf_hub_download", {**where, "filename": "b.txt", "revision": "v2"}],
            "info": ["repo_info", {**where, "revision": "v2"}],
            "commit": ["hf_hub_download", {**where, "filename": "b.txt", "revision": "0" * 40}],
            "entry": ["hf_hub_download", {**where, "filename": "c.txt"}],
            "branch": ["create_branch", {**where, "branch": "main"}],
            "type": ["repo_info", {"repo_id": "me/zoo", "repo_type": "model"}],
            "late": ["delete_file", {**where, **remove, "parent_commit": first}],
            "delete": ["delete_file", {**where, "path_in_repo": "c.txt"}],
        },
    ).value
    no_revision, no_entry = ["RevisionNotFoundError", 404], ["RemoteEntryNotFoundError", 404]
    assert errors == {
        **dict.fromkeys(["revision", "info", "commit"], no_revision),
        **dict.fromkeys(["entry", "delete"], no_entry),
        "branch": ["HfHubHTTPError", 409],
        "type": ["RepositoryNotFoundError", 404],
        "late": ["HfHubHTTPError", 412],
    }
    assert hub.files("me/zoo", "dataset")["b.txt"] == b"b"


def test_a_card_with_wrong_metadata_is_refused(hub, run, tmp_path):
    hub.put("me/model", {})
    folders = {
        "broken": "---\ntags: [a\n---\n",
        "typed": "---\nmodel-index: 3\n---\n",
        "fine": "---\ntags: [a]\n---\n",
    }
    calls = {}
    for name, text in folders.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "README.md").write_text(text)
        calls[name] = ["upload_folder", {"repo_id": "me/model", "folder_path": str(tmp_path / name)}]
    found = run(outcomes, calls).value
    assert found == {"broken": ["ValueError", None], "typed": ["ValueError", None], "fine": None}
    assert hub.files("me/model")["README.md"] == folders["fine"].encode()


# ---------------------------------------------------------------------------------------------------- datasets
def dataset_round_trip():
    import datasets

    rows = {"name": [f"n{i}" for i in range(40)], "value": [i / 7 for i in range(40)]}
    datasets.Dataset.from_dict(rows).push_to_hub("me/zoo", "small", split="train", num_shards=4)
    loaded = datasets.load_dataset("me/zoo", "small", split="train")
    streamed = datasets.load_dataset("me/zoo", "small", split="train", streaming=True)
    return {"loaded": loaded.to_dict() == rows, "streamed": list(streamed)[39], "shards": streamed.num_shards}


def test_datasets_pushes_loads_and_streams_and_nothing_else_is_reached(hub, run):
    found = run(dataset_round_trip).value
    assert found == {"loaded": True, "streamed": {"name": "n39", "value": 39 / 7}, "shards": 4}
    assert "config_name: small" in hub.files("me/zoo", "dataset")["README.md"].decode()
    # a host that it makes of the Hub's name; it must not wait for name servers
    assert hub.strays
    assert all(url.startswith("http://datasets-server.127.0.0.1:") for url in hub.strays)
    assert not hub.leaks


def look_elsewhere():
    from huggingface_hub.utils import get_session

    found = []
    for url in ("http://example.com/", "https://huggingface.co/api/models/gpt2"):
        try:
            found.append(get_session().get(url).status_code)
        except Exception as error:
            found.append(type(error).__name__)
    return found


def test_other_machines_are_out_of_reach(hub, run):
    assert run(look_elsewhere).value == [403, "ProxyError"]
    assert hub.strays == ["http://example.com/", "huggingface.co:443"]


# ---------------------------------------------------------------------------------------------------- faults
def download_twice():
    from pathlib import Path

    from huggingface_hub import HfApi, hf_hub_download

    found = []
    for force in (False, False, True):
        try:
            path = hf_hub_download("me/model", "weights.bin", force_download=force)
        except Exception as error:
            found.append(f"{type(error).__name__}: {error}")
        else:
            damaged = [mismatch["path"] for mismatch in HfApi().verify_repo_checksums("me/model").mismatches]
            found.append([Path(path).read_bytes().hex(), damaged])
    cache = Path(path).parents[2]
    return {"found": found, "left": [str(path) for path in cache.rglob("*.incomplete")]}


@pytest.mark.parametrize(
    ("kind", "match", "error"),
    [
        ("500", "GET /models/.*/weights.bin", "500 Internal Server Error"),
        ("503", "GET /models/.*/weights.bin", "503 Service Unavailable"),
        ("500", "HEAD .*/weights.bin", None),
        ("503", "HEAD .*/weights.bin", None),
        ("slow", "GET /models/.*/weights.bin", None),
        ("cut", "GET /models/.*/weights.bin", None),
        ("checksum", "GET /models/.*/weights.bin", None),
        ("expired_token", "HEAD .*/weights.bin", "Invalid credentials in Authorization header"),
    ],
)
def test_a_download_after_a_fault(hub, run, kind, match, error):
    hub.put("me/model", {"weights.bin": LARGE})
    fault = hub.fault(kind, match)
    found = run(download_twice, HF_HUB_DOWNLOAD_TIMEOUT="1").value
    assert fault.hits == 1
    assert not found["left"]
    first, second, forced = found["found"]
    whole = [LARGE.hex(), []]
    if kind == "checksum":
        # the client compares sizes only, and trusts its cache from then on; it has another call for this
        damaged = [LARGE[:-1].hex() + f"{LARGE[-1] ^ 0xFF:02x}", ["weights.bin"]]
        assert first == second == damaged
    elif error:
        assert error in first
        assert second == whole
    else:
        assert first == second == whole
    assert forced == whole
    if kind == "cut":
        assert hub.reads("/weights.bin")[0] == (0, len(LARGE) // 2)


def upload_twice():
    from huggingface_hub import HfApi

    found = []
    for _ in range(2):
        try:
            HfApi().upload_file(path_or_fileobj=bytes(1000), path_in_repo="weights.bin", repo_id="me/model")
        except Exception as error:
            cause = error.__cause__ or error
            found.append(f"{type(error).__name__}: {error} {type(cause).__name__}: {cause}")
        else:
            found.append(None)
    return found


@pytest.mark.parametrize(
    ("kind", "match", "error"),
    [
        ("503", "PUT ", None),
        ("cut", "PUT ", None),
        ("checksum", "PUT ", "is not what was announced"),
        ("500", "POST .*/commit/main", "500 Internal Server Error"),
        ("expired_token", "POST .*/preupload/main", "Invalid credentials in Authorization header"),
    ],
)
def test_an_upload_after_a_fault_is_whole_or_not_there(hub, run, kind, match, error):
    hub.put("me/model", {})
    hub.fault(kind, match)
    first, second = run(upload_twice).value
    assert second is None
    assert error in first if error else first is None
    assert hub.files("me/model")["weights.bin"] == bytes(1000)
    assert len(hub.commits("me/model")) == 3  # the Hub's own, the test's, and one upload


# ---------------------------------------------------------------------------------------------------- the tools
def test_check_finds_unknown_requests_and_faults_that_never_were():
    with HubServer() as hub:
        hub.check()
        assert ask(hub, "GET", "/api/models/me/model/discussions").status == 404
        with pytest.raises(AssertionError, match="/discussions: the test's server does not know"):
            hub.check()
    with HubServer() as hub:
        hub.fault("500", "GET /nowhere", times=2)
        assert ask(hub, "GET", "/nowhere").status == 500
        with pytest.raises(AssertionError, match="did not happen as often as asked: 500 at 'GET /nowhere'"):
            hub.check()
        with pytest.raises(ValueError, match="kind is '404'"):
            hub.fault("404")


def test_the_storage_host_takes_only_signed_addresses_and_reports_tokens(hub):
    hub.put("me/model", {"weights.bin": LARGE})
    signed = ask(hub, "GET", "/me/model/resolve/main/weights.bin").headers["Location"]
    assert signed.startswith(hub.storage_url)
    connection = http.client.HTTPConnection(hub.storage_url.removeprefix("http://"))
    path = signed.removeprefix(hub.storage_url)
    for target, headers, status in [
        (path, {}, 200),
        (path.split("?")[0], {}, 403),
        (path, {"Authorization": "x"}, 200),
    ]:
        connection.request("GET", target, headers=headers)
        response = connection.getresponse()
        assert response.status == status
        assert (response.read() == LARGE) == (status == 200)
    assert [entry.path for entry in hub.leaks] == [path.split("?")[0]]


def where_am_i(name):
    import importlib.util
    import os
    from pathlib import Path

    wanted = ("HF_ENDPOINT", "HF_TOKEN", "HF_HUB_OFFLINE", "HF_HOME", "SANE_CACHE", "HF_DATASETS_CACHE", "HF_SECRET")
    return {
        "found": importlib.util.find_spec("tokenization_sane") is not None,
        "folder": [path.name for path in Path().iterdir()],
        "environment": {key: os.environ.get(key) for key in wanted},
        "name": name,
    }


def test_a_process_has_what_the_test_asks_for_and_nothing_of_the_user(hub, run, monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")  # as in CI
    monkeypatch.setenv("HF_SECRET", "x")
    with_package = run(where_am_i, "ä").value
    without = run(where_am_i, "b", package=False, token=None, home="mine")
    assert (with_package["found"], without.value["found"]) == (True, False)
    assert (with_package["folder"], with_package["name"]) == ([], "ä")
    assert without.home == tmp_path / "mine"
    assert without.value["environment"] == {
        "HF_ENDPOINT": hub.url,
        "HF_TOKEN": None,
        "HF_HUB_OFFLINE": "0",
        "HF_HOME": str(tmp_path / "mine" / "hf"),
        "SANE_CACHE": str(tmp_path / "mine" / "sane"),
        "HF_DATASETS_CACHE": str(tmp_path / "mine" / "datasets"),
        "HF_SECRET": None,
    }
    assert with_package["environment"]["HF_TOKEN"] == hub.token
    assert run("import sys; print(sys.argv[1:])", 1, tmp_path).stdout.strip() == str(["1", str(tmp_path)])
    assert run(["python", "-c", "raise SystemExit(3)"], expect=3).returncode == 3


def test_a_process_that_fails_or_hangs_fails_the_test_with_what_it_printed(run):
    with pytest.raises(pytest.fail.Exception, match=r"exit code 1 instead of 0\n[^$]*ZeroDivisionError"):
        run("print(1 / 0)")
    with pytest.raises(pytest.fail.Exception, match=r"not done after 0.5 s\n.*waits"):
        run("import threading; print('waits', flush=True); threading.Event().wait()", timeout=0.5)


def test_two_threads_that_commit_at_once_lose_nothing(hub):
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda i: hub.put("me/model", {f"{i}.txt": os.urandom(3)}), range(64)))
    assert len(hub.files("me/model")) == 65
    assert len(hub.commits("me/model")) == 65
