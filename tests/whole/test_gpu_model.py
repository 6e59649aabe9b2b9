"""The model of a GPU's time: what it runs of the machine code is what the emulated device runs of the source."""

import shutil
import subprocess
import sys

import pytest
import torch
from helpers import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))
BENCHMARKS = ROOT / "benchmarks"
pytestmark = pytest.mark.skipif(not BENCHMARKS.exists(), reason="needs the source tree")

LOOP = """
\t.section\t.text.kernel,"ax",@progbits
.text.kernel:
        /*0000*/                   S2R R0, SR_TID.X ;
        /*0010*/                   LDC.64 R2, c[0x0][0x210] ;
        /*0020*/                   IMAD.MOV.U32 R5, RZ, RZ, RZ ;
.L_x_1:
        /*0030*/                   LDG.E.128 R8, desc[UR4][R2.64] ;
        /*0040*/                   LDG.E R12, desc[UR4][R2.64+0x4] ;
        /*0050*/                   IADD3 R2, P0, R2, 0x10, RZ ;
        /*0060*/                   IADD3.X R3, RZ, R3, RZ, P0, !PT ;
        /*0070*/                   FFMA R6, R8, R9, R12 ;
        /*0080*/                   VIADD R5, R5, 0x1 ;
        /*0090*/                   ISETP.GE.AND P1, PT, R5, c[0x0][0x218], PT ;
        /*00a0*/              @!P1 BRA `(.L_x_1) ;
        /*00b0*/                   FSETP.GT.AND P2, PT, R6, RZ, PT ;
        /*00c0*/               @P2 BRA `(.L_x_2) ;
        /*00d0*/                   STG.E desc[UR4][R2.64], R6 ;
.L_x_2:
        /*00e0*/                   EXIT ;
"""


def run(code, numbers, rounds):
    from sass.warp import Warp, functions

    arguments = numbers.data_ptr().to_bytes(8, "little") + rounds.to_bytes(4, "little")
    begin, end = numbers.data_ptr(), numbers.data_ptr() + numbers.numel() * 4
    readable = lambda address, size: begin <= address and address + size <= end
    return Warp(functions(code)["kernel"], {0x210: arguments}, {"SR_TID.X": 0}, readable).run()


def test_a_loop_is_run_as_often_as_its_arguments_say():
    numbers = torch.arange(40, dtype=torch.float32)
    issued = run(LOOP, numbers, 7)
    assert issued.total == 3 + 7 * 8 + 3 and issued.names["FFMA"] == 7  # the last product is positive: nothing is stored
    assert issued.units == {"special": 1, "control": 1 + 7 + 2, "multiply": 1, "fp32": 7, "memory": 14, "integer": 7 * 4 + 1}
    assert issued.requests == 14 and issued.in_flight == 20 and not issued.unknown
    assert run(LOOP, -numbers, 7).names["STG"] == 0 and run(LOOP, numbers * 0, 7).names["STG"] == 1


def test_what_memory_does_not_show_is_counted():
    issued = run(LOOP, torch.zeros(8), 3)  # the third time it reads beyond
    assert list(issued.unknown.values()) == [1] and issued.names["STG"] == 1


@pytest.mark.parametrize(
    ("r4", "low", "high", "difference"),
    [(5, "R4, -R4", "RZ, ~RZ", 0), (0, "R4, -R4", "RZ, ~RZ", 0), (0, "R4, -0x1", "RZ, -0x1", -1)],
)
def test_differences_of_64_bits_carry(r4, low, high, difference):
    """-R4 is ~R4 and 1, which carries where R4 is 0; -0x1 is a number, not a negation."""
    from sass.integers import Integers
    from sass.registers import Instruction

    lane = Integers({}, {}, lambda address, size: False)
    lane._set("R4", r4)
    made = lambda modifiers, text: Instruction(0, "PT", "IADD3", modifiers, tuple(text.split(", ")), None)
    lane._execute(made((), f"R0, P0, {low}, RZ"), True)
    lane._execute(made(("X",), f"R1, {high}, RZ, P0, !PT"), True)
    assert lane._value("R0", wide=True) == difference % 2**64


def test_machine_code_and_source_ask_memory_as_often():
    from gpu_model import nvdisasm

    if shutil.which("nvcc") is None or shutil.which("g++") is None or nvdisasm() is None:
        pytest.skip("needs nvcc, nvdisasm (which Triton brings) and g++")
    command = [sys.executable, BENCHMARKS / "gpu_model.py", "--operator", "weighted_sum"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    header, _, *rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in done.stdout.splitlines() if line[0] == "|"]
    assert len(rows) == 4
    for row in rows:
        named = dict(zip(header, row, strict=True))
        here, emulated = named["requests, emulated"].split(", ")
        assert here == emulated and named["unknown branches"] == "0"
        assert float(named["instructions"]) > 8 and float(named["of a copy"]) <= 1
