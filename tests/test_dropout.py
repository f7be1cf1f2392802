"""Dropout: the mask function by itself, and kernels that drop exactly what it says."""

import math

import pytest
import torch
from oracle import assert_right, ints, marks, rand
from sparse_cases import random_blocks

from flash_attn_sm120 import dropout_mask, flash_attn_func, flash_attn_varlen_func, reference
from flash_attn_sm120.dropout import OWN_BITS, bits_of_numbers, halves, philox, rotate_left, split_chance, thresholds
from flash_attn_sm120.problem import AttentionProblem

BF16, FP16 = torch.bfloat16, torch.float16
SEED = 0xFEDCBA98_87654321  # the top bit of both words set
WORD = 0xFFFFFFFF


def philox_of_ints(counter, key, rounds=7):
    """Philox 4x32 as the paper writes it, on Python's ints."""
    a, b, c, d = counter
    k0, k1 = key
    for _ in range(rounds):
        high_0, low_0 = divmod(a * 0xD2511F53, 1 << 32)
        high_1, low_1 = divmod(c * 0xCD9E8D57, 1 << 32)
        a, b, c, d = high_1 ^ b ^ k0, low_1, high_0 ^ d ^ k1, low_0
        k0, k1 = (k0 + 0x9E3779B9) & WORD, (k1 + 0xBB67AE85) & WORD
    return a, b, c, d


def kept_by_hand(batch, head, row, column, p, seed):
    counter = (head, column // 64, batch, row // 32 * 32 + row % 8 * 4 + column % 8 // 2)
    a, b, c, d = philox_of_ints(counter, (seed & WORD, seed >> 32))
    place = column % 2 * 16 + column // 16 % 2 * 8 + row // 16 % 2 * 4 + row // 8 % 2 * 2 + column // 8 % 2
    groups = (c * 0x9E3779B9 + d) % 2**32
    if column // 32 % 2:
        a, b, c, d = c, d, a, b
    bit = lambda word, turned=0: word >> (place - turned) % 32 & 1  # noqa: E731
    bits = [bit(a), bit(b), bit(c, 9) ^ bit(c) ^ bit(d), bit(c, 18) ^ bit(a) ^ bit(c), bit(a, 29) ^ bit(b) ^ bit(d)]
    bits += [bit(b, 11) ^ bit(b) ^ bit(c), bit(c, 31) ^ bit(a) ^ bit(d)]
    number = sum(one << i for i, one in enumerate(bits))
    threshold, part = divmod(round(p * 2**39), 2**32)
    return number >= threshold + (groups < part)


# Of Random123's own known answers, those of philox4x32 with 7 rounds: counter, key, result.
KNOWN = [
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "5f6fb709 0d893f64 4f121f81 4f730a48"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "5207ddc2 45165e59 4d8ee751 8c52f662"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "4dfccaba 190a87f0 c47362ba b6b5242a"),
]


@pytest.mark.parametrize("counter, key, result", KNOWN)
def test_known_answers(counter, key, result):
    counter, key, result = ([int(word, 16) for word in words.split()] for words in (counter, key, result))
    assert list(philox_of_ints(counter, key)) == result
    words = philox([torch.tensor([word]) for word in counter], key)
    assert [word.item() for word in words] == result


@pytest.mark.parametrize("seed", [0, 1, SEED, 2**64 - 1])
def test_every_place_by_hand(seed):
    mask = dropout_mask(2, 2, 19, 43, 0.4, seed)
    assert mask.shape == (2, 2, 19, 43) and mask.dtype == torch.bool
    for place in torch.cartesian_prod(*map(torch.arange, mask.shape)).tolist():
        assert mask[tuple(place)] == kept_by_hand(*place, 0.4, seed), place


