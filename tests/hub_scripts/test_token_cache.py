"""Tokens of a zoo, kept in one file that several processes fill."""

import multiprocessing
import pickle

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from hub_scripts.zoos.token_cache import token_cache
from hub_scripts.zoos.views import Sample, WindowDataset, collate
from hub_scripts.zoos.zoo import Zoo
from tokenization_sane import SaneWeightTokenizer


@pytest.fixture
def cache_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("SANE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_the_cache_holds_the_weights_of_every_row_and_their_statistics(tiny_zoo, cache_folder):
    zoo = Zoo(tiny_zoo)
    cache = token_cache(zoo, "train", 16, "flat")
    rows = range(len(zoo.rows("train")))
    assert len(cache) == len(rows)
    for row in rows:
        tensors = cache.layout.unpack(cache.tokens([row])[0])
        assert all(torch.equal(tensors[name], tensor) for name, tensor in zoo.state_dict("train", row).items())
    tokenizer = SaneWeightTokenizer(16, "flat", "zoo")
    fitted = tokenizer.fit([zoo.state_dict("train", row) for row in rows], zoo.layout).zoo
    gathered = tokenizer.set_moments({zoo.layout_id: (zoo.layout, cache.moments)}).zoo
    for name, pair in fitted[zoo.layout_id]["statistics"].items():
        assert gathered[zoo.layout_id]["statistics"][name] == pytest.approx(pair)


def test_a_second_use_reads_no_row(tiny_zoo, cache_folder, monkeypatch):
    first = token_cache(Zoo(tiny_zoo), "train", 16, "flat")
    monkeypatch.setattr(Zoo, "read_file", lambda *_: pytest.fail("a row was read again"))
    second = token_cache(Zoo(tiny_zoo), "train", 16, "flat")
    assert torch.equal(first.tokens(slice(None)), second.tokens(slice(None)))
    (folder,) = (cache_folder / "tokens").iterdir()
    assert {path.name for path in folder.iterdir() if path.suffix != ".lock"} == {"train.npy", "train.json"}


def test_other_cuts_and_precisions_have_files_of_their_own(tiny_zoo, cache_folder):
    zoo = Zoo(tiny_zoo)
    exact = token_cache(zoo, "train", 16, "flat").tokens(slice(None))
    short = token_cache(zoo, "train", 16, "flat", "bfloat16").tokens(slice(None))
    assert torch.equal(short, exact.to(torch.bfloat16).float())
    assert not torch.equal(short, exact)
    assert token_cache(zoo, "train", 12, "dense").layout.token_size == 12
    assert len(list((cache_folder / "tokens").iterdir())) == 3
    with pytest.raises(ValueError, match="'int8', expected float32 or bfloat16"):
        token_cache(zoo, "train", 16, "flat", "int8")


def _fill(folder: str, rank: int, queue) -> None:
    zoo, read = Zoo(folder), Zoo.read_file
    files = []
    Zoo.read_file = lambda self, split, number: files.append(number) or read(self, split, number)
    token_cache(zoo, "train", 16, "flat", rank=rank, world_size=2)
    queue.put(files)


def test_two_processes_fill_it_together_and_read_each_file_once(sharded_zoo, cache_folder):
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    processes = [context.Process(target=_fill, args=(str(sharded_zoo), rank, queue)) for rank in range(2)]
    for process in processes:
        process.start()
    read = [queue.get(timeout=60) for _ in processes]
    for process in processes:
        process.join()
    zoo = Zoo(sharded_zoo)
    assert sorted(read[0] + read[1]) == list(range(len(zoo.files["train"].files)))
    cache = token_cache(zoo, "train", 16, "flat")
    for row in range(len(cache)):
        tensors = cache.layout.unpack(cache.tokens([row])[0])
        assert all(torch.equal(tensors[name], tensor) for name, tensor in zoo.state_dict("train", row).items())


def test_a_process_that_dies_loses_one_file(sharded_zoo, cache_folder, monkeypatch):
    read, seen = Zoo.read_file, []

    def dies(self, split, number):
        seen.append(number)
        if len(seen) == 3:
            raise KeyboardInterrupt
        return read(self, split, number)

    monkeypatch.setattr(Zoo, "read_file", dies)
    with pytest.raises(KeyboardInterrupt):
        token_cache(Zoo(sharded_zoo), "train", 16, "flat")
    assert not list(cache_folder.rglob("train.npy"))
    zoo = Zoo(sharded_zoo)
    cache = token_cache(zoo, "train", 16, "flat")
    assert sorted(seen) == sorted([*range(len(zoo.files["train"].files)), seen[2]])
    assert torch.equal(
        cache.layout.unpack(cache.tokens([0])[0])["fc1.weight"], zoo.state_dict("train", 0)["fc1.weight"]
    )


def test_workers_open_the_file_themselves(tiny_zoo, cache_folder):
    zoo = Zoo(tiny_zoo)
    cache = token_cache(zoo, "train", 16, "flat")
    assert len(pickle.dumps(cache)) < 20_000 < cache.tokens(slice(None)).numel() * 4
    statistics = dict.fromkeys(cache.layout.tensors, (0.0, 1.0))
    dataset = WindowDataset(cache, statistics, 8, zoo.symmetries, 0.1)
    steps = [[Sample(0, row) for row in rows] for rows in ((0, 1), (2, 3))]
    here, there = (
        list(DataLoader(dataset, batch_sampler=steps, collate_fn=collate, num_workers=n, **context))
        for n, context in ((0, {}), (1, {"multiprocessing_context": "spawn"}))
    )
    for one, other in zip(here, there, strict=True):
        assert [name for name in one if not torch.equal(one[name], other[name])] == []


def test_a_window_is_a_slice(tiny_zoo, cache_folder):
    cache = token_cache(Zoo(tiny_zoo), "train", 16, "flat")
    whole = cache.tokens([2])[0].numpy()
    assert np.array_equal(cache.window(2, 3, 9), whole[3:9])
    places = np.array([[5, 40], [17, 0]])
    assert np.array_equal(cache.take(2, places), whole.ravel()[places])
