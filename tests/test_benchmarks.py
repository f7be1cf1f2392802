"""The kernels that measure a GPU's ceilings do the work that is counted; what forward.py counts and shows."""

import runpy
import shutil
import sys
from functools import reduce
from operator import xor
from pathlib import Path

import pytest
import torch

pytest.importorskip("cutlass")
from flash_attn_sm120 import simulator
from flash_attn_sm120.bench import ceiling, forward, prefill
from flash_attn_sm120.hot_path import hot_path
from flash_attn_sm120.sass import disassemble

ROOT = Path(__file__).parent.parent


@pytest.fixture
def build(tmp_path):
    options = f"--keep-ptx --keep-cubin --dump-dir {tmp_path}"
    return lambda kernel: ceiling.build(kernel, "sm_120a", options)


def test_mma_loop_multiplies_each_round_and_does_little_else(build):
    built = build(ceiling.MmaLoop)
    names = [instruction.name for instruction in hot_path(disassemble(built.__cubin__)).instructions]
    assert names.count("HMMA") == ceiling.PRODUCTS and len(names) < 1.5 * ceiling.PRODUCTS
    sums = []
    for rounds in (1, 3):
        out = torch.full((2, ceiling.THREADS), float("nan"))
        with simulator.simulate():
            simulator.launch(built, (out, rounds))
        sums.append(out)
    assert (sums[0] > 0).all() and sums[0].unique().numel() > 16
    torch.testing.assert_close(sums[1], 3 * sums[0])


def test_read_loop_reads_every_word(build):
    words = torch.randint(-(2**31), 2**31, (ceiling.IN_FLIGHT + 3, 2, ceiling.THREADS, 4)).to(torch.int32)
    out = torch.zeros(2, ceiling.THREADS, dtype=torch.int32)
    with simulator.simulate():
        simulator.launch(build(ceiling.ReadLoop), (words, out))
    assert torch.equal(out, reduce(xor, (words[step, ..., i] for step in range(len(words)) for i in range(4))))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float8_e4m3fn])
def test_a_pool_has_each_row_where_the_table_says(dtype):
    rows, table = torch.randn(2, 32, 3, 16), torch.randperm(8).int().view(2, 4)
    pool = prefill.pool(rows, table, 8, dtype)
    assert pool.dtype == dtype and pool.shape == (8, 8, 3, 16)
    for batch, row in ((0, 0), (0, 9), (1, 31), (1, 16)):
        found = pool[table[batch, row // 8], row % 8]
        assert torch.equal(found.float(), rows[batch, row].to(dtype).float())


@pytest.mark.parametrize("mask, window", [("full", None), ("causal", None), ("causal", 2), ("causal", 100)])
def test_flop_counts_visible_pairs(mask, window):
    rows, columns = torch.arange(9)[:, None], torch.arange(9)
    visible = (columns <= rows) | (mask == "full")
    if window is not None:
        visible &= columns >= rows - window
    cell = forward.Cell(2, 9, heads=3, head_dim=8, head_dim_v=16, mask=mask, window=window)
    assert cell.flop == 2 * 2 * 3 * int(visible.sum()) * (8 + 16)


def test_the_table_names_what_failed():
    row = {"cell": "d64", "ms": {"ours": 0.5}, "tflops": {"ours": 400.0, "sdpa_flash": 320.0}, "ratio": 1.25}
    row |= {"failed": {"flash_attn_4": "not installed: No module"}, "percent_of_ceiling": 62.5}
    header, _, line = forward.show([row], ["sdpa_flash", "flash_attn_4"]).splitlines()
    assert "SDPA flash | flash-attn-4" in header
    assert line == "| d64 | 0.500 | 400 |  | 320 | not installed | 1.25 | 62 |"


@pytest.fixture
def own_modules():
    """The package's modules are the same again behind a test that loads others."""
    own = {name: module for name, module in sys.modules.items() if name.partition(".")[0] == "flash_attn_sm120"}
    yield
    for name in [name for name in sys.modules if name.partition(".")[0] == "flash_attn_sm120"]:
        del sys.modules[name]
    sys.modules.update(own)


def test_copies_are_loaded_side_by_side(tmp_path, own_modules):
    load_copy = runpy.run_path(str(ROOT / "benchmarks" / "copies.py"))["load_copy"]
    for name in ("one", "two"):
        shutil.copytree(ROOT / "flash_attn_sm120", tmp_path / name / "flash_attn_sm120")
        with open(tmp_path / name / "flash_attn_sm120" / "bench" / "prefill.py", "a") as file:
            file.write(f"NAME = {name!r}\n")
    found = [load_copy(tmp_path / name) for name in ("one", "two")]
    assert [module.NAME for module in found] == ["one", "two"]
    with pytest.raises(ValueError, match="expected a folder with flash_attn_sm120"):
        load_copy(tmp_path / "three")
