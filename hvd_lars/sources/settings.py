"""The interface of all data set settings."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from pydantic import Field

from hvd_lars.errors import UserError
from hvd_lars.settings.fields import Positive, Section, key

if TYPE_CHECKING:
    from hvd_lars.comm.base import Communicator
    from hvd_lars.data.source import Source

Shape = tuple[int, int, int]
"""(channels, height, width)."""
Statistics = tuple[tuple[float, ...], tuple[float, ...]]
"""Mean and deviation of each channel in [0, 1]."""
ValFraction = Annotated[float, Field(gt=0, lt=1)] | None


def val_fraction_key() -> Any:
    """Return the field of the share of training images to hold out."""
    return key(
        binds="run",
        default=None,
        description="share of the training images to hold out and evaluate in place of the test "
        "images",
    )


@dataclass(frozen=True)
class BuildContext:
    """The context in which a data set is built.

    Attributes:
        comm: the ranks.
        seed: seeds order, augmentation and made-up images.
        gpu: whether this rank's images go to a GPU, which then augments them.
    """

    comm: Communicator
    seed: int
    gpu: bool = False


class SourceSettings(Section):
    """Settings of a kind of data set; the defaults suit a small one in memory."""

    # Kinds of one family store the same data in different forms: a config that changes the form
    # keeps the keys that both have.
    FAMILY: ClassVar[str] = ""

    name: str

    def build(self, context: BuildContext) -> Source:
        """Make the source; collective.

        Raises:
            UserError: on every rank alike: the data is missing or not as expected.
        """
        raise NotImplementedError

    @property
    def shapes(self) -> list[Shape]:
        """Shapes of the network's input images, that of evaluation first."""
        raise NotImplementedError

    @property
    def location(self) -> Path | None:
        """Path that must exist on this machine, or None."""
        return None

    @property
    def expected(self) -> Expected | None:
        """Required size of the data set, or None."""
        return None

    @property
    def mixes_pairs(self) -> bool:
        """Whether images are mixed with their neighbours in the batch."""
        return False

    @property
    def num_workers(self) -> int:
        """Processes per rank that make batches."""
        return 0

    @property
    def tolerated_bad_fraction(self) -> float:
        """Share of the training, and of the test images, that may be unreadable."""
        return 0.0

    def statistics(self, seed: int) -> Statistics | None:
        """Return the mean and deviation that normalise images; None without normalisation."""
        return None

    def shared_bytes(self, micro_batch: int, eval_batch: int) -> int:
        """Return the bytes of shared memory (/dev/shm) that a rank's batches need."""
        return 0

    def facts(self) -> dict[str, int]:
        """Return the facts needed to prepare images for the network, by key."""
        return {}

    def read_only(self) -> SourceSettings:
        """Return settings whose ``build`` copies and downloads nothing."""
        return self

    def made_up(self, num_train: int) -> SourceSettings:
        """Return settings for random images of the same shape and classes, to measure speed.

        Data sets in memory are kept as they are.
        """
        return self


class Expected(Section):
    """Required size of the data set: any other is refused; without data, ``check`` uses it."""

    train: Positive = key(binds="nothing", description="training images")
    eval: Positive = key(binds="nothing", description="test images")
    classes: Annotated[int, Field(ge=2)] = key(binds="nothing", description="number of classes")

    def check(self, train: int, evaluation: int, classes: int, where: str) -> None:
        """Raise UserError, which names the data set ``where``, if it has another size."""
        found, wanted = (train, evaluation, classes), (self.train, self.eval, self.classes)
        if found != wanted:
            raise UserError(
                f"data.expect: {where} has {_counts(*found)}; {_counts(*wanted)} are expected; "
                f"data.expect=null accepts any"
            )


def _counts(train: int, evaluation: int, classes: int) -> str:
    return f"{train:,} + {evaluation:,} images of {classes:,} classes"
