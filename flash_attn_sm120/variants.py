"""What `compile`, the demo and the tests build: one problem for each way in which the machine code can differ.

Pure Python, but for changed_variants, whose mods are CuTe DSL's.
"""

from __future__ import annotations

from flash_attn_sm120.problem import DTYPES, FP8_DTYPES, MASKS, AttentionProblem

HEAD_DIMS = ((64, 64), (80, 80), (96, 96), (128, 128), (192, 128), (192, 192), (256, 256))


def variants() -> list[AttentionProblem]:
    """What `compile`, the demo and the tests build: one problem for each way in which the machine code can differ."""
    problems = []
    packed = {"packed_q": True, "packed_k": True}
    for head_dim, head_dim_v in HEAD_DIMS:
        for mask in MASKS:
            problems.append(AttentionProblem("bfloat16", head_dim, head_dim_v, mask=mask, lse=True))
        problems.append(AttentionProblem("bfloat16", head_dim, head_dim_v, mask="causal", lse=True, **packed))
    for mask in MASKS:
        problems.append(AttentionProblem("float16", 128, 128, mask=mask))
        problems.append(AttentionProblem("bfloat16", 128, 128, mask=mask, softcap=True, lse=True))
        problems.append(AttentionProblem("float16", 128, 128, mask=mask, lse=True, tma_strides=False))
        problems.append(AttentionProblem("bfloat16", 128, 128, mask=mask, softcap=True, tma_strides=False))
        problems.append(AttentionProblem("bfloat16", 128, 128, mask=mask, **packed))
        problems.append(AttentionProblem("float16", 128, 128, mask=mask, lse=True, seqused_q=True, seqused_k=True))
        problems.append(AttentionProblem("bfloat16", 128, 128, mask=mask, packed_q=True, seqused_k=True, lse=True))
    problems.append(AttentionProblem("bfloat16", 256, 256, mask="local", softcap=True, lse=True))
    problems.append(AttentionProblem("bfloat16", 40, 72, mask="causal", lse=True))
    problems.append(AttentionProblem("float16", 8, 256, lse=True))
    problems.append(AttentionProblem("float16", 32, 192, mask="causal", lse=True))
    problems += serving_variants()
    return list(dict.fromkeys(problems))


def serving_variants() -> list[AttentionProblem]:
    """Those of a server's prefill: pages, 8-bit keys, and what changes scores."""
    paged = {"page_size": 16, "seqused_k": True, "lse": True}
    problems = [AttentionProblem("bfloat16", *dims, mask="causal", packed_q=True, **paged) for dims in HEAD_DIMS]
    ways = [
        {},
        {"page_size": 8, "mask": "local", "softcap": True},
        {"page_size": 48, "seqused_q": True, "mask": "causal", "sink": "bfloat16"},
        {"page_size": 784, "packed_q": True, "seqused_q": True, "lse": False, "sink": "float32"},
        {"page_size": 64, "mask": "causal", "alibi": True},
        {"mask": "causal", "softcap": True, "alibi": True, "k_descale": True, "v_descale": True},
        {"mask": "causal", "chunked": True},
        {"mask": "local", "chunked": True, "context_parallel": True},
        {"mask": "causal", "context_parallel": True, "alibi": True},
        {"page_size": 0, "mask": "causal", "kv_dtype": FP8_DTYPES[0]},
    ]
    problems += [AttentionProblem("float16", 128, 128, **paged | way) for way in ways]
    scales = {"k_descale": True, "v_descale": True}
    for kv_dtype in FP8_DTYPES:
        for dtype in DTYPES:
            way = {"kv_dtype": kv_dtype, "mask": "causal", "packed_q": True} | scales
            problems.append(AttentionProblem(dtype, 128, 128, **paged | way))
        way = {"kv_dtype": kv_dtype, "mask": "causal", "packed_q": True, "v_descale": True}
        problems.append(AttentionProblem(DTYPES[len(problems) % 2], 128, 128, **paged | way))
    for head_dim, head_dim_v in HEAD_DIMS:
        way = {"kv_dtype": FP8_DTYPES[0], "mask": "full", "page_size": 32}
        problems.append(AttentionProblem("bfloat16", head_dim, head_dim_v, **paged | way))
    way = {"kv_dtype": FP8_DTYPES[1], "mask": "local", "softcap": True, "alibi": True, "sink": "float32"}
    problems.append(AttentionProblem("bfloat16", 128, 128, **paged | way | scales))
    return problems


