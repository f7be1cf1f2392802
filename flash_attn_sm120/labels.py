"""A problem in a few words, for people."""

from __future__ import annotations

from flash_attn_sm120.problem import AttentionProblem, ClassifyProblem, CombineProblem

SHORT = {
    "bfloat16": "bf16",
    "float16": "fp16",
    "float32": "fp32",
    "float8_e4m3fn": "e4m3",
    "float8_e5m2": "e5m2",
}


def label(problem: AttentionProblem | CombineProblem | ClassifyProblem) -> str:
    """Such as `bf16 192/128 causal packed lse`."""
    if isinstance(problem, CombineProblem):
        words = [
            "combine",
            SHORT[problem.dtype],
            str(problem.head_dim_v),
            problem.sink and f"{SHORT[problem.sink]} sink",
        ]
        words += [name for name in ("packed", "cu_seqlens", "seqused", "lse") if getattr(problem, name)]
        return " ".join(filter(None, words))
    if isinstance(problem, ClassifyProblem):
        return "classify blocks {}x{}".format(*problem.block_size)
    words = [SHORT[problem.dtype], f"{problem.head_dim}/{problem.head_dim_v}", problem.mask]
    words.append("split decode" if problem.split else "decode" if problem.decode else "")
    packed = {(True, True): "packed", (True, False): "packed q", (False, True): "packed k"}
    words.append(packed.get((problem.packed_q, problem.packed_k), ""))
    words.append(f"pages of {problem.page_size}" if problem.paged else "")
    words.append(problem.kv_dtype and f"{SHORT[problem.kv_dtype]} KV")
    words.append(problem.sink and f"{SHORT[problem.sink]} sink")
    flags = ("seqused_q", "seqused_k", "softcap", "alibi", "chunked", "context_parallel", "k_descale", "v_descale")
    words += [name for name in (*flags, "dropout", "score_mod", "mask_mod", "lse") if getattr(problem, name)]
    words.append("blocks {}x{}".format(*problem.sparse_block) if problem.block_sparse else "")
    words.append("two groups" if problem.dual_group else "")
    words.append("padded" if problem.padded_lse else "")
    words.append("" if problem.tma_strides else "repeated rows")
    return " ".join(filter(None, words))
