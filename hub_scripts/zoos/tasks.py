"""Tasks: images and labels that the networks of a zoo are trained and judged on."""

import gzip
import math
import re
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from hub_scripts.evaluation.functional import OTHER_CLASS

SPLITS = ("train", "validation", "test")
KNOWN = (
    "digits, idx:DIR (a folder of IDX files, as MNIST comes), dataset:NAME (images with labels that "
    "datasets.load_dataset reads; dataset:NAME@CONFIG); with classes behind it, as in digits[3,1,4,5], some of them in that order"
)
HELD_OUT = 10_000  # images of the validation split where a task comes without one; a sixth of smaller sets


@dataclass(frozen=True)
class Task:
    """An image classification task, split once and for all.

    Args:
        name (`str`): as given to [`load_task`].
        images (`dict[str, torch.Tensor]`): by split, `(images, channels, height, width)` float32, standardised by the mean and
            standard deviation of the training images (one value each).
        labels (`dict[str, torch.Tensor]`): by split, `(images,)` int64.
        num_classes (`int`): number of classes.
        pixel_mean (`float`): mean of the training pixels, after scaling to 0..1.
        pixel_std (`float`): their standard deviation.
    """

    name: str
    images: dict[str, torch.Tensor]
    labels: dict[str, torch.Tensor]
    num_classes: int
    pixel_mean: float
    pixel_std: float

    def resized(self, channels: int, height: int, width: int) -> "Task":
        """The task with images of another size (bilinear) or number of channels: grey becomes equal channels, colours their mean.

        Images are standardised again, since interpolation changes their standard deviation.
        """
        images = {}
        for split, found in self.images.items():
            if found.shape[1] != channels:
                found = found.mean(1, keepdim=True).expand(-1, channels, -1, -1)
            images[split] = nn.functional.interpolate(found, (height, width), mode="bilinear", antialias=True)
        mean, std = float(images["train"].double().mean()), float(images["train"].double().std())
        return replace(
            self,
            images={split: (found - mean) / std for split, found in images.items()},
            pixel_mean=self.pixel_mean + self.pixel_std * mean,
            pixel_std=self.pixel_std * std,
        )

    def few(self, shots: int, seed: int) -> "Task":
        """The task with at most `shots` labelled train images of each class; validation and test images stay.

        Raises:
            ValueError: If a class has no train image.
        """
        labels, generator = self.labels["train"], torch.Generator().manual_seed(seed)
        order = torch.randperm(len(labels), generator=generator)
        chosen = [order[labels[order] == c][:shots] for c in range(self.num_classes)]
        missing = [c for c, rows in enumerate(chosen) if not len(rows)]
        if missing:
            raise ValueError(
                f"{self.name} has no train image of class {missing[0]} among its {len(labels)}; take more."
            )
        together = torch.cat(chosen)
        return self._with_train(together[torch.randperm(len(together), generator=generator)])

    def first(self, count: int, seed: int) -> "Task":
        """The task with at most `count` train images, drawn at random."""
        order = torch.randperm(len(self.labels["train"]), generator=torch.Generator().manual_seed(seed))
        return self._with_train(order[:count])

    def _with_train(self, rows: torch.Tensor) -> "Task":
        images, labels = ({**values, "train": values["train"][rows]} for values in (self.images, self.labels))
        return replace(self, images=images, labels=labels)

    def of_classes(self, classes: Sequence[int]) -> "Task":
        """The part of the task that has some of its classes, numbered anew in the order given; pixels stay as they are.

        Raises:
            ValueError: If there are fewer than two, one is named twice, or the task does not have it.
        """
        name = f"{self.name}[{','.join(map(str, classes))}]"
        unknown = [c for c in classes if not 0 <= c < self.num_classes]
        if unknown or len(classes) < 2 or len(set(classes)) != len(classes):
            raise ValueError(
                f"{name}: expected two or more different classes from 0 to {self.num_classes - 1}"
                + (f", there is no class {unknown[0]}." if unknown else ".")
            )
        labels = {split: renumber(found, classes) for split, found in self.labels.items()}
        own = {split: found != OTHER_CLASS for split, found in labels.items()}
        empty = [split for split, found in own.items() if not found.any()]
        if empty:
            raise ValueError(f"{name} has no images in its {empty[0]} split.")
        return replace(
            self,
            name=name,
            images={split: images[own[split]] for split, images in self.images.items()},
            labels={split: found[own[split]] for split, found in labels.items()},
            num_classes=len(classes),
        )


def renumber(labels: torch.Tensor, classes: Sequence[int]) -> torch.Tensor:
    """Labels as a network numbers them that knows these classes in this order; others become `OTHER_CLASS`."""
    found = torch.full_like(labels, OTHER_CLASS)
    for number, known in enumerate(classes):
        found[labels == known] = number
    return found


