"""Freed memory is kept where the C library can, and somebody's own setting stands."""

import os
import subprocess
import sys

import pytest

PROGRAM = """
import resource, torch
from hvd_lars.runtime.allocator import keep_freed_memory
torch.set_num_threads(1)
if {keep}:
    keep_freed_memory()
def step():
    return [torch.ones(10_000_000) for _ in range(3)]  # each above glibc's largest mmap threshold
for _ in range(8):  # where its holes fit, the heap still grows by a tensor now and then
    step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(4):
    step()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def page_faults(keep, **variables):
    environment = {k: v for k, v in os.environ.items() if not k.startswith("MALLOC_")} | variables
    program = [sys.executable, "-c", PROGRAM.format(keep=keep)]
    done = subprocess.run(program, env=environment, capture_output=True, text=True, check=True)
    return int(done.stdout)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc's switch")
def test_steps_ask_the_system_for_memory_once():
    returned = page_faults(keep=False)
    assert returned > 100  # 480 MB, in pages of 4 KiB or of 2 MiB
    assert page_faults(keep=True) < returned / 4
    assert page_faults(keep=True, MALLOC_ARENA_MAX="4") > returned / 2
