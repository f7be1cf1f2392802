"""The variants that wheels bring compiled: what the attention of known models asks for, in prefill and decode."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from flash_attn_sm120.problem import AttentionProblem

PAGE = 16  # rows of a page, vLLM's own choice
PACKED = {"packed_q": True, "packed_k": True}
PADDED = {"seqused_k": True}  # batches with padding, and caches of a fixed size
PAGED = {"packed_q": True, "seqused_k": True, "page_size": PAGE}
SCALED = {"v_descale": True}  # of 8-bit pages; K's factor is a number, as vLLM's layers have it, or a tensor too


@dataclass(frozen=True)
class Shapes:
    """The attention of a model's layers, as far as it selects machine code; head counts and lengths don't.

    head_dim, head_dim_v: multiples of 8 up to 256, head_dim_v 0 for that of q.
    masks: "full"; "causal"; "local" for layers with a sliding window. dtypes: "bfloat16", "float16".
    kv_dtypes: of pages that hold "float8_e4m3fn" or "float8_e5m2"; 16-bit pages are always among the problems.
    sink: dtype of learnable_sink, "" without. softcap: scores are capped. page_size: rows of a page.
    """

    head_dim: int
    head_dim_v: int = 0
    masks: tuple[str, ...] = ("causal",)
    dtypes: tuple[str, ...] = ("bfloat16",)
    kv_dtypes: tuple[str, ...] = ()
    sink: str = ""
    softcap: bool = False
    page_size: int = PAGE

    def problems(self) -> list[AttentionProblem]:
        """Prefill and decode, whole and split, of dense, padded, packed and paged calls without lse."""
        paged = PAGED | {"page_size": self.page_size}
        found = []
        for mask in self.masks:
            options = {"mask": mask, "sink": self.sink, "softcap": self.softcap}
            for dtype in self.dtypes:
                ways: list[dict[str, Any]] = [{}, PADDED, PACKED, paged]
                ways += [way | self._decode(split) for way in ({}, PADDED, paged) for split in (False, True)]
                found += [self._problem(dtype, options | way) for way in ways]
            for kv_dtype in self.kv_dtypes:
                for k_descale in (False, True):
                    stored = paged | SCALED | {"kv_dtype": kv_dtype, "k_descale": k_descale}
                    ways = [stored, stored | self._decode(False), stored | self._decode(True)]
                    found += [self._problem(self.dtypes[0], options | way) for way in ways]
        return found

    def _decode(self, split: bool) -> dict[str, bool]:
        return {"decode": True, "split": split}

    def _problem(self, dtype: str, options: dict[str, Any]) -> AttentionProblem:
        return AttentionProblem(dtype, self.head_dim, self.head_dim_v or self.head_dim, **options)


BOTH, E4M3 = ("bfloat16", "float16"), ("float8_e4m3fn",)
MODELS = {
    "Llama 3, Qwen3": Shapes(128, dtypes=BOTH, kv_dtypes=E4M3),
    "Mistral": Shapes(128, masks=("causal", "local"), dtypes=BOTH, kv_dtypes=E4M3),
    "Llama 3.2 1B": Shapes(64, dtypes=BOTH, kv_dtypes=E4M3),
    "gpt-oss": Shapes(64, masks=("causal", "local"), kv_dtypes=E4M3, sink="bfloat16"),
    "Gemma 3": Shapes(256, masks=("causal", "local"), kv_dtypes=E4M3),
    "Gemma 3 27B": Shapes(128, masks=("causal", "local"), kv_dtypes=E4M3),
    "DeepSeek-V2-Lite": Shapes(192, 128, kv_dtypes=E4M3),
}


def shipped_variants() -> list[AttentionProblem]:
    """Each once."""
    return list(dict.fromkeys(problem for shapes in MODELS.values() for problem in shapes.problems()))
