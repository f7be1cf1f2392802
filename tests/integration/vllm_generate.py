"""A real vLLM generates with FLASH_ATTN_SM120 what it generates with its own backend. Needs a GPU and vLLM 0.24.

    python tests/integration/vllm_generate.py [--models llama qwen3 gemma3 gpt_oss] [--modes eager full decode]
                                              [--kv auto fp8] [--runners 1 2] [--json FILE]
                                              [--reference TRITON_ATTN|float32] [--backends NAME ...]
                                              [--query-scale 4] [--experts-per-token 2]

Each model is small, with random weights, written to a temporary folder. 32 requests of 1 to 1,500 tokens, some with the
same beginning, go through chunked prefill (512 tokens a step) and a prefix cache, twice, so that the second round finds
its prompts cached. The reference generates greedily, without CUDA graphs. FLASH_ATTN_SM120 then does in each mode:
  eager   no CUDA graphs
  full    every batch of at most 64 tokens replays a graph, also mixed ones
  decode  batches of decodes replay graphs
in two ways: freely, compared up to each request's first difference; and led along the reference's tokens, compared
everywhere, which is how every decode step counts. Where vLLM's newer model runner takes the model, a third engine runs
it freely (`runner 2`); only the older one can be led. A position counts where the reference's top two logits are more
than 1e-2 apart. To tell whose rounding a difference is, --reference float32 computes attention in float32 PyTorch from
the same cache, and --backends can name vLLM's own. A fresh model attends to all its keys about equally; with
--query-scale 4 it picks among them, and each backend's rounding shows more. All of gpt-oss's experts work on each
token; with --experts-per-token 2 rounding also decides which. Exits with 1 where fewer than 99% of these agree, where a
layer has another backend, or where vLLM's log doesn't name this one.

Without a network (PyTorch 2.11.0, transformers 5 and Triton in place, this repository in the working directory):

    python tests/integration/pack_vllm.py DIR        # on a machine with one: DIR/vllm.tar.xz
    mkdir -p /tmp/vllm && tar xJf DIR/vllm.tar.xz -C /tmp/vllm
    PYTHONPATH=$PWD:<this package's dependencies>:/tmp/vllm python tests/integration/vllm_generate.py

The backend is found through its entry point, or, where this package lies uninstalled on PYTHONPATH, registered here.
"""

import argparse
import gc
import itertools
import json
import logging
import os
import random
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

BACKEND = "FLASH_ATTN_SM120"
# One process: engines come and go without importing vLLM anew, and its log lines can be read here.
ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_USE_FLASHINFER_SAMPLER": "0",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
}
VOCABULARY, REQUESTS, NEW_TOKENS, LONGEST = 1024, 32, 64, 1500
GAP = 1e-2  # between the top two logits, above which tokens are to agree
ENOUGH = 0.99
SIZES = [1, 2, 4, 8, 16, 24, 32, 48, 64]  # tokens of the batches that graphs are captured for
RUNNERS = {"llama": (1, 2), "qwen3": (1, 2), "gemma3": (1,), "gpt_oss": (1,)}  # those that vLLM 0.24 has for a model
MODES: dict[str, dict[str, Any]] = {
    "eager": {"enforce_eager": True},
    "full": {"compilation_config": {"mode": 0, "cudagraph_mode": "FULL", "cudagraph_capture_sizes": SIZES}},
    "decode": {
        "compilation_config": {"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY", "cudagraph_capture_sizes": SIZES}
    },
    "compiled": {},
}


