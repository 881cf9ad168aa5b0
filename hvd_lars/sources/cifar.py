"""CIFAR-10 and CIFAR-100 as data sets."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal

from hvd_lars.runtime.files import expand_user
from hvd_lars.settings.fields import Positive, key
from hvd_lars.sources.images import EXPECT, AugmentSettings, ImageSettings
from hvd_lars.sources.settings import Expected, Statistics

if TYPE_CHECKING:
    from hvd_lars.comm.base import Communicator
    from hvd_lars.sources.images import Stores


class CifarAugmentSettings(AugmentSettings):
    """AugmentSettings with another default crop."""

    crop: Literal["resized", "window", "padded"] = key(
        binds="run and recipe", default="padded", description="as in AugmentSettings"
    )


class _Cifar(ImageSettings):
    root: str = key(binds="nothing", description="folder of torchvision's files")
    download: bool = key(binds="nothing", default=False, description="download missing files")
    image_size: Positive = key(
        binds="run and recipe", default=32, description="side of the crop, in pixels"
    )
    eval_resize: Positive = key(
        binds="run and recipe", default=32, description="shorter side before the centre crop"
    )
    augment: CifarAugmentSettings = key(
        binds="run and recipe",
        default=CifarAugmentSettings(),
        description="augmentation of training images",
    )

    COLOURS: ClassVar[Statistics] = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)
    FOLDER: ClassVar[str]

    @property
    def location(self) -> Path:
        """Torchvision's folder in ``root``."""
        return expand_user(self.root, "data.root") / self.FOLDER

    def stores(self, comm: Communicator) -> Stores:
        """See :meth:`ImageSettings.stores`; rank 0 downloads first."""
        from hvd_lars.comm.agree import on_each_node, on_root
        from hvd_lars.data.cifar import load_cifar
        from hvd_lars.data.identity import made_identity

        if self.download:
            # Rank 0 first, as the folder is often shared; then nodes with a folder of their own.
            on_root(comm, lambda: len(load_cifar(self.name, self.root, download=True)))
        on_each_node(comm, lambda: load_cifar(self.name, self.root, self.download))
        train, val, classes = load_cifar(self.name, self.root, download=False)
        identity = made_identity(self.name, len(train.labels), len(val.labels), len(classes))
        return train, val, replace(identity, classes=classes), ""

    def read_only(self) -> _Cifar:
        """Return the settings without the download."""
        return self.model_copy(update={"download": False})


class Cifar10Data(_Cifar):
    """CIFAR-10: 50,000 and 10,000 images, 32×32, of 10 classes; torchvision's files."""

    FOLDER: ClassVar[str] = "cifar-10-batches-py"

    name: Literal["cifar10"] = key(binds="run", description="which data set")
    expect: Expected | None = key(
        binds="nothing", default=Expected(train=50_000, eval=10_000, classes=10), description=EXPECT
    )


class Cifar100Data(_Cifar):
    """CIFAR-100: 50,000 and 10,000 images, 32×32, of 100 classes; torchvision's files."""

    FOLDER: ClassVar[str] = "cifar-100-python"

    name: Literal["cifar100"] = key(binds="run", description="which data set")
    expect: Expected | None = key(
        binds="nothing",
        default=Expected(train=50_000, eval=10_000, classes=100),
        description=EXPECT,
    )


KINDS = (Cifar10Data, Cifar100Data)
