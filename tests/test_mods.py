"""Ready-made mods, at every place: the compiled function in the simulator and its twin in PyTorch, against the formula
written for one place in plain Python."""

import functools
import itertools
import math
import subprocess
import sys

import pytest
import torch

pytest.importorskip("cutlass")
import mod_kernel
from cutlass import Float32, cute
from mod_kernel import Info

from flash_attn_sm120 import mods
from flash_attn_sm120.mod_key import mod_of
from flash_attn_sm120.problem import AttentionProblem

BATCH, HEADS, TOTAL = 2, 3, 200
# Rows and columns: more of either, one of each, more columns than a warp's vectors of eight; offsets of a packed batch.
SIZES = [Info(5, 37, 11, 40), Info(9, 4, 3, 7), Info(1, 1, 0, 0), Info(3, 150, 0, 50)]
VEC_SIZES = [1, 2, 4, 8]


def ids(*shape):
    return torch.randint(0, 3, shape, dtype=torch.int32)


# name: (make(vec_size), aux(info), formula). A score mod's formula is (score, b, h, i, j, info, aux) with i the row's
# position, a mask mod's the same without the score.
SCORES = {
    "alibi": (
        lambda n: mods.alibi(vec_size=n),
        lambda info: [torch.rand(HEADS)],
        lambda s, b, h, i, j, info, aux: s - aux[0][h] * abs(i - j),
    ),
    "alibi a batch entry": (
        lambda n: mods.alibi(per_batch=True, aux=1, vec_size=n),
        lambda info: [torch.ones(1), torch.rand(HEADS, BATCH).T],
        lambda s, b, h, i, j, info, aux: s - aux[1][b, h] * abs(i - j),
    ),
    "relative_bias": (
        lambda n: mods.relative_bias(vec_size=n),
        lambda info: [torch.randn(HEADS, 13)],
        lambda s, b, h, i, j, info, aux: s + aux[0][h, max(-6, min(6, j - i)) + 6],
    ),
    "relative_bias in float16": (
        lambda n: mods.relative_bias(vec_size=n),
        lambda info: [torch.randn(HEADS, 6).half()[:, ::2]],
        lambda s, b, h, i, j, info, aux: s + aux[0][h, max(-1, min(1, j - i)) + 1],
    ),
    "softcap": (
        lambda n: mods.softcap(2.5, vec_size=n),
        lambda info: [],
        lambda s, b, h, i, j, info, aux: 2.5 * math.tanh(s / 2.5),
    ),
}
MASKS = {
    "causal": (lambda n: mods.causal(vec_size=n), lambda info: [], lambda b, h, i, j, info, aux: j <= i),
    "sliding_window": (
        lambda n: mods.sliding_window(3, 2, vec_size=n),
        lambda info: [],
        lambda b, h, i, j, info, aux: i - 3 <= j <= i + 2,
    ),
    "sliding_window, left": (
        lambda n: mods.sliding_window(4, None, vec_size=n),
        lambda info: [],
        lambda b, h, i, j, info, aux: i - 4 <= j,
    ),
    "sliding_window, right": (
        lambda n: mods.sliding_window(None, 1, vec_size=n),
        lambda info: [],
        lambda b, h, i, j, info, aux: j <= i + 1,
    ),
    "prefix_lm": (
        lambda n: mods.prefix_lm(vec_size=n),
        lambda info: [35],
        lambda b, h, i, j, info, aux: j < 35 or j <= i,
    ),
    "prefix_lm a batch entry": (
        lambda n: mods.prefix_lm(per_batch=True, vec_size=n),
        lambda info: [torch.tensor([3, 36], dtype=torch.int32)],
        lambda b, h, i, j, info, aux: j < aux[0][b] or j <= i,
    ),
    "document": (
        lambda n: mods.document(vec_size=n),
        lambda info: [ids(BATCH, info.seqlen_k)],
        lambda b, h, i, j, info, aux: i >= 0 and aux[0][b, i] == aux[0][b, j],
    ),
    "document, packed": (
        lambda n: mods.document(packed=True, vec_size=n),
        lambda info: [ids(TOTAL)],
        lambda b, h, i, j, info, aux: i >= 0 and aux[0][info.offset_k + i] == aux[0][info.offset_k + j],
    ),
    "dilated": (lambda n: mods.dilated(3, vec_size=n), lambda info: [], lambda b, h, i, j, info, aux: (i - j) % 3 == 0),
    "dilated, of two": (
        lambda n: mods.dilated(2, vec_size=n),
        lambda info: [],
        lambda b, h, i, j, info, aux: (i - j) % 2 == 0,
    ),
    "dense": (
        lambda n: mods.dense(vec_size=n),
        lambda info: [torch.rand(BATCH, HEADS, *info[:2]) < 0.5],
        lambda b, h, i, j, info, aux: aux[0][b, h, i - info.seqlen_k + info.seqlen_q, j],
    ),
    "dense, of bytes": (
        lambda n: mods.dense(aux=1, vec_size=n),
        lambda info: [torch.ones(1), torch.randint(0, 2, (1, HEADS, *info[:2]), dtype=torch.uint8) * 3],
        lambda b, h, i, j, info, aux: aux[1][0, h, i - info.seqlen_k + info.seqlen_q, j] != 0,
    ),
    "dense, of all heads": (
        lambda n: mods.dense(vec_size=n),
        lambda info: [torch.rand(BATCH, 1, info[1], info[0]).transpose(2, 3) < 0.5],
        lambda b, h, i, j, info, aux: aux[0][b, 0, i - info.seqlen_k + info.seqlen_q, j],
    ),
    "both": (
        lambda n: mods.both(mods.causal(vec_size=n), mods.document(vec_size=n)),
        lambda info: [ids(BATCH, info.seqlen_k)],
        lambda b, h, i, j, info, aux: j <= i and i >= 0 and aux[0][b, i] == aux[0][b, j],
    ),
    "either of both": (
        lambda n: mods.either(
            mods.both(mods.dilated(4, vec_size=n), mods.causal(vec_size=n)), mods.sliding_window(0, 2, vec_size=n)
        ),
        lambda info: [],
        lambda b, h, i, j, info, aux: (j <= i and (i - j) % 4 == 0) or i <= j <= i + 2,
    ),
}
CASES = {**SCORES, **MASKS}


