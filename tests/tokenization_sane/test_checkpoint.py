"""Checkpoints of every format: what is read, what is refused, and that the writer undoes the reader to the bit."""

import errno
import http.server
import itertools
import json
import os
import struct
import threading
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import nn

from tokenization_sane import CheckpointWriter
from tokenization_sane.checkpoint_sane import CheckpointFiles, read_checkpoint
from tokenization_sane.layout_sane import CheckpointLayout, TensorLayout
from tokenization_sane.specs_sane import module_specs, state_dict_specs

torch.set_num_threads(1)

BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def bits(tensor: torch.Tensor) -> torch.Tensor:
    tensor = torch.view_as_real(tensor) if tensor.is_complex() else tensor
    return tensor.contiguous().reshape(-1).view(BITS[tensor.element_size()])


def assert_same(found, expected):
    assert sorted(found) == sorted(expected)
    for name, tensor in expected.items():
        assert (found[name].dtype, found[name].shape) == (tensor.dtype, tensor.shape), name
        assert torch.equal(bits(found[name]), bits(tensor)), name


def values(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.arange(1, 1 + int(np.prod(shape))).reshape(shape).to(dtype)


def raw_safetensors(header: dict | str | bytes, data: bytes = b"", length: int | None = None) -> bytes:
    text = (
        header if isinstance(header, bytes) else (header if isinstance(header, str) else json.dumps(header)).encode()
    )
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def entry(shape=(2,), offsets=(0, 8), dtype="F32") -> dict:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


def row_axes(source, **kwargs) -> dict:
    with CheckpointFiles(source, **kwargs) as files:
        return {spec.name: spec.row_axis for spec in files.specs}


def kinds(source) -> dict:
    return {spec.name: spec.kind for spec in source}


# ---------------------------------------------------------------------------------------------------- formats
def test_a_file_is_known_by_its_header_and_a_slice_of_it_is_a_view_of_the_mapped_pages(tmp_path):
    path = tmp_path / "model.safetensors"
    save_file({"layer10.w": values(5, 3), "layer2.w": values(2, 3, 7), "steps": torch.tensor(4)}, path)
    with CheckpointFiles(path) as files:
        assert [spec[:3] for spec in files.specs] == [
            ("layer2.w", (2, 3, 7), "float32"),
            ("layer10.w", (5, 3), "float32"),
            ("steps", (), "int64"),
        ]
        rows = files.rows(TensorLayout("layer2.w", (2, 3, 7), "float32", row_axis=1), 1, 3)
        assert torch.equal(rows, values(2, 3, 7)[:, 1:3])
        assert rows.untyped_storage().nbytes() == path.stat().st_size  # the file itself, nothing was copied
        assert_same(files.read(), load_file(path))


def test_writing_to_what_was_read_leaves_the_file_alone(tmp_path):
    save_file({"w": values(3)}, tmp_path / "m.safetensors")
    read_checkpoint(tmp_path / "m.safetensors")["w"].zero_()
    assert torch.equal(read_checkpoint(tmp_path / "m.safetensors")["w"], values(3))


@pytest.mark.parametrize(
    "name",
    ["float64", "float32", "float16", "bfloat16", "float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz",
     "float8_e8m0fnu", "float4_e2m1fn_x2", "complex64", "int64", "int32", "int16", "int8", "uint64", "uint32", "uint16",
     "uint8", "bool"],
)  # fmt: skip
def test_every_dtype_of_safetensors_is_read_and_written(name, tmp_path):
    dtype = getattr(torch, name)
    tensor = (
        torch.tensor([[1, 0], [0, 1], [1, 1]], dtype=torch.uint8).view(dtype)
        if dtype.itemsize == 1
        else values(3, 2, dtype=dtype)
    )
    save_file({"odd": torch.ones(3, dtype=torch.uint8), "w": tensor}, tmp_path / "a.safetensors")
    with CheckpointFiles(tmp_path / "a.safetensors") as files:
        assert ("w", (3, 2), name) in [spec[:3] for spec in files.specs]
        found = files.read()
        layout = CheckpointLayout.build(files.specs, 4)
    assert_same(found, {"odd": torch.ones(3, dtype=torch.uint8), "w": tensor})
    copy(found, layout, tmp_path / "b.safetensors")
    assert_same(load_file_any(tmp_path / "b.safetensors"), found)


def load_file_any(path: Path) -> dict:
    """As the safetensors library reads it."""
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


def copy(tensors: dict, layout: CheckpointLayout, path: Path, **kwargs) -> None:
    passthrough = {spec.name: tensors[spec.name] for spec in layout.passthrough}
    tokens = layout.pack({name: tensors[name] for name in layout.tensors}, torch.float64)
    with CheckpointWriter(path, layout, passthrough, **kwargs) as writer:
        writer.write(0, tokens)


def test_values_that_do_not_stand_at_multiples_of_their_size_are_read_all_the_same(tmp_path):
    header = {"a": entry([1], [0, 1], "U8"), "w": entry([2, 3], [1, 25])}
    file = tmp_path / "odd.safetensors"
    file.write_bytes(raw_safetensors(header, b"\7" + values(2, 3).numpy().tobytes()))
    assert_same(read_checkpoint(file), {"a": torch.tensor([7], dtype=torch.uint8), "w": values(2, 3)})
    with CheckpointFiles(file) as files:
        assert torch.equal(files.rows(TensorLayout("w", (2, 3), "float32", 1), 1, 2), values(2, 3)[:, 1:2])


def sharded(folder: Path, index_name: str = "model.safetensors.index.json") -> dict:
    folder.mkdir(exist_ok=True)
    save_file({"a": values(2), "b": values(3)}, folder / "x-00001-of-00002.safetensors")
    save_file({"c": values(5)}, folder / "x-00002-of-00002.safetensors")
    weight_map = {"a": 1, "b": 1, "c": 2}
    index = {"weight_map": {name: f"x-0000{part}-of-00002.safetensors" for name, part in weight_map.items()}}
    (folder / index_name).write_text(json.dumps(index))
    return index


@pytest.mark.parametrize("index_name", ["model.safetensors.index.json", "diffusion.safetensors.index.json"])
def test_shards_are_read_as_their_index_tells(index_name, tmp_path):
    sharded(tmp_path, index_name)
    save_file({"a": values(7)}, tmp_path / "optimizer.safetensors")
    for source in (tmp_path, tmp_path / index_name):
        assert_same(read_checkpoint(source), {"a": values(2), "b": values(3), "c": values(5)})
    with CheckpointFiles(tmp_path) as files:
        assert files.skipped == ["optimizer.safetensors"]


def change_index(folder: Path, change) -> None:
    index = sharded(folder)
    change(index["weight_map"])
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m.update(d="x-00001-of-00002.safetensors"), "puts d into x-00001-of-00002.safetensors, which does not have it"),
        (lambda m: m.pop("b"), "x-00001-of-00002.safetensors holds b, but .*index.json does not list it"),
        (lambda m: m.update(d="y.safetensors"), "index.json names y.safetensors, which is not there"),
        (lambda m: m.update(a="x-00002-of-00002.safetensors"), "puts a into x-00002-of-00002.safetensors, which does not"),
        (lambda m: m.update(a="../secret.safetensors"), "puts a into '../secret.safetensors', expected the name of a file"),
        (lambda m: m.update(a=3), "puts a into 3, expected the name of a file"),
        (lambda m: m.clear(), "names no tensors"),
    ],
)  # fmt: skip
def test_an_index_that_contradicts_its_shards_is_refused(change, message, tmp_path):
    change_index(tmp_path, change)
    with pytest.raises(ValueError, match=message):
        CheckpointFiles(tmp_path)


