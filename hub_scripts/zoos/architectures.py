"""Small architectures for populations of networks; named in a zoo as `hub_scripts.zoos.architectures:SmallCNN`."""

import torch
from torch import nn

ACTIVATIONS = {
    "tanh": nn.Tanh,
    "relu": nn.ReLU,
    "gelu": nn.GELU,
    "sigmoid": nn.Sigmoid,
    "leaky_relu": nn.LeakyReLU,
    "silu": nn.SiLU,
}


class SmallCNN(nn.Sequential):
    """Two or more convolutions, max-pooling after the first two, and two linear layers.

    Args:
        image_size (`int`): side of the square images in pixels, a multiple of 4.
        image_channels (`int`): channels of the images.
        channels (`tuple[int, ...]`): output channels of the convolutions, at least two.
        hidden_size (`int`): units of the first linear layer.
        num_classes (`int`): outputs.
        activation (`str`): a key of `ACTIVATIONS`.
        dropout (`float`): share of values that are dropped before each convolution but the first and before each linear layer.
        batch_norm (`bool`): True normalises the outputs of the convolutions.
        kernel_size (`int`): side of the kernels, odd; images are padded so that they keep their size.
    """

    def __init__(
        self,
        image_size: int = 8,
        image_channels: int = 1,
        channels: tuple[int, ...] = (8, 12),
        hidden_size: int = 20,
        num_classes: int = 10,
        activation: str = "tanh",
        dropout: float = 0.0,
        batch_norm: bool = False,
        kernel_size: int = 3,
    ):
        if image_size % 4:
            raise ValueError(f"image_size is {image_size}, expected a multiple of 4 (two poolings halve it twice).")
        if len(channels) < 2:
            raise ValueError(f"channels is {channels}, expected at least two convolutions.")
        if kernel_size % 2 == 0:
            raise ValueError(f"kernel_size is {kernel_size}, expected an odd number (images keep their size).")
        act = _activation(activation)
        super().__init__()
        before, last = image_channels, len(channels) + 1
        for index, width in enumerate(channels, start=1):
            self.add_module(f"conv{index}", nn.Conv2d(before, width, kernel_size, padding=kernel_size // 2))
            self.add_module(f"norm{index}", nn.BatchNorm2d(width) if batch_norm else nn.Identity())
            self.add_module(f"act{index}", act())
            if index < 3:
                self.add_module(f"pool{index}", nn.MaxPool2d(2))
            self.add_module(f"drop{index}", _dropout(dropout))
            before = width
        self.flatten = nn.Flatten()
        self.fc1 = nn.Linear(before * (image_size // 4) ** 2, hidden_size)
        self.add_module(f"act{last}", act())
        self.add_module(f"drop{last}", _dropout(dropout))
        self.fc2 = nn.Linear(hidden_size, num_classes)


class ModelZooCNN(nn.Sequential):
    """The small CNN of the published Model Zoos (arXiv 2209.14764): 2,464 parameters on MNIST, 2,864 on 28x28 colour images.

    Three convolutions (kernels 5, 5 and 2), the first two with max-pooling before their activation, and two linear layers.

    Args:
        image_size (`int`): side of the square images in pixels, at least 20.
        image_channels (`int`): channels of the images.
        channels (`tuple[int, int, int]`): output channels of the convolutions.
        hidden_size (`int`): units of the first linear layer.
        num_classes (`int`): outputs.
        activation (`str`): a key of `ACTIVATIONS`.
        dropout (`float`): share of values that are dropped before the second and third convolution and the last linear layer.
        batch_norm (`bool`): True normalises the outputs of the convolutions.
    """

    def __init__(
        self,
        image_size: int = 28,
        image_channels: int = 1,
        channels: tuple[int, int, int] = (8, 6, 4),
        hidden_size: int = 20,
        num_classes: int = 10,
        activation: str = "tanh",
        dropout: float = 0.0,
        batch_norm: bool = False,
    ):
        side = ((image_size - 4) // 2 - 4) // 2 - 1
        if side < 1:
            raise ValueError(
                f"image_size is {image_size}, expected at least 20: nothing is left after the convolutions."
            )
        act = _activation(activation)
        super().__init__()
        before = image_channels
        for index, (width, kernel) in enumerate(zip(channels, (5, 5, 2), strict=True), start=1):
            self.add_module(f"conv{index}", nn.Conv2d(before, width, kernel))
            self.add_module(f"norm{index}", nn.BatchNorm2d(width) if batch_norm else nn.Identity())
            if index < 3:
                self.add_module(f"pool{index}", nn.MaxPool2d(2))
            self.add_module(f"act{index}", act())
            if index < 3:
                self.add_module(f"drop{index}", _dropout(dropout))
            before = width
        self.flatten = nn.Flatten()
        self.fc1 = nn.Linear(before * side**2, hidden_size)
        self.act4 = act()
        self.drop4 = _dropout(dropout)
        self.fc2 = nn.Linear(hidden_size, num_classes)


class MLP(nn.Sequential):
    """Linear layers on flattened images.

    Args:
        image_size (`int`): side of the square images in pixels.
        image_channels (`int`): channels of the images.
        hidden_sizes (`tuple[int, ...]`): units of the hidden layers.
        num_classes (`int`): outputs.
        activation (`str`): a key of `ACTIVATIONS`.
        dropout (`float`): share of values that are dropped after each hidden layer.
        batch_norm (`bool`): True normalises the outputs of the hidden layers.
    """

    def __init__(
        self,
        image_size: int = 8,
        image_channels: int = 1,
        hidden_sizes: tuple[int, ...] = (24, 16),
        num_classes: int = 10,
        activation: str = "relu",
        dropout: float = 0.0,
        batch_norm: bool = False,
    ):
        act = _activation(activation)
        super().__init__()
        self.flatten = nn.Flatten()
        width = image_channels * image_size**2
        for index, size in enumerate(hidden_sizes, start=1):
            self.add_module(f"fc{index}", nn.Linear(width, size))
            self.add_module(f"norm{index}", nn.BatchNorm1d(size) if batch_norm else nn.Identity())
            self.add_module(f"act{index}", act())
            self.add_module(f"drop{index}", _dropout(dropout))
            width = size
        self.head = nn.Linear(width, num_classes)


class SmallResNet(nn.Module):
    """A residual network with batch norm: a convolution, residual blocks of two convolutions, mean over the image, linear.

    Args:
        image_size (`int`): side of the square images in pixels; any, the mean at the end takes what is left.
        image_channels (`int`): channels of the images.
        channels (`tuple[int, ...]`): output channels of the stages; each stage after the first halves the image.
        num_classes (`int`): outputs.
        activation (`str`): a key of `ACTIVATIONS`.
        depths (`tuple[int, ...]`, *optional*): blocks in each stage; by default one.
    """

    def __init__(
        self,
        image_size: int = 8,
        image_channels: int = 1,
        channels: tuple[int, ...] = (8, 12),
        num_classes: int = 10,
        activation: str = "relu",
        depths: tuple[int, ...] | None = None,
    ):
        depths = depths or (1,) * len(channels)
        if len(depths) != len(channels) or min(depths) < 1:
            raise ValueError(f"depths is {depths}, expected a number of blocks for each of the channels {channels}.")
        super().__init__()
        act, width = _activation(activation), channels[0]
        self.stem = nn.Sequential(
            nn.Conv2d(image_channels, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), act()
        )
        self.blocks = nn.Sequential()
        for index, (size, depth) in enumerate(zip(channels, depths, strict=True)):
            for block in range(depth):
                self.blocks.append(ResidualBlock(width, size, 2 if index and not block else 1, act))
                width = size
        self.head = nn.Linear(width, num_classes)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Logits `(batch, num_classes)` of images `(batch, image_channels, image_size, image_size)`."""
        return self.head(self.blocks(self.stem(images)).mean((2, 3)))


class ResidualBlock(nn.Module):
    """Two convolutions with batch norm beside a skip connection, which is a convolution of its own where the shape changes."""

    def __init__(self, width: int, size: int, stride: int, act: type[nn.Module]):
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(width, size, 3, stride, padding=1, bias=False), nn.BatchNorm2d(size)
        self.conv2, self.norm2 = nn.Conv2d(size, size, 3, padding=1, bias=False), nn.BatchNorm2d(size)
        self.act = act()
        is_same = stride == 1 and width == size
        self.skip = (
            nn.Identity()
            if is_same
            else nn.Sequential(nn.Conv2d(width, size, 1, stride, bias=False), nn.BatchNorm2d(size))
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map `(batch, width, side, side)` to `(batch, size, side / stride, side / stride)`."""
        return self.act(self.skip(x) + self.norm2(self.conv2(self.act(self.norm1(self.conv1(x))))))


def _activation(name: str) -> type[nn.Module]:
    if name not in ACTIVATIONS:
        raise ValueError(f"activation is {name!r}, expected one of {', '.join(ACTIVATIONS)}.")
    return ACTIVATIONS[name]


def _dropout(share: float) -> nn.Module:
    return nn.Dropout(share) if share else nn.Identity()
