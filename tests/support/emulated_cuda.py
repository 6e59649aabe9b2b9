"""The Python half of emulated_cuda.cpp: torch.cuda's functions for a device that does everything at once, and the operators'
reference in the place of their CUDA kernels. A pytest plugin: `-p emulated_cuda`, with the library preloaded."""

import os
import sys
from contextlib import nullcontext
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


def _on(self, device):
    """A storage's bytes on another device."""
    return torch.empty(0, dtype=torch.uint8, device=self.device).set_(self).to(device).untyped_storage()


NOTHING = dict.fromkeys(("_lazy_init", "synchronize", "empty_cache", "set_sync_debug_mode", "check_error"), lambda *_: None)
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
    "cudart": lambda: SimpleNamespace(cudaHostRegister=lambda *_: 0),
}
for name, value in (NOTHING | DEVICE).items():
    setattr(torch.cuda, name, value)
torch.Tensor.record_stream = lambda self, stream: None
torch.UntypedStorage.cpu = lambda self: _on(self, "cpu")
torch.UntypedStorage.to = lambda self, *, device, non_blocking=False: _on(self, device)

_unavailable, _lookup = backend._unavailable, backend._lookup
backend._unavailable = lambda name: None if name == "cuda" else _unavailable(name)
backend._lookup = lambda op, name: _lookup(op, "reference" if name == "cuda" else name)

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