def test_an_index_names_each_tensor_once_and_is_json(tmp_path):
    sharded(tmp_path)
    index = tmp_path / "model.safetensors.index.json"
    for text, message in [
        ('{"weight_map": {"a": "x", "a": "y"}}', "'a' stands twice"),
        ("{", "is no index of shards"),
        ("[]", "is no index of shards"),
        ('{"metadata": {}}', "weight_map is missing"),
        ("[" * 100_000, "is no index of shards"),
    ]:
        index.write_text(text)
        with pytest.raises(ValueError, match=message):
            CheckpointFiles(tmp_path)


def test_one_name_in_two_files_is_refused(tmp_path):
    save_file({"w": values(2)}, tmp_path / "a.safetensors")
    save_file({"w": values(2)}, tmp_path / "b.safetensors")
    with pytest.raises(ValueError, match=r"w stands in .*a.safetensors and in .*b.safetensors"):
        CheckpointFiles(tmp_path)


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_numpy_archives_are_read_member_by_member(save, tmp_path):
    arrays = {
        "dense/kernel": np.arange(6, dtype=np.float32).reshape(2, 3),
        "fortran": np.asfortranarray(np.arange(12, dtype=np.float64).reshape(2, 3, 2)),
        "big": np.arange(5, dtype=">f4"),
        "big_complex": np.array([1 + 2j, 3 - 1j], dtype=">c8"),
        "half": np.ones((), np.float16),
        "empty": np.zeros((0, 3), np.float32),
        "count": np.array([7, 9], np.uint32),
        "flag": np.array(True),
        "wide": np.array([1 + 2j]),
    }
    save(tmp_path / "m.npz", **arrays)
    with CheckpointFiles(tmp_path / "m.npz") as files:
        assert [spec.name for spec in files.specs] == [name.replace("/", ".") for name in arrays]
        found = files.read()
        for name, array in arrays.items():
            tensor = found[name.replace("/", ".")]
            assert tuple(tensor.shape) == array.shape
            assert str(tensor.dtype) == f"torch.{array.dtype.name}"
            assert np.array_equal(tensor.numpy(), array), name
        part = files.rows(TensorLayout("fortran", (2, 3, 2), "float64", row_axis=1), 1, 3)
        assert np.array_equal(part.numpy(), arrays["fortran"][:, 1:3])


def test_what_numpy_makes_of_bfloat16_is_read_as_such(tmp_path):
    tensor = values(3, dtype=torch.bfloat16)
    np.savez(tmp_path / "m.npz", w=tensor.view(torch.int16).numpy().view("V2"))
    assert_same(read_checkpoint(tmp_path / "m.npz"), {"w": tensor})


