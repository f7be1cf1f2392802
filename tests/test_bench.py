"""flash-attn-sm120 bench without a GPU: tables, files, pictures, peers and their refusals."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from flash_attn_sm120 import cli
from flash_attn_sm120.bench import paged_peers, peers, results, tables
from flash_attn_sm120.reference import attention

STORED = Path(__file__).parents[1] / "benchmarks" / "results"
no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="says what happens without a GPU")


@no_gpu
def test_without_a_gpu(capsys):
    assert cli.main(["bench"]) == 1
    out, err = capsys.readouterr()
    assert not out and "bench: there is no GPU that PyTorch can use" in err


@pytest.mark.parametrize(
    "line, code, text",
    [
        ("backward", 2, "expected some of forward, prefill, decode, got 'backward'"),
        ("--peers triton", 2, "expected none or some of sdpa_flash"),
        ("--plot nowhere/x.png", 2, "expected a file in a folder that exists"),
        ("--plot x.txt", 2, "expected a name that ends with .png"),
        ("--from x.json --occupancy sm120", 2, "--from reads what was measured: expected no --occupancy"),
        ("decode --cells windows", 2, "--cells: expected forward among the sections"),
        ("forward --peers flashinfer", 2, "--peers: expected peers that forward is compared with, got flashinfer"),
        ("--from x.json", 1, "x.json"),
        (f"--from {__file__}", 1, "expected JSON"),
        (f"--from {STORED / 'decode_h200.json'} forward", 1, "has no forward"),
        (f"--from {STORED / 'vllm_h200.json'}", 1, "expected results of forward, prefill or decode, got none"),
        (f"--from {STORED / 'windows_h200.json'}", 1, "expected results of forward, prefill or decode, got none"),
    ],
)
def test_refusals(line, code, text, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    try:
        found = cli.main(["bench", *line.split()])
    except SystemExit as stop:
        found = stop.code
    assert found == code and text in capsys.readouterr().err


def test_a_picture_has_every_number(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    from flash_attn_sm120.bench import plot

    whole = {name: results.load(STORED / f"{name}_h200.json")[name] for name in ("forward", "prefill", "decode")}
    whole["decode"]["rows"][0] |= {"peers": {"flashinfer": {"graph_us": 20.0, "graph_tb_s": 1.75}}, "failed": {}}
    file = tmp_path / "all.json"
    file.write_text(json.dumps(whole))
    assert cli.main(["bench", "--from", str(file), "--plot", str(tmp_path / "all.png")]) == 0
    text = capsys.readouterr().out
    for name in whole:
        assert (tmp_path / f"all-{name}.png").read_bytes().startswith(b"\x89PNG") and f"all-{name}.png" in text
    speeds = {
        name: [value for row in whole[name]["rows"] for value in row["tflops"].values()]
        for name in ("forward", "prefill")
    }
    speeds["decode"] = [row["graph_tb_s"] for row in whole["decode"]["rows"]] + [1.75]
    for name, expected in speeds.items():
        figure = plot.DRAWINGS[name](whole[name])
        heights = [bar.get_height() for axis in figure.axes for bar in axis.patches]
        assert sorted(heights) == sorted(expected)
        words = " ".join(text.get_text() for text in figure.texts)
        assert "Measured on NVIDIA H200" in words and "SM120's tiles" in words and "higher is better" in words


def test_tables_of_stored_results(capsys):
    assert cli.main(["bench", "--from", str(STORED / "forward_h200.json")]) == 0
    lines = capsys.readouterr().out.splitlines()
    (row,) = (line.split() for line in lines if line.startswith("d128 h16/16 causal b1 s16384"))
    rows = json.loads((STORED / "forward_h200.json").read_text())["rows"]
    (stored,) = (each for each in rows if each["cell"] == "d128 h16/16 causal b1 s16384")
    speeds = [f"{stored['tflops'][name]:.0f}" for name in ("ours", "other", "sdpa_flash", "flash_attn_4")]
    shares = [f"{stored['ratio']:.2f}", f"{stored['percent_of_ceiling']:.0f}"]
    assert row[5:] == [f"{stored['ms']['ours']:.3f}", *speeds, *shares]
    assert "flash-attn-4" in " ".join(lines) and "Measured on NVIDIA H200" in " ".join(lines)


def test_measuring_saves_as_it_goes_and_leaves_out_what_does_not_fit(monkeypatch, tmp_path, capsys):
    pytest.importorskip("cutlass")
    from flash_attn_sm120.bench import decode

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *index: (12, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *index: "a GPU")
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(decode, "read_tb_s", lambda: 2.0)
    file, asked = tmp_path / "found.json", []

    def measure(cell, occupancy, wanted):
        if asked and wanted:
            assert len(json.loads(file.read_text())["decode"]["rows"]) == len([one for one in asked if one.batch != 64])
        asked.append(cell)
        if cell.batch == 64:
            raise torch.OutOfMemoryError("no")
        assert occupancy == "device" and wanted == ["sdpa_flash"]
        row = {"cell": cell.name, "splits": 1, "eager_us": 10.0, "graph_us": 8.0, "graph_tb_s": 1.0, "peers": {}}
        return row | {"failed": {"sdpa_flash": "differs by 0.3" if cell.batch == 16 else "no windows"}}

    monkeypatch.setattr(decode, "measure", measure)
    assert cli.main(["bench", "decode", "--peers", "sdpa_flash", "--json", str(file)]) == 1
    out, err = capsys.readouterr()
    assert len(asked) == len(decode.cells_of("both")) and results.load(file)["decode"]["peers"] == ["sdpa_flash"]
    assert "left out, too large for this GPU's memory: b64 s4096" in out and " 50 " in out and "no windows" in out
    assert "b16 s8192 h32/32 bf16: sdpa_flash differs by 0.3" in err
    monkeypatch.setattr(decode, "measure", lambda cell, *rest, **more: measure(decode.Cell(64, 8), "", []))
    asked.clear()
    assert cli.main(["bench", "decode", "--peers", "none"]) == 1
    assert "too little memory for decode" in capsys.readouterr().err


def test_peers_that_are_not_installed(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *index: (12, 1))
    monkeypatch.setattr(peers, "find_spec", lambda name: None)
    assert peers.installed("sdpa_flash") and not peers.installed("flashinfer")
    assert cli.main(["bench", "decode", "--peers", "flashinfer,flash_attn_4"]) == 1
    assert "flashinfer needs pip install flashinfer-python; flash_attn_4 needs" in capsys.readouterr().err


@pytest.fixture
def cache():
    """(q of one token, K and V in pages, the page table, dense K and V): three sequences of 19 rows."""
    torch.manual_seed(3)
    table = torch.randperm(9).int().view(3, 3)
    q = torch.randn(3, 1, 4, 16)
    pools = torch.randn(2, 9, 8, 2, 16)
    dense = [torch.stack([torch.cat([pool[page] for page in row])[:19] for row in table.tolist()]) for pool in pools]
    return q, *pools, table, dense


def test_dense_peers_of_decode_get_the_rows_of_the_pages(cache, monkeypatch):
    q, k, v, table, dense = cache
    seen = []

    def peer(name, causal, window, grouped):
        seen.append((name, causal, window, grouped))
        return lambda q, k, v: attention(q, k, v)[0]

    monkeypatch.setattr(peers, "peer", peer)
    (call,), sets = paged_peers.decode_calls("sdpa_flash", [(q, k, v, table)], 19, None)
    torch.testing.assert_close(call(*sets[0]), attention(q, *dense)[0])
    paged_peers.decode_calls("flash_attn_4", [(q, k, v, table)], 19, 7)
    assert seen == [("sdpa_flash", False, None, True), ("flash_attn_4", True, 7, True)]
    assert paged_peers.unable("sdpa_flash", 7, "") == "no windows"
    assert paged_peers.unable("flash_attn_4", None, "float8_e4m3fn") == "no FP8 K and V"
    assert not paged_peers.unable("flashinfer", 7, "float8_e4m3fn")


def test_decode_reads_far_more_than_l2_holds():
    pytest.importorskip("cutlass")
    from flash_attn_sm120.bench import decode

    for cell in decode.cells_of("both"):
        count = decode.set_count(cell.bytes_read)
        held = decode.L2_BYTES / (count * cell.bytes_read)
        assert held <= 1 / 24 or count == decode.MOST_SETS
        assert count == 2 or (count - 1) * cell.bytes_read < 24 * decode.L2_BYTES


def test_a_peer_is_its_fastest_way_and_never_a_wrong_one(monkeypatch):
    pytest.importorskip("cutlass")
    from flash_attn_sm120.arguments import Arguments, Lengths
    from flash_attn_sm120.bench import decode

    out = torch.randn(1, 1, 4, 16)
    arguments = (*Arguments(out, out, out, torch.empty_like(out), lengths=Lengths(page_table=out)), None)

    def lacking(*_):
        raise RuntimeError("no such kernel")

    ways = {"slow": lambda *_: out, "fast": lambda *_: out + 0.01, "wrong": lambda *_: out + 1.0, "lacking": lacking}
    times = {ways["slow"]: 3.0, ways["fast"]: 2.0, ways["wrong"]: 1.0}
    monkeypatch.setattr(decode, "graph_ms", lambda call, sets: times[call])
    monkeypatch.setattr(decode, "row_ms", lambda call, sets: times[call] / 2)

    def measured(*names):
        calls = [ways[name] for name in names]
        monkeypatch.setattr(paged_peers, "decode_calls", lambda *_: (calls, [(0,)]))
        return decode._peer("flashinfer", decode.Cell(1, 64), lambda *own: own[3].copy_(out), [arguments])

    found = measured("slow", "lacking", "fast")
    assert (found["graph_us"], found["row_us"]) == (2000.0, 1000.0)
    with pytest.raises(peers.Differs, match=r"^1$"):
        measured("slow", "wrong")
    with pytest.raises(RuntimeError, match="no such kernel"):
        measured("lacking")
    with pytest.raises(peers.NotOffered, match="no windows"):
        decode._peer("sdpa_flash", decode.Cell(1, 64, window=3), None, [arguments])


class Wrapper:
    """What FlashInfer's wrappers do by their documentation."""

    def __init__(self, workspace, layout, **options):
        assert layout == "NHD" and options.pop("backend") == "fa2" and set(options) <= {"use_tensor_cores"}
        self.prefill = not options

    def plan(self, *arguments, causal=False, window_left=-1, q_data_type, kv_data_type):
        self.marks = arguments[0] if self.prefill else None
        self.indptr, self.indices, self.last, *sizes = arguments[1:] if self.prefill else arguments
        assert sizes == [4, 2, 16, 8]
        self.causal, self.window = causal, (None if window_left < 0 else window_left, None)

    def run(self, q, pools):
        marks = self.marks if self.prefill else torch.arange(len(q) + 1)
        found = []
        for i, last in enumerate(self.last.tolist()):
            pages = self.indices[self.indptr[i] : self.indptr[i + 1]].long()
            size = (len(pages) - 1) * 8 + last
            k, v = (pool[pages].flatten(0, 1)[None, :size] for pool in pools)
            rows = q[None, marks[i] : marks[i + 1]]
            found.append(attention(rows, k, v, causal=self.causal, window_size=self.window)[0][0])
        return torch.cat(found)


