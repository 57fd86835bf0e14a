"""Tasks: images and labels that the networks of a zoo are trained and judged on."""

from dataclasses import dataclass

import torch

SPLITS = ("train", "validation", "test")


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


def load_task(name: str) -> Task:
    """Load a task by name.

    Args:
        name (`str`): `"digits"`, the 1,797 images of 8 by 8 pixels that scikit-learn carries.

    Raises:
        ValueError: If there is no such task.
    """
    if name == "digits":
        return _digits()
    raise ValueError(f"there is no task {name!r}; known tasks: digits.")


def _digits() -> Task:
    from sklearn.datasets import load_digits  # slow to import, and only this task needs it

    data = load_digits()
    images = torch.tensor(data.images, dtype=torch.float32)[:, None] / 16
    labels = torch.tensor(data.target)
    # the split is a part of the task: another one would make accuracies of two zoos incomparable
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    return _make_task("digits", dict(zip(SPLITS, order.split([797, 300, 700]), strict=True)), images, labels, 10)


def _make_task(
    name: str, rows: dict[str, torch.Tensor], images: torch.Tensor, labels: torch.Tensor, num_classes: int
) -> Task:
    mean, std = float(images[rows["train"]].mean()), float(images[rows["train"]].std())
    standardised = (images - mean) / std
    return Task(
        name,
        {split: standardised[index] for split, index in rows.items()},
        {split: labels[index] for split, index in rows.items()},
        num_classes,
        mean,
        std,
    )