def configurations(experts_per_token: int) -> dict[str, Any]:
    """Of small models: head sizes 128, 64 and 256, windows, norms of q and k, sinks, 4 experts."""
    from transformers import Gemma3TextConfig, GptOssConfig, LlamaConfig, Qwen3Config

    common = {"vocab_size": VOCABULARY, "num_hidden_layers": 4, "max_position_embeddings": 4096, "dtype": "bfloat16"}
    common |= {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "tie_word_embeddings": False}
    return {
        "llama": LlamaConfig(
            hidden_size=1024, intermediate_size=2048, num_attention_heads=8, num_key_value_heads=2, **common
        ),
        "qwen3": Qwen3Config(
            hidden_size=512, intermediate_size=1024, num_attention_heads=8, num_key_value_heads=4, head_dim=64, **common
        ),
        "gemma3": Gemma3TextConfig(
            hidden_size=512, intermediate_size=1024, num_attention_heads=4, num_key_value_heads=2, head_dim=256,
            sliding_window=128, layer_types=["sliding_attention", "sliding_attention", "full_attention"] * 2,
            **common | {"num_hidden_layers": 6},
        ),
        "gpt_oss": GptOssConfig(
            hidden_size=512, intermediate_size=512, num_attention_heads=16, num_key_value_heads=2, head_dim=64,
            num_local_experts=4, num_experts_per_tok=experts_per_token, sliding_window=128, **common,
        ),
    }  # fmt: skip


def write_model(name: str, folder: Path, query_scale: float, experts_per_token: int) -> Path:
    """Random weights as transformers draws them; queries query_scale times as large, and sinks that count."""
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM

    torch.manual_seed(7)
    model = AutoModelForCausalLM.from_config(configurations(experts_per_token)[name], dtype=torch.bfloat16)
    tensors = {}
    for key, weight in model.state_dict().items():
        if "q_proj.weight" in key:
            weight *= query_scale
        elif "sinks" in key:
            weight.normal_()
        # vLLM 0.24 looks for gpt-oss's 16-bit experts under a name of its own.
        tensors[key.replace(".mlp.experts.", ".mlp.experts.routed_experts.")] = weight.contiguous()
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(folder / name)
    save_file(tensors, folder / name / "model.safetensors", metadata={"format": "pt"})
    return folder / name


def prompts() -> list[list[int]]:
    """Of mixed lengths; a third of the requests begin alike."""
    draw = random.Random(11)
    shared = [draw.randrange(3, VOCABULARY) for _ in range(200)]
    lengths = [1, 2, 15, 16, 17, 511, 512, 513, LONGEST]
    lengths += [draw.randint(1, LONGEST if place % 4 == 0 else 300) for place in range(REQUESTS - len(lengths))]
    drawn = [[draw.randrange(3, VOCABULARY) for _ in range(length)] for length in lengths]
    return [shared + own if place % 3 == 0 and len(own) < 1000 else own for place, own in enumerate(drawn)]


@dataclass
class Answer:
    """Of one request. tokens: as generated. best: the likeliest at each place. gaps: between the top two logits."""

    tokens: list[int]
    best: list[int]
    gaps: list[float]


class Log(logging.Handler):
    """Lines in which vLLM names the backend; one for engines that choose alike."""

    def __init__(self, backends: list[str]) -> None:
        super().__init__()
        self.backends = backends
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        line = record.getMessage()
        if any(name in line for name in self.backends) and line.startswith("Using"):
            self.lines.append(line)


def leader() -> type:
    """A logits processor that allows, at each place, the token that a request's parameters name."""
    from vllm.v1.sample.logits_processor import AdapterLogitsProcessor

    class Leader(AdapterLogitsProcessor):
        @classmethod
        def validate_params(cls, params: Any) -> None:
            pass

        def is_argmax_invariant(self) -> bool:
            return False

        def new_req_logits_processor(self, params: Any) -> Any:
            tokens = (params.extra_args or {}).get("lead")
            if tokens is None:
                return None

            def lead(output: list[int], logits: torch.Tensor) -> torch.Tensor:
                only = torch.full_like(logits, -torch.inf)
                only[tokens[len(output)]] = 0
                return only

            return lead

    return Leader


