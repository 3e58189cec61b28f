"""Networks for pictures: deep and narrow, with and without batch norm, with skips, and back up to a picture."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from bench.models import VGG, DenseNet40, LeNet5, ResNet18
from tests.models.batches import CLASSES, pictures
from tests.models.loop import assert_collected, assert_stepped


class UNet(nn.Module):
    """Down and up again, with a skip; transposed convolutions, in groups and with padding."""

    def __init__(self):
        super().__init__()
        self.down = nn.ModuleList([nn.Conv2d(1, 2, 3, padding=1), nn.Conv2d(2, 4, 3, stride=2, padding=1)])
        self.up = nn.ConvTranspose2d(4, 2, 3, stride=2, padding=1, output_padding=1, groups=2)
        self.out = nn.Conv2d(4, 1, 1)

    def forward(self, x):
        first = F.relu(self.down[0](x))
        return self.out(torch.cat([first, self.up(F.relu(self.down[1](first)))], 1))


def reconstruction(model, batch):
    return (model(batch[0]) - batch[0]).square().flatten(1).mean(1)


NETWORKS = {
    "VGG16": (lambda: VGG(1, CLASSES), (3, 32, 32)),
    "VGG16 with batch norm": (lambda: VGG(1, CLASSES, batch_norm=True), (3, 32, 32)),
    "ResNet-18": (lambda: ResNet18(2, CLASSES), (3, 8, 8)),
    "DenseNet-40": (lambda: DenseNet40(1, CLASSES), (3, 8, 8)),
    "LeNet-5": (lambda: LeNet5(1, CLASSES, 12), (1, 12, 12)),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_collected(name, tmp_path):
    network, shape = NETWORKS[name]
    assert_collected(network().double(), pictures(shape, (3, 3, 1)), tmp_path / "store")


@pytest.mark.parametrize("name", ["VGG16", "LeNet-5"])
def test_stepped(name, tmp_path):
    network, shape = NETWORKS[name]
    assert_stepped(network().double(), pictures(shape, (3, 3, 1)), tmp_path / "store")


def test_a_picture_made_again(tmp_path):
    assert_collected(UNet().double(), pictures(), tmp_path / "store", reconstruction)
    assert_stepped(UNet().double(), pictures(), tmp_path / "steps", reconstruction)
