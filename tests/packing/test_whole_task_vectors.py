import pytest
import streaming

import samerge_ext as sm
from samerge_ext.packing.factors import FactoredTaskVectors
from samerge_ext.statistics.features import Features

NEED_THEM_WHOLE = {
    "elected": sm.ties,
    "random": sm.dare,
    "trimmed": sm.trimmed,
    "one length": sm.align_norms,
    "distilled": lambda packed: sm.distac(None, packed, {}, None),
    "a model for each task": sm.emr,
    "statistics": sm.layer_stats,
    "features": Features.of_packed,
}


@pytest.fixture(params=["in a file", "as factors"])
def in_pieces(request, tmp_path):
    in_memory, in_file = streaming.packed_twice(tmp_path)
    if request.param == "in a file":
        return in_file
    factors = FactoredTaskVectors(in_memory.layout, {}, in_memory.num_tasks, in_memory.base.dtype)
    return sm.PackedWeights(in_memory.layout, in_memory.tasks, in_memory.base, factors)


@pytest.mark.parametrize("what", NEED_THEM_WHOLE)
def test_what_needs_them_whole_says_so(in_pieces, what):
    with pytest.raises(TypeError, match=r"(stay in .*|are kept as LoRA factors); .* takes packed\.in_memory\(\)"):
        NEED_THEM_WHOLE[what](in_pieces)
