"""What every communicator does, at 1 to 4 ranks."""

from pathlib import Path

import pytest
import torch

from hvd_lars.comm.agree import on_each_node, on_root
from hvd_lars.comm.base import REDUCIBLE
from hvd_lars.errors import UserError

pytestmark = pytest.mark.ranks(1, 2, 3, 4, horovod=(1, 2, 3), mpi=(1, 2, 3, 4), gloo=(2, 3))

DTYPES = [getattr(torch, name) for name in REDUCIBLE]


def rank_values(comm, n, dtype=torch.float64, rank=None):
    """Values of a rank, exact in every dtype, so that sums can be compared without tolerance."""
    rank = comm.rank if rank is None else rank
    return (torch.arange(n) % 97 * (rank + 1) + rank).to(dtype)


def expected_sum(comm, n, dtype):
    return sum(rank_values(comm, n, dtype, rank) for rank in range(comm.size))


def test_rank_is_below_size(comm):
    assert 0 <= comm.rank < comm.size
    assert 0 <= comm.local_rank < comm.size


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", [1, 7, 4096, 100_003])
def test_all_reduce_sums_in_place(comm, n, dtype):
    tensor = rank_values(comm, n, dtype)
    comm.start_all_reduce_sum(tensor, "tensor").wait()
    assert torch.equal(tensor, expected_sum(comm, n, dtype))


def test_all_reduce_takes_a_scalar_and_a_matrix(comm):
    scalar = torch.tensor(comm.rank + 1.0)
    matrix = torch.full((3, 5), comm.rank + 1.0)
    comm.start_all_reduce_sum(scalar, "scalar").wait()
    comm.start_all_reduce_sum(matrix, "matrix").wait()
    total = sum(range(1, comm.size + 1))
    assert scalar.item() == total
    assert torch.equal(matrix, torch.full((3, 5), float(total)))


def test_several_reductions_are_under_way_at_once(comm):
    tensors = [rank_values(comm, 1000 + i) for i in range(20)]
    pending = [comm.start_all_reduce_sum(t, f"t{i}") for i, t in enumerate(tensors)]
    for handle in reversed(pending):
        handle.wait()
    for i, tensor in enumerate(tensors):
        assert torch.equal(tensor, expected_sum(comm, 1000 + i, torch.float64))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_all_ranks_hold_the_same_bits_and_again_the_same(comm, dtype):
    generator = torch.Generator().manual_seed(comm.rank)
    original = torch.randn(70_001, generator=generator, dtype=dtype)
    results = []
    for _ in range(3):
        tensor = original.clone()
        comm.start_all_reduce_sum(tensor, "bits").wait()
        results.append(tensor)
        roots = tensor.clone()
        comm.broadcast(roots)
        assert torch.equal(tensor, roots)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.complex64, torch.bool])
def test_a_dtype_that_cannot_be_summed_is_refused_by_name(comm, dtype):
    with pytest.raises(TypeError, match=f"weights: {str(dtype)[6:]} cannot be summed"):
        comm.start_all_reduce_sum(torch.zeros(3, dtype=dtype), "weights")


def test_a_strided_tensor_is_refused(comm):
    with pytest.raises(TypeError, match="not contiguous"):
        comm.start_all_reduce_sum(torch.zeros(4, 4).t()[1:], "strided")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("part", [1, 5, 20_000])
def test_reduce_scatter_gives_this_ranks_part(comm, part, dtype):
    flats = [rank_values(comm, part * comm.size, dtype) + i for i in range(3)]
    shards = [torch.full((part,), torch.nan, dtype=dtype) for _ in flats]
    pending = [
        comm.start_reduce_scatter_sum(flat, shard, f"shard {i}")
        for i, (flat, shard) in enumerate(zip(flats, shards, strict=True))
    ]
    for i, (shard, handle) in enumerate(zip(shards, pending, strict=True)):
        handle.wait()
        assert handle.done()
        whole = expected_sum(comm, part * comm.size, dtype) + i * comm.size
        assert torch.equal(shard, whole[comm.rank * part : (comm.rank + 1) * part])


