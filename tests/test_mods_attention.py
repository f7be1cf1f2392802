"""score_mod, mask_mod and what they read in the attention kernels, against the same in PyTorch."""

import math
from typing import NamedTuple

import pytest
import torch

pytest.importorskip("cutlass")
import cutlass
from cutlass import Boolean, Float32, Int32, cute
from oracle import assert_right, ints, marks, rand
from test_dropout import in_form

from flash_attn_sm120 import compile as compiler
from flash_attn_sm120 import flash_attn_func, flash_attn_varlen_func, mods

BF16, FP16 = torch.bfloat16, torch.float16


class Sizes(NamedTuple):
    batch: int
    heads: int
    seqlen_q: int
    seqlen_k: int
    device: torch.device


def with_twin(function, vec_size, in_torch=None):
    function.__vec_size__ = vec_size
    if in_torch is not None:
        function.in_torch = in_torch
    return function


# Mods as users write them: make(vec_size, t, s), t and s the places of the first tensor and the first number in aux.
def doubled(n, t, s):
    @cute.jit
    def score_mod(score, batch, head, q_idx, kv_idx, seqlen_info, aux_tensors):
        return score * 2.0

    return with_twin(score_mod, n, lambda score, *rest: score * 2.0)


def distance(n, t, s):
    def score_mod(score, batch, head, q_idx, kv_idx, seqlen_info, aux_tensors):
        return score + (kv_idx - q_idx).to(Float32) * 0.03

    return with_twin(score_mod, n, lambda score, b, h, q, k, *rest: score + (k - q) * 0.03)


def head_scale(n, t, s):
    @cute.jit
    def score_mod(score, batch, head, q_idx, kv_idx, seqlen_info, aux_tensors):
        return score * Float32(aux_tensors[t][head[0]])

    return with_twin(score_mod, n, lambda score, b, h, q, k, info, aux: score * aux[t][h].float())


def column_bias(n, t, s):
    @cute.jit
    def score_mod(score, batch, head, q_idx, kv_idx, seqlen_info, aux_tensors):
        bias = cute.make_rmem_tensor((n,), Float32)
        for i in cutlass.range_constexpr(n):
            bias[i] = Float32(aux_tensors[t][batch[0], kv_idx[i]])
        return score + bias.load()

    return with_twin(score_mod, n, lambda score, b, h, q, k, info, aux: score + aux[t][b, k].float())


def place_bias(n, t, s):
    @cute.jit
    def score_mod(score, batch, head, q_idx, kv_idx, seqlen_info, aux_tensors):
        bias = cute.make_rmem_tensor((n,), Float32)
        for i in cutlass.range_constexpr(n):
            bias[i] = Float32(aux_tensors[t][head[0], q_idx[0], kv_idx[i]])
        return score + bias.load()

    return with_twin(score_mod, n, lambda score, b, h, q, k, info, aux: score + aux[t][h, q, k].float())


def even_columns(n, t, s):
    @cute.jit
    def score_mod(score, batch, head, q_idx, kv_idx, seqlen_info, aux_tensors):
        return cute.where(kv_idx % 2 == 0, score, score * 0.5)

    return with_twin(score_mod, n, lambda score, b, h, q, k, *rest: torch.where(k % 2 == 0, score, score * 0.5))


def line(n, t, s):
    def score_mod(score, batch, head, q_idx, kv_idx, seqlen_info, aux_tensors):
        return score * aux_tensors[s] + aux_tensors[s + 1] * (kv_idx % 3).to(Float32)

    def in_torch(score, batch, head, q_idx, kv_idx, seqlen_info, aux):
        return score * aux[s] + aux[s + 1] * (kv_idx % 3)

    return with_twin(score_mod, n, in_torch)


def striped(n, t, s):
    """Runs in PyTorch as it is."""

    def mask_mod(batch, head, q_idx, kv_idx, seqlen_info, aux_tensors):
        return ((kv_idx + head) % 2 == 0) | (kv_idx == q_idx)

    return with_twin(mask_mod, n)