def test_an_archive_that_hides_pickles_lies_or_is_damaged_is_refused_by_name(tmp_path):
    def refuse(message: str) -> None:
        with pytest.raises(ValueError, match=message):
            read_checkpoint(tmp_path / "m.npz")

    np.savez(tmp_path / "m.npz", w=np.array([{}], dtype=object))
    refuse(r"m.npz: w holds Python objects")
    np.savez(tmp_path / "m.npz", w=np.array(["text"]))
    refuse(r"m.npz: w has dtype <U4")
    np.savez(tmp_path / "m.npz", **{"a/b": np.ones(2), "a.b": np.ones(2)})
    refuse(r"m.npz: a.b stands twice")
    np.savez(tmp_path / "m.npz", **{"a\\b": np.ones(2)})
    refuse("m.npz: tensor name")

    def member(shape: str, data: bytes) -> bytes:
        text = f"{{'descr': '<f4', 'fortran_order': False, 'shape': {shape}, }}".ljust(117) + "\n"
        return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text.encode() + data

    for shape, message in [
        ("(3,)", "w has .* needs .*the header lies"),
        ("(-1,)", "w has shape"),
        ("(2**9,)", "w is no NumPy"),
    ]:
        with zipfile.ZipFile(tmp_path / "m.npz", "w") as archive:
            archive.writestr("w.npy", member(shape, bytes(8)))
        refuse(message)
    with zipfile.ZipFile(tmp_path / "m.npz", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("w.npy", member("(1000,)", bytes(4000)))
    whole = (tmp_path / "m.npz").read_bytes()
    (tmp_path / "m.npz").write_bytes(whole[:-30])
    refuse("m.npz is damaged")
    changed = bytearray(whole)
    place = whole.index(b"w.npy") + 60
    changed[place] ^= 255
    (tmp_path / "m.npz").write_bytes(bytes(changed))
    refuse("m.npz")


def keras_file(path: Path) -> None:
    h5py = pytest.importorskip("h5py", reason="reading Keras files is an extra")
    with h5py.File(path, "w") as file:
        lstm = file.create_group("lstm_1/lstm_1")
        lstm["kernel:0"] = np.arange(40, dtype=np.float32).reshape(5, 8)
        lstm["recurrent_kernel:0"] = np.arange(16, dtype=np.float32).reshape(2, 8)
        lstm["bias:0"] = np.ones(8, np.float32)
        file["dense/kernel:0"] = np.arange(6, dtype=">f4").reshape(2, 3)
        file["dense/again:0"] = file["dense/kernel:0"]
        file["conv/kernel:0"] = np.arange(54, dtype=np.float16).reshape(3, 3, 2, 3)
        file["names"] = ["a", "b"]
        file["elsewhere"] = h5py.ExternalLink("other.h5", "/x")
        file["steps"] = np.int64(3)


def test_keras_files_are_walked_and_their_rows_are_the_last_axis(tmp_path):
    keras_file(tmp_path / "m.h5")
    with CheckpointFiles(tmp_path / "m.h5") as files:
        found = {spec.name: (spec.shape, spec.kind, spec.row_axis) for spec in files.specs}
        assert found == {
            "lstm_1.lstm_1.kernel": ((5, 8), "recurrent", 1),
            "lstm_1.lstm_1.recurrent_kernel": ((2, 8), "recurrent", 1),
            "lstm_1.lstm_1.bias": ((8,), "recurrent", None),
            "dense.again": ((2, 3), None, 1),
            "conv.kernel": ((3, 3, 2, 3), None, 3),
            "steps": ((), None, None),
        }
        assert files.ties == {"dense.kernel": "dense.again"}  # one object under two names
        assert files.ignored == {"names": "object", "elsewhere": "ExternalLink"}
        rows = files.rows(TensorLayout("conv.kernel", (3, 3, 2, 3), "float16", 3), 1, 3)
        assert np.array_equal(rows.numpy(), np.arange(54).reshape(3, 3, 2, 3)[..., 1:3])
        assert torch.equal(files.read()["dense.again"], torch.arange(6.0).reshape(2, 3))


def test_a_damaged_keras_file_is_refused(tmp_path):
    keras_file(tmp_path / "m.h5")
    whole = (tmp_path / "m.h5").read_bytes()
    (tmp_path / "m.h5").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"m.h5 is a damaged HDF5 file"):
        CheckpointFiles(tmp_path / "m.h5")


def test_without_h5py_a_keras_file_names_the_extra(tmp_path, monkeypatch):
    keras_file(tmp_path / "m.h5")
    monkeypatch.setattr("tokenization_sane.checkpoint_sane.h5py", None)
    with pytest.raises(ValueError, match=r'm.h5 is a Keras file.*pip install "sane-hub\[keras\]"'):
        CheckpointFiles(tmp_path / "m.h5")


@pytest.mark.parametrize("new", [True, False])
def test_a_pickle_needs_a_flag_and_nothing_in_it_is_dropped_in_silence(new, tmp_path):
    flat = torch.arange(6.0)
    content = {
        "model": {"w": values(2, 3), "b": flat[:2], "c": flat[2:4]},
        "optimizer": {"state": [values(5)], "lr": 0.1, "none": {}},
        "epoch": 3,
    }
    content["model"]["tied"] = content["model"]["w"]
    torch.save(content, tmp_path / "m.pt", _use_new_zipfile_serialization=new)
    with pytest.raises(ValueError, match=r"m.pt is a pickle.*--allow-pickle \(allow_pickle=True"):
        CheckpointFiles(tmp_path / "m.pt")
    with CheckpointFiles(tmp_path / "m.pt", allow_pickle=True) as files:
        assert [spec.name for spec in files.specs] == ["model.w", "model.b", "model.c", "optimizer.state.0"]
        assert files.ties == {"model.tied": "model.w"}  # and b and c, neighbours in one buffer, are not tied
        assert files.ignored == {"optimizer.lr": "float", "optimizer.none": "dict", "epoch": "int"}
        assert torch.equal(files.rows(TensorLayout("model.w", (2, 3), "float32"), 1, 2), values(2, 3)[1:])
    assert_same(
        read_checkpoint(tmp_path / "m.pt", allow_pickle=True),
        {"model.w": values(2, 3), "model.b": flat[:2], "model.c": flat[2:4], "model.tied": values(2, 3),
         "optimizer.state.0": values(5)},
    )  # fmt: skip