def test_reduce_scatter_refuses_what_does_not_divide(comm):
    start = comm.start_reduce_scatter_sum
    if comm.size > 1:
        with pytest.raises(ValueError, match=f"a multiple of {comm.size} elements"):
            start(torch.zeros(comm.size + 1), torch.zeros(1), "odd")
    with pytest.raises(ValueError, match="one dimension"):
        start(torch.zeros(comm.size, 2), torch.zeros(2), "matrix")
    with pytest.raises(ValueError, match="does not fit"):
        start(torch.zeros(comm.size * 3), torch.zeros(2), "short")
    with pytest.raises(TypeError, match="bfloat16 cannot be summed"):
        start(torch.zeros(comm.size).bfloat16(), torch.zeros(1).bfloat16(), "half")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.int64])
def test_all_gather_is_in_place_and_in_the_order_of_the_ranks(comm, dtype):
    whole = torch.zeros(11 * comm.size, dtype=dtype)
    whole[11 * comm.rank : 11 * (comm.rank + 1)] = rank_values(comm, 11, dtype)
    other = torch.full((2 * comm.size,), comm.rank, dtype=dtype)
    pending = [comm.start_all_gather(whole, "whole"), comm.start_all_gather(other, "other")]
    for handle in pending:
        handle.wait()
    wanted = torch.cat([rank_values(comm, 11, dtype, r) for r in range(comm.size)])
    assert torch.equal(whole, wanted)
    assert other.tolist() == [r for r in range(comm.size) for _ in range(2)]
    if comm.size > 1:
        with pytest.raises(ValueError, match=f"a multiple of {comm.size} elements"):
            comm.start_all_gather(torch.zeros(comm.size + 1), "odd")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.bool, torch.int64])
def test_broadcast_from_every_root(comm, dtype):
    for root in range(comm.size):
        tensor = rank_values(comm, 9).to(dtype)
        comm.broadcast(tensor, root)
        assert torch.equal(tensor, rank_values(comm, 9, rank=root).to(dtype))


def test_broadcast_keeps_a_channels_last_layout_and_takes_scalars(comm):
    tensor = torch.full((2, 3, 4, 4), float(comm.rank)).to(memory_format=torch.channels_last)
    tensor[0, 1] = comm.rank + 10
    strides = tensor.stride()
    scalar = torch.tensor(comm.rank)
    comm.broadcast(tensor)
    comm.broadcast(scalar)
    comm.broadcast(torch.empty(0))
    assert tensor.stride() == strides
    assert tensor[0, 1].eq(10).all()
    assert tensor[1].eq(0).all()
    assert scalar.item() == 0


def test_broadcast_object(comm):
    for root in range(comm.size):
        assert comm.broadcast_object({"rank": comm.rank, "x": [1.5]}, root) == {
            "rank": root,
            "x": [1.5],
        }


def test_on_root_returns_to_all_ranks_and_fails_on_all_ranks(comm):
    assert on_root(comm, lambda: f"made by {comm.rank}") == "made by 0"

    def refuse():
        raise PermissionError(13, "Permission denied", "/some/file")

    with pytest.raises(UserError, match="/some/file: Permission denied"):
        on_root(comm, refuse)


def test_barrier_returns(comm):
    for _ in range(3):
        assert comm.barrier() is None


def test_each_group_sums_its_own_ranks(comm):
    for ranks in [n for n in range(1, comm.size + 1) if comm.size % n == 0]:
        group = comm.group(ranks)
        first = comm.rank // ranks * ranks
        assert (group.rank, group.size) == (comm.rank - first, ranks)
        whole, part = torch.ones(3), torch.full((5,), float(comm.rank), dtype=torch.float64)
        pending = comm.start_all_reduce_sum(whole, f"whole {ranks}")  # both at once
        group.start_all_reduce_sum(part, f"part {ranks}").wait()
        pending.wait()
        assert part.tolist() == [float(sum(range(first, first + ranks)))] * 5
        assert whole.tolist() == [comm.size] * 3


def test_groups_that_do_not_divide_the_ranks_are_refused(comm):
    with pytest.raises(ValueError, match=f"groups of 5 ranks cannot be made of {comm.size}"):
        comm.group(5)


def test_on_each_node_acts_once_a_node_and_fails_on_all_ranks(comm, tmp_path_factory):
    folder = comm.broadcast_object(str(tmp_path_factory.mktemp("node")))
    on_each_node(comm, lambda: Path(folder, f"{comm.rank}").touch())
    assert [path.name for path in Path(folder).iterdir()] == ["0"]  # all ranks are on one node

    def refuse():
        raise PermissionError(13, "Permission denied", "/some/file")

    with pytest.raises(UserError, match="/some/file: Permission denied"):
        on_each_node(comm, refuse)
