"""A tiny zoo and a model trained on it for a moment; made once for the tests that need them."""

import os
from pathlib import Path

import pytest
import torch

from tests.tiny import TINY_TRAINING

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def _own_caches(tmp_path_factory):
    """Nothing of the tests goes into the user's caches, and nothing of the user's comes in."""
    import datasets

    folder = tmp_path_factory.mktemp("caches")
    before = os.environ.get("SANE_CACHE")
    os.environ["SANE_CACHE"] = str(folder / "sane")
    datasets.config.HF_DATASETS_CACHE = folder / "datasets"
    yield
    os.environ.pop("SANE_CACHE") if before is None else os.environ.update(SANE_CACHE=before)


@pytest.fixture(scope="session")
def tiny_zoo(tmp_path_factory) -> Path:
    """9 networks of 2 epochs."""
    from hub_scripts.build_zoo import BuildZooArguments, build_zoo

    folder = tmp_path_factory.mktemp("zoo") / "zoo"
    build_zoo(
        BuildZooArguments(
            output_dir=str(folder),
            num_models=9,
            epochs=2,
            batch_size=100,
            learning_rates=[1e-2, 3e-3],
            weight_decays=[0.0],
            initialisations=["kaiming_uniform"],
            architecture_kwargs='{"channels": [3, 5], "hidden_size": 7}',
        )
    )
    return folder


@pytest.fixture(scope="session")
def mlp_zoo(tmp_path_factory) -> Path:
    """Networks of another architecture on the same task."""
    from hub_scripts.build_zoo import BuildZooArguments, build_zoo

    folder = tmp_path_factory.mktemp("mlp") / "mlp-zoo"
    build_zoo(
        BuildZooArguments(
            output_dir=str(folder),
            num_models=6,
            epochs=1,
            batch_size=100,
            architecture="hub_scripts.zoos.architectures:MLP",
            architecture_kwargs='{"hidden_sizes": [6, 5]}',
        )
    )
    return folder


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory, tiny_zoo) -> Path:
    """A SANE model after six steps."""
    from hub_scripts.train import TrainArguments, train

    folder = tmp_path_factory.mktemp("model") / "model"
    train(TrainArguments(zoo=str(tiny_zoo), output_dir=str(folder), **TINY_TRAINING))
    return folder


@pytest.fixture(scope="session")
def sharded_zoo(tmp_path_factory, tiny_zoo) -> Path:
    """The same networks with the train split in four files."""
    import shutil

    import pyarrow.parquet as pq

    folder = tmp_path_factory.mktemp("sharded") / "zoo"
    shutil.copytree(tiny_zoo, folder)
    (file,) = (folder / "data").glob("train-*.parquet")
    table = pq.read_table(file)
    file.unlink()
    for number in range(4):
        start, stop = (len(table) * i // 4 for i in (number, number + 1))
        pq.write_table(table.slice(start, stop - start), folder / "data" / f"train-{number:05d}-of-00004.parquet")
    return folder