def load_task(name: str) -> Task:
    """Load a task by name.

    Args:
        name (`str`): one of

            * `"digits"`, the 1,797 images of 8 by 8 pixels that scikit-learn carries;
            * `"idx:DIR"`, a folder of IDX files, gzipped or not, with the names of MNIST and Fashion-MNIST;
            * `"dataset:NAME"` or `"dataset:NAME@CONFIG"`, what `datasets.load_dataset` reads as a column of images, all of one size,
              and a column of labels.

            Any of them may be followed by some of its classes in brackets: `"digits[3,1,4,5]"` has the images of these four, labelled
            0 to 3 in this order.

            Where the last two have no validation split, it is taken from the training images: always the same 10,000, or a
            sixth where there are fewer than 60,000. Mean and standard deviation are those of the training images that
            remain.

    Raises:
        ValueError: If there is no such task, or its files are missing, damaged or of another kind.
    """
    kind, _, source = name.partition(":")
    chosen = re.fullmatch(r"(.+)\[(\d+(?:,\d+)*)\]", name)
    if chosen and not Path(source or name).is_dir():  # a folder may be called like that
        return load_task(chosen[1]).of_classes([int(number) for number in chosen[2].split(",")])
    if name == "digits":
        return _digits()
    if kind == "idx" and source:
        return _idx(name, Path(source))
    if kind == "dataset" and source:
        return _dataset(name, source)
    raise ValueError(f"there is no task {name!r}; known tasks: {KNOWN}.")


def _digits() -> Task:
    from sklearn.datasets import load_digits  # slow to import, and only this task needs it

    data = load_digits()
    images = torch.tensor(data.images, dtype=torch.float32)[:, None] / 16
    labels = torch.tensor(data.target)
    # the split is a part of the task: another one would make accuracies of two zoos incomparable
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    rows = dict(zip(SPLITS, order.split([797, 300, 700]), strict=True))
    mean, std = float(images[rows["train"]].mean()), float(images[rows["train"]].std())
    standardised = (images - mean) / std
    return Task(
        "digits",
        {split: standardised[index] for split, index in rows.items()},
        {split: labels[index] for split, index in rows.items()},
        10,
        mean,
        std,
    )


