"""Zoos on the Hub: published, read back whole and in part, trained on."""

import json
import shutil
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import save_file

from hub_scripts.import_zoo import ImportZooArguments, import_zoo
from tests.hub.server import HubServer

MODELS = 24


def network(seed: int, width: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "fc1.weight": torch.randn(width, 40, generator=generator),
        "fc2.weight": torch.randn(4, width, generator=generator),
    }


def make_zoo(folder: Path, width: int = 30, **arguments) -> Path:
    """A zoo of networks that nobody trained."""
    (folder / "checkpoints").mkdir(parents=True)
    for number in range(MODELS):
        save_file(network(number, width), folder / "checkpoints" / f"m{number:02d}.safetensors")
    args = ImportZooArguments(**arguments)
    args.source, args.output_dir = str(folder / "checkpoints"), str(folder / "zoo")
    import_zoo(args)
    return folder / "zoo"


@pytest.fixture(scope="module")
def zoo(tmp_path_factory) -> Path:
    return make_zoo(tmp_path_factory.mktemp("zoo"))


def seed(hub: HubServer, folder: Path, **kwargs) -> None:
    """The zoo as it is after a push, without the push."""
    files = {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    hub.put("me/zoo", files, "dataset", **kwargs)


def test_a_zoo_is_pushed_in_one_commit_and_read_by_people_without_our_package(hub, run, zoo):
    pushed = run(["sane", "push-zoo", zoo, "me/zoo", "--private"])
    assert "/datasets/me/zoo/commit/" in pushed.stdout
    assert len(hub.commits("me/zoo", "dataset")) == 2  # the Hub's own, and ours
    assert hub.repos() == {"datasets/me/zoo": True}
    files = hub.files("me/zoo", "dataset")
    assert {p.relative_to(zoo).as_posix() for p in zoo.rglob("*") if p.is_file()} == files.keys() - {".gitattributes"}

    def read(repo):
        import safetensors.torch
        from datasets import load_dataset

        rows = load_dataset(repo)
        streamed = [row["weights"] for row in load_dataset(repo, split="test", streaming=True)]
        row = rows["train"][3]
        tensors = safetensors.torch.load(row["weights"])
        return {
            "splits": {name: len(split) for name, split in rows.items()},
            "equal": streamed == rows["test"]["weights"],
            "model": row["model_id"],
            "values": tensors["fc1.weight"].tolist(),
        }

    found = run(read, "me/zoo", package=False).value
    assert sum(found["splits"].values()) == MODELS
    assert found["equal"]
    assert found["values"] == network(int(found["model"].removeprefix("m")), 30)["fc1.weight"].tolist()
    assert not hub.leaks


def test_a_second_push_sends_only_what_changed_and_leaves_no_row_of_the_first(hub, run, zoo, tmp_path):
    seed(hub, zoo)
    hub.put("me/zoo", {"data/train-00007-of-00009.parquet": b"of an older version"}, "dataset")
    run(["sane", "push-zoo", zoo, "me/zoo"])
    assert "data/train-00007-of-00009.parquet" not in hub.files("me/zoo", "dataset")
    assert not [entry for entry in hub.entries(method="PUT", host="storage") if entry.status == 200]


def read_some(repo):
    """Properties of a zoo, then one row."""
    from hub_scripts.zoos.zoo import Zoo

    zoo = Zoo(repo)
    last = len(zoo.rows("train")) - 1
    return {
        "model": zoo.rows("train")[last]["model_id"],
        "values": zoo.state_dict("train", last)["fc2.weight"].tolist(),
    }


def test_of_large_networks_only_those_that_are_asked_for_come_over(hub, run, tmp_path):
    zoo = make_zoo(tmp_path, width=3000, embed_limit=100_000)
    size = next((zoo / "weights").rglob("*.safetensors")).stat().st_size
    run(["sane", "push-zoo", zoo, "me/zoo"])
    found = run(read_some, "me/zoo", client="reader").value
    assert found["values"] == network(int(found["model"].removeprefix("m")), 3000)["fc2.weight"].tolist()
    sent = hub.bytes_sent(client="reader")
    assert size < sent < 1.5 * size < 0.2 * sum(p.stat().st_size for p in zoo.rglob("*") if p.is_file())


def test_a_streamed_row_costs_one_file_of_many(hub, run, tmp_path):
    zoo = make_zoo(tmp_path, width=6000)  # a megabyte a row
    seed(hub, zoo)

    def first(repo):
        import gc

        from datasets import load_dataset

        rows = iter(load_dataset(repo, split="train", streaming=True).take(1))
        found = next(rows)["model_id"]
        del rows
        gc.collect()
        return found

    assert run(first, "me/zoo", package=False, client="reader", expect=None).value.startswith("m")
    files = sorted((zoo / "data").glob("train-*.parquet"))
    assert len(files) > 4
    # the first file, and footers to know what there is
    assert hub.bytes_sent(client="reader") < 1.3 * files[0].stat().st_size
    assert not any(hub.bytes_sent(f"/{file.name}", client="reader") > 100_000 for file in files[1:])


def test_two_processes_train_on_a_zoo_of_the_hub_and_each_row_is_read_by_one(hub, run, tmp_path):
    zoo = make_zoo(tmp_path / "source", width=3000)
    seed(hub, zoo)
    settings = ["--max-steps", 2, "--batch-size", 4, "--hidden-size", 16, "--num-hidden-layers", 1, "--token-size", 64]
    settings += ["--latent-size", 8, "--linear-start", "False", "--eval-steps", 2, "--save-steps", 2]
    command = ["accelerate", "launch", "--multi_gpu", "--num_processes", "2", "--main_process_port", "0"]
    command += ["-m", "hub_scripts.train", "--zoo", "me/zoo", "--output-dir", tmp_path / "model"]
    result = run([*command, *map(str, settings)], ACCELERATE_USE_CPU="true", client="train")
    assert "2 process(es)" in result.stdout
    assert json.loads((tmp_path / "model" / "results.json").read_text())["num_processes"] == 2
    for file in [f for f in sorted((zoo / "data").glob("*.parquet")) if not f.name.startswith("test")]:
        groups = pq.ParquetFile(file).metadata
        weights = groups.schema.names.index("weights")
        for group in range(groups.num_row_groups):
            column = groups.row_group(group).column(weights)
            start, stop = column.data_page_offset, column.data_page_offset + column.total_compressed_size
            reads = [read for read in hub.reads(f"/{file.name}", client="train") if read[0] < stop and read[1] > start]
            whole = [read for read in reads if read[0] <= start and read[1] >= stop]
            assert len(whole) == 1, (file.name, group, reads, (start, stop))
            assert sum(min(r[1], stop) - max(r[0], start) for r in reads) < 1.5 * (stop - start)


# ---------------------------------------------------------------------------------------------------- what goes wrong
def open_zoo(repo, revision):
    """What the user is told."""
    from hub_scripts.zoos.zoo import Zoo

    try:
        return {"rows": len(Zoo(repo, revision))}
    except ValueError as error:
        return {"error": str(error)}


def test_what_cannot_be_read_is_said_in_the_hubs_words_with_what_to_do(hub, run, zoo):
    seed(hub, zoo, private=True)
    hub.put("me/text", {"data/train-00000-of-00001.parquet": b"-"}, "dataset")
    said = run(open_zoo, "me/zoo", None, token=None).value["error"]
    assert "401" in said
    assert "hf auth login" in said
    said = run(open_zoo, "me/zoo", "v9").value["error"]
    assert "there is no revision 'v9'" in said
    said = run(open_zoo, "me/text", None).value["error"]
    assert "me/text is no zoo: it has no zoo.json" in said


@pytest.mark.parametrize("kind", ["500", "503", "cut"])
def test_a_fault_of_the_network_is_survived_or_said_and_the_next_run_completes(hub, run, zoo, kind):
    seed(hub, zoo)
    hub.fault(kind, match=r"GET .*train-.*\.parquet", times=1)
    first = run(read_some, "me/zoo", home="home", expect=None)
    assert first.returncode == 0 or first.stderr
    found = run(read_some, "me/zoo", home="home").value
    assert found["values"] == network(int(found["model"].removeprefix("m")), 30)["fc2.weight"].tolist()


def test_weights_that_came_over_damaged_are_fetched_again(hub, run, tmp_path):
    zoo = make_zoo(tmp_path, width=3000, embed_limit=100_000)
    seed(hub, zoo)
    hub.fault("checksum", match=r"GET /datasets/.*\.safetensors", times=1)
    found = run(read_some, "me/zoo").value
    assert found["values"] == network(int(found["model"].removeprefix("m")), 3000)["fc2.weight"].tolist()


def test_a_push_with_a_token_that_may_not_write_says_so(hub, run, zoo):
    result = run(["sane", "push-zoo", zoo, "me/zoo"], token=HubServer.read_token, expect=1)
    assert "403" in result.stderr
    assert "hf auth login" in result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize("kind", ["500", "cut", "checksum", "expired_token"])
def test_a_push_that_fails_leaves_no_half_zoo_and_is_repeated(hub, run, zoo, kind):
    where = r"POST .*/commit/" if kind in ("500", "expired_token", "cut") else r"PUT /uploads/"
    hub.fault(kind, match=where, times=1)
    first = run(["sane", "push-zoo", zoo, "me/zoo"], expect=None)
    if first.returncode:
        assert first.returncode == 1
        assert "Traceback" not in first.stderr, first.stderr
        assert "was not published at me/zoo" in first.stderr
        # all of it, if only the answer to the commit was cut, or nothing
        assert ("zoo.json" in hub.files("me/zoo", "dataset")) == (kind == "cut")
        run(["sane", "push-zoo", zoo, "me/zoo"])
    files = hub.files("me/zoo", "dataset")
    assert all(files[p.relative_to(zoo).as_posix()] == p.read_bytes() for p in zoo.rglob("*") if p.is_file())


def test_a_damaged_zoo_is_not_pushed(hub, run, zoo, tmp_path):
    shutil.copytree(zoo, tmp_path / "damaged")
    file = tmp_path / "damaged" / "data" / "test-00000-of-00001.parquet"
    content = bytearray(file.read_bytes())
    content[200] ^= 1
    file.write_bytes(content)
    result = run(["sane", "push-zoo", tmp_path / "damaged", "me/zoo"], expect=1)
    assert "data/test-00000-of-00001.parquet is damaged" in result.stderr
    assert not hub.repos()
