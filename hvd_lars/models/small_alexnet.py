"""An AlexNet-shaped network for small grey images."""

from __future__ import annotations

from torch import Tensor, nn


class SmallAlexNet(nn.Module):
    """Five 3×3 convolutions and three linear layers, without dropout.

    Widths 8-16-[pool]-24-24-16-[pool]-hidden-hidden-num_classes; weights Xavier-uniform, biases
    zero.  Like AlexNet it needs a rate per layer: tuned SGD fails on it at a batch of 1,024.

    Args:
        num_classes: width of the last layer.
        image_size: side of the images, in pixels.
        stem: size and stride of the first convolution's kernel.
        hidden: width of the first two linear layers.
        batch_norm: put BatchNorm behind each convolution.
    """

    def __init__(
        self,
        num_classes: int = 10,
        image_size: int = 8,
        stem: tuple[int, int] = (3, 1),
        hidden: int = 128,
        batch_norm: bool = False,
    ) -> None:
        super().__init__()

        def block(inputs: int, outputs: int, size: int = 3, stride: int = 1) -> list[nn.Module]:
            conv = nn.Conv2d(inputs, outputs, size, stride, padding=size // 2)
            norm = [nn.BatchNorm2d(outputs)] if batch_norm else []
            return [conv, *norm, nn.ReLU(inplace=True)]

        self.features = nn.Sequential(
            *block(1, 8, *stem),
            *block(8, 16),
            nn.MaxPool2d(2),
            *block(16, 24),
            *block(24, 24),
            *block(24, 16),
            nn.MaxPool2d(2),
        )
        side = -(-image_size // stem[1]) // 4
        self.classifier = nn.Sequential(
            nn.Linear(16 * side**2, hidden),
            nn.ReLU(inplace=True),
            nn.Linear(hidden, hidden),
            nn.ReLU(inplace=True),
            nn.Linear(hidden, num_classes),
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
