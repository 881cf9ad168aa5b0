"""An AlexNet-shaped network for small grey images."""

from __future__ import annotations

from torch import Tensor, nn


class SmallAlexNet(nn.Module):
    """Five 3×3 convolutions and three linear layers, without normalisation or dropout.

    Widths 8-16-[pool]-24-24-16-[pool]-128-128-num_classes; weights Xavier-uniform, biases zero.
    Like AlexNet it needs a rate per layer: tuned SGD fails on it at a batch of 1,024.

    Args:
        num_classes: width of the last layer.
        image_size: side of the images, in pixels, a multiple of 4.
    """

    def __init__(self, num_classes: int = 10, image_size: int = 8) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(1, 8, 3, padding=1),
            nn.ReLU(inplace=True),
            nn.Conv2d(8, 16, 3, padding=1),
            nn.ReLU(inplace=True),
            nn.MaxPool2d(2),
            nn.Conv2d(16, 24, 3, padding=1),
            nn.ReLU(inplace=True),
            nn.Conv2d(24, 24, 3, padding=1),
            nn.ReLU(inplace=True),
            nn.Conv2d(24, 16, 3, padding=1),
            nn.ReLU(inplace=True),
            nn.MaxPool2d(2),
        )
        self.classifier = nn.Sequential(
            nn.Linear(16 * (image_size // 4) ** 2, 128),
            nn.ReLU(inplace=True),
            nn.Linear(128, 128),
            nn.ReLU(inplace=True),
            nn.Linear(128, num_classes),
        )
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                assert module.bias is not None
                nn.init.zeros_(module.bias)

    def forward(self, images: Tensor) -> Tensor:
        """Return logits (n, num_classes) of images (n, 1, image_size, image_size)."""
        logits: Tensor = self.classifier(self.features(images).flatten(1))
        return logits
