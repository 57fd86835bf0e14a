"""Tasks from IDX files and from datasets: what is read, how it is split, and what is refused."""

import gzip
import struct

import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image, Value
from PIL import Image as Picture

from hub_scripts.zoos.tasks import load_task, renumber

RANDOM = np.random.default_rng(0)


def idx(array: np.ndarray) -> bytes:
    """As MNIST stores it."""
    return bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}i", *array.shape) + array.tobytes()


def make_idx_folder(folder, train=30, test=7, size=(5, 4), suffix=""):
    """Random images; labels 0, 1, 2 in turn."""
    folder.mkdir(exist_ok=True)
    for prefix, count in (("train", train), ("t10k", test)):
        images = RANDOM.integers(0, 256, (count, *size), dtype=np.uint8)
        for name, array in (("images-idx3", images), ("labels-idx1", np.arange(count, dtype=np.uint8) % 3)):
            content = idx(array)
            file = folder / f"{prefix}-{name}-ubyte{suffix}"
            file.write_bytes(gzip.compress(content) if suffix else content)
    return folder


def raw_images(file) -> torch.Tensor:
    content = gzip.decompress(file.read_bytes()) if file.suffix == ".gz" else file.read_bytes()
    return torch.tensor(np.frombuffer(content, np.uint8, offset=16).reshape(-1, 1, 5, 4)).float() / 255


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_idx_files_are_read_split_and_standardised(tmp_path, suffix):
    folder = make_idx_folder(tmp_path / "mnist", suffix=suffix)
    task = load_task(f"idx:{folder}")
    assert {split: tuple(images.shape) for split, images in task.images.items()} == {
        "train": (25, 1, 5, 4),
        "validation": (5, 1, 5, 4),  # a sixth of 30
        "test": (7, 1, 5, 4),
    }
    assert (task.name, task.num_classes) == (f"idx:{folder}", 3)
    assert task.labels["test"].tolist() == [0, 1, 2, 0, 1, 2, 0]
    # the statistics are those of the images that are left for training
    restored = task.images["train"] * task.pixel_std + task.pixel_mean
    assert restored.mean().item() == pytest.approx(task.pixel_mean)
    assert restored.std().item() == pytest.approx(task.pixel_std, rel=1e-5)
    torch.testing.assert_close(
        task.images["test"] * task.pixel_std + task.pixel_mean,
        raw_images(folder / f"t10k-images-idx3-ubyte{suffix}"),
        rtol=0,
        atol=1e-6,
    )
    # every training image is in one of two splits, with its own label
    given = {tuple(image.flatten().mul(255).round().int().tolist()): i % 3 for i, image in enumerate(raw_images(folder / f"train-images-idx3-ubyte{suffix}"))}  # fmt: skip
    for split in ("train", "validation"):
        pixels = (task.images[split] * task.pixel_std + task.pixel_mean).mul(255).round().int().flatten(1).tolist()
        for image, label in zip(pixels, task.labels[split].tolist(), strict=True):
            assert given.pop(tuple(image)) == label
    assert not given


def test_a_task_is_the_same_each_time_and_may_be_named_by_a_relative_path(tmp_path, monkeypatch):
    make_idx_folder(tmp_path / "mnist")
    one = load_task(f"idx:{tmp_path / 'mnist'}")
    monkeypatch.chdir(tmp_path)
    other = load_task("idx:mnist")
    assert other.name == "idx:mnist"
    assert all(torch.equal(one.images[split], other.images[split]) for split in one.images)
    assert (one.pixel_mean, one.pixel_std) == (other.pixel_mean, other.pixel_std)


