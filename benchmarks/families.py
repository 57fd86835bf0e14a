"""Networks of the families that people use, at the sizes they are used at, each with inputs small enough to try it on."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import transformers as hf
from torch import nn


class Family(NamedTuple):
    """How to make a network of random weights, and what to call it on.

    Args:
        build (`Callable`): makes the module.
        inputs (`Callable`): makes the example inputs.
        select_outputs (`Callable`, *optional*): picks what must not change out of what the module returns.
    """

    build: Callable[[], nn.Module]
    inputs: Callable[[], Any]
    select_outputs: Callable[[Any], Any] | None = None


def images(size: int, channels: int = 3) -> Callable[[], torch.Tensor]:
    """One image of noise."""
    return lambda: torch.randn(1, channels, size, size, generator=torch.Generator().manual_seed(0))


def words(vocabulary: int, length: int = 7, **more: Any) -> Callable[[], dict]:
    """A few random tokens of text."""
    return lambda: {
        "input_ids": torch.randint(0, vocabulary, (1, length), generator=torch.Generator().manual_seed(0)),
        **more,
    }


def logits(outputs: Any) -> torch.Tensor:
    """The answer of a transformers model, without caches and hidden states."""
    return outputs.logits


class Vgg(nn.Sequential):
    """VGG-11 with batch norm (Simonyan and Zisserman 2015)."""

    def __init__(self) -> None:
        layers: list[nn.Module] = []
        channels = 3
        for width in (64, "M", 128, "M", 256, 256, "M", 512, 512, "M", 512, 512, "M"):
            if width == "M":
                layers.append(nn.MaxPool2d(2))
            else:
                layers += [nn.Conv2d(channels, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU()]
                channels = width
        head = [nn.Linear(512 * 49, 4096), nn.ReLU(), nn.Linear(4096, 4096), nn.ReLU(), nn.Linear(4096, 1000)]
        super().__init__(*layers, nn.AdaptiveAvgPool2d(7), nn.Flatten(), *head)


class GroupedBlock(nn.Module):
    """A ResNeXt bottleneck: the 3x3 convolution works in groups (Xie et al. 2017)."""

    def __init__(self, inputs: int, outputs: int, width: int, groups: int, stride: int) -> None:
        super().__init__()
        self.branch = nn.Sequential(
            nn.Conv2d(inputs, width, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU(),
            nn.Conv2d(width, width, 3, stride, 1, groups=groups, bias=False), nn.BatchNorm2d(width), nn.ReLU(),
            nn.Conv2d(width, outputs, 1, bias=False), nn.BatchNorm2d(outputs),
        )  # fmt: skip
        self.shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        """Run the network."""
        return (self.branch(values) + self.shortcut(values)).relu()


def resnext() -> nn.Module:
    """ResNeXt with 32 groups of 4 channels and one block a stage."""
    return nn.Sequential(
        nn.Conv2d(3, 64, 7, 2, 3, bias=False), nn.BatchNorm2d(64), nn.ReLU(), nn.MaxPool2d(3, 2, 1),
        GroupedBlock(64, 256, 128, 32, 1), GroupedBlock(256, 512, 256, 32, 2), GroupedBlock(512, 1024, 512, 32, 2),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(1024, 1000),
    )  # fmt: skip


class ShuffleBlock(nn.Module):
    """A ShuffleNet v2 unit: half of the channels pass, both halves are shuffled (Ma et al. 2018)."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        half = outputs // 2
        self.stride = stride
        self.shortcut = nn.Sequential(
            nn.Conv2d(inputs, inputs, 3, stride, 1, groups=inputs, bias=False), nn.BatchNorm2d(inputs),
            nn.Conv2d(inputs, half, 1, bias=False), nn.BatchNorm2d(half), nn.ReLU(),
        ) if stride > 1 else nn.Identity()  # fmt: skip
        self.branch = nn.Sequential(
            nn.Conv2d(inputs if stride > 1 else half, half, 1, bias=False), nn.BatchNorm2d(half), nn.ReLU(),
            nn.Conv2d(half, half, 3, stride, 1, groups=half, bias=False), nn.BatchNorm2d(half),
            nn.Conv2d(half, half, 1, bias=False), nn.BatchNorm2d(half), nn.ReLU(),
        )  # fmt: skip

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        """Run the network."""
        left, right = (values, values) if self.stride > 1 else values.chunk(2, dim=1)
        joined = torch.cat([self.shortcut(left), self.branch(right)], dim=1)
        batch, channels, height, width = joined.shape
        return joined.view(batch, 2, channels // 2, height, width).transpose(1, 2).reshape(joined.shape)


def shufflenet() -> nn.Module:
    """ShuffleNet v2 x1.0, as in the paper: 24, 116, 232, 464, 1024 channels."""
    stem = [nn.Conv2d(3, 24, 3, 2, 1, bias=False), nn.BatchNorm2d(24), nn.ReLU(), nn.MaxPool2d(3, 2, 1)]
    stages, channels = [], 24
    for width, repeats in ((116, 4), (232, 8), (464, 4)):
        for number in range(repeats):
            stages.append(ShuffleBlock(channels, width, 1 if number else 2))
            channels = width
    head = [nn.Conv2d(464, 1024, 1, bias=False), nn.BatchNorm2d(1024), nn.ReLU()]
    return nn.Sequential(*stem, *stages, *head, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(1024, 1000))


class Reader(nn.Module):
    """Embedding, recurrent layers, classifier of the last state."""

    def __init__(self, recurrent: nn.RNNBase) -> None:
        super().__init__()
        directions = 2 if recurrent.bidirectional else 1
        self.words, self.recurrent = nn.Embedding(1000, recurrent.input_size), recurrent
        self.head = nn.Linear(recurrent.hidden_size * directions, 10)

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Run the network."""
        return self.head(self.recurrent(self.words(input_ids))[0].mean(1))


def encoder() -> nn.Module:
    """Plain `nn.TransformerEncoder` between two linear layers."""
    layer = nn.TransformerEncoderLayer(256, 8, 1024, batch_first=True)
    stack = nn.TransformerEncoder(layer, 4, enable_nested_tensor=False)
    return nn.Sequential(nn.Linear(32, 256), stack, nn.Linear(256, 10))


def small_cnn() -> nn.Module:
    """The 2,464-parameter tanh CNN of the published zoos (Unterthiner et al. 2020; Schürholt et al. 2022)."""
    return nn.Sequential(
        nn.Conv2d(1, 8, 5), nn.MaxPool2d(2, 2), nn.Tanh(), nn.Conv2d(8, 6, 5), nn.MaxPool2d(2, 2), nn.Tanh(),
        nn.Conv2d(6, 4, 2), nn.Tanh(), nn.Flatten(), nn.Linear(36, 20), nn.Tanh(), nn.Linear(20, 10),
    )  # fmt: skip


def mlp() -> nn.Module:
    """A ReLU MLP for images of 28 x 28 pixels."""
    return nn.Sequential(
        nn.Flatten(), nn.Linear(784, 256), nn.ReLU(), nn.Linear(256, 128), nn.ReLU(), nn.Linear(128, 10)
    )


def resnet18() -> nn.Module:
    """ResNet-18 with ten classes, as transformers builds it."""
    return hf.ResNetForImageClassification(
        hf.ResNetConfig(
            embedding_size=64, hidden_sizes=[64, 128, 256, 512], depths=[2, 2, 2, 2], layer_type="basic", num_labels=10
        )
    )


FAMILIES: dict[str, Family] = {
    "mlp": Family(mlp, images(28, 1)),
    "cnn": Family(small_cnn, images(28, 1)),
    "resnet18": Family(resnet18, images(64)),
    "vgg11_bn": Family(Vgg, images(64)),
    "mobilenet_v2": Family(lambda: hf.MobileNetV2ForImageClassification(hf.MobileNetV2Config()), images(64)),
    "efficientnet_b0": Family(
        lambda: hf.EfficientNetForImageClassification(
            hf.EfficientNetConfig(width_coefficient=1.0, depth_coefficient=1.0, hidden_dim=1280)
        ),
        images(64),
    ),
    "convnext_tiny": Family(lambda: hf.ConvNextForImageClassification(hf.ConvNextConfig()), images(64)),
    "resnext": Family(resnext, images(64)),
    "regnet": Family(
        lambda: hf.RegNetForImageClassification(
            hf.RegNetConfig(hidden_sizes=[24, 56, 152, 368], depths=[1, 1, 4, 7], groups_width=8, layer_type="y")
        ),
        images(64),
    ),
    "shufflenet_v2": Family(shufflenet, images(64)),
    # any size of image: its positions are interpolated, which costs a tenth of 224 x 224 pixels
    "vit_base": Family(
        lambda: hf.ViTForImageClassification(hf.ViTConfig()),
        lambda: {"pixel_values": images(64)(), "interpolate_pos_encoding": True},
    ),
    "swin_tiny": Family(lambda: hf.SwinForImageClassification(hf.SwinConfig()), images(224)),
    "bert_base": Family(lambda: hf.BertForMaskedLM(hf.BertConfig()), words(30522), logits),
    "albert_base": Family(
        lambda: hf.AlbertForMaskedLM(hf.AlbertConfig(hidden_size=768, num_attention_heads=12, intermediate_size=3072)),
        words(30000),
        logits,
    ),
    "gpt2": Family(lambda: hf.GPT2LMHeadModel(hf.GPT2Config()), words(50257), logits),
    "llama_gqa": Family(
        lambda: hf.LlamaForCausalLM(
            hf.LlamaConfig(
                vocab_size=8000,
                hidden_size=512,
                intermediate_size=1376,
                num_hidden_layers=8,
                num_attention_heads=8,
                num_key_value_heads=2,
            )
        ),
        words(8000),
        logits,
    ),
    "t5_small": Family(
        lambda: hf.T5ForConditionalGeneration(hf.T5Config(decoder_start_token_id=0)),
        words(32128, decoder_input_ids=torch.tensor([[0, 5, 9, 2]])),
        logits,
    ),
    "lstm": Family(lambda: Reader(nn.LSTM(64, 128, 2, batch_first=True, bidirectional=True)), words(1000)),
    "gru": Family(lambda: Reader(nn.GRU(64, 128, 2, batch_first=True)), words(1000)),
    "transformer_encoder": Family(encoder, lambda: torch.randn(1, 7, 32, generator=torch.Generator().manual_seed(0))),
}
