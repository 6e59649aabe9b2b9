import pytest
import torch
from helpers import need_backend, packed
from processes import python

import samerge_ext as sm
from samerge_ext import backend


def test_every_backend_says_whether_it_runs():
    reasons = sm.available()
    assert set(reasons) == set(backend.BACKENDS) and reasons["reference"] is None
    assert all(reason is None or len(reason) > 10 for reason in reasons.values())


def test_the_innermost_choice_counts_and_ends():
    before = backend.active()
    with sm.use_backend("reference"):
        with sm.use_backend("auto"):
            assert backend.active() == "auto"
        assert backend.active() == "reference"
        with pytest.raises(ZeroDivisionError), sm.use_backend("auto"):
            raise ZeroDivisionError
        assert backend.active() == "reference"
    assert backend.active() == before


def test_a_choice_reaches_the_backward_pass(monkeypatch):
    """The backward runs on autograd's threads and through the same choice."""
    calls = []
    original = backend.kernel
    monkeypatch.setattr(backend, "kernel", lambda op, x: calls.append((op, backend.active())) or original(op, x))
    inputs = packed(2, [1])
    inputs[2].requires_grad_()
    with sm.use_backend("reference"):
        sm.weighted_sum(*inputs).sum().backward()
    assert calls == [("weighted_sum", "reference"), ("coefficient_grad", "reference")]


def test_auto_takes_the_extension_where_it_is_built():
    need_backend("cpu")
    assert backend.kernel("weighted_sum", torch.empty(0)) is backend._C.weighted_sum_cpu
    with sm.use_backend("reference"):
        assert backend.kernel("weighted_sum", torch.empty(0)).__module__ == "samerge_ext.reference.weighted_sum"


def test_auto_falls_back_and_says_so_once():
    backend._kernels.pop(("weighted_sum", "auto", "meta"), None)
    backend._warned.clear()
    with pytest.warns(RuntimeWarning, match="reference.*no kernels for meta tensors"):
        assert backend.kernel("weighted_sum", torch.empty(0, device="meta")).__module__.startswith("samerge_ext.reference")
    with pytest.warns(RuntimeWarning) as record:
        backend.kernel("coefficient_grad", torch.empty(0, device="meta"))
        backend.warnings.warn("the only one", RuntimeWarning)
    assert [str(w.message) for w in record] == ["the only one"]


def test_unknown_names_are_listed():
    with pytest.raises(ValueError, match="unknown backend 'gpu'.*auto, reference, cpu, cuda, triton"), sm.use_backend("gpu"):
        pass
    result = python("import samerge_ext.backend", SAMERGE_BACKEND="gpu")
    assert result.returncode and "unknown backend 'gpu'" in result.stderr


def test_a_named_backend_runs_or_raises():
    for name, reason in sm.available().items():
        if reason:
            with pytest.raises(RuntimeError, match=f"backend '{name}' is not available"), sm.use_backend(name):
                pass
    need_backend("cpu")
    with sm.use_backend("cpu"), pytest.raises(RuntimeError, match="'cpu' cannot run weighted_sum on a meta tensor"):
        backend.kernel("weighted_sum", torch.empty(0, device="meta"))
    with sm.use_backend("cpu"), pytest.raises(RuntimeError, match="'cpu' has no unheard_of"):
        backend.kernel("unheard_of", torch.empty(0))


def test_the_variable_names_a_backend():
    code = "import samerge_ext; print(samerge_ext.backend.active())"
    assert python(code, SAMERGE_BACKEND="reference").stdout.strip() == "reference"


def test_without_the_extension_the_reference_runs_and_says_so():
    code = """
import sys; sys.modules["samerge_ext._C"] = None
import torch, samerge_ext as sm
for _ in range(2): print(sm.entropy(torch.zeros(2, 4)).item())
try:
    with sm.use_backend("cpu"): pass
except RuntimeError as error: print(error)
"""
    result = python(code)
    assert result.stdout.count("1.386") == 2, result.stderr
    assert result.stderr.count("runs on the PyTorch reference") == 1
    assert "pip install . --no-build-isolation" in result.stdout.splitlines()[-1]


def test_levels_can_be_forced():
    need_backend("cpu")
    code = "from samerge_ext import backend; print(backend._C.cpu_level())"
    assert python(code, SAMERGE_CPU_LEVEL="portable").stdout.strip() == "portable"
    result = python(code, SAMERGE_CPU_LEVEL="sse9")
    assert result.returncode and "'sse9' is unknown or does not run on this machine; choose auto" in result.stderr
    with pytest.raises(ValueError, match="portable"):
        backend._C.set_cpu_level("sse9")


def test_importing_costs_little_more_than_torch():
    code = "import torch, time; t = time.process_time(); import samerge_ext.ops; print(time.process_time() - t)"
    assert any(float(python(code).stdout) < 0.3 for _ in range(2))


def test_heavy_packages_are_imported_only_when_used():
    code = "import torch, sys; before = set(sys.modules); import samerge_ext.ops; print(*sorted(set(sys.modules) - before))"
    assert not {"transformers", "matplotlib", "typer", "pydantic", "rich", "triton"} & set(python(code).stdout.split())
