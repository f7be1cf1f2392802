"""What attention takes of a real vLLM's time, by backend. Needs a GPU of 30 GB and vLLM 0.24.

    python tests/integration/vllm_throughput.py [--backends FLASH_ATTN_SM120 TRITON_ATTN FLASH_ATTN:3 FLASH_ATTN:2]
                                                [--layers 32] [--json FILE]

The shapes of Llama-3-8B with vLLM's dummy weights, bf16, chunked prefill of 8,192 tokens a step, pages of 16 tokens,
decodes replayed from CUDA graphs, no prefix cache. Two loads: 32 requests of 2,048 tokens and 1 of 32,000, 128 new
tokens each. Each runs with one new token, which is the prefill, and with all of them; the difference is the decode.
Attention time is what PyTorch's profiler counts in the backend's kernels on the GPU, without writing the cache; tokens
a second are those of runs without the profiler. FLASH_ATTN:3 is vLLM's FlashAttention 3, which uses wgmma on an H200,
as Triton does; FLASH_ATTN:2 has mma.sync only. Packages as vllm_generate.py says.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from vllm_generate import BACKEND, ENVIRONMENT

LOADS = {"32 x 2k": (32, 2048), "1 x 32k": (1, 32000)}  # requests, tokens of each
NEW_TOKENS = 128
KERNELS = {  # parts of the names of the kernels that are a backend's attention
    BACKEND: ("flash_attn_sm120",),
    "TRITON_ATTN": ("unified_attention", "reduce_segments"),
    "FLASH_ATTN": ("flash::", "flash_fwd", "FlashAttn", "prepare_varlen"),
}


@dataclass
class Row:
    """prefill_ms, decode_ms: of attention on the GPU; *_s: wall time of the whole engine."""

    backend: str
    load: str
    prefill_ms: float
    decode_ms: float
    prefill_s: float
    decode_s: float
    kernels: list[str]


def write_model(folder: Path, layers: int) -> Path:
    from transformers import LlamaConfig

    config = LlamaConfig(
        vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_hidden_layers=layers, num_attention_heads=32,
        num_key_value_heads=8, max_position_embeddings=40960, rope_theta=500000.0, dtype="bfloat16",
        architectures=["LlamaForCausalLM"], bos_token_id=1, eos_token_id=2, tie_word_embeddings=False,
    )  # fmt: skip
    config.save_pretrained(folder)
    return folder


def engine(model: Path, backend: str) -> Any:
    from vllm import LLM

    name, _, version = backend.partition(":")
    attention = {"backend": name} | ({"flash_attn_version": int(version)} if version else {})
    return LLM(
        model=str(model),
        load_format="dummy",
        skip_tokenizer_init=True,
        dtype="bfloat16",
        attention_config=attention,
        block_size=16,
        max_model_len=32768,
        max_num_seqs=32,
        max_num_batched_tokens=8192,
        enable_prefix_caching=False,
        num_gpu_blocks_override=5000,
        gpu_memory_utilization=0.5,
        compilation_config={"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY", "cudagraph_capture_sizes": [1, 32]},
        seed=0,
    )


def generate(llm: Any, requests: int, tokens: int, new: int) -> float:
    """Seconds."""
    from vllm import SamplingParams

    draw = torch.Generator().manual_seed(5)
    prompts = torch.randint(3, 128000, (requests, tokens), generator=draw).tolist()
    params = SamplingParams(temperature=0.0, max_tokens=new, ignore_eos=True, detokenize=False)
    start = time.perf_counter()
    llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], params, use_tqdm=False)
    torch.cuda.synchronize()
    return time.perf_counter() - start


def attention_ms(llm: Any, backend: str, requests: int, tokens: int, new: int) -> tuple[float, set[str]]:
    """Of one run on the GPU, and the names of the kernels."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        generate(llm, requests, tokens, new)
    parts = KERNELS[backend.partition(":")[0]]
    total, names = 0.0, set()
    for event in profiler.events():
        if event.device_type == torch.autograd.DeviceType.CUDA and any(part in event.name for part in parts):
            total += event.device_time
            names.add(event.name[:120])
    return total / 1e3, names


def measure(model: Path, backend: str) -> list[Row]:
    llm = engine(model, backend)
    rows = []
    for load, (requests, tokens) in LOADS.items():
        generate(llm, requests, tokens, 2)
        prefill_s, all_s = (generate(llm, requests, tokens, new) for new in (1, NEW_TOKENS))
        prefill_ms, names = attention_ms(llm, backend, requests, tokens, 1)
        all_ms, more = attention_ms(llm, backend, requests, tokens, NEW_TOKENS)
        rows.append(
            Row(backend, load, prefill_ms, all_ms - prefill_ms, prefill_s, all_s - prefill_s, sorted(names | more))
        )
    return rows


def measure_apart(model: Path, backend: str) -> list[Row]:
    """In a process of its own, as an engine leaves its CUDA graphs' memory behind."""
    with tempfile.NamedTemporaryFile("r", suffix=".json") as found:
        command = [sys.executable, __file__, "--engine", str(model), "--backends", backend, "--json", found.name]
        answer = subprocess.run(command, capture_output=True, text=True)
        if answer.returncode:
            lines = [line for line in answer.stderr.splitlines() if "Error" in line] or ["?"]
            raise RuntimeError(lines[-1])
        return [Row(**row) for row in json.load(found)]


def child(options: argparse.Namespace) -> None:
    """What measure_apart starts."""
    from flash_attn_sm120.integrations.vllm import register

    register()
    rows = measure(options.engine, *options.backends)
    options.json.write_text(json.dumps(list(map(asdict, rows))))


def line_of(row: Row) -> str:
    requests, tokens = LOADS[row.load]
    prefill, decode = requests * tokens / row.prefill_s, requests * (NEW_TOKENS - 1) / row.decode_s
    cells = (row.backend, row.load, f"{row.prefill_ms:.1f}", f"{row.decode_ms:.1f}", f"{prefill:.0f}", f"{decode:.0f}")
    return "| " + " | ".join(cells) + " |"


HEAD = "| backend | requests | prefill: attention, ms | decode: attention, ms | prefill, tokens/s | decode, tokens/s |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    backends = (BACKEND, "TRITON_ATTN", "FLASH_ATTN:3", "FLASH_ATTN:2")
    parser.add_argument("--backends", nargs="+", default=backends)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--json", type=Path, help="where the table goes, too")
    parser.add_argument("--engine", type=Path, help=argparse.SUPPRESS)  # the child's, a folder with a model
    options = parser.parse_args()
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    if options.engine:
        return child(options)
    about = {"vllm": version("vllm"), "torch": torch.__version__, "gpu": torch.cuda.get_device_name()}
    rows: list[Row] = []
    failed = {}
    with tempfile.TemporaryDirectory() as folder:
        model = write_model(Path(folder), options.layers)
        for backend in options.backends:
            try:
                rows += measure_apart(model, backend)
            except RuntimeError as error:  # a peer that doesn't start is a fact for the table
                failed[backend] = str(error)
                print(f"{backend}: {error}", file=sys.stderr)
            if options.json:
                found = about | {"layers": options.layers, "failed": failed, "rows": list(map(asdict, rows))}
                options.json.write_text(json.dumps(found, indent=1) + "\n")
            print("\n".join(line_of(row) for row in rows if row.backend == backend), flush=True)
    rule = "| --- " * HEAD.count(" | ") + "| --- |"
    print("\n".join([HEAD, rule, *map(line_of, rows)]))
    sys.exit(BACKEND in failed or not all(row.kernels for row in rows))


if __name__ == "__main__":
    main()