def decode_variants() -> list[AttentionProblem]:
    """variants() of the decode kernel, whole and split: launched with partials, they have no place in variants()."""
    paged = {"page_size": 16, "seqused_k": True}
    shapes = [("bfloat16", d, dv, {**paged, "mask": "causal", "lse": True}) for d, dv in HEAD_DIMS]
    plain = [
        {},
        {"packed_q": True, "packed_k": True, "mask": "causal"},
        {"seqused_k": True, "mask": "local", "softcap": True},
        {"packed_q": True, "seqused_q": True, **paged, "mask": "local", "lse": True},
        {**paged, "page_size": 8, "sink": "float32", "mask": "causal"},
        {**paged, "page_size": 784, "sink": "bfloat16", "alibi": True, "lse": True},
        {**paged, "mask": "causal", "chunked": True},
        {**paged, "mask": "causal", "context_parallel": True, "lse": True},
    ]
    shapes += [("float16", 128, 128, options) for options in plain]
    scales = {"k_descale": True, "v_descale": True}
    for kv_dtype in FP8_DTYPES:
        options = {**paged, **scales, "kv_dtype": kv_dtype, "mask": "causal", "lse": True}
        shapes += [(dtype, d, d, options) for dtype in DTYPES for d in (64, 128, 256)]
    shapes.append(("bfloat16", 192, 128, {**paged, "kv_dtype": FP8_DTYPES[0], "mask": "local", "softcap": True}))
    problems = [
        AttentionProblem(dtype, d, dv, decode=True, split=split, **options)
        for dtype, d, dv, options in shapes
        for split in (False, True)
    ]
    return list(dict.fromkeys(problems))


def changed_variants() -> list[AttentionProblem]:
    """variants() with dropout, mods and lists of blocks, alone and together."""
    from flash_attn_sm120 import mods
    from flash_attn_sm120.mod_key import mod_of

    packed, paged = {"packed_q": True, "packed_k": True}, {"page_size": 16, "seqused_k": True}
    alibi = {"score_mod": mod_of("score_mod", mods.alibi(vec_size=2)), "aux": (("float32", 1),)}
    softcap = {"score_mod": mod_of("score_mod", mods.softcap(3.0))}
    document = {"mask_mod": mod_of("mask_mod", mods.document()), "aux": (("int32", 2),)}
    dense = {"mask_mod": mod_of("mask_mod", mods.dense()), "aux": (("bool", 4),)}
    dense_after_alibi = alibi | {
        "mask_mod": mod_of("mask_mod", mods.dense(aux=1)),
        "aux": (("float32", 1), ("bool", 4)),
    }
    drop, lists = {"dropout": True}, {"sparse_block": (128, 128)} | dense
    ways = [
        *({"head_dims": dims} | drop for dims in HEAD_DIMS),
        {"mask": "causal"} | drop,
        {"mask": "local", "softcap": True} | drop | packed,
        {"mask": "causal", "packed_q": True} | drop | paged,
        {"mask": "causal", "kv_dtype": FP8_DTYPES[0]} | drop | paged,
        {"mask": "causal", "tma_strides": False, "alibi": True, "sink": "float32"} | drop,
        *({"head_dims": (d, d)} | alibi for d in (64, 128, 256)),
        {"mask": "causal"} | alibi | packed,
        {"mask": "causal"} | softcap | paged,
        {"mask": "local", "kv_dtype": FP8_DTYPES[1]} | softcap | paged,
        document,
        {"mask": "causal", "softcap": True, "packed_q": True} | document | paged,
        *({"head_dims": (d, d)} | lists for d in (64, 128, 192, 256)),
        *({"head_dims": (d, d)} | lists | {"sparse_block": (64, 32)} for d in (64, 128, 192, 256)),
        {"sparse_block": (256, 64)},
        {"sparse_block": (192, 192), "mask": "causal"},
        {"mask": "local", "sink": "float32"} | lists | packed,
        {"mask": "causal", "packed_q": True} | lists | paged,
        dense_after_alibi | drop | {"sparse_block": (128, 64), "mask": "causal"},
    ]
    problems = []
    for i, way in enumerate(ways):
        dims = way.pop("head_dims", (128, 128))
        problems.append(AttentionProblem(DTYPES[i % 2], *dims, lse=i % 3 > 0, **way))
    return problems


def dual_group_variants() -> list[AttentionProblem]:
    """variants() of two query groups."""
    own = {"packed_q": True, "packed_k": True, "lse": True, "dual_group": True}
    ways = [
        ("bfloat16", 64, 64, {"mask": "causal"}),
        ("bfloat16", 96, 96, {"mask": "local", "softcap": True, "sink": "float32", "padded_lse": True}),
        ("float16", 128, 128, {"mask": "causal", "seqused_k": True}),
        ("bfloat16", 128, 128, {"mask": "local"}),
        ("bfloat16", 192, 128, {"mask": "full", "padded_lse": True, "sink": "bfloat16"}),
        ("bfloat16", 256, 256, {"mask": "local", "softcap": True}),
    ]
    return [AttentionProblem(*dims, **own | options) for *dims, options in ways]
