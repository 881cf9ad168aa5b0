"""The settings of a data set: what the trainer asks of every kind."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, ClassVar

from pydantic import Field

from hvd_lars.settings.fields import Positive, Section, key

if TYPE_CHECKING:
    from hvd_lars.comm.base import Communicator
    from hvd_lars.data import Source

Shape = tuple[int, int, int]
"""(channels, height, width)."""
Statistics = tuple[tuple[float, ...], tuple[float, ...]]
"""Mean and deviation of each channel in [0, 1]."""


@dataclass(frozen=True)
class BuildContext:
    """Surroundings of a data set.

    Attributes:
        comm: the ranks.
        seed: of order, augmentation and made-up images.
        gpu: this rank's images end up on a GPU, which then augments them.
    """

    comm: Communicator
    seed: int
    gpu: bool = False


class SourceSettings(Section):
    """A kind of data set.  The defaults are those of a small one in memory."""

    # Kinds of one family are other forms of the same data: a config that changes the form keeps
    # the keys that both have.
    FAMILY: ClassVar[str] = ""

    name: str

    def build(self, context: BuildContext) -> Source:
        """Make the source; collective.

        Raises:
            UserError: on every rank alike: the data is missing, or not as it should be.
        """
        raise NotImplementedError

    @property
    def shapes(self) -> list[Shape]:
        """Shapes of images that the network is shown, that of evaluation first."""
        raise NotImplementedError

    @property
    def location(self) -> Path | None:
        """The path that must be on this machine; None where nothing must."""
        return None

    @property
    def expected(self) -> Expected | None:
        """The size that the data set must have."""
        return None

    @property
    def mixes_pairs(self) -> bool:
        """Whether images are mixed with their neighbours in the batch."""
        return False

    @property
    def num_workers(self) -> int:
        """Processes a rank that make batches."""
        return 0

    @property
    def tolerated_bad_fraction(self) -> float:
        """Of the training and of the test images, that may be unreadable."""
        return 0.0

    def statistics(self, seed: int) -> Statistics | None:
        """Mean and deviation that images are normalised by; None where they are not."""
        return None

    def shared_bytes(self, micro_batch: int, eval_batch: int) -> int:
        """Bytes of shared memory (/dev/shm) that a rank needs for its batches."""
        return 0

    def facts(self) -> dict[str, int]:
        """Keys that whoever prepares images for the network needs."""
        return {}

    def read_only(self) -> SourceSettings:
        """The same settings, but ``build`` copies and downloads nothing."""
        return self

    def made_up(self, num_train: int) -> SourceSettings:
        """Random images of the same shape and number of classes, to measure speed with.

        Data sets in memory stay as they are.
        """
        return self


class Expected(Section):
    """How large the data set must be: others are refused, and ``check`` plans without it."""

    train: Positive = key(binds="nothing", description="images to train on")
    eval: Positive = key(binds="nothing", description="images to test on")
    classes: Annotated[int, Field(ge=2)] = key(binds="nothing", description="labels")