class RunsCode:
    def __reduce__(self):
        return (os.system, ("true",))


def test_a_pickle_that_would_run_code_is_refused_even_with_the_flag(tmp_path):
    torch.save({"w": RunsCode()}, tmp_path / "m.bin")
    with pytest.raises(ValueError, match=r"m.bin cannot be read with weights_only=True"):
        CheckpointFiles(tmp_path / "m.bin", allow_pickle=True)


def test_pickled_shards_are_read_with_their_index(tmp_path):
    torch.save({"a": values(2)}, tmp_path / "p-1.bin")
    torch.save({"b": values(3)}, tmp_path / "p-2.bin")
    index = {"weight_map": {"a": "p-1.bin", "b": "p-2.bin"}}
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match=r"pytorch_model.bin.index.json are pickles.*--allow-pickle"):
        CheckpointFiles(tmp_path)
    assert_same(read_checkpoint(tmp_path, allow_pickle=True), {"a": values(2), "b": values(3)})


def test_a_folder_prefers_what_cannot_run_code(tmp_path):
    with pytest.raises(ValueError, match=r"holds no .safetensors file"):
        CheckpointFiles(tmp_path)
    torch.save({"from_pickle": values(2)}, tmp_path / "pytorch_model.bin")
    torch.save({"other": values(2)}, tmp_path / "training_args.bin")
    assert set(read_checkpoint(tmp_path, allow_pickle=True)) == {"from_pickle"}
    np.savez(tmp_path / "m.npz", from_numpy=np.ones(2))
    assert set(read_checkpoint(tmp_path)) == {"from_numpy"}
    np.savez(tmp_path / "n.npz", w=np.ones(2))
    with pytest.raises(ValueError, match=r"several checkpoints \(m.npz, n.npz\)"):
        CheckpointFiles(tmp_path)
    save_file({"from_safetensors": values(2)}, tmp_path / "model.safetensors")
    save_file({"other": values(2)}, tmp_path / "optimizer.safetensors")
    with CheckpointFiles(tmp_path) as files:
        assert [spec.name for spec in files.specs] == ["from_safetensors"]
        assert files.files == ["model.safetensors"]
        assert files.skipped == ["m.npz", "n.npz", "optimizer.safetensors", "pytorch_model.bin", "training_args.bin"]


# ---------------------------------------------------------------------------------------------------- bad input
@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", "is a git-lfs pointer.*git lfs pull"),
        (b"<!DOCTYPE html><html>not found</html>", "is a web page"),
        (b"\1\2\3", "has only 3 bytes"),
        (raw_safetensors({"w": entry()}, bytes(8), length=10**9), "its header claims 1000000000 bytes, the file has"),
        (raw_safetensors({"w": entry()}, bytes(8), length=2**64 - 1), "its header claims"),
        (raw_safetensors(b"\xff" * 20), "is no valid safetensors file: 'utf-8' codec"),
        (raw_safetensors("{nonsense}"), "is no valid safetensors file"),
        (raw_safetensors("[" * 100_000), "is no valid safetensors file"),
        (raw_safetensors("[1, 2, 3, 4]"), "its header is no JSON object"),
        (raw_safetensors('{"w": 1, "w": 2}'), "'w' stands twice"),
        (raw_safetensors({"w": [1]}), "does not tell dtype, shape and data_offsets of w"),
        (raw_safetensors({"w": {"dtype": "F32", "shape": [2]}}), "does not tell dtype, shape and data_offsets of w"),
        (raw_safetensors({"w": entry([-2])}, bytes(8)), r"w has shape \[-2\]"),
        (raw_safetensors({"w": entry([2.0])}, bytes(8)), r"w has shape \[2.0\]"),
        (raw_safetensors({"w": entry([True])}, bytes(8)), r"w has shape \[True\]"),
        (raw_safetensors({"w": entry([2], [8, 0])}, bytes(8)), "w has -8 bytes"),
        (raw_safetensors({"w": entry([3])}, bytes(8)), r"w has 8 bytes.*its shape \[3\] of F32 needs 12"),
        (raw_safetensors({"w": entry([2**40, 2**40], [0, 2**62])}), "w has .* bytes .*the header lies"),
        (raw_safetensors({"w": entry([2**40], [0, 2**42])}), "is truncated: w should end at byte 4398046511"),
        (raw_safetensors({"w": entry(dtype="F99")}, bytes(8)), "w has dtype 'F99'"),
        (raw_safetensors({"w": entry(dtype="F6_E2M3")}, bytes(8)), "w has dtype 'F6_E2M3'"),
        (raw_safetensors({"w": entry([16, 1], dtype="F4")}, bytes(8)), "the last size must be even"),
        (raw_safetensors({"w": entry()}, bytes(7)), "is truncated: w should end at byte"),
        (raw_safetensors({"w": entry()}, bytes(9)), "1 bytes follow w, the last tensor"),
        (raw_safetensors({"v": entry(), "w": entry([2], [4, 12])}, bytes(12)), "an overlap between v and w"),
        (raw_safetensors({"v": entry(), "w": entry([2], [12, 20])}, bytes(20)), "a hole between v and w"),
        (raw_safetensors({"w": entry([2], [4, 12])}, bytes(12)), "a hole between the header and w"),
        (raw_safetensors({"__metadata__": {"a": 1}, "w": entry()}, bytes(8)), "__metadata__ does not map text to text"),
        (raw_safetensors({"../w": entry()}, bytes(8)), "tensor name '../w'"),
        (raw_safetensors({"a\nb": entry()}, bytes(8)), r"tensor name 'a\\nb'"),
        (raw_safetensors({"": entry()}, bytes(8)), "tensor name ''"),
    ],
)  # fmt: skip
def test_damaged_files_are_refused_with_file_and_tensor(content, message, tmp_path):
    path = tmp_path / "bad.safetensors"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message) as error:
        CheckpointFiles(path)
    assert "bad.safetensors" in str(error.value)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_bit_flip_or_a_cut_in_the_header_is_an_error_or_still_a_sound_file(data, tmp_path):
    path = tmp_path / "m.safetensors"
    save_file({"a.weight": values(3, 2), "b": values(5, dtype=torch.bfloat16)}, path, {"format": "pt"})
    content = bytearray(path.read_bytes())
    if data.draw(st.booleans()):
        content = content[: data.draw(st.integers(0, len(content) - 1))]
    else:
        place = data.draw(st.integers(0, len(content) - 35))
        content[place] ^= 1 << data.draw(st.integers(0, 7))
    path.write_bytes(bytes(content))
    try:
        tensors = read_checkpoint(path)
    except ValueError as refused:
        message = str(refused)
    else:
        message = "m.safetensors"
        assert sum(tensor.numel() * tensor.element_size() for tensor in tensors.values()) == 34
    assert "m.safetensors" in message