@pytest.mark.parametrize("p", [0.001, 0.1, 0.25, 0.5, 0.9])
@pytest.mark.parametrize("seed", [0, SEED])
def test_keep_rate(p, seed):
    mask = dropout_mask(2, 4, 256, 512, p, seed)
    chance = 1.0 - p
    assert abs(mask.float().mean().item() - chance) < 4 * math.sqrt(p * (1 - p) / mask.numel())
    for axis in range(4) if p > 0.05 else ():  # and for each batch entry, head, row and column, which drop many
        counted = mask.movedim(axis, 0).flatten(1).float()
        off = (counted.mean(1) - chance).abs().max().item()
        assert off < 5 * math.sqrt(p * (1 - p) / counted.shape[1]), axis


@pytest.mark.parametrize("first, second", [(0, 0), (1, 1), (0, 1)])
def test_bits_of_two_weights_are_independent(first, second):
    """Between each two bits of two weights' numbers, and each two of one's, in any of a group's 64 places."""
    count = 1 << 18
    generator = torch.Generator().manual_seed(SEED)
    counter = torch.randint(0, 1 << 32, (4, count), generator=generator)
    made = [bits_of_numbers(half, rotate_left) for half in halves(philox(counter, (1, 2)))]
    words = torch.stack([word for half in made for word in half])
    signs = (1 - 2 * (words[:, None] >> torch.arange(32)[:, None] & 1)).to(torch.int8)  # (word, place, count)
    rows, columns = (signs[OWN_BITS * half :][:OWN_BITS].flatten(0, 1).float() for half in (first, second))
    sums = (rows @ columns.T).abs()
    if first == second:
        sums.fill_diagonal_(0)
    assert sums.max().item() < 5.5 * math.sqrt(count)  # of 50000 pairs
    assert rows.mean(1).abs().max().item() < 5 / math.sqrt(count)


def rank(vectors):
    """Of ints as vectors of bits."""
    basis = []
    for vector in vectors:
        for other in basis:
            vector = min(vector, vector ^ other)
        if vector:
            basis.append(vector)
    return len(basis)


def test_bits_of_two_weights_depend_on_other_bits_of_philox():
    """Exactly: no sum of bits of two weights' numbers is always 0, nor of the 64 top bits of a group."""
    sources = [tuple(1 << bit if word == own else 0 for own in range(4)) for word in range(4) for bit in range(32)]
    made = [[bits_of_numbers(half, rotate_left) for half in halves(words)] for words in sources]
    places = [(half, place) for half in range(2) for place in range(32)]
    vectors = {
        (half, place): [
            sum((one[half][bit] >> place & 1) << i for i, one in enumerate(made)) for bit in range(OWN_BITS)
        ]
        for half, place in places
    }
    for i, first in enumerate(places):
        for second in places[:i]:
            assert rank(vectors[first] + vectors[second]) == 2 * OWN_BITS, (first, second)
    assert rank([vectors[place][-1] for place in places]) == len(places)


@pytest.mark.parametrize("p", [1e-12, 0.003, 0.1, 1 / 3, 0.5, 127 / 128, 1 - 2**-53])
def test_the_chance_is_kept_to_39_bits(p):
    threshold, carry = split_chance(p)
    assert 0 <= threshold < 1 << OWN_BITS and 0 <= carry < 1 << 32
    assert abs((threshold + carry / 2**32) / 2**OWN_BITS - p) <= 2**-39
    assert thresholds(p) == (threshold, carry - (carry >> 31 << 32))


@pytest.mark.parametrize("p", [0.1, 0.5])
def test_neighbours_do_not_correlate(p):
    mask = dropout_mask(3, 3, 200, 400, p, SEED).double()
    mask = (mask - mask.mean()) / mask.std()
    pairs = [(axis, step) for axis, steps in ((0, (1, 2)), (1, (1, 2)), (2, (1, 2, 8, 16, 64))) for step in steps]
    pairs += [(3, step) for step in (1, 2, 3, 4, 7, 8, 16, 24, 32, 33, 64, 128)]
    for axis, step in pairs:
        size = mask.shape[axis] - step
        products = mask.narrow(axis, 0, size) * mask.narrow(axis, step, size)
        assert products.mean().abs().item() < 4 / math.sqrt(products.numel()), (axis, step)
    other = dropout_mask(3, 3, 200, 400, p, SEED + 1).double()
    product = (other - other.mean()) / other.std() * mask
    assert product.mean().abs().item() < 4 / math.sqrt(mask.numel())


