"""Cosines and sign conflicts of task vectors in files, against all of them in fp64 at once."""

import merges
import pytest
import torch
from folders import read_all
from helpers import assert_close

from samerge_ext.elementwise import file_pieces
from samerge_ext.elementwise.similarity import similarity


@pytest.mark.parametrize("has_base", [True, False])
def test_similarity_is_that_of_whole_vectors_in_pieces_of_any_size(tmp_path, monkeypatch, has_base):
    monkeypatch.setitem(file_pieces.BUFFER_BYTES, "cpu", 1)
    models = merges.write(tmp_path, dtype=torch.float32)
    merge = merges.merge_of(models, "arithmetic")
    if not has_base:
        merge.base = None
    found = similarity(merge)
    base, *experts = (read_all(models / name) for name in ("base", *merges.TASKS))
    assert found["of"] == ("task vectors" if has_base else "models") and found["models"] == list(merges.TASKS)

    def expected(names):
        # A difference is rounded to the type that tensors are merged in.
        rows = [torch.cat([(e[n] - base[n] if has_base else e[n]).reshape(-1) for n in names]).double() for e in experts]
        share = ((rows[0] * rows[1] < 0).sum() / (rows[0] * rows[1] != 0).sum()).item()
        return torch.nn.functional.cosine_similarity(rows[0], rows[1], dim=0), share, torch.stack(rows).norm(dim=1)

    cosine, conflicts, _ = expected(list(merges.SHAPES))
    assert_close(torch.tensor(found["cosines"])[0, 1], cosine)
    assert found["conflicts"][0][1] == found["conflicts"][1][0] == pytest.approx(conflicts, rel=1e-6)
    assert found["conflicts"][0][0] == 0 and found["cosines"][1][1] == pytest.approx(1)
    cosine, conflicts, norms = expected(["layers.0.w"])
    assert_close(torch.tensor([found["norms"][task]["layers.0.w"] for task in merges.TASKS]), norms)
    assert_close(torch.tensor(found["layers"]["cosine"]["layers.0.w"]), cosine)
    assert found["layers"]["sign conflicts"]["layers.0.w"] == pytest.approx(conflicts, rel=1e-6)


def test_one_model_has_nothing_to_be_like(tmp_path):
    merge = merges.merge_of(merges.write(tmp_path), "arithmetic")
    merge.experts = merge.experts[:1]
    with pytest.raises(ValueError, match="two models or more"):
        similarity(merge)