def test_flashinfer_gets_the_pages(cache, monkeypatch):
    module = SimpleNamespace(BatchDecodeWithPagedKVCacheWrapper=Wrapper, BatchPrefillWithPagedKVCacheWrapper=Wrapper)
    monkeypatch.setitem(sys.modules, "flashinfer", module)
    monkeypatch.setattr(paged_peers, "_workspace", lambda: None)
    q, k, v, table, dense = cache
    calls, sets = paged_peers.decode_calls("flashinfer", [(q, k, v, table)], 19, 6)
    assert len(calls) == 2
    for call in calls:
        torch.testing.assert_close(call(*sets[0]), attention(q, *dense, window_size=(6, None))[0])
    long = torch.randn(3, 19, 4, 16)
    call = paged_peers.flashinfer_prefill(long.shape, k, table, True)
    torch.testing.assert_close(call(long, k, v), attention(long, *dense, causal=True)[0])


def test_a_table_says_why_a_number_is_missing():
    row = {"cell": "c", "tflops": {"dense": 400.0, "bf16": 380.0, "e4m3": 350.0}, "page_size": 16}
    row |= {"failed": {"flashinfer bf16": "RuntimeError: no kernel"}, "alone": {"bf16": 370.0, "e4m3": 374.0}}
    title, header, (line,) = tables.prefill({"rows": [row]})
    assert "pages of 16" in title and header[4] == "FlashInfer, paged"
    assert line == ["c", "400", "380", "350", "RuntimeError", "0.95", "0.92", "1.01"]
