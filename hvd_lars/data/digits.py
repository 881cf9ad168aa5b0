"""scikit-learn's handwritten digits, enlarged by random warps."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch

from hvd_lars.data.warps import WarpedImages

NUM_TRAIN, NUM_EVAL = 897, 900


def load_digits(copies: int, seed: int, val_fraction: float | None = None) -> WarpedImages:
    """Load the 1,797 real 8×8 images of handwritten digits shipped with scikit-learn.

    The split is fixed: 897 training images, each seen ``copies`` times an epoch, and 900 for test.

    Source: E. Alpaydin, C. Kaynak, Optical Recognition of Handwritten Digits, UCI, 1998.
    """
    table = torch.from_numpy(_table())
    order = np.random.default_rng(0).permutation(len(table))  # the split never changes
    images = table[order, :64].view(-1, 1, 8, 8).float().div_(16.0)
    labels = table[order, 64].long()
    train, test = slice(None, NUM_TRAIN), slice(NUM_TRAIN, None)
    parts = (images[train], labels[train]), (images[test], labels[test])
    return WarpedImages(*parts, 10, copies, seed, "digits", val_fraction)


def _table() -> np.ndarray[Any, np.dtype[np.float64]]:
    """Return (1797, 65): the pixels, 0 to 16, and the digit.

    The file is read directly, since importing scikit-learn takes a second.
    """
    found = find_spec("sklearn")
    for folder in (found and found.submodule_search_locations) or []:
        path = Path(folder, "datasets/data/digits.csv.gz")
        if path.exists():
            return np.loadtxt(path, delimiter=",")
    from sklearn import datasets

    data = datasets.load_digits()
    return np.column_stack([data.data, data.target])