def test_a_larger_call_contains_a_smaller_one():
    large = dropout_mask(3, 4, 50, 200, 0.3, SEED)
    for sizes in ((1, 1, 1, 1), (2, 3, 20, 65), (3, 1, 50, 31), (1, 4, 7, 200)):
        assert torch.equal(dropout_mask(*sizes, 0.3, SEED), large[tuple(map(slice, sizes))])


def test_seeds_as_ints_and_tensors():
    mask = dropout_mask(2, 2, 30, 40, 0.5, SEED)
    words = torch.tensor([SEED & WORD, SEED >> 32])
    assert torch.equal(dropout_mask(2, 2, 30, 40, 0.5, words), mask)
    assert torch.equal(dropout_mask(2, 2, 30, 40, 0.5, SEED, device="cpu"), mask)
    for other in (SEED ^ 1, SEED ^ 1 << 63, SEED >> 32):
        assert not torch.equal(dropout_mask(2, 2, 30, 40, 0.5, other), mask)


def test_the_mask_is_the_same_on_a_gpu(gpu):
    sizes = (2, 3, 100, 300, 0.3)
    mask = dropout_mask(*sizes, SEED)
    assert torch.equal(dropout_mask(*sizes, SEED, device=gpu).cpu(), mask)
    assert torch.equal(dropout_mask(*sizes, torch.tensor([SEED & WORD, SEED >> 32], device=gpu)).cpu(), mask)


def test_extremes():
    assert dropout_mask(1, 1, 64, 64, 0.0, 5).all()
    assert dropout_mask(1, 1, 64, 64, 1e-12, 5).all()
    assert not dropout_mask(1, 1, 64, 64, 1 - 1e-12, 5).any()
    assert dropout_mask(0, 2, 3, 4, 0.5, 5).shape == (0, 2, 3, 4)
    assert dropout_mask(1, 2, 3, 0, 0.5, 5).shape == (1, 2, 3, 0)


