"""The networks that are measured and that recording is tested on, at any width."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

VGG16 = (1, 1, "pool", 2, 2, "pool", 4, 4, 4, "pool", 8, 8, 8, "pool", 8, 8, 8, "pool")


class VGG(nn.Module):
    """VGG16 for images of 32x32: thirteen convolutions of ``width`` times 1 to 8 channels, and a linear layer."""

    def __init__(self, width: int = 64, classes: int = 10, batch_norm: bool = False) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        channels = 3
        for each in VGG16:
            if isinstance(each, str):
                layers.append(nn.MaxPool2d(2))
                continue
            layers.append(nn.Conv2d(channels, each * width, 3, padding=1))
            channels = each * width
            layers += [nn.BatchNorm2d(channels), nn.ReLU()] if batch_norm else [nn.ReLU()]
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Linear(channels, classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                # Without batch norm thirteen layers don't train from torch's own smaller start.
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
                nn.init.zeros_(module.bias)

    def forward(self, images: Tensor) -> Tensor:
        """Logits [n, classes] of images [n, 3, 32, 32]."""
        return self.classifier(self.features(images).flatten(1))

    def convolution(self, number: int) -> str:
        """The name of the convolution that papers call conv1 to conv13."""
        names = [f"features.{name}" for name, each in self.features.named_children() if isinstance(each, nn.Conv2d)]
        return names[number - 1]


class LeNet5(nn.Module):
    """Two convolutions and three linear layers, for square images of this ``size``."""

    def __init__(self, channels: int = 1, classes: int = 10, size: int = 28) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, 6, 5, padding=2)
        self.conv2 = nn.Conv2d(6, 16, 5)
        self.fc1 = nn.Linear(16 * (size // 4 - 2) ** 2, 120)
        self.fc2 = nn.Linear(120, 84)
        self.fc3 = nn.Linear(84, classes)

    def forward(self, images: Tensor) -> Tensor:
        """Logits [n, classes]."""
        hidden = F.max_pool2d(torch.relu(self.conv1(images)), 2)
        hidden = F.max_pool2d(torch.relu(self.conv2(hidden)), 2).flatten(1)
        return self.fc3(torch.relu(self.fc2(torch.relu(self.fc1(hidden)))))


class _Residual(nn.Module):
    def __init__(self, inside: int, outside: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inside, outside, 3, stride, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(outside)
        self.conv2 = nn.Conv2d(outside, outside, 3, 1, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(outside)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or inside != outside:
            self.shortcut = nn.Sequential(nn.Conv2d(inside, outside, 1, stride, bias=False), nn.BatchNorm2d(outside))

    def forward(self, values: Tensor) -> Tensor:
        hidden = self.norm2(self.conv2(F.relu(self.norm1(self.conv1(values)), inplace=True)))
        return F.relu(hidden + self.shortcut(values), inplace=True)


class ResNet18(nn.Module):
    """ResNet-18 for images of 32x32: four stages of two blocks, ``width`` channels in the first."""

    def __init__(self, width: int = 64, classes: int = 10) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU())
        blocks = []
        inside = width
        for stage in range(4):
            for block in range(2):
                outside = width * 2**stage
                blocks.append(_Residual(inside, outside, 2 if stage and not block else 1))
                inside = outside
        self.blocks = nn.Sequential(*blocks)
        self.classifier = nn.Linear(inside, classes)

    def forward(self, images: Tensor) -> Tensor:
        """Logits [n, classes]."""
        return self.classifier(self.blocks(self.stem(images)).mean((2, 3)))


class _Dense(nn.Module):
    def __init__(self, inside: int, growth: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(inside)
        self.conv = nn.Conv2d(inside, growth, 3, padding=1, bias=False)

    def forward(self, values: Tensor) -> Tensor:
        return torch.cat([values, self.conv(F.relu(self.norm(values)))], 1)


class DenseNet40(nn.Module):
    """DenseNet-40 for images of 32x32: three blocks of twelve layers that add ``growth`` channels each."""

    def __init__(self, growth: int = 12, classes: int = 10, depth: int = 40) -> None:
        super().__init__()
        channels = 2 * growth
        layers: list[nn.Module] = [nn.Conv2d(3, channels, 3, padding=1, bias=False)]
        for block in range(3):
            for _ in range((depth - 4) // 3):
                layers.append(_Dense(channels, growth))
                channels += growth
            if block < 2:
                layers += [nn.BatchNorm2d(channels), nn.ReLU(), nn.Conv2d(channels, channels, 1, bias=False)]
                layers.append(nn.AvgPool2d(2))
        self.features = nn.Sequential(*layers, nn.BatchNorm2d(channels), nn.ReLU())
        self.classifier = nn.Linear(channels, classes)

    def forward(self, images: Tensor) -> Tensor:
        """Logits [n, classes]."""
        return self.classifier(self.features(images).mean((2, 3)))


def bert(classes: int = 4, vocabulary: int = 30_522, width: int = 768, layers: int = 12, **settings: Any) -> nn.Module:
    """BERT for the classification of texts as in ``transformers``, with weights drawn at random."""
    from transformers import BertConfig, BertForSequenceClassification

    config = BertConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=max(width // 64, 1),
        intermediate_size=4 * width,
        num_labels=classes,
        **settings,
    )
    return BertForSequenceClassification(config)