def head_limit(n, t, s):
    @cute.jit
    def mask_mod(batch, head, q_idx, kv_idx, seqlen_info, aux_tensors):
        return kv_idx < Int32(aux_tensors[t][head[0]])

    return with_twin(mask_mod, n, lambda b, h, q, k, info, aux: k < aux[t][h])


def places(n, t, s):
    @cute.jit
    def mask_mod(batch, head, q_idx, kv_idx, seqlen_info, aux_tensors):
        keep = cute.make_rmem_tensor((n,), Boolean)
        for i in cutlass.range_constexpr(n):
            keep[i] = aux_tensors[t][batch[0], q_idx[0], kv_idx[i]] != 0
        return keep.load()

    return with_twin(mask_mod, n, lambda b, h, q, k, info, aux: aux[t][b, q, k] != 0)


def two_rows_of_three(n, t, s):
    """One Boolean for all columns; every third row sees nothing."""

    def mask_mod(batch, head, q_idx, kv_idx, seqlen_info, aux_tensors):
        return q_idx[0] % 3 != 0

    return with_twin(mask_mod, n, lambda b, h, q, k, info, aux: (q % 3 != 0) & (k >= 0))


def half_columns(n, t, s):
    @cute.jit
    def mask_mod(batch, head, q_idx, kv_idx, seqlen_info, aux_tensors):
        half = Int32(seqlen_info.seqlen_k) // 2 + aux_tensors[s]
        return kv_idx < half

    return with_twin(mask_mod, n, lambda b, h, q, k, info, aux: k < info.seqlen_k // 2 + aux[s])


def uniform(*shape, device):
    return torch.rand(shape, device=device)


def whole(low, high, shape, dtype, device):
    return torch.randint(low, high, shape, dtype=dtype, device=device)


# name: (make, tensors, numbers); tensors are as large as the sizes that they are read at, and no larger.
SCORES = {
    "alibi": (lambda n, t, s: mods.alibi(aux=t, vec_size=n), lambda z: [uniform(z.heads, device=z.device)], []),
    "alibi a batch entry": (
        lambda n, t, s: mods.alibi(per_batch=True, aux=t, vec_size=n),
        lambda z: [uniform(z.heads, z.batch, device=z.device).T],
        [],
    ),
    "relative_bias": (
        lambda n, t, s: mods.relative_bias(aux=t, vec_size=n),
        lambda z: [torch.randn(z.heads, 41, device=z.device)],
        [],
    ),
    "relative_bias in bfloat16": (
        lambda n, t, s: mods.relative_bias(aux=t + 1, vec_size=n),
        lambda z: [torch.zeros(1, device=z.device), torch.randn(z.heads, 9, device=z.device).to(BF16)],
        [],
    ),
    "softcap": (lambda n, t, s: mods.softcap(2.5, vec_size=n), lambda z: [], []),
    "high softcap": (lambda n, t, s: mods.softcap(30, vec_size=n), lambda z: [], []),
    "doubled": (doubled, lambda z: [], []),
    "distance": (distance, lambda z: [], []),
    "head_scale": (head_scale, lambda z: [torch.randn(z.heads, device=z.device).to(FP16)], []),
    "column_bias": (column_bias, lambda z: [torch.randn(z.batch, z.seqlen_k, device=z.device)], []),
    "place_bias": (
        place_bias, lambda z: [torch.randn(z.heads, z.seqlen_q, z.seqlen_k, device=z.device).to(BF16)], [],
    ),
    "column_bias of int64": (
        column_bias, lambda z: [whole(-2, 3, (z.batch, z.seqlen_k), torch.int64, z.device)], [],
    ),
    "even_columns": (even_columns, lambda z: [], []),
    "line": (line, lambda z: [], [0.5, -1]),
}  # fmt: skip
MASKS = {
    "causal": (lambda n, t, s: mods.causal(vec_size=n), lambda z: [], []),
    "sliding_window": (lambda n, t, s: mods.sliding_window(30, 3, vec_size=n), lambda z: [], []),
    "prefix_lm": (lambda n, t, s: mods.prefix_lm(aux=s, vec_size=n), lambda z: [], [30]),
    "prefix_lm a batch entry": (
        lambda n, t, s: mods.prefix_lm(per_batch=True, aux=t, vec_size=n),
        lambda z: [whole(0, z.seqlen_k, (z.batch,), torch.int32, z.device)],
        [],
    ),
    "document": (
        lambda n, t, s: mods.document(aux=t, vec_size=n),
        lambda z: [whole(0, 3, (z.batch, z.seqlen_k), torch.int32, z.device)],
        [],
    ),
    "dilated": (lambda n, t, s: mods.dilated(3, vec_size=n), lambda z: [], []),
    "dense": (
        lambda n, t, s: mods.dense(aux=t, vec_size=n),
        lambda z: [uniform(z.batch, z.heads, z.seqlen_q, z.seqlen_k, device=z.device) < 0.5],
        [],
    ),
    "dense, of bytes": (
        lambda n, t, s: mods.dense(aux=t, vec_size=n),
        lambda z: [whole(0, 2, (1, z.heads, z.seqlen_k, z.seqlen_q), torch.uint8, z.device).mT],
        [],
    ),
    "both": (
        lambda n, t, s: mods.both(mods.causal(vec_size=n), mods.document(aux=t, vec_size=n)),
        lambda z: [whole(0, 2, (z.batch, z.seqlen_k), torch.int32, z.device)],
        [],
    ),
    "either": (
        lambda n, t, s: mods.either(mods.dilated(4, vec_size=n), mods.sliding_window(0, None, vec_size=n)),
        lambda z: [],
        [],
    ),
    "striped": (striped, lambda z: [], []),
    "head_limit": (
        head_limit, lambda z: [torch.arange(z.heads, device=z.device) * 25], [],
    ),
    "places": (places, lambda z: [whole(0, 2, (z.batch, z.seqlen_q, z.seqlen_k), torch.int8, z.device)], []),
    "half_columns": (half_columns, lambda z: [], [5]),
}  # fmt: skip
FORMS = ["tma", "packed", "plain", "paged", "padded"]


def vec_size_of(index, vector):
    """1, or one of the others."""
    return (2, 4, 8)[index % 3] if vector else 1


def run(device, form, dtype=BF16, score=None, mask=None, score_size=1, mask_size=1, **more):
    """A ragged call with GQA. score, mask: names in SCORES and MASKS."""
    on, lengths_q, lengths_k = device.torch_device, *device.pick(((130, 300), (257, 101)), ((30, 67), (70, 39)))
    heads, heads_kv = device.pick((6, 2), (2, 1))
    sizes = Sizes(2, heads, max(lengths_q), max(lengths_k), on)
    q = rand(on, 2, sizes.seqlen_q, heads, 64, dtype=dtype)
    k, v = (rand(on, 2, sizes.seqlen_k, heads_kv, 64, dtype=dtype) for _ in range(2))
    if form == "plain":
        k = k[:, :, :1].expand_as(k)
    given = {} if form in ("tma", "plain") else (q, k, v, lengths_q, lengths_k)
    if given:
        q, k, v, given = in_form(on, form, *given)
    tensors, numbers, chosen = [], [], []
    for kind, name in ((SCORES, score), (MASKS, mask)):
        make, own, own_numbers = kind[name] if name else (None, lambda z: [], [])
        chosen.append((make, len(tensors), len(numbers)))
        tensors += own(sizes)
        numbers += own_numbers
    for argument, (make, t, s), n in zip(("score_mod", "mask_mod"), chosen, (score_size, mask_size), strict=True):
        if make is not None:
            given[argument] = make(n, t, len(tensors) + s)
    given |= {"aux_tensors": tensors} if tensors else {}
    given |= {"aux_scalars": numbers} if numbers else {}
    return assert_right(q, k, v, **given, **more)


def cases(kinds):
    """(place, name, form, vector): on a GPU all, in the interpreter a form and a width for each."""
    everything = torch.cuda.is_available()
    return [
        pytest.param(i, name, form, vector, id=f"{name}-{form}-{'vector' if vector else 'scalar'}")
        for i, name in enumerate(kinds)
        for j, form in enumerate(FORMS)
        for vector in (False, True)
        if everything or (j, vector) == (i % len(FORMS), i % 2 == 1)
    ]


@pytest.mark.parametrize("i, name, form, vector", cases(SCORES))
def test_score_mods(i, name, form, vector, device):
    run(device, form, (BF16, FP16)[i % 2], score=name, score_size=vec_size_of(i, vector))


@pytest.mark.parametrize("i, name, form, vector", cases(MASKS))
def test_mask_mods(i, name, form, vector, device):
    run(device, form, (FP16, BF16)[i % 2], mask=name, mask_size=vec_size_of(i, vector))


@pytest.mark.parametrize("i, name, form, vector", cases(SCORES))
def test_together(i, name, form, vector, device):
    """Each mod in the form in which the tests above don't have it."""
    masks = list(MASKS)
    j = (i + 5) % len(masks)
    sizes = {
        "score_size": vec_size_of(i, not vector),
        "mask_size": vec_size_of(j, (j % 2 == 0) ^ (vector ^ (i % 2 == 1))),
    }
    causal = {"causal": i % 4 == 2}
    run(device, FORMS[(FORMS.index(form) + 2) % len(FORMS)], score=name, mask=masks[j], **sizes, **causal)


def test_there_are_twelve_of_each():
    assert len(SCORES) >= 12 and len(MASKS) >= 12


@pytest.mark.parametrize("form", ["tma", "packed"])
def test_rows_that_see_nothing(form, device, monkeypatch):
    monkeypatch.setitem(MASKS, "two_rows_of_three", (two_rows_of_three, lambda z: [], []))
    out, lse = run(device, form, mask="two_rows_of_three", mask_size=4)
    if form == "packed":
        out, lse = out[:30], lse[:, :30]
        assert (out[::3] == 0).all() and (lse[:, ::3] == -math.inf).all() and lse[:, 1::3].isfinite().all()
    else:
        assert (out[:, ::3] == 0).all() and (lse[..., ::3] == -math.inf).all() and lse[..., 1::3].isfinite().all()


@pytest.mark.parametrize("beside", [{"softcap": 2.0}, {"alibi_slopes": True}, {"window_size": (20, 5)}], ids=str)
def test_mask_mod_beside_what_changes_scores(beside, device):
    """What isn't seen stays unseen: a softcap makes a number of -inf."""
    if "alibi_slopes" in beside:
        beside = {"alibi_slopes": torch.rand(device.pick(6, 2), device=device.torch_device) * 0.3}
    run(device, "padded", mask="places", **beside)


@pytest.mark.parametrize("lengths_q, lengths_k", [((0, 20, 1), (33, 0, 9)), ((5, 17, 0), (0, 1, 64))])
@pytest.mark.parametrize("form", ["padded", "packed"])
def test_empty_sequences_read_nothing(form, lengths_q, lengths_k, device):
    """What mods read is read at places that exist, and a sequence without rows or columns has none."""
    on = device.torch_device
    q, k = rand(on, 3, max(lengths_q), 2, 64), rand(on, 3, max(lengths_k), 1, 64)
    sizes = Sizes(3, 2, max(lengths_q), max(lengths_k), on)
    q, k, v, given = in_form(on, form, q, k, k, lengths_q, lengths_k)
    (_, bias, _), (_, seen, _) = SCORES["column_bias"], MASKS["places"]
    given |= {"score_mod": column_bias(2, 0, 0), "mask_mod": places(1, 1, 0)}
    assert_right(q, k, v, **given, aux_tensors=[*bias(sizes), *seen(sizes)])


def test_a_packed_document_mask(device):
    on, lengths = device.torch_device, (40, 1, 33)
    q, k, v = rand(on, 74, 2, 64), rand(on, 74, 1, 64), rand(on, 74, 1, 64)
    ids = whole(0, 3, (74,), torch.int32, on)
    where = marks(on, *lengths)
    mask = mods.both(mods.causal(), mods.document(packed=True))
    assert_right(q, k, v, cu_seqlens_q=where, cu_seqlens_k=where, mask_mod=mask, aux_tensors=[ids])


def test_what_seqlen_info_holds(device):
    """Each field goes into the score."""

    def score_mod(score, batch, head, q_idx, kv_idx, seqlen_info, aux_tensors):
        info = seqlen_info
        number = info.seqlen_q % 5 + info.seqlen_k % 7 * 2 + info.offset_q % 3 * 3 + info.offset_k % 4
        return score + (kv_idx % 2 * number).to(Float32) * 0.1

    def in_torch(score, batch, head, q_idx, kv_idx, info, aux):
        number = info.seqlen_q % 5 + info.seqlen_k % 7 * 2 + info.offset_q % 3 * 3 + info.offset_k % 4
        return score + kv_idx % 2 * number * 0.1

    on = device.torch_device
    q, k, v = rand(on, 50, 2, 64), rand(on, 80, 1, 64), rand(on, 80, 1, 64)
    lengths = {"cu_seqlens_q": marks(on, 21, 29), "cu_seqlens_k": marks(on, 50, 30), "seqused_k": ints(on, 43, 30)}
    assert_right(q, k, v, **lengths, score_mod=with_twin(score_mod, 1, in_torch))


@pytest.fixture
def built(monkeypatch):
    """Problems that were compiled since."""
    problems, build = [], compiler.build
    monkeypatch.setattr(
        compiler, "build", lambda problem, *rest, **more: problems.append(problem) or build(problem, *rest, **more)
    )
    return problems


def plus(number):
    def score_mod(score, batch, head, q_idx, kv_idx, seqlen_info, aux_tensors):
        return score + (kv_idx % 2).to(Float32) * number

    return with_twin(score_mod, 1, lambda score, b, h, q, k, *rest: score + k % 2 * number)


def test_a_redefined_mod_is_compiled_anew_and_an_equal_one_is_not(built, device):
    q, k, v = (rand(device.torch_device, 1, 20, 1, 64) for _ in range(3))
    first, _ = assert_right(q, k, v, score_mod=plus(0.625))
    known = len(built)
    again, _ = assert_right(q, k, v, score_mod=plus(0.625))
    assert len(built) == known and torch.equal(again, first)
    other, _ = assert_right(q, k, v, score_mod=plus(-1.375))
    assert len(built) > known and not torch.equal(other, first)


def test_numbers_and_tensors_change_without_compiling(built, device):
    on = device.torch_device
    q, k, v = (rand(on, 1, 20, 2, 64) for _ in range(3))
    known = None
    for numbers in ([0.5, 1], [2.0, -3]):
        for size in (2, 3):
            slopes = torch.rand(size, device=on)
            chosen = {"score_mod": line(1, 0, 1), "mask_mod": striped(1, 1, 0)}
            assert_right(q, k, v, **chosen, aux_tensors=[slopes], aux_scalars=numbers)
            known = len(built) if known is None else known
    assert len(built) == known


def call(packed=False, **options):
    q, k, v = (torch.zeros(2, 9, 2, 64, dtype=BF16) for _ in range(3))
    if packed:
        options["seqused_q"] = ints("cpu", 9, 9)
    return (flash_attn_varlen_func if packed else flash_attn_func)(q, k, v, **options)


SCORE, MASK, ONE = plus(1), striped(1, 0, 0), torch.ones(2)
# (name, arguments, exception, argument named, what the rest of the message must hold)
WRONG = [
    ("tensors alone", {"aux_tensors": [ONE]}, ValueError, "aux_tensors", ["score_mod", "float32"]),
    ("numbers alone", {"aux_scalars": [1]}, ValueError, "aux_scalars", ["mask_mod", "1"]),
    ("a number for a score_mod", {"score_mod": 3}, TypeError, "score_mod", ["3"]),
    ("a name for a mask_mod", {"mask_mod": "causal"}, TypeError, "mask_mod", ["causal"]),
    ("a tensor for tensors", {"score_mod": SCORE, "aux_tensors": ONE}, TypeError, "aux_tensors", ["list", "float32"]),
    ("a list for a tensor", {"score_mod": SCORE, "aux_tensors": [[1]]}, TypeError, "aux_tensors[0]", ["tensor"]),
    ("complex", {"mask_mod": MASK, "aux_tensors": [ONE, ONE.to(torch.complex64)]}, TypeError, "aux_tensors[1]",
     ["bfloat16", "complex64"]),
    ("rank 0", {"mask_mod": MASK, "aux_tensors": [ONE[0]]}, ValueError, "aux_tensors[0]", ["dimension", "()"]),
    ("elsewhere", {"mask_mod": MASK, "aux_tensors": [ONE.to("meta")]}, ValueError, "aux_tensors[0]", ["cpu", "meta"]),
    ("a number for numbers", {"mask_mod": MASK, "aux_scalars": 3}, TypeError, "aux_scalars", ["list", "3"]),
    ("a flag for a number", {"mask_mod": MASK, "aux_scalars": [True]}, TypeError, "aux_scalars[0]", ["float", "True"]),
    ("33 bits", {"mask_mod": MASK, "aux_scalars": [2**31]}, ValueError, "aux_scalars[0]", ["32 bits"]),
    ("softcap", {"score_mod": SCORE, "softcap": 3.0}, NotImplementedError, "softcap", ["mods.softcap"]),
    ("slopes", {"score_mod": SCORE, "alibi_slopes": ONE}, NotImplementedError, "alibi_slopes", ["mods.alibi"]),
    ("splits and score_mod", {"score_mod": SCORE, "num_splits": 2}, NotImplementedError, "num_splits", ["score_mod"]),
    ("splits and mask_mod", {"mask_mod": MASK, "num_splits": 3}, NotImplementedError, "num_splits", ["mask_mod", "3"]),
    ("ranks", {"mask_mod": MASK, "cp_world_size": 2, "cp_tot_seqused_k": ints("cpu", 9, 9)}, NotImplementedError,
     "cp_world_size", ["mask_mod", "got 2"]),
]  # fmt: skip


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("given, kind, argument, parts", [w[1:] for w in WRONG], ids=[w[0] for w in WRONG])
def test_refused(given, kind, argument, parts, packed, recorder):
    with pytest.raises(kind) as caught:
        call(packed, **given)
    message = str(caught.value)
    assert message.startswith(f"{argument}: expected ") and ", got " in message
    assert all(part in message for part in parts), message
    assert not recorder.calls


def whole_scores(score, batch, head, q_idx, kv_idx, seqlen_info, aux_tensors):
    return kv_idx


def a_flag(score, batch, head, q_idx, kv_idx, seqlen_info, aux_tensors):
    return True


def numbers_for_flags(batch, head, q_idx, kv_idx, seqlen_info, aux_tensors):
    return kv_idx - q_idx


def nothing(batch, head, q_idx, kv_idx, seqlen_info, aux_tensors):
    return None


@pytest.mark.parametrize(
    "argument, function, got",
    [
        ("score_mod", whole_scores, "Int32"),
        ("score_mod", a_flag, "True"),
        ("mask_mod", numbers_for_flags, "Int32"),
        ("mask_mod", nothing, "None"),
    ],
)
def test_wrong_results_of_mods(argument, function, got, device):
    q, k, v = (rand(device.torch_device, 1, 20, 1, 64) for _ in range(3))
    with pytest.raises(TypeError, match=rf"{argument}: expected a vector of 1 .*, got .*{got}"):
        flash_attn_func(q, k, v, **{argument: function})