def test_other_files_are_told_by_what_is_in_them(tmp_path):
    save_file({"w": values(2)}, tmp_path / "safetensors.bin")
    assert_same(read_checkpoint(tmp_path / "safetensors.bin"), {"w": values(2)})
    torch.save({"w": values(2)}, tmp_path / "pickle.safetensors")
    torch.save({"w": values(2)}, tmp_path / "pickle")
    for name in ("pickle.safetensors", "pickle"):
        with pytest.raises(ValueError, match=f"{name} is a pickle"):
            CheckpointFiles(tmp_path / name)
    (tmp_path / "page.bin").write_text("\n<html>404</html>")
    (tmp_path / "notes.txt").write_text("hello")
    (tmp_path / "m.npz").write_text("hello")
    (tmp_path / "m.bin").write_text("hello")
    with zipfile.ZipFile(tmp_path / "m.keras", "w") as archive:
        archive.writestr("model.weights.h5", b"")
    for name, message in [
        ("page.bin", "is a web page"),
        ("notes.txt", "is no checkpoint that can be read"),
        ("m.npz", "does not begin like a .npz file"),
        ("m.keras", "unzip it and give model.weights.h5"),
        ("m.bin", "cannot be read with weights_only=True"),
    ]:
        with pytest.raises(ValueError, match=message):
            CheckpointFiles(tmp_path / name, allow_pickle=True)


def test_a_mistyped_path_is_no_repository(tmp_path, monkeypatch):
    def no_hub(*_, **__):
        raise AssertionError("the Hub was asked")

    monkeypatch.setattr("huggingface_hub.HfApi.model_info", no_hub)
    for source in (tmp_path / "no", "./no", "no/such/model", "modle.safetensors", "a/b.npz", "..", "a b", "x/y.pth"):
        if not Path(source).is_dir():
            with pytest.raises(ValueError, match="does not exist"):
                CheckpointFiles(source)
    with pytest.raises(ValueError, match="this is a int"):
        CheckpointFiles(3)


# ---------------------------------------------------------------------------------------------------- Hub
class LoopbackHub:
    """Serves one repository, `me/net`, and counts the bytes of each file that it gives away."""

    def __init__(self, files: dict[str, bytes], ranges: bool = True):
        hub = self
        self.files, self.sent, self.ranges = files, dict.fromkeys(files, 0), ranges

        class Handler(http.server.BaseHTTPRequestHandler):
            def log_message(self, *_):
                pass

            def reply(self, status: int, body: bytes, headers: dict) -> None:
                self.send_response(status)
                for name, value in headers.items():
                    self.send_header(name, value)
                self.end_headers()
                if self.command == "GET":
                    try:
                        self.wfile.write(body)
                    except (BrokenPipeError, ConnectionResetError):
                        return

            def do_HEAD(self):
                self.do_GET()

            def do_GET(self):
                if self.path.split("?")[0] in ("/api/models/me/net", "/api/models/me/net/revision/v1"):
                    siblings = [{"rfilename": name, "size": len(body)} for name, body in hub.files.items()]
                    body = json.dumps({"id": "me/net", "sha": "a" * 40, "siblings": siblings}).encode()
                    return self.reply(200, body, {"Content-Length": len(body)})
                name = self.path.rpartition("/")[2]
                if not self.path.startswith(f"/me/net/resolve/{'a' * 40}/") or name not in hub.files:
                    headers = {"Content-Length": 0, "X-Error-Code": "RepoNotFound"}
                    return self.reply(404, b"", headers)
                body, status = hub.files[name], 200
                total, asked = len(body), self.headers.get("Range")
                headers = {"ETag": f'"{name}"', "X-Repo-Commit": "a" * 40}
                if asked and hub.ranges:
                    first, _, last = asked.removeprefix("bytes=").partition("-")
                    body, status = body[int(first) : int(last) + 1 if last else None], 206
                    headers["Content-Range"] = f"bytes {first}-{int(first) + len(body) - 1}/{total}"
                if self.command == "GET":
                    hub.sent[name] += len(body)
                return self.reply(status, body, headers | {"Content-Length": len(body)})

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=lambda: self.server.serve_forever(0.01), daemon=True).start()
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"