def test_idx_files_that_are_missing_or_do_not_fit_are_named(tmp_path):
    def refused(spoil, message):
        folder = make_idx_folder(tmp_path / "mnist", suffix=".gz")
        spoil(folder)
        with pytest.raises(ValueError, match=message):
            load_task(f"idx:{folder}")

    def replace(name, content):
        return lambda folder: (folder / f"{name}.gz").write_bytes(content)

    labels, images = "train-labels-idx1-ubyte", "train-images-idx3-ubyte"
    refused(lambda folder: (folder / f"{labels}.gz").unlink(), f"mnist has neither {labels} nor {labels}.gz")
    whole = gzip.compress(idx(np.zeros(30, np.uint8)))
    refused(replace(labels, whole[:-9]), f"{labels}.gz is damaged: .*Get it again")
    refused(replace(labels, b"<html>"), f"{labels}.gz is damaged: Not a gzipped file")
    refused(replace(images, gzip.compress(b"")), f"{images}.gz is no IDX file of images: it begins with nothing")
    refused(replace(images, whole), "begins with 00000801, expected 00000803")
    cut = gzip.compress(idx(np.zeros((30, 5, 4), np.uint8))[:-1])
    refused(replace(images, cut), f"{images}.gz is damaged: it holds 599 values, its first bytes say 30 x 5 x 4")
    refused(
        replace(labels, gzip.compress(idx(np.zeros(29, np.uint8)))),
        f"{images}.gz holds 30 images and .*{labels}.gz holds 29 labels",
    )
    refused(
        replace("t10k-images-idx3-ubyte", gzip.compress(idx(np.zeros((7, 4, 5), np.uint8)))),
        "training images of 5x4 pixels and test images of 4x5",
    )
    refused(replace(images, gzip.compress(idx(np.full((30, 5, 4), 9, np.uint8)))), "one grey value only")
    with pytest.raises(ValueError, match=r"idx:nowhere: there is no folder nowhere\."):
        load_task("idx:nowhere")


def make_dataset(folder, splits, mode="L", size=(5, 4), label=None, columns=("image", "label")):
    """A folder of parquet files that `load_dataset` reads."""
    features = Features({columns[0]: Image(), columns[1]: label or ClassLabel(names=["cat", "dog", "emu"])})
    folder.mkdir()
    for split, count in splits.items():
        shape = (size[1], size[0], 3) if mode == "RGB" else size[::-1]
        pictures = [Picture.fromarray(RANDOM.integers(0, 256, shape, dtype=np.uint8)) for _ in range(count)]
        rows = {columns[0]: pictures, columns[1]: [i % 3 for i in range(count)]}
        Dataset.from_dict(rows, features=features).to_parquet(str(folder / f"{split}-00000-of-00001.parquet"))
    return f"dataset:{folder}"


@pytest.mark.parametrize(("mode", "channels"), [("L", 1), ("RGB", 3)])
def test_a_dataset_of_images_and_labels_is_a_task(tmp_path, mode, channels):
    name = make_dataset(tmp_path / "animals", {"train": 13, "test": 5}, mode)
    task = load_task(name)
    assert {split: tuple(images.shape) for split, images in task.images.items()} == {
        "train": (11, channels, 4, 5),
        "validation": (2, channels, 4, 5),
        "test": (5, channels, 4, 5),
    }
    assert (task.name, task.num_classes, task.labels["test"].tolist()) == (name, 3, [0, 1, 2, 0, 1])
    first = DatasetDict.from_parquet({"test": str(tmp_path / "animals" / "test-00000-of-00001.parquet")})["test"][0]
    pixels = torch.tensor(np.asarray(first["image"])).float().view(4, 5, channels).permute(2, 0, 1) / 255
    torch.testing.assert_close(task.images["test"][0] * task.pixel_std + task.pixel_mean, pixels, rtol=0, atol=1e-6)


def test_a_validation_split_of_the_dataset_is_taken_as_it_is(tmp_path):
    splits = {"train": 8, "validation": 5, "test": 4}
    task = load_task(make_dataset(tmp_path / "animals", splits, label=Value("int32"), columns=("photo", "kind")))
    assert {split: len(labels) for split, labels in task.labels.items()} == splits
    assert task.num_classes == 3


def test_datasets_that_are_no_classification_of_images_say_why(tmp_path):
    with pytest.raises(ValueError, match="has no test split; its splits are train"):
        load_task(make_dataset(tmp_path / "a", {"train": 4}))
    with pytest.raises(ValueError, match=r"needs a column of images and one of labels .* has image \(Image\), label \(Value\)"):  # fmt: skip
        load_task(make_dataset(tmp_path / "b", {"train": 4, "test": 4}, label=Value("string")))
    folder = tmp_path / "c"
    make_dataset(folder, {"train": 4, "test": 4})
    make_dataset(tmp_path / "d", {"test": 4}, size=(6, 4))
    file = "test-00000-of-00001.parquet"
    (folder / file).write_bytes((tmp_path / "d" / file).read_bytes())
    with pytest.raises(ValueError, match="has images of 4x5 and of 4x6 pixels; bring them to one size first"):
        load_task(f"dataset:{folder}")
    with pytest.raises(ValueError, match=r"datasets\.load_dataset cannot read it: "):
        load_task(f"dataset:{tmp_path / 'nowhere'}")


