"""tools/check_cuda.py reads what compiler and disassembler say; CI runs the check itself."""

import importlib.util
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SPEC = importlib.util.spec_from_file_location("check_cuda", ROOT / "tools" / "check_cuda.py")
check_cuda = importlib.util.module_from_spec(SPEC)
sys.modules["check_cuda"] = check_cuda  # its dataclasses look there
SPEC.loader.exec_module(check_cuda)

SYMBOL = "_ZN40_GLOBAL__N__02cb2874_8_scale_cu_8af66dbb10scale_rowsE5Table"
REPORT = f"""
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '{SYMBOL}' for 'sm_90'
ptxas info    : Function properties for {SYMBOL}
    16 bytes stack frame, 8 bytes spill stores, 12 bytes spill loads
ptxas info    : Used 63 registers, used 1 barriers, 64 bytes smem
ptxas info    : Compiling entry function '_Z5otherv' for 'sm_90'
ptxas info    : Function properties for _Z5otherv
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 20 registers, used 0 barriers
"""
LISTING = f"""
\t\tFunction : {SYMBOL}
        /*0000*/                   LDC R1, c[0x0][0x28] ;          /* 0x00000a00ff017b82 */
                                                                   /* 0x000fe20000000800 */
        /*0010*/              @!P0 LDG.E.128 R8, desc[UR4][R2.64] ;  /* 0x0000040402087981 */
        /*0020*/                   LDG.E.128.CONSTANT R8, desc[UR4][R2.64] ;  /* 0x00 */
        /*10250*/             @UP1 LDL R25, [R1+0x4] ;             /* 0x00000400011c7983 */
"""


def test_a_report_is_read():
    rows, other = check_cuda.parse_report(REPORT, 90)
    assert (rows.name, rows.registers, rows.stack, rows.spills, rows.shared) == (
        *("scale_rows", 63, 16, 8, 64),
    )
    assert (other.name, other.registers, other.stack, other.shared) == ("other", 20, 0, 0)


def test_instructions_are_counted():
    counts = check_cuda.count_instructions(LISTING)["scale_rows"]
    assert (counts["LDG.E.128"], counts["LDG"], counts["LDL"], counts["LDC"]) == (2, 2, 1, 1)
    assert "STG.E.128" not in counts


def test_faults_are_named():
    budget = check_cuda.Budget(62, ["LDG.E.128", "STG.E.128"])
    kernel = check_cuda.parse_report(REPORT, 90)[0]
    kernel.counts = check_cuda.count_instructions(LISTING)["scale_rows"]
    assert kernel.faults(budget) == [
        "63 registers, over its budget of 62",
        "16 bytes of local memory, 8 bytes spilled",
        "no STG.E.128",
        "1 LDL",
    ]
    other = check_cuda.parse_report(REPORT, 80)[1]
    assert other.faults(check_cuda.Budget(20, [])) == []


@pytest.mark.parametrize(
    "source", sorted((ROOT / "csrc" / "cuda").glob("*.cu")), ids=lambda p: p.stem
)
def test_each_kernel_has_a_budget(source):
    text = source.read_text()
    kernels = set(re.findall(r"__global__[^;{]*?(\w+)\(const Table", text))
    assert kernels and kernels == set(check_cuda.budgets(text))


def test_without_tools_it_says_so_and_fails(monkeypatch, capsys):
    monkeypatch.setattr(check_cuda.shutil, "which", lambda name: None)
    for arguments, code in (([], 1), (["--allow-missing"], 0)):
        monkeypatch.setattr(sys, "argv", ["check_cuda.py", *arguments])
        assert check_cuda.main() == code
        assert capsys.readouterr().err == "no nvcc: nothing was checked\n"
