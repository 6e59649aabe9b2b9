"""Memory as the process sees it."""

import subprocess
import sys
import textwrap

import pytest

HELD = """
    import torch
    from samerge_ext.memory import give_back_freed_memory, resident_bytes
    BLOCK = 4 << 20
    if {call}:
        give_back_freed_memory()
    torch.ones(4 * BLOCK, dtype=torch.uint8) # freed: now malloc takes blocks up to this size from its heap
    held = [(torch.ones(BLOCK, dtype=torch.uint8), torch.ones(BLOCK // 40)) for _ in range(50)]
    small = [b for _, b in held]             # between the blocks, so that the heap cannot shrink
    before = resident_bytes()
    del held
    print((before - resident_bytes()) / BLOCK)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's malloc")
@pytest.mark.parametrize("call", [False, True])
def test_freed_blocks_go_back_to_the_system(call):
    """Which they do not by themselves: without the call the test would prove nothing."""
    script = textwrap.dedent(HELD.format(call=call))
    blocks = float(subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True).stdout)
    assert blocks > 45 if call else blocks < 5