class Engine:
    """A vLLM with one backend."""

    def __init__(self, model: Path, backend: str, mode: str, kv: str, runner: int = 1) -> None:
        """runner: 1 or 2, which of vLLM's model runners; processors of logits make it the first."""
        from vllm import LLM

        self.llm = LLM(
            model=str(model),
            skip_tokenizer_init=True,
            dtype="bfloat16",
            kv_cache_dtype=kv,
            attention_backend=backend,
            max_model_len=2048,
            max_num_seqs=REQUESTS,
            max_num_batched_tokens=512,
            enable_chunked_prefill=True,
            enable_prefix_caching=True,
            num_gpu_blocks_override=4096,
            gpu_memory_utilization=0.3,
            async_scheduling=False,
            logits_processors=[leader()] if runner == 1 else None,
            seed=0,
            **MODES[mode],
        )

    def backends(self) -> str:
        """Of its layers."""
        (names,) = self.llm.apply_model(
            lambda model: {layer.backend.name for layer in model.modules() if hasattr(layer, "attn_backend")}
        )
        return ", ".join(sorted(names))

    def generate(self, lead: list[Answer] | None = None) -> list[Answer]:
        from vllm import SamplingParams

        params = [
            SamplingParams(
                temperature=0.0,
                max_tokens=NEW_TOKENS,
                ignore_eos=True,
                logprobs=2,
                detokenize=False,
                extra_args=None if lead is None else {"lead": lead[place].tokens},
            )
            for place in range(REQUESTS)
        ]
        inputs = [{"prompt_token_ids": tokens} for tokens in prompts()]
        return [answer(result.outputs[0]) for result in self.llm.generate(inputs, params, use_tqdm=False)]

    def close(self) -> None:
        from vllm.distributed import cleanup_dist_env_and_memory

        self.llm.llm_engine.engine_core.shutdown()
        del self.llm
        cleanup_dist_env_and_memory()
        gc.collect()
        torch.cuda.empty_cache()


def answer(output: Any) -> Answer:
    best, gaps = [], []
    for place in output.logprobs:
        ranked = sorted(((entry.logprob, token) for token, entry in place.items()), reverse=True)
        best.append(ranked[0][1])
        gaps.append(ranked[0][0] - ranked[1][0])
    return Answer(list(output.token_ids), best, gaps)


@dataclass
class Row:
    """Agreement of one engine with the reference. compared: positions whose gap is wide enough; agreed: of these.
    backend: as asked for; backends: as the layers have it."""

    model: str
    kv: str
    mode: str
    runner: int
    round: int
    way: str
    positions: int
    compared: int
    agreed: int
    backend: str
    backends: str

    @property
    def share(self) -> float:
        return self.agreed / self.compared if self.compared else 0.0


def compare(reference: list[Answer], ours: list[Answer], way: str) -> tuple[int, int, int]:
    """(positions, compared, agreed): up to each request's first difference where both ran freely, else all."""
    positions = compared = agreed = 0
    for one, other in zip(reference, ours, strict=True):
        chosen = other.tokens if way == "free" else other.best
        for token, gap, mine in zip(one.tokens, one.gaps, chosen, strict=True):
            positions += 1
            if gap > GAP:
                compared += 1
                agreed += token == mine
            if way == "free" and token != mine:
                break
    return positions, compared, agreed


def same_queries() -> None:
    """TRITON_ATTN rounds queries to float8 beside a float8 cache, which FLASH_ATTN_SM120 doesn't: here neither does."""
    from vllm.v1.attention.backends.triton_attn import TritonAttentionImpl

    made = TritonAttentionImpl.__init__

    def make(self: Any, *arguments: Any, **named: Any) -> None:
        made(self, *arguments, **named)
        self.supports_quant_query_input = False

    TritonAttentionImpl.__init__ = make


@contextmanager
def in_float32() -> Iterator[None]:
    """Attention of FLASH_ATTN_SM120's layers is this package's reference."""
    from flash_attn_sm120 import reference
    from flash_attn_sm120.integrations import vllm_backend

    def attend(
        q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cu_seqlens_q: torch.Tensor, cu_seqlens_k: None,
        max_seqlen_q: int, max_seqlen_k: int, *, out: torch.Tensor, **options: Any,
    ) -> None:  # fmt: skip
        out.copy_(reference.attention(q, k, v, cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k, **options)[0])

    own, vllm_backend.flash_attn_varlen_func = vllm_backend.flash_attn_varlen_func, attend
    try:
        yield
    finally:
        vllm_backend.flash_attn_varlen_func = own


