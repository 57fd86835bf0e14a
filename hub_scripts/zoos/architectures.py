"""Small architectures for populations of networks; named in a zoo as `hub_scripts.zoos.architectures:SmallCNN`."""

from torch import nn

ACTIVATIONS = {"tanh": nn.Tanh, "relu": nn.ReLU, "gelu": nn.GELU}


class SmallCNN(nn.Sequential):
    """Two convolutions with max-pooling and two linear layers.

    Args:
        image_size (`int`): side of the square images in pixels, a multiple of 4.
        image_channels (`int`): channels of the images.
        channels (`tuple[int, int]`): output channels of the convolutions.
        hidden_size (`int`): units of the first linear layer.
        num_classes (`int`): outputs.
        activation (`str`): `"tanh"`, `"relu"` or `"gelu"`.
    """

    def __init__(
        self,
        image_size: int = 8,
        image_channels: int = 1,
        channels: tuple[int, int] = (8, 12),
        hidden_size: int = 20,
        num_classes: int = 10,
        activation: str = "tanh",
    ):
        if image_size % 4:
            raise ValueError(f"image_size is {image_size}, expected a multiple of 4 (two poolings halve it twice).")
        first, second = channels
        act = ACTIVATIONS[activation]
        super().__init__()
        self.conv1 = nn.Conv2d(image_channels, first, 3, padding=1)
        self.act1 = act()
        self.pool1 = nn.MaxPool2d(2)
        self.conv2 = nn.Conv2d(first, second, 3, padding=1)
        self.act2 = act()
        self.pool2 = nn.MaxPool2d(2)
        self.flatten = nn.Flatten()
        self.fc1 = nn.Linear(second * (image_size // 4) ** 2, hidden_size)
        self.act3 = act()
        self.fc2 = nn.Linear(hidden_size, num_classes)


class MLP(nn.Sequential):
    """Linear layers on flattened images.

    Args:
        image_size (`int`): side of the square images in pixels.
        image_channels (`int`): channels of the images.
        hidden_sizes (`tuple[int, ...]`): units of the hidden layers.
        num_classes (`int`): outputs.
        activation (`str`): `"tanh"`, `"relu"` or `"gelu"`.
    """

    def __init__(
        self,
        image_size: int = 8,
        image_channels: int = 1,
        hidden_sizes: tuple[int, ...] = (24, 16),
        num_classes: int = 10,
        activation: str = "relu",
    ):
        super().__init__()
        self.flatten = nn.Flatten()
        width = image_channels * image_size**2
        for index, size in enumerate(hidden_sizes, start=1):
            self.add_module(f"fc{index}", nn.Linear(width, size))
            self.add_module(f"act{index}", ACTIVATIONS[activation]())
            width = size
        self.head = nn.Linear(width, num_classes)
