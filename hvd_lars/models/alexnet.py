"""The two AlexNets that the large-batch papers trained."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn


class CaffeAlexNet(nn.Module):
    """Caffe's AlexNet: 60,965,224 parameters at 1,000 classes, images 227×227.

    Five convolutions, three of them in two groups, and three linear layers.  torchvision's
    ``alexnet`` is another network: one tower, 61.1 M parameters, no normalisation.

    Args:
        num_classes: width of the last layer.
        batch_norm: If False, local response normalisation (size 5, α 1e-4, β 0.75) after the
            first two ReLUs, before the pooling, and the initial biases of BVLC's reference.  If
            True, BatchNorm without affine parameters on the inputs of the second to the fifth
            convolution (conv → ReLU → [pool] → BN, ε 1e-4), the network of the LARS runs.

    References:
        Krizhevsky, Sutskever, Hinton 2012; You, Gitman, Ginsburg 2017, arXiv 1708.03888.
    """

    def __init__(self, num_classes: int = 1000, batch_norm: bool = False) -> None:
        super().__init__()

        def block(conv: nn.Conv2d, pool: bool, response: bool) -> list[nn.Module]:
            layers: list[nn.Module] = [conv, nn.ReLU(inplace=True)]
            if response and not batch_norm:
                layers.append(nn.LocalResponseNorm(5, alpha=1e-4, beta=0.75, k=1.0))
            return [*layers, nn.MaxPool2d(3, 2)] if pool else layers

        def norm(channels: int) -> list[nn.Module]:
            return [nn.BatchNorm2d(channels, eps=1e-4, affine=False)] if batch_norm else []

        self.features = nn.Sequential(
            *block(nn.Conv2d(3, 96, 11, stride=4), pool=True, response=True),
            *norm(96),
            *block(nn.Conv2d(96, 256, 5, padding=2, groups=2), pool=True, response=True),
            *norm(256),
            *block(nn.Conv2d(256, 384, 3, padding=1), pool=False, response=False),
            *norm(384),
            *block(nn.Conv2d(384, 384, 3, padding=1, groups=2), pool=False, response=False),
            *norm(384),
            *block(nn.Conv2d(384, 256, 3, padding=1, groups=2), pool=True, response=False),
        )
        self.classifier = nn.Sequential(
            nn.Linear(256 * 6 * 6, 4096),
            nn.ReLU(inplace=True),
            nn.Dropout(0.5),
            nn.Linear(4096, 4096),
            nn.ReLU(inplace=True),
            nn.Dropout(0.5),
            nn.Linear(4096, num_classes),
        )
        conv_biases = [0.0] * 5 if batch_norm else [0.0, 0.1, 0.0, 0.1, 0.1]
        convolutions = [m for m in self.features if isinstance(m, nn.Conv2d)]
        linears = [m for m in self.classifier if isinstance(m, nn.Linear)]
        _initialise(convolutions, [0.01] * 5, conv_biases)
        _initialise(linears, [0.005, 0.005, 0.01], [0.1, 0.1, 0.0])

    def forward(self, images: Tensor) -> Tensor:
        """Return logits (n, num_classes) of images (n, 3, 227, 227)."""
        logits: Tensor = self.classifier(self.features(images).flatten(1))
        return logits


def _initialise(
    layers: Sequence[nn.Conv2d | nn.Linear], deviations: Sequence[float], biases: Sequence[float]
) -> None:
    """Set Gaussian weights and constant biases, layer by layer."""
    for layer, deviation, bias in zip(layers, deviations, biases, strict=True):
        nn.init.normal_(layer.weight, std=deviation)
        assert layer.bias is not None
        nn.init.constant_(layer.bias, bias)