def answers_of(name: str, path: Path, kv: str) -> list[Answer]:
    """Of the reference."""
    exact = name == "float32"
    with in_float32() if exact else nullcontext():
        engine = Engine(path, BACKEND if exact else name, "eager", kv)
        found = engine.generate()
        engine.close()
    return found


def run(model: str, path: Path, kv: str, options: argparse.Namespace) -> list[Row]:
    reference = answers_of(options.reference, path, kv)
    rows = []
    runners = [runner for runner in RUNNERS[model] if runner in options.runners]
    for backend, mode, runner in itertools.product(options.backends, options.modes, runners):
        engine = Engine(path, backend, mode, kv, runner)
        for turn, way in itertools.product((1, 2), ("free", "led") if runner == 1 else ("free",)):
            ours = engine.generate(reference if way == "led" else None)
            counts = compare(reference, ours, way)
            rows.append(Row(model, kv, mode, runner, turn, way, *counts, backend, engine.backends()))
            print(line_of(rows[-1]), flush=True)
        engine.close()
    return rows


def line_of(row: Row) -> str:
    return (
        f"{row.backend:16} {row.model:8} {row.kv:5} {row.mode:8} runner {row.runner} round {row.round} {row.way:5}"
        f"{row.positions:6} positions {row.compared:6} compared {100 * row.share:7.2f}% agree"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = ("llama", "qwen3", "gemma3", "gpt_oss")
    parser.add_argument("--models", nargs="+", default=names, choices=names)
    parser.add_argument("--modes", nargs="+", default=("eager", "full", "decode"), choices=list(MODES))
    parser.add_argument("--kv", nargs="+", default=("auto", "fp8"), help="dtypes of the cache")
    parser.add_argument("--reference", default="TRITON_ATTN", help="the backend that is compared with")
    parser.add_argument("--backends", nargs="+", default=[BACKEND], help="those that are compared")
    parser.add_argument("--query-scale", type=float, default=1.0, help="queries, times those of a fresh model")
    parser.add_argument("--experts-per-token", type=int, default=4, choices=(1, 2, 3, 4), help="of gpt-oss's 4")
    parser.add_argument("--runners", nargs="+", type=int, default=[1, 2], help="vLLM's model runners")
    parser.add_argument("--json", type=Path, help="where the table goes, too")
    options = parser.parse_args()
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    import vllm

    from flash_attn_sm120.integrations.vllm import register

    register()
    same_queries()
    log = Log(options.backends)
    logging.getLogger("vllm").addHandler(log)
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as folder:
        for model in options.models:
            path = write_model(model, Path(folder), options.query_scale, options.experts_per_token)
            for kv in options.kv:
                rows += run(model, path, kv, options)
                if options.json:
                    about = {"vllm": vllm.__version__, "torch": torch.__version__, "gpu": torch.cuda.get_device_name()}
                    about |= {
                        "reference": options.reference,
                        "backends": options.backends,
                        "query_scale": options.query_scale,
                        "experts_per_token": options.experts_per_token,
                        "gap": GAP,
                        "log": sorted(set(log.lines)),
                    }
                    table = [asdict(row) | {"share": row.share} for row in rows]
                    options.json.write_text(json.dumps(about | {"rows": table}, indent=1) + "\n")
    print("\n".join(map(line_of, rows)))
    wrong = [row for row in rows if row.share < ENOUGH or row.backends != row.backend]
    print("\n".join(sorted(set(log.lines))), f"{len(rows) - len(wrong)} of {len(rows)} as they should be", sep="\n")
    sys.exit(bool(wrong) or not log.lines)


if __name__ == "__main__":
    main()