def _make_task(
    name: str, images: Mapping[str, np.ndarray], labels: Mapping[str, np.ndarray], num_classes: int | None = None
) -> Task:
    """A task from images `(images, channels, height, width)` uint8 and labels of its splits, of which validation may be missing."""
    images = dict(images)
    labels = {split: torch.from_numpy(found.astype(np.int64)) for split, found in labels.items()}
    if "validation" not in images:
        count = len(labels["train"])
        # the split is a part of the task, as for digits
        order = torch.randperm(count, generator=torch.Generator().manual_seed(0))
        rows = order.split([count - max(1, min(HELD_OUT, count // 6)), max(1, min(HELD_OUT, count // 6))])
        for values in (images, labels):
            values["train"], values["validation"] = (values["train"][index] for index in rows)
    for split, found in labels.items():
        if len(found) == 0 or found.min() < 0:
            raise ValueError(
                f"{name} has {'images without a label' if len(found) else 'no images'} in its {split} split."
            )
    mean, std = _pixel_statistics(images["train"])
    if std == 0:
        raise ValueError(f"{name} has training images of one grey value only, there is nothing to learn.")
    return Task(
        name,
        {split: torch.tensor(images[split], dtype=torch.float32).div_(255).sub_(mean).div_(std) for split in SPLITS},
        {split: labels[split] for split in SPLITS},
        num_classes or 1 + max(int(found.max()) for found in labels.values()),
        mean,
        std,
    )


def _pixel_statistics(images: np.ndarray) -> tuple[float, float]:
    """Mean and standard deviation of bytes over 255: from counts, so that they are the same digits with any number of threads."""
    counts = np.bincount(images.ravel(), minlength=256)
    values = np.arange(256) / 255
    mean = float(counts @ values) / images.size
    return mean, math.sqrt(float(counts @ (values - mean) ** 2) / max(1, images.size - 1))


# --- IDX files


def _idx(name: str, folder: Path) -> Task:
    if not folder.is_dir():
        raise ValueError(f"{name}: there is no folder {folder}.")
    images, labels = {}, {}
    for split, prefix in (("train", "train"), ("test", "t10k")):
        files = [_find(folder, f"{prefix}-{kind}-ubyte") for kind in ("images-idx3", "labels-idx1")]
        images[split], labels[split] = _read_idx(files[0], 3)[:, None], _read_idx(files[1], 1)
        if len(images[split]) != len(labels[split]):
            raise ValueError(
                f"{files[0]} holds {len(images[split])} images and {files[1]} holds {len(labels[split])} labels; "
                "they do not belong together, get both again."
            )
    sizes = {split: "x".join(map(str, found.shape[2:])) for split, found in images.items()}
    if sizes["train"] != sizes["test"]:
        raise ValueError(
            f"{folder} has training images of {sizes['train']} pixels and test images of {sizes['test']}; "
            "these files do not belong together."
        )
    return _make_task(name, images, labels)


def _find(folder: Path, name: str) -> Path:
    for file in (folder / name, folder / f"{name}.gz"):
        if file.is_file():
            return file
    raise ValueError(f"{folder} has neither {name} nor {name}.gz.")


def _read_idx(file: Path, dimensions: int) -> np.ndarray:
    """Bytes of an IDX file: two zeros, 8 for bytes, the number of dimensions, their lengths as big-endian int32, the values."""
    try:
        content = gzip.decompress(file.read_bytes()) if file.suffix == ".gz" else file.read_bytes()
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise ValueError(f"{file} is damaged: {error}. Get it again.") from error
    magic, start = bytes([0, 0, 8, dimensions]), 4 + 4 * dimensions
    if content[:4] != magic or len(content) < start:
        raise ValueError(
            f"{file} is no IDX file of {'images' if dimensions == 3 else 'labels'}: it begins with {content[:4].hex() or 'nothing'}, "
            f"expected {magic.hex()}."
        )
    shape = np.frombuffer(content[4:start], ">i4")
    if len(content) - start != math.prod(shape.tolist()):
        raise ValueError(
            f"{file} is damaged: it holds {len(content) - start} values, its first bytes say "
            f"{' x '.join(map(str, shape))}. Get it again."
        )
    return np.frombuffer(content, np.uint8, offset=start).reshape(shape)


# --- datasets


def _dataset(name: str, source: str) -> Task:
    from datasets import load_dataset  # slow to import, and only these tasks need it
    from datasets.exceptions import DatasetsError

    path, _, config = source.partition("@")
    try:
        found = load_dataset(path, config or None)
    except (OSError, ValueError, DatasetsError) as error:
        raise ValueError(f"{name}: datasets.load_dataset cannot read it: {str(error).splitlines()[0]}") from error
    missing = [split for split in ("train", "test") if split not in found]
    if missing:
        raise ValueError(f"{name} has no {missing[0]} split; its splits are {', '.join(found)}.")
    image_column, label_column = _columns(name, found["train"].features)
    images, labels = {}, {}
    for split in [split for split in SPLITS if split in found]:
        images[split] = _decode(name, found[split][image_column])
        labels[split] = np.asarray(found[split].with_format("numpy")[label_column][:])
    channels = {split: values.shape[1] for split, values in images.items()}
    if len(set(channels.values())) > 1:  # grey images in one split, as colours
        images = {split: np.broadcast_to(v, (len(v), 3, *v.shape[2:])).copy() for split, v in images.items()}
    sizes = sorted({values.shape[2:] for values in images.values()})
    if len(sizes) > 1:
        raise _different_sizes(name, *sizes[:2])
    return _make_task(name, images, labels, getattr(found["train"].features[label_column], "num_classes", None))


def _columns(name: str, features: Mapping[str, Any]) -> tuple[str, str]:
    """The columns of images and of labels."""
    from datasets import ClassLabel, Image, Value

    images = [column for column, kind in features.items() if isinstance(kind, Image)]
    classes = [column for column, kind in features.items() if isinstance(kind, ClassLabel)]
    integers = [column for column, kind in features.items() if isinstance(kind, Value) and "int" in kind.dtype]
    named = [column for column in classes + integers if column in ("label", "labels")]
    labels = (named or classes or integers)[:1]
    if not images or not labels or (not named and not classes and len(integers) > 1):
        raise ValueError(
            f"{name} is no image classification task: it needs a column of images and one of labels (a ClassLabel, or whole "
            f"numbers called label), and has {', '.join(f'{column} ({type(kind).__name__})' for column, kind in features.items())}."
        )
    return images[0], labels[0]


def _decode(name: str, images: Iterable[Any]) -> np.ndarray:
    """Pictures as `(images, channels, height, width)` uint8: one channel if all are grey, else red, green and blue."""
    arrays = []
    for image in images:
        if image.mode[0] in "IF":
            raise ValueError(
                f"{name} has images of mode {image.mode}, expected 8 bits a channel; convert them to L or RGB."
            )
        arrays.append(np.asarray(image.convert("L" if image.mode in ("1", "L") else "RGB")))
        if arrays[-1].shape[:2] != arrays[0].shape[:2]:
            raise _different_sizes(name, arrays[0].shape[:2], arrays[-1].shape[:2])
    if any(array.ndim == 3 for array in arrays):
        arrays = [array if array.ndim == 3 else np.repeat(array[..., None], 3, axis=-1) for array in arrays]
        return np.ascontiguousarray(np.stack(arrays).transpose(0, 3, 1, 2))
    return np.stack(arrays)[:, None]


def _different_sizes(name: str, one: tuple[int, ...], other: tuple[int, ...]) -> ValueError:
    first, second = ("x".join(map(str, size)) for size in (one, other))
    return ValueError(f"{name} has images of {first} and of {second} pixels; bring them to one size first.")