@pytest.fixture
def serve(tmp_path, monkeypatch):
    """Starts a Hub with these files, and sends this process' client there."""
    from huggingface_hub import constants

    hubs = []

    def start(files: dict[str, bytes], **kwargs) -> LoopbackHub:
        hubs.append(LoopbackHub(files, **kwargs))
        monkeypatch.setattr(constants, "ENDPOINT", hubs[-1].url)
        monkeypatch.setattr("huggingface_hub.hf_api.api.endpoint", hubs[-1].url)
        monkeypatch.setattr(
            constants, "HUGGINGFACE_CO_URL_TEMPLATE", hubs[-1].url + "/{repo_id}/resolve/{revision}/{filename}"
        )
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)  # loopback is no network
        return hubs[-1]

    yield start
    for hub in hubs:
        hub.server.shutdown()
        hub.server.server_close()


@pytest.mark.parametrize("ranges", [True, False])
def test_a_hub_repository_is_known_by_ranged_reads_and_downloaded_with_the_first_value(serve, tmp_path, ranges):
    big = torch.zeros(500_000)
    (tmp_path / "local").mkdir()
    save_file({"w": values(2, 3), "big": big}, tmp_path / "local" / "model.safetensors")
    content = (tmp_path / "local" / "model.safetensors").read_bytes()
    hub = serve({"model.safetensors": content, "README.md": b"-", "pytorch_model.bin": b"-"}, ranges=ranges)
    with CheckpointFiles("me/net@v1") as files:
        assert [spec[:2] for spec in files.specs] == [("big", (500_000,)), ("w", (2, 3))]
        assert files.skipped == ["pytorch_model.bin"]
        if ranges:
            assert 0 < hub.sent["model.safetensors"] <= 100_000
        assert not list(tmp_path.glob("hub/**/model.safetensors"))
        assert torch.equal(files.rows(TensorLayout("w", (2, 3), "float32"), 1, 2), values(2, 3)[1:])
        assert list(tmp_path.glob("hub/**/model.safetensors"))
    assert_same(read_checkpoint("me/net"), {"w": values(2, 3), "big": big})


def test_shards_of_a_repository_are_known_by_their_headers(serve, tmp_path):
    sharded(tmp_path / "local")
    hub = serve({path.name: path.read_bytes() for path in (tmp_path / "local").iterdir()})
    with CheckpointFiles("me/net") as files:
        assert [spec.name for spec in files.specs] == ["a", "b", "c"]
    assert not list(tmp_path.glob("hub/**/*.safetensors"))
    assert set(read_checkpoint("me/net")) == {"a", "b", "c"}
    assert hub.sent["model.safetensors.index.json"] < 500


def test_a_header_on_the_hub_is_checked_before_the_file_is_downloaded(serve, tmp_path):
    serve({"model.safetensors": raw_safetensors({"w": entry([3])}, bytes(8))})
    with pytest.raises(ValueError, match=r"me/net/model.safetensors: w has 8 bytes"):
        CheckpointFiles("me/net")
    serve({"pytorch_model.bin": b"-"})
    with pytest.raises(ValueError, match=r"me/net/pytorch_model.bin is a pickle"):
        CheckpointFiles("me/net")
    with pytest.raises(ValueError, match="me/other is neither a file or folder here nor a model repository"):
        CheckpointFiles("me/other")


