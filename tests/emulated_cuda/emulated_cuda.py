"""The Python half of the emulated device: torch.cuda's functions, where everything is done at once, the operators' CUDA kernels
as the library has them, and what it saw them do. A pytest plugin: `-p emulated_cuda`, with the library preloaded."""

import ctypes
import importlib.machinery
import importlib.util
import os
import subprocess
import sys
from collections.abc import Callable
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch

from samerge_ext import backend


class Event:
    def synchronize(self):
        pass


class Stream:
    device = torch.device("cuda", 0)

    def __init__(self, device=None):
        pass

    def wait_event(self, event):
        assert isinstance(event, Event)

    def record_event(self):
        return Event()


def _bytes(self):
    return torch.empty(0, dtype=torch.uint8, device=self.device).set_(self)


def _on(self, device):
    """A storage's bytes on another device."""
    return _bytes(self).to(device).untyped_storage()


NOTHING = dict.fromkeys(
    ("_lazy_init", "synchronize", "empty_cache", "set_sync_debug_mode", "set_stream", "check_error"), lambda *_: None
)
DEVICE = {
    "is_available": lambda: True,
    "device_count": lambda: 1,
    "current_device": lambda: 0,
    "is_bf16_supported": lambda *_: True,
    "is_current_stream_capturing": lambda: False,
    "current_stream": lambda device=None: Stream(),
    "stream": lambda stream: nullcontext(),
    "Stream": Stream,
    "Event": Event,
    "mem_get_info": lambda device=None: (2**34, 2**34),
    "memory_reserved": lambda device=None: 0,
    "memory_allocated": lambda device=None: 0,
    "cudart": lambda: SimpleNamespace(cudaHostRegister=lambda *_: 0),
}
for name, value in (NOTHING | DEVICE).items():
    setattr(torch.cuda, name, value)
torch.Tensor.record_stream = lambda self, stream: None
torch.UntypedStorage.clone = lambda self: _bytes(self).clone().untyped_storage()
torch.UntypedStorage.cpu = lambda self: _on(self, "cpu")
torch.UntypedStorage.to = lambda self, *, device, non_blocking=False: _on(self, device)

LIBRARY = os.environ.pop("LD_PRELOAD")  # other programs that a test starts have no need of it
_loader = importlib.machinery.ExtensionFileLoader("emulated_kernels", LIBRARY)
_kernels = importlib.util.module_from_spec(importlib.util.spec_from_loader("emulated_kernels", _loader))
_loader.exec_module(_kernels)
for name in dir(_kernels):
    if name.endswith("_cuda"):
        setattr(backend._C, name, getattr(_kernels, name))

runtime = ctypes.CDLL(LIBRARY)
for function in (runtime.emulated_fault, runtime.emulated_traffic, runtime.emulated_launches):
    function.restype = ctypes.c_char_p


class Device(ctypes.Structure):
    """runtime.h's emulated_device."""

    _fields_ = [(name, ctypes.c_int) for name in (
        "processors", "per_processor", "generation", "shared_bytes", "order", "poison", "watched", "counted",
    )]  # fmt: skip


@contextmanager
def device(**settings: int):
    current = Device.in_dll(runtime, "emulated_device")
    before = {name: getattr(current, name) for name in settings}
    for name, value in settings.items():
        setattr(current, name, value)
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(current, name, value)


@dataclass(frozen=True)
class Traffic:
    """What warps asked for at one place in a kernel in one launch: bytes, those that several lanes ask for at once counted once,
    and those that the launch had not touched before. Of global memory a unit is a sector of 32 bytes, of shared memory a turn of
    its banks; `least` would do for the same bytes side by side."""

    launch: int
    kernel: str
    line: str
    shared: bool
    write: bool
    requests: int
    asked: int
    unique: int
    units: int
    least: int


def traffic(call: Callable[[], object]) -> list[Traffic]:
    runtime.emulated_forget()
    with device(counted=1):
        call()
    rows = [line.split("\t") for line in runtime.emulated_traffic().decode().splitlines()]
    places = sorted({place for row in rows for place in row[1:3]})
    command = ["addr2line", "-f", "-C", "-s", "-e", LIBRARY, *places]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    names, lines = dict(zip(places, printed[::2])), dict(zip(places, (line.split()[0] for line in printed[1::2])))
    made = lambda launch, kernel, place, *numbers: Traffic(int(launch), names[kernel], lines[place], *map(int, numbers))
    return [made(*row) for row in rows]


# Composed of operators that are watched in their own tests.
COMPOSED = ("test_svd_topk", "test_svd_topk_vectors", "test_layer_stats")


def pytest_runtest_setup(item):
    Device.in_dll(runtime, "emulated_device").watched = item.path.stem not in COMPOSED


_status = 0


def pytest_sessionfinish(exitstatus):
    global _status
    _status = int(exitstatus)


@pytest.hookimpl(trylast=True)
def pytest_unconfigure():
    """Leaves without running what C++ has to do at exit: torch wakes the device's autograd thread there, which under a
    Python before 3.12 asks for the lock of an interpreter that is gone, and now and then ends the process by an abort."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(_status)
