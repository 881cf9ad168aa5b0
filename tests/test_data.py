"""Which samples make up a batch, and that they do not depend on who draws them."""

import numpy as np
import pytest
import torch

from hvd_lars.data.digits import load_digits
from hvd_lars.data.glyphs import draw_glyphs
from hvd_lars.data.randomness import uniforms
from hvd_lars.data.sampler import GlobalBatches, accumulation, smallest_micro_batch
from hvd_lars.data.synthetic import Synthetic


def test_an_epoch_draws_every_sample_at_most_once_and_epochs_differ():
    batches = GlobalBatches(103, 20, seed=1)
    assert batches.steps_per_epoch == 5
    first = np.concatenate([batches.indices(step) for step in range(5)])
    second = np.concatenate([batches.indices(step) for step in range(5, 10)])
    assert len(set(first.tolist())) == 100
    assert set(first.tolist()) <= set(range(103))
    assert first.tolist() != second.tolist()
    assert batches.indices(2).tolist() == first[40:60].tolist()  # going back is the same


@pytest.mark.parametrize("size", [1, 2, 3, 4, 7, 30])
@pytest.mark.parametrize("micro_batch", [1, 3, 8, 1000])
def test_ranks_and_micro_batches_share_out_the_global_batch_exactly(size, micro_batch):
    batches = GlobalBatches(50, 23, seed=0)
    pieces = [batches.micro_batches(1, rank, size, micro_batch) for rank in range(size)]
    taken = np.concatenate([piece for mine in pieces for piece in mine])
    assert sorted(taken.tolist()) == sorted(batches.indices(1).tolist())
    assert {len(mine) for mine in pieces} == {accumulation(23, size, micro_batch)}
    assert max(len(piece) for mine in pieces for piece in mine) <= micro_batch
    sizes = [len(piece) for piece in pieces[0]]
    assert max(sizes) - min(sizes) <= 1


@pytest.mark.parametrize("pairs", [False, True])
def test_the_smallest_micro_batch_is_known_without_drawing(pairs):
    block = 2 if pairs else 1
    for global_batch in range(1, 40):
        batches = GlobalBatches(40, global_batch, seed=0, pairs=pairs)
        for size in (1, 2, 3, 5):
            for micro_batch in range(block, 9):
                drawn = [batches.micro_batches(0, rank, size, micro_batch) for rank in range(size)]
                smallest = min(len(piece) for mine in drawn for piece in mine if len(piece))
                found = smallest_micro_batch(global_batch, size, micro_batch, block)
                assert found == smallest, (global_batch, size, micro_batch)


def test_the_seed_papers_8192_is_cut_into_32_pieces():
    assert accumulation(global_batch=8192, size=1, micro_batch=256) == 32


@pytest.mark.parametrize("global_batch", [0, 51])
def test_a_batch_that_cannot_be_drawn_is_refused(global_batch):
    with pytest.raises(ValueError, match=f"batch of {global_batch} cannot be drawn from 50"):
        GlobalBatches(50, global_batch, seed=0)


def test_random_numbers_belong_to_their_sample():
    indices = np.arange(1000)
    whole = uniforms(3, 2, indices, 6)
    assert np.array_equal(uniforms(3, 2, indices[7::13], 6), whole[7::13])
    assert np.array_equal(uniforms(3, 2, indices[[999]], 6)[0], whole[999])
    assert not np.array_equal(uniforms(3, 3, indices, 6), whole)
    assert not np.array_equal(uniforms(4, 2, indices, 6), whole)


def test_random_numbers_are_uniform_and_independent():
    draws = uniforms(0, 0, np.arange(50_000), 4)
    assert draws.min() >= 0.0
    assert draws.max() < 1.0
    counts, _ = np.histogram(draws[:, 1], bins=20, range=(0, 1))
    assert ((counts - 2500) ** 2 / 2500).sum() < 45  # χ² of 19 degrees: P < 0.001
    correlation = np.corrcoef(np.vstack([draws.T, draws[1:, 0].tolist() + [0.5]]))
    assert np.abs(correlation - np.eye(5)).max() < 0.02


