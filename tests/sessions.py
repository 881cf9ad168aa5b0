"""Where tests over several ranks run: ``@pytest.mark.ranks(2, 3)`` says with how many.

By default a test runs over Horovod with 3 and 5 of its numbers, over mpi4py with 2 and 4 of them,
and alone with 1: every number once, as the communicator's contract covers the other pairs.
``ranks(2, 3, mpi=(3,), gloo=(2,))`` says otherwise.  Gloo polls, which takes minutes on two cores:
the communicator's contract and the loop are tested over it.
"""

# What joins the ranks, and how many there are; tests/launch/test_rank_suites.py starts each.
SESSIONS = {
    "local": (1,),
    "horovod": (1, 2, 3, 5),
    "mpi": (1, 2, 3, 4),
    "gloo": (2, 3),
}
_DEFAULTS = {"local": {1}, "horovod": {3, 5}, "mpi": {2, 4}, "gloo": set()}


def sizes_of(mark):
    """Numbers of ranks by what joins them, as a ``ranks`` mark says."""
    return {
        kind: set(mark.kwargs.get(kind, default & set(mark.args)))
        for kind, default in _DEFAULTS.items()
    }
