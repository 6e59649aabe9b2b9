"""Memory as the process sees it."""

import contextlib
import platform

import pytest
import torch
from processes import in_a_process

from samerge_ext.memory import large_tensors_mapped, resident_bytes

BLOCK = 4 << 20
GLIBC = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="what malloc does by itself is known of glibc's alone")


def blocks_given_back(context) -> float:
    """How many of fifty freed blocks are the system's again."""
    torch.ones(4 * BLOCK, dtype=torch.uint8)  # freed: now malloc takes blocks up to this size from its heap
    with context():
        held = [(torch.ones(BLOCK, dtype=torch.uint8), torch.ones(BLOCK // 40)) for _ in range(50)]
    small = [b for _, b in held]  # between the blocks, so that the heap cannot shrink
    before = resident_bytes()
    del held
    given_back = before - resident_bytes()
    del small
    return given_back / BLOCK


@GLIBC
@pytest.mark.parametrize("context", [contextlib.nullcontext, large_tensors_mapped])
def test_freed_tensors_go_back_to_the_system(context):
    """Which they do not by themselves: without that the test would prove nothing."""
    blocks = in_a_process(blocks_given_back, context)
    assert blocks > 45 if context is large_tensors_mapped else blocks < 5


@GLIBC
def test_tensors_are_mapped_inside_the_context_alone():
    """At the start of a page, where malloc keeps its own words."""

    def at_page_start() -> bool:
        return torch.empty(3 << 20, dtype=torch.uint8).data_ptr() % 4096 == 0

    with large_tensors_mapped():
        with large_tensors_mapped():
            kept = torch.arange(1 << 20)
        assert at_page_start()
    assert not at_page_start()
    assert torch.equal(kept, torch.arange(1 << 20)), "a tensor outlives the context"
    assert kept.resize_(1 << 21)[: 1 << 20].equal(torch.arange(1 << 20))


def test_onednn_allocates_through_the_context():
    """It asks for memory without a tensor around it, and frees it through whatever allocator is in force by then."""
    x = torch.randn(1 << 20)
    expected = torch.nn.functional.gelu(x)
    with large_tensors_mapped():
        assert torch.equal(torch.nn.functional.gelu(x), expected)