def test_digits_are_a_fixed_split_of_real_images():
    source = load_digits(copies=12, seed=0)
    assert (source.num_train, source.num_eval, source.num_classes) == (10_764, 900, 10)
    images, labels = source.eval_batch(np.arange(900))
    assert images.shape == (900, 1, 8, 8)
    assert torch.bincount(labels, minlength=10).min() > 70
    again, _ = load_digits(copies=1, seed=9).eval_batch(np.arange(900))
    assert torch.equal(images, again)


def test_digit_warps_depend_on_seed_epoch_and_sample_alone():
    source = load_digits(copies=12, seed=0)
    indices = np.array([5, 5 + 897, 5000, 10_763])
    images, labels = source.train_batch(1, indices)
    alone, _ = source.train_batch(1, indices[2:3])
    torch.testing.assert_close(alone[0], images[2])
    assert labels[0] == labels[1]
    assert not torch.allclose(images[0], images[1])
    assert not torch.allclose(source.train_batch(2, indices)[0], images)
    assert not torch.allclose(load_digits(copies=12, seed=1).train_batch(1, indices)[0], images)


def test_a_warp_moves_ink_but_does_not_make_it():
    source = load_digits(copies=12, seed=0)
    images, _ = source.train_batch(0, np.arange(897))
    plain, _ = source.eval_batch(np.arange(900))
    assert images.min() >= plain.min() - 1e-5
    assert abs(images.mean().item()) < 0.15  # normalised images have mean 0


def test_glyphs_are_one_fixed_set_of_drawings():
    source = draw_glyphs(copies=6, seed=0)
    assert (source.num_train, source.num_eval, source.num_classes) == (12_000, 2000, 40)
    images, labels = source.eval_batch(np.arange(2000))
    assert images.shape == (2000, 1, 16, 16)
    assert torch.bincount(labels).tolist() == [50] * 40
    again, _ = draw_glyphs(copies=1, seed=9).eval_batch(np.arange(2000))
    assert torch.equal(images, again)
    # Drawings of a class resemble each other more than those of another.
    means = torch.stack([images[labels == c].mean(0).flatten() for c in range(40)])
    nearest = torch.cdist(images.flatten(1), means).argmin(1)
    assert 0.3 < (nearest == labels).float().mean() < 0.95


@pytest.mark.parametrize("size", [1, 2, 3, 4])
@pytest.mark.parametrize("micro_batch", [2, 3, 8, 1000])
def test_pairs_stay_together_whoever_takes_them(size, micro_batch):
    batches = GlobalBatches(50, 23, seed=0, pairs=True)
    whole = batches.indices(1).tolist()
    partner = {whole[i]: whole[i ^ 1] for i in range(22)}
    pieces = [batches.micro_batches(1, rank, size, micro_batch) for rank in range(size)]
    taken = [i for mine in pieces for piece in mine for i in piece.tolist()]
    assert sorted(taken) == sorted(whole)
    assert {len(mine) for mine in pieces} == {accumulation(23, size, micro_batch, 2)}
    for piece in (piece.tolist() for mine in pieces for piece in mine):
        assert len(piece) <= micro_batch
        for k in range(0, len(piece) - 1, 2):
            assert partner[piece[k]] == piece[k + 1]
        assert len(piece) % 2 == 0 or piece[-1] == whole[-1]


def test_synthetic_images_are_repeatable_and_tell_their_class():
    source = Synthetic(100, 20, num_classes=4, image_size=6, channels=3, seed=0)
    images, labels = source.train_batch(0, np.arange(100))
    assert images.shape == (100, 3, 6, 6)
    assert torch.equal(source.train_batch(0, np.array([17]))[0][0], images[17])
    assert not torch.equal(source.eval_batch(np.arange(20))[0], images[:20])
    means = torch.stack([images[labels == c].mean() for c in range(4)])
    assert means.diff().min() > 0.5