def test_without_a_network_the_cache_serves(serve, tmp_path, monkeypatch):
    save_file({"w": values(3)}, tmp_path / "m.safetensors")
    serve({"model.safetensors": (tmp_path / "m.safetensors").read_bytes()})
    read_checkpoint("me/net@v1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match="me/unknown is no file or folder here, the Hub cannot be reached"):
        CheckpointFiles("me/unknown")
    assert_same(read_checkpoint(f"me/net@{'a' * 40}"), {"w": values(3)})


# ---------------------------------------------------------------------------------------------------- kinds
class Everything(nn.Module):
    def __init__(self):
        super().__init__()
        self.token = nn.Parameter(torch.ones(1, 1, 6))
        self.table = nn.Parameter(torch.ones(5, 6))
        self.gamma = nn.Parameter(torch.ones(6))
        self.depthwise = nn.Conv2d(6, 6, 3, groups=6)
        self.up = nn.ConvTranspose2d(6, 4, 3)
        self.up_grouped = nn.ConvTranspose2d(6, 4, 3, groups=2)
        self.attention = nn.MultiheadAttention(6, 2, add_bias_kv=True)
        self.apart = nn.MultiheadAttention(6, 2, kdim=4, vdim=4)
        self.memory = nn.GRU(3, 5, bidirectional=True)
        self.cell = nn.LSTMCell(3, 5)
        self.words = nn.EmbeddingBag(7, 6)
        self.norm = nn.RMSNorm(6)
        self.normed = nn.utils.parametrizations.weight_norm(nn.Linear(3, 2))
        self.experts = Experts()
        self.own_linear = OwnLinear()


class Experts(nn.Module):
    def __init__(self):
        super().__init__()
        self.gate_up = nn.Parameter(torch.ones(2, 3, 4))


class OwnLinear(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(4, 3)), nn.Parameter(torch.ones(4))


def test_the_types_of_modules_tell_kinds_and_row_axes():
    specs, ties = module_specs(Everything())
    found = {spec.name: (spec.kind, spec.row_axis) for spec in specs}
    assert ties == {}
    expected = {
        "token": ("other", None), "table": ("other", None), "gamma": (None, None),
        "depthwise.weight": ("conv", 0), "depthwise.bias": ("conv", None),
        "up.weight": ("conv", 1), "up_grouped.weight": ("conv", 0),
        "attention.in_proj_weight": ("linear", 0), "attention.in_proj_bias": ("linear", None),
        "attention.bias_k": ("other", None), "attention.out_proj.weight": ("linear", 0),
        "apart.k_proj_weight": ("linear", 0),
        "memory.weight_hh_l0_reverse": ("recurrent", 0), "memory.bias_hh_l0": ("recurrent", None),
        "cell.weight_ih": ("recurrent", 0),
        "words.weight": ("embedding", 0), "norm.weight": ("norm", None),
        "normed.bias": ("linear", None), "normed.parametrizations.weight.original1": ("linear", 0),
        "experts.gate_up": ("other", None), "own_linear.weight": (None, None),
    }  # fmt: skip
    assert {name: found[name] for name in expected} == expected


def test_the_linear_layers_of_gpt2_are_stored_the_other_way_round():
    from transformers.pytorch_utils import Conv1D

    (weight, bias), _ = module_specs(Conv1D(nf=5, nx=3))
    assert (weight.shape, weight.kind, weight.row_axis) == ((3, 5), "linear", 1)
    assert (bias.kind, bias.row_axis) == ("linear", None)


def test_a_lazy_layer_without_a_shape_is_refused():
    with pytest.raises(ValueError, match=r"0.weight has no shape yet"):
        module_specs(nn.Sequential(nn.LazyLinear(3)))


def test_a_sparse_tensor_is_refused_by_name():
    with pytest.raises(ValueError, match=r"w is torch.sparse_coo"):
        state_dict_specs({"w": torch.eye(2).to_sparse()})


@pytest.mark.parametrize("module", [nn.LSTM(3, 5, 2), nn.GRU(5, 5), nn.LSTM(7, 2, bidirectional=True)])
def test_gated_recurrent_tables_are_known_by_their_shapes(module):
    specs, _ = state_dict_specs({f"net.{name}": tensor for name, tensor in module.state_dict().items()})
    assert {spec.kind for spec in specs} == {"recurrent"}


@pytest.mark.parametrize(
    "module",
    [nn.RNN(3, 5), nn.MultiheadAttention(4, 2), nn.MultiheadAttention(4, 2, kdim=3, vdim=3), nn.LSTM(3, 5, proj_size=2),
     nn.LSTM(3, 5, bias=False), nn.TransformerEncoderLayer(4, 2, 16), nn.Linear(4, 16)],
)  # fmt: skip
def test_what_is_not_surely_recurrent_is_left_to_the_shapes(module):
    specs, _ = state_dict_specs(module.state_dict())
    assert {spec.kind for spec in specs} == {None}


# ---------------------------------------------------------------------------------------------------- writing
FLOATS = [torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2, torch.complex64]
OTHERS = [torch.int64, torch.int8, torch.bool]


@st.composite
def checkpoints(draw) -> tuple[dict, dict]:
    """Tensors and row axes, several of a prefix, of any rank and dtype; some integer, empty or 0-d; one tied."""
    tensors, axes = {}, {}
    for number in range(draw(st.integers(1, 4))):
        for name in draw(st.lists(st.sampled_from(["weight", "bias", "x", "y"]), unique=True, min_size=1, max_size=3)):
            shape = tuple(draw(st.lists(st.integers(0, 5), max_size=4)))
            dtype = draw(st.sampled_from(FLOATS * 2 + OTHERS))
            generator = torch.Generator().manual_seed(draw(st.integers(0, 99)))
            whole = torch.randn(*shape, 2, generator=generator) * 3
            key = f"part{number}.{name}"
            tensors[key] = torch.view_as_complex(whole) if dtype.is_complex else whole[..., 0].to(dtype)
            axes[key] = draw(st.integers(0, len(shape) - 1)) if len(shape) >= 2 else None
    full = [name for name, tensor in tensors.items() if tensor.numel()]
    if full and draw(st.booleans()):
        tensors["tied.weight"] = tensors[full[0]]
    return tensors, axes


@settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture]
)
@given(
    checkpoint=checkpoints(), token_size=st.integers(1, 13), packing=st.sampled_from(["dense", "flat", "paper"]), data=st.data()
)  # fmt: skip
def test_windows_in_any_order_become_the_same_checkpoint_to_the_bit(checkpoint, token_size, packing, data, tmp_path):
    tensors, axes = checkpoint
    specs, ties = state_dict_specs(tensors)
    specs = [spec._replace(row_axis=axes[spec.name]) for spec in specs]
    layout = CheckpointLayout.build(specs, token_size, packing, ties, tensors)
    tokens = layout.pack({name: tensors[name] for name in layout.tensors})
    cuts = sorted({0, layout.num_tokens, *data.draw(st.lists(st.integers(0, layout.num_tokens), max_size=6))})
    windows = data.draw(st.permutations([*itertools.pairwise(cuts)]))
    passthrough = {spec.name: tensors[spec.name] for spec in layout.passthrough}
    with CheckpointWriter(tmp_path / "w.safetensors", layout, passthrough, overwrite=True) as writer:
        for start, stop in windows:
            end = min(layout.num_tokens, stop + data.draw(st.integers(0, 2)))  # some overlap
            shown = tokens[start:end].clone()
            shown[~layout.value_mask[start:end]] = 77.0  # what a model writes on padding goes nowhere
            writer.write(start, shown if start % 2 else shown[None])
    assert_same(read_checkpoint(tmp_path / "w.safetensors"), tensors)
    assert_same(load_file_any(tmp_path / "w.safetensors"), {n: t for n, t in tensors.items() if n not in ties})
    with CheckpointFiles(tmp_path / "w.safetensors") as files:
        assert files.ties == ties
    assert [path.name for path in tmp_path.iterdir()] == ["w.safetensors"]


