from importlib.util import find_spec

import pytest
import streaming
import torch
from helpers import CPU_LEVELS, INTERPRETED, need_backend, running_on

from samerge_ext import backend, ops  # noqa: F401  (registers torch.ops.samerge)

# PyPI's torchvision cannot load its operators beside a torch for CPUs, and then fails to import, and transformers and open_clip
# with it, unless two of them are there. None is called.
OPERATORS_OF_TORCHVISION = torch.library.Library("torchvision", "FRAGMENT")
if find_spec("torchvision"):
    try:
        import torchvision  # noqa: F401
    except RuntimeError:
        for operator in ("nms", "qnms"):
            OPERATORS_OF_TORCHVISION.define(f"{operator}(Tensor boxes, Tensor scores, float iou_threshold) -> Tensor")
    except (ImportError, OSError):  # broken in another way, which those tests will say that need it
        pass


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup():
    """Every test draws the same numbers in every run, and so do the fixtures that it is the first to need."""
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def poison():
    """Fills the memory of torch.empty with NaN, in Python as in C++, so that what is not written shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def packed_twice(tmp_path):
    return streaming.packed_twice(tmp_path)


# With --dist loadfile a worker takes one file after another, and makes a module's fixtures once: the longest first, so that the
# workers end together.
LONGEST = ("cuda_build", "emulated_gpu", "plan", "triton", "demo_studies", "benchmarks", "sanitized_loops", "families", "soak")


def pytest_collection_modifyitems(items):
    places = {f"test_{name}": place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(item.path.stem, len(places)))


def pytest_report_header():
    return "tests marked gpu are deselected unless -m names them: make test-gpu"


def pytest_terminal_summary(terminalreporter):
    """What tests have measured and recorded, of which a passed one would otherwise say nothing."""
    passed = terminalreporter.stats.get("passed", ())
    lines = [line for report in passed for name, line in report.user_properties if name == "measured"]
    if lines:
        terminalreporter.write_sep("=", "measured")
        terminalreporter.write_line("\n".join(lines))


# Under TRITON_INTERPRET=1 operator tests run on the interpreted kernels alone; test_triton.py starts such a run.
if INTERPRETED:
    import interpreted  # noqa: F401

    BACKENDS = LEVELS = ("triton",)
else:
    ON_GPU = [pytest.param(name, marks=pytest.mark.gpu) for name in ("cuda", "triton")]
    BACKENDS, LEVELS = ("reference", "cpu", *ON_GPU), ("reference", *CPU_LEVELS, *ON_GPU)


@pytest.fixture(params=BACKENDS)
def each_backend(request):
    with running_on(request.param):
        yield request.param


@pytest.fixture(params=LEVELS)
def each_level(request):
    """As `each_backend`, with the C++ loops at every instruction level that this machine runs."""
    if request.param not in CPU_LEVELS:
        with running_on(request.param):
            yield request.param
        return
    need_backend("cpu")
    before = backend.cpu_level()  # which SAMERGE_CPU_LEVEL may have forced
    try:
        backend._C.set_cpu_level(request.param)
    except ValueError as error:
        pytest.skip(str(error))
    try:
        with backend.use_backend("cpu"):
            yield request.param
    finally:
        backend._C.set_cpu_level(before)


@pytest.fixture(params=("cuda", "triton"))
def on_gpu(request):
    """Either implementation for GPUs, and a GPU as the default device."""
    with running_on(request.param):
        yield request.param


@pytest.fixture
def on_gpu_by_name(request, on_gpu):
    """As `on_gpu`, with tensors still created on the CPU: methods must place what they create themselves."""
    torch.set_default_device("cpu")
    return on_gpu


@pytest.fixture
def threads():
    """A function that sets the number of threads until the test ends."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)