@functools.cache
def artifact(name, vec_size, folder):
    make, aux, _ = CASES[name]
    return mod_kernel.compiled(make(vec_size), name in SCORES, aux(SIZES[0]), folder)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("mods")


def plainly(name, info, aux, scores):
    """The formula at every place."""
    shape = (BATCH, HEADS, info.seqlen_q, info.seqlen_k)
    shift, formula, out = info.seqlen_k - info.seqlen_q, CASES[name][2], torch.empty(shape)
    for b, h, i, j in itertools.product(*map(range, shape)):
        score = () if scores is None else (scores[b, h, i, j],)
        out[b, h, i, j] = float(formula(*score, b, h, i + shift, j, info, aux))
    return out


@pytest.mark.parametrize("info", SIZES, ids=lambda info: f"{info.seqlen_q}x{info.seqlen_k}")
@pytest.mark.parametrize("name", CASES)
def test_everywhere(name, info, folder):
    aux = CASES[name][1](info)
    shape = (BATCH, HEADS, info.seqlen_q, info.seqlen_k)
    scores = 4 * torch.randn(shape) if name in SCORES else None
    expected = plainly(name, info, aux, scores)
    tolerance = {"rtol": 1e-6, "atol": 3e-6} if scores is not None else {"rtol": 0, "atol": 0}
    twin = mod_kernel.in_torch(CASES[name][0](1), shape, info, aux, scores)
    torch.testing.assert_close(twin, expected, **tolerance)
    for vec_size in VEC_SIZES:
        result = mod_kernel.everywhere(artifact(name, vec_size, folder), shape, info, aux, scores)
        torch.testing.assert_close(result, expected, **tolerance)


