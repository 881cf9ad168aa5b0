"""scikit-learn's handwritten digits, enlarged by random warps; imports warps."""

from __future__ import annotations

import numpy as np
import torch

from hvd_lars.data.warps import WarpedImages

NUM_TRAIN, NUM_EVAL = 897, 900


def load_digits(copies: int, seed: int) -> WarpedImages:
    """1,797 real 8×8 images of handwritten digits, shipped with scikit-learn.

    A fixed split: 900 test images, 897 for training, each seen ``copies`` times an epoch.

    Source: E. Alpaydin, C. Kaynak, Optical Recognition of Handwritten Digits, UCI, 1998.
    """
    from sklearn import datasets  # a second to import

    data = datasets.load_digits()
    order = np.random.default_rng(0).permutation(len(data.target))  # the split never changes
    images = torch.from_numpy(data.images[order]).float().div_(16.0).unsqueeze(1)
    labels = torch.from_numpy(data.target[order]).long()
    train, test = slice(None, NUM_TRAIN), slice(NUM_TRAIN, None)
    return WarpedImages(
        (images[train], labels[train]), (images[test], labels[test]), 10, copies, seed
    )