def small_layout() -> CheckpointLayout:
    specs, _ = state_dict_specs({"w": values(5, 3), "steps": torch.tensor(1)})
    return CheckpointLayout.build(specs, token_size=3)  # 5 tokens, one a row


def test_what_never_came_is_named_and_no_file_is_left(tmp_path):
    writer = CheckpointWriter(tmp_path / "w.safetensors", small_layout(), {"steps": torch.tensor(4)}).__enter__()
    writer.write(2, torch.ones(1, 3))
    writer.write(0, torch.ones(1, 3))
    with pytest.raises(ValueError, match=r"w.safetensors is not written: of 5 tokens, 1 to 1, 3 to 4 never came"):
        writer.__exit__(None, None, None)
    assert list(tmp_path.iterdir()) == []


def test_an_error_in_between_leaves_the_old_file_and_nothing_else(tmp_path):
    save_file({"old": values(2)}, tmp_path / "w.safetensors")
    writer = CheckpointWriter(tmp_path / "w.safetensors", small_layout(), {"steps": torch.tensor(4)}, overwrite=True)
    with pytest.raises(ZeroDivisionError), writer:
        writer.write(0, torch.ones(5, 3) / (1 // 0))
    assert_same(read_checkpoint(tmp_path / "w.safetensors"), {"old": values(2)})
    assert [path.name for path in tmp_path.iterdir()] == ["w.safetensors"]


def test_a_full_disk_is_an_error_before_the_first_value(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(OSError, match="No space left"):
        CheckpointWriter(tmp_path / "w.safetensors", small_layout(), {"steps": torch.tensor(4)}).__enter__()
    assert list(tmp_path.iterdir()) == []


def test_where_room_cannot_be_reserved_zeros_are_written(tmp_path, monkeypatch):
    monkeypatch.delattr(os, "posix_fallocate")
    tensors = {"w": values(5, 3), "steps": torch.tensor(4)}
    copy(tensors, small_layout(), tmp_path / "w.safetensors", metadata={"made_by": "test"})
    assert_same(read_checkpoint(tmp_path / "w.safetensors"), tensors)
    content = (tmp_path / "w.safetensors").read_bytes()
    text = json.loads(content[8 : 8 + struct.unpack("<Q", content[:8])[0]])
    assert text["__metadata__"] == {"format": "pt", "made_by": "test"}


def test_the_writer_refuses_what_does_not_fit(tmp_path):
    path, layout, steps = tmp_path / "w.safetensors", small_layout(), {"steps": torch.tensor(4)}
    for passthrough, message in [
        ({}, "steps is not in the tokens"),
        ({"steps": torch.tensor(4.0)}, r"steps is float32 of shape \(\), the layout expects int64"),
        (steps | {"more": torch.tensor(1)}, "more is given as passthrough"),
    ]:
        with pytest.raises(ValueError, match=message):
            CheckpointWriter(path, layout, passthrough)
    with pytest.raises(ValueError, match="'made_by' is the name of a tensor, 'w'"):
        CheckpointWriter(path, layout, steps, metadata={"made_by": "w"})
    wide, _ = state_dict_specs({"w": values(2, dtype=torch.complex128)})
    with pytest.raises(ValueError, match="w is complex128, which a safetensors file cannot hold"):
        CheckpointWriter(path, CheckpointLayout.build(wide, 4))
    path.write_bytes(b"old")
    with pytest.raises(ValueError, match="is there already; pass overwrite=True"):
        CheckpointWriter(path, layout, steps)
    writer = CheckpointWriter(path, layout, steps, overwrite=True)
    with pytest.raises(ValueError, match="not open"):
        writer.write(0, torch.ones(5, 3))
    for start, tokens, message in [
        (0, torch.ones(5, 4), r"has shape \(5, 4\), expected \(tokens, 3\)"),
        (3, torch.ones(3, 3), "tokens 3 to 6 do not stand in a sequence of 5"),
        (-1, torch.ones(1, 3), "tokens -1 to 0 do not stand"),
    ]:
        with pytest.raises(ValueError, match=message), writer:
            writer.write(start, tokens)
    double, _ = state_dict_specs({"w": values(2, dtype=torch.float64)})
    with (
        pytest.raises(ValueError, match=r"w is float64; torch.float32 tokens would round it"),
        CheckpointWriter(tmp_path / "d.safetensors", CheckpointLayout.build(double, 2)) as writer,
    ):
        writer.write(0, torch.ones(1, 2))
    assert path.read_bytes() == b"old"