@pytest.mark.parametrize("score", [0.0, -0.0, 1e-30, 1e30, -1e30, math.inf, -math.inf])
def test_softcap_of_any_score(score, folder):
    result = mod_kernel.everywhere(
        artifact("softcap", 2, folder), (1, 1, 1, 4), Info(1, 4), [], torch.full((1, 1, 1, 4), score)
    )
    torch.testing.assert_close(result, torch.full((1, 1, 1, 4), 2.5 * math.tanh(score / 2.5)), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", MASKS)
def test_no_columns_and_no_rows(name):
    """A twin may be called on a sequence without keys."""
    make, aux, _ = CASES[name]
    for info in (Info(4, 0), Info(0, 4)):
        shape = (BATCH, HEADS, info.seqlen_q, info.seqlen_k)
        assert mod_kernel.in_torch(make(1), shape, info, aux(info)).shape == shape


def test_vectors_share_what_they_need(folder):
    """A row's position and each pair of columns are converted once; nothing is multiplied that isn't added at once."""
    ptx = artifact("alibi", 4, folder).artifacts.PTX
    assert ptx.count("cvt.rn.f32.s32") == 3
    assert ptx.count("fma.rn.f32") == 4 and "mul.f32" not in ptx and "mul.rn.f32" not in ptx
    # A mask that is one comparison stays one; the row's end is counted once.
    ptx = artifact("prefix_lm", 8, folder).artifacts.PTX
    assert ptx.count("max.s32") == 1


def test_a_bias_is_that_of_the_function_itself():
    """Sums start with alibi's bias; a function made of it, or with its code alone, is called on scores."""
    alibi = mods.alibi()

    @functools.wraps(alibi)
    def doubled(*args):
        return alibi(*args) * 2.0

    copied = type(alibi)(alibi.__code__, alibi.__globals__, closure=alibi.__closure__)
    own, *others = (mod_of("score_mod", function) for function in (alibi, doubled, copied))
    assert len({mod.digest for mod in (own, *others)}) == 3
    made = {"dtype": "bfloat16", "head_dim": 128, "head_dim_v": 128, "aux": (("float32", 1),)}
    for mod, extra, biased in (
        (own, {}, True),
        *((mod, {}, False) for mod in others),
        (own, {"k_descale": True}, False),
    ):
        problem = AttentionProblem(score_mod=mod, **made, **extra)
        assert (problem.biased, problem.rescored) == (biased, not biased)


# What can be chosen, each choice different from the first.
CHOICES = {
    mods.alibi: [{}, {"per_batch": True}, {"aux": 1}],
    mods.relative_bias: [{}, {"aux": 1}],
    mods.softcap: [{"cap": 30.0}, {"cap": 31.0}],
    mods.causal: [{}],
    mods.sliding_window: [{"left": 4, "right": 0}, {"left": 0, "right": 4}, {"left": 4, "right": None}],
    mods.prefix_lm: [{}, {"per_batch": True}, {"aux": 1}],
    mods.document: [{}, {"packed": True}, {"aux": 1}],
    mods.dilated: [{"step": 2}, {"step": 3}],
    mods.dense: [{}, {"aux": 1}],
}


@pytest.mark.parametrize("make", CHOICES)
def test_digests(make):
    first, *others = CHOICES[make]
    known = mod_of("mod", make(**first))
    assert known == mod_of("mod", make(**first))
    for other in [*others, {**first, "vec_size": 2}]:
        assert mod_of("mod", make(**other)) != known
    assert mod_of("mod", make(**first, vec_size=4)).width == 4


def test_digests_of_joined_mods():
    def digest(join, *kinds):
        return mod_of("mask_mod", join(*kinds)).digest

    causal, window, other = mods.causal(), mods.sliding_window(3, 0), mods.sliding_window(4, 0)
    known = digest(mods.both, causal, window)
    assert known == digest(mods.both, mods.causal(), mods.sliding_window(3, 0))
    assert known != digest(mods.either, causal, window) and known != digest(mods.both, causal, other)
    assert digest(mods.both, mods.both(causal, window), causal) != digest(mods.both, mods.both(causal, other), causal)


def test_all_mods_differ():
    made = {name: mod_of("mod", make(1)) for name, (make, _, _) in CASES.items()}
    same = {"relative_bias in float16", "dense, of all heads"}  # of other mods with other tensors
    assert len({mod for name, mod in made.items() if name not in same}) == len(made) - len(same)


@cute.jit
def doubled_below(score, batch, head, q_idx, kv_idx, seqlen_info, aux_tensors):
    if kv_idx[0] < q_idx[0]:
        score = score * Float32(2.0)
    return score


def test_under_cute_jit(folder):
    """A mod under cute.jit has its attributes, computes the same, and is the same to mod_of once it was compiled."""
    mod = cute.jit(mods.causal(vec_size=2))
    assert mod.__vec_size__ == 2 and mod.in_torch(0, 0, 5, 4, Info(8, 8), ()) is True
    info = Info(5, 37)
    result = mod_kernel.everywhere(mod_kernel.compiled(mod, False, [], folder), (1, 1, 5, 37), info, [])
    torch.testing.assert_close(result, plainly("causal", info, [], None)[:1, :1])

    before = mod_of("score_mod", doubled_below).digest
    code = doubled_below.__wrapped__.__code__
    compiled = mod_kernel.compiled(doubled_below, True, [], folder)
    assert doubled_below.__wrapped__.__code__ is not code
    assert mod_of("score_mod", doubled_below).digest == before
    assert (
        mod_of("score_mod", functools.partial(doubled_below)).digest
        == mod_of("score_mod", functools.partial(doubled_below)).digest
    )
    scores = torch.randn(1, 1, 5, 37)
    result = mod_kernel.everywhere(compiled, scores.shape, info, [], scores)
    assert torch.equal(result, torch.where(torch.arange(37) < torch.arange(5)[:, None], 2 * scores, scores))


def test_users_mods_join():
    """A mod without a twin gives one without; its width counts."""

    def own(batch, head, q_idx, kv_idx, seqlen_info, aux_tensors):
        return kv_idx != q_idx

    joined = mods.both(own, mods.causal())
    assert joined.__vec_size__ == 1 and not hasattr(joined, "in_torch")
    assert not hasattr(mods.either(mods.causal(), own), "in_torch")
    own.__vec_size__ = 2
    with pytest.raises(ValueError, match="second: expected a mod of vec_size 2 as first, got 1"):
        mods.both(own, mods.causal())
    with pytest.raises(TypeError, match="second: expected a mask mod, got str 'causal'"):
        mods.either(own, "causal")


@pytest.mark.parametrize(
    "make, kind, words",
    [
        (lambda: mods.softcap(0), ValueError, "cap: expected a finite number > 0, got"),
        (lambda: mods.softcap(math.inf), ValueError, "cap: expected a finite number > 0"),
        (lambda: mods.softcap("30"), TypeError, "cap: expected a finite number > 0, got str '30'"),
        (lambda: mods.sliding_window(-1, 0), ValueError, "left: expected an int >= 0, got -1"),
        (lambda: mods.sliding_window(0, 1.5), TypeError, "right: expected an int >= 0, got float 1.5"),
        (lambda: mods.sliding_window(True, 1), TypeError, "left: expected an int >= 0, got bool True"),
        (lambda: mods.sliding_window(None, None), ValueError, "left, right: expected at least one int"),
        (lambda: mods.dilated(0), ValueError, "step: expected an int >= 1, got 0"),
        (lambda: mods.alibi(aux=-1), ValueError, "aux: expected an int >= 0, got -1"),
        (lambda: mods.alibi(per_batch=1), TypeError, "per_batch: expected bool, got int 1"),
        (lambda: mods.document(packed=torch.ones(1)), TypeError, "packed: expected bool, got float32"),
        (lambda: mods.prefix_lm(per_batch=None), TypeError, "per_batch: expected bool, got None"),
        (lambda: mods.causal(vec_size=3), ValueError, r"vec_size: expected one of \(1, 2, 4, 8\), got int 3"),
        (lambda: mods.causal(vec_size=2.0), ValueError, "vec_size: expected one of"),
    ],
)
def test_wrong_arguments(make, kind, words):
    with pytest.raises(kind, match=words):
        make()


def test_public_names():
    assert set(mods.__all__) == {name for name in vars(mods) if callable(getattr(mods, name))}


def test_what_is_imported():
    """The package and mod_of load no cutlass."""
    for module in ("flash_attn_sm120", "flash_attn_sm120.mod_key"):
        code = f"import {module}, sys; sys.exit('cutlass' in sys.modules)"
        assert subprocess.run([sys.executable, "-c", code]).returncode == 0
