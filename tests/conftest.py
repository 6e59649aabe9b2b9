import pytest
import torch
from helpers import LEVELS, need_backend

from samerge_ext import backend


@pytest.fixture(autouse=True)
def poison():
    """Fills the memory of torch.empty with NaN, in Python as in C++, so that what is not written shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(params=("reference", "cpu"))
def each_backend(request):
    need_backend(request.param)
    with backend.use_backend(request.param):
        yield request.param


@pytest.fixture(params=("reference", *LEVELS))
def each_level(request):
    """The reference, then the C++ loops at every instruction level that this machine runs."""
    if request.param == "reference":
        with backend.use_backend("reference"):
            yield request.param
        return
    need_backend("cpu")
    try:
        backend._C.set_cpu_level(request.param)
    except ValueError as error:
        pytest.skip(str(error))
    try:
        with backend.use_backend("cpu"):
            yield request.param
    finally:
        backend._C.set_cpu_level("auto")


@pytest.fixture
def threads():
    """A function that sets the number of threads until the test ends."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)
