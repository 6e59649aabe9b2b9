"""Planted faults in Triton kernels, which tests/support/interpreted.py sees; run by test_triton.py."""

import pytest
import torch
from helpers import INTERPRETED

pytestmark = pytest.mark.skipif(not INTERPRETED, reason="needs Triton's interpreter: run by test_triton.py")

if INTERPRETED:
    import triton
    import triton.language as tl

    @triton.jit
    def planted(x, y, n, FAULT: tl.constexpr):
        program, places = tl.program_id(0), tl.arange(0, 8)
        mine = program * 8 + places
        if FAULT == "out of bounds":
            tl.store(y + mine, tl.load(x + mine + 1))
        elif FAULT == "written twice":
            tl.store(y + places, tl.load(x + mine))
        elif FAULT == "written twice at once":
            tl.store(y + mine // 2, tl.load(x + mine))
        elif FAULT == "written after another's read":
            tl.store(y + mine, tl.load(y + (n - 1 - mine)))
        else:
            tl.store(y + mine, tl.load(x + mine, mask=mine < n, other=0), mask=mine < n)


FAULTS = {
    "out of bounds": "1 of 8 places are outside of the kernel's arguments",
    "written twice": "touches what another has written",
    "written twice at once": "writes one place twice at once",
    "written after another's read": "touches what another has written|writes what another has read",
    "none": None,
}


@pytest.mark.parametrize("fault", FAULTS)
def test_planted_faults_are_seen(fault):
    x, y = torch.zeros(16), torch.zeros(16)
    run = lambda: planted[(2,)](x, y, 16, FAULT=fault)
    if FAULTS[fault] is None:
        run()
    else:
        with pytest.raises(Exception, match=FAULTS[fault]):
            run()