def paged(device, k, v, lengths, page_size=16):
    """Pools that hold padded k and v (batch, seqlen_k, ...) in shuffled pages, NaN elsewhere, and the arguments."""
    pages = max(-(-k.shape[1] // page_size), 1)
    table = torch.randperm(pages * len(lengths)).view(len(lengths), pages)
    pools = [
        torch.full((table.numel(), page_size, *x.shape[2:]), math.nan, dtype=x.dtype, device=device) for x in (k, v)
    ]
    for b, length in enumerate(lengths):
        row = torch.arange(length)
        place = (table[b, row // page_size].to(device), (row % page_size).to(device))
        for pool, x in zip(pools, (k, v), strict=True):
            pool[place] = x[b, :length]
    return *pools, {"page_table": table.int().to(device), "seqused_k": ints(device, *lengths)}


def unpadded(x, lengths):
    return torch.cat([x[b, :length] for b, length in enumerate(lengths)])


FORMS = ["dense", "padded", "packed", "paged"]


def in_form(device, form, q, k, v, lengths_q, lengths_k):
    """(q, k, v, options) of padded tensors."""
    if form == "dense":
        return q, k, v, {}
    if form == "padded":
        return q, k, v, {"seqused_q": ints(device, *lengths_q), "seqused_k": ints(device, *lengths_k)}
    where = {"cu_seqlens_q": marks(device, *lengths_q)}
    if form == "packed":
        where["cu_seqlens_k"] = marks(device, *lengths_k)
        return unpadded(q, lengths_q), unpadded(k, lengths_k), unpadded(v, lengths_k), where
    k, v, more = paged(device, k, v, lengths_k)
    return unpadded(q, lengths_q), k, v, where | more


def inputs(device, sizes=None, heads=(4, 2), head_dim=64, dtype=BF16):
    """Padded q, k and v of sequences of ragged lengths."""
    lengths_q, lengths_k = sizes or device.pick(((300, 129, 1), (400, 37, 515)), ((37, 140), (140, 45)))
    on, batch = device.torch_device, len(lengths_q)
    q = rand(on, batch, max(lengths_q), heads[0], head_dim, dtype=dtype)
    k, v = (rand(on, batch, max(lengths_k), heads[1], head_dim, dtype=dtype) for _ in range(2))
    return q, k, v, lengths_q, lengths_k


def call(q, k, v, **options):
    """(out, lse), so that few kernels are compiled."""
    packed = q.dim() == 3 or "seqused_q" in options
    return (flash_attn_varlen_func if packed else flash_attn_func)(q, k, v, return_lse=True, **options)


@pytest.mark.parametrize("dtype", [BF16, FP16], ids=["bfloat16", "float16"])
@pytest.mark.parametrize("form", FORMS)
def test_exact(form, dtype, device):
    causal = {"causal": form != "dense"}
    q, k, v, options = in_form(device.torch_device, form, *inputs(device, dtype=dtype))
    for p in (0.1, 0.5, 0.9):
        assert_right(q, k, v, dropout_p=p, dropout_seed=SEED, **options, **causal)


def kept_by_kernel(q, k, head_dim_v, **options):
    """bool (batch, heads, seqlen_q, seqlen_k): weights that aren't 0, seen through values that are 1 in one column."""
    found = []
    for first in range(0, k.shape[1], head_dim_v):
        rows = range(first, min(first + head_dim_v, k.shape[1]))
        v = torch.zeros(*k.shape[:3], head_dim_v, dtype=k.dtype, device=k.device)
        v[:, list(rows)] = torch.eye(head_dim_v, dtype=k.dtype, device=k.device)[: len(rows), None]
        out, _ = call(q, k, v, **options)
        found.append(out[..., : len(rows)] != 0)
    return torch.cat(found, -1).transpose(1, 2)


# tile_n is 64, 64 or 32, 32, and 16 where blocks are narrow and head_dim is 256
@pytest.mark.parametrize("head_dim, block_size", [(64, None), (128, None), (192, None), (256, None), (256, (64, 32))])
def test_which_weights_are_kept(head_dim, block_size, device):
    if head_dim in device.pick((), (128, 192)):
        sizes = ((33,), (100,))  # of what interprets slowest
    else:
        sizes = device.pick(((300, 129), (400, 37)), ((140,), (150,)))
    q, k, _, _, _ = inputs(device, sizes, heads=(2, 1), head_dim=head_dim)
    options = {"dropout_seed": SEED}
    if block_size is not None:
        every = (len(q), 2, q.shape[1], k.shape[1])
        options["block_sparse_tensors"] = random_blocks(*every, block_size, 1.0, ("full",), q.device)
    for p in device.pick((0.1, 0.5, 0.9), (0.4,)):
        kept = kept_by_kernel(q, k, head_dim, dropout_p=p, **options)
        expected = dropout_mask(len(q), 2, q.shape[1], k.shape[1], p, SEED, q.device)
        assert torch.equal(kept, expected)


def test_kept_weights_are_scaled(device):
    """Each is 1 / (1 - p) times what it is without dropout: 1.11 at p = 0.1."""
    q, k, _, _, _ = inputs(device, ((40,), (64,)), heads=(2, 1), dtype=FP16)
    v = torch.eye(64, dtype=FP16, device=q.device)[None, :, None]
    plain = call(q, k, v)[0].float()
    for p in (0.1, 0.75):
        dropped = call(q, k, v, dropout_p=p, dropout_seed=3)[0].float()
        ratio = (dropped / plain)[(dropped != 0) & (plain > 1e-3)]
        assert ratio.numel() > 100 and (ratio * (1 - p) - 1).abs().max().item() < 4 * torch.finfo(FP16).eps


def test_nothing_and_everything_dropped(device):
    q, k, v, _, _ = inputs(device, ((20,), (30,)), heads=(1, 1))
    assert_right(q, k, v, dropout_p=1e-12, dropout_seed=1)
    _, plain_lse = reference.attention(q, k, v)
    out, lse = call(q, k, v, dropout_p=1 - 1e-12)
    assert (out == 0).all()
    torch.testing.assert_close(lse, plain_lse)


def test_seeds_and_lse(device):
    """The same seed, in either form, gives the same bits; another doesn't; lse never sees any."""
    q, k, v, _, _ = inputs(device, ((20,), (70,)))
    words = torch.tensor([SEED & WORD, SEED >> 32], device=q.device)
    seeds = (SEED, SEED, words, SEED ^ 1, SEED ^ 1 << 63)
    runs = [call(q, k, v, dropout_p=0.5, dropout_seed=seed) for seed in seeds]
    outs, lses = zip(*runs, strict=True)
    assert torch.equal(outs[0], outs[1]) and torch.equal(outs[0], outs[2])
    assert not torch.equal(outs[0], outs[3]) and not torch.equal(outs[0], outs[4])
    assert all(torch.equal(lse, lses[0]) for lse in lses)
    torch.testing.assert_close(lses[0], call(q, k, v)[1])


def test_forms_and_page_orders_give_the_same_bits(device):
    """A sequence's result follows from its place in the batch, not from where its rows lie."""
    given = inputs(device, device.pick(None, ((20, 33), (70, 40))))
    lengths_q = given[3]
    outs = []
    for form in ("padded", "packed", "paged", "paged"):
        q, k, v, options = in_form(device.torch_device, form, *given)
        out, _ = call(q, k, v, dropout_p=0.3, dropout_seed=SEED, causal=True, **options)
        outs.append(unpadded(out, lengths_q) if form == "padded" else out)
    for out in outs[1:]:
        assert torch.equal(out, outs[0])


def test_a_drawn_seed_and_its_state(device):
    q, k, v, _, _ = inputs(device, ((20,), (70,)))
    torch.manual_seed(11)
    first, _, state = call(q, k, v, dropout_p=0.5, return_rng_state=True)
    second, _, next_state = call(q, k, v, dropout_p=0.5, return_rng_state=True)
    assert not torch.equal(first, second) and not torch.equal(state, next_state)
    assert state.shape == (2,) and state.dtype == torch.int64 and state.device == q.device
    assert ((state >= 0) & (state <= WORD)).all()
    torch.manual_seed(11)
    assert torch.equal(call(q, k, v, dropout_p=0.5)[0], first)
    again, _, own_state = call(q, k, v, dropout_p=0.5, dropout_seed=next_state, return_rng_state=True)
    assert torch.equal(again, second) and torch.equal(own_state, next_state)


def test_a_replayed_graph_reads_the_seed_anew(gpu):
    q, k, v = (torch.randn(2, 300, 4, 64, device=gpu, dtype=BF16) for _ in range(3))
    seed = torch.tensor([1, 2], device=gpu)
    flash_attn_func(q, k, v, dropout_p=0.3, dropout_seed=seed)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = flash_attn_func(q, k, v, dropout_p=0.3, dropout_seed=seed)
    for words in ((1, 2), (3, 2), (WORD, WORD)):
        seed.copy_(torch.tensor(words))
        graph.replay()
        number = words[0] | words[1] << 32
        assert torch.equal(out, flash_attn_func(q, k, v, dropout_p=0.3, dropout_seed=number))


@pytest.mark.parametrize("off", [0, 0.0, None])
def test_without_dropout_it_is_the_same_problem(off, recorder):
    q, k, v = (torch.randn(2, 19, 2, 64).to(BF16) for _ in range(3))
    state = torch.get_rng_state()
    _, found = flash_attn_func(q, k, v, dropout_p=off, dropout_seed=7, return_rng_state=True)
    assert found is None and torch.equal(torch.get_rng_state(), state)
    flash_attn_func(q, k, v)
    assert recorder.problems == [AttentionProblem("bfloat16", 64, 64)]
    assert recorder.calls[0].modifiers == recorder.calls[1].modifiers == type(recorder.calls[0].modifiers)()


def test_p_and_seeds_share_a_kernel(recorder):
    q, k, v = (torch.randn(2, 19, 2, 64).to(BF16) for _ in range(3))
    for p, seed in ((0.1, 1), (0.5, SEED), (0.9, torch.tensor([5, 6]))):
        flash_attn_func(q, k, v, dropout_p=p, dropout_seed=seed)
    assert set(recorder.problems) == {AttentionProblem("bfloat16", 64, 64, dropout=True)}
    given = [call.modifiers.dropout for call in recorder.calls]
    assert [(way.threshold, way.carry) for way in given] == [thresholds(p) for p in (0.1, 0.5, 0.9)]
    assert [way.seed.tolist() for way in given] == [[1, 0], [SEED & WORD, SEED >> 32], [5, 6]]
    assert [way.factor for way in given] == pytest.approx([1 / 0.9, 2.0, 10.0])


# (name, arguments, exception, argument named, what the rest of the message must hold)
WRONG = [
    ("below 0", {"dropout_p": -0.1}, ValueError, "dropout_p", ["below 1", "-0.1"]),
    ("one", {"dropout_p": 1}, ValueError, "dropout_p", ["below 1", "got 1"]),
    ("above 1", {"dropout_p": 1.5}, ValueError, "dropout_p", ["below 1", "1.5"]),
    ("nan", {"dropout_p": math.nan}, ValueError, "dropout_p", ["below 1", "nan"]),
    ("a string", {"dropout_p": "0.1"}, TypeError, "dropout_p", ["number", "0.1"]),
    ("a flag", {"dropout_p": True}, TypeError, "dropout_p", ["number", "True"]),
    ("a tensor", {"dropout_p": torch.tensor(0.1)}, TypeError, "dropout_p", ["number", "float32"]),
    ("seed below 0", {"dropout_seed": -1}, ValueError, "dropout_seed", ["2^64 - 1", "-1"]),
    ("seed of 65 bits", {"dropout_seed": 2**64}, ValueError, "dropout_seed", ["2^64 - 1", str(2**64)]),
    ("seed of a float", {"dropout_seed": 1.0}, TypeError, "dropout_seed", ["int64", "1.0"]),
    ("seed of a flag", {"dropout_seed": True}, TypeError, "dropout_seed", ["int64", "True"]),
    ("seed int32", {"dropout_seed": ints("cpu", 1, 2)}, TypeError, "dropout_seed", ["int64", "int32"]),
    ("seed of one", {"dropout_seed": torch.tensor([1])}, ValueError, "dropout_seed", ["(2,)", "(1,)"]),
    ("seed elsewhere", {"dropout_seed": torch.zeros(2, dtype=torch.int64, device="meta")}, ValueError, "dropout_seed",
     ["cpu", "meta"]),
    ("splits", {"num_splits": 2}, NotImplementedError, "num_splits", ["dropout_p", "got 2"]),
    ("ranks", {"cp_world_size": 2, "cp_tot_seqused_k": ints("cpu", 9, 9)}, NotImplementedError, "cp_world_size",
     ["dropout_p", "got 2"]),
]  # fmt: skip


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("given, kind, argument, parts", [w[1:] for w in WRONG], ids=[w[0] for w in WRONG])
def test_refused(given, kind, argument, parts, packed, recorder):
    q, k, v = (torch.zeros(2, 9, 2, 64, dtype=BF16) for _ in range(3))
    options = {"dropout_p": 0.1} | given
    if packed:
        options |= {"seqused_q": ints("cpu", 9, 9)}
    with pytest.raises(kind) as caught:
        call(q, k, v, **options)
    message = str(caught.value)
    assert message.startswith(f"{argument}: expected ") and ", got " in message
    assert all(part in message for part in parts), message
    assert not recorder.calls


@pytest.mark.parametrize("p", [-0.5, 1.0, math.nan])
def test_a_mask_of_no_chance(p):
    with pytest.raises(ValueError, match=r"^dropout_p: expected from 0 to below 1, got "):
        dropout_mask(1, 1, 1, 1, p, 0)