@pytest.mark.parametrize("name", ["cats", "idx:", "dataset:", ""])
def test_an_unknown_task_names_the_known_ones(name):
    with pytest.raises(ValueError, match=f"there is no task '{name}'; known tasks: digits, idx:DIR .*, dataset:NAME"):
        load_task(name)


# ---------------------------------------------------------------------------------------------------- some classes
def test_classes_in_brackets_make_a_task_of_their_own():
    whole, task = load_task("digits"), load_task("digits[3,1,4]")
    assert (task.name, task.num_classes) == ("digits[3,1,4]", 3)
    assert (task.pixel_mean, task.pixel_std) == (whole.pixel_mean, whole.pixel_std)
    for split, labels in whole.labels.items():
        chosen = (labels == 3) | (labels == 1) | (labels == 4)
        assert torch.equal(task.images[split], whole.images[split][chosen])
        assert torch.equal(torch.tensor([3, 1, 4])[task.labels[split]], labels[chosen])


def test_a_folder_may_have_classes_behind_it(tmp_path):
    make_idx_folder(tmp_path / "mnist[1]")
    task = load_task(f"idx:{tmp_path / 'mnist[1]'}[2,0]")
    assert task.labels["test"].tolist() == [1, 0, 1, 0, 1]  # of 0, 1, 2, 0, 1, 2, 0


@pytest.mark.parametrize(
    ("classes", "message"),
    [
        ("3,10", r"digits\[3,10\]: expected two or more different classes from 0 to 9, there is no class 10\."),
        ("3,3", r"digits\[3,3\]: expected two or more different classes from 0 to 9\."),
        ("3", r"digits\[3\]: expected two or more different classes"),
    ],
)
def test_classes_that_make_no_task_are_refused(classes, message):
    with pytest.raises(ValueError, match=message):
        load_task(f"digits[{classes}]")


def test_labels_of_other_classes_are_left_out():
    assert renumber(torch.tensor([5, 2, 7, 5]), (7, 5)).tolist() == [1, -100, 0, 1]


# ---------------------------------------------------------------------------------------------------- sizes and few samples
def test_resized_images_are_standardised_again():
    task, larger = load_task("digits"), load_task("digits").resized(3, 28, 20)
    assert {tuple(images.shape[1:]) for images in larger.images.values()} == {(3, 28, 20)}
    assert float(larger.images["train"].mean()) == pytest.approx(0, abs=1e-4)
    assert float(larger.images["train"].std()) == pytest.approx(1, abs=1e-4)
    assert larger.pixel_std < task.pixel_std  # of smooth images
    # the pixels themselves are those of a plain interpolation
    raw = task.images["test"][:5] * task.pixel_std + task.pixel_mean
    wanted = torch.nn.functional.interpolate(raw, (28, 20), mode="bilinear", antialias=True)
    found = larger.images["test"][:5, 1:2] * larger.pixel_std + larger.pixel_mean
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5)
    assert all(torch.equal(task.labels[split], larger.labels[split]) for split in task.labels)


def test_a_few_samples_are_as_many_of_each_class():
    task = load_task("digits[3,1,4]")
    few = task.few(5, seed=0)
    assert few.labels["train"].bincount().tolist() == [5, 5, 5]
    assert torch.equal(few.images["train"], task.few(5, seed=0).images["train"])
    assert not torch.equal(few.images["train"], task.few(5, seed=1).images["train"])
    assert torch.equal(few.images["validation"], task.images["validation"])
    own = {tuple(image.flatten().tolist()): int(label) for image, label in zip(task.images["train"], task.labels["train"], strict=True)}  # fmt: skip
    assert [own[tuple(image.flatten().tolist())] for image in few.images["train"]] == few.labels["train"].tolist()
    assert len(task.first(7, seed=0).labels["train"]) == 7
    assert len(task.first(10_000, seed=0).labels["train"]) == len(task.labels["train"])
    with pytest.raises(ValueError, match=r"digits\[3,1,4\] has no train image of class \d among its 1; take more\."):
        task.first(1, seed=0).few(5, seed=0)
