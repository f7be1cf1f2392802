"""The backend inside vLLM's own classes, on a CPU: registration, selection, metadata, and layers that compute.

Run by test_vllm_plugin.py, with the sources of one vLLM on the path and the plugin no_gpu. The reference computes what
a kernel would.
"""

import inspect
import pickle
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from no_gpu import Platform
from oracle import ints, marks, rand
from vllm.config import CUDAGraphMode
from vllm.config.attention import AttentionConfig
from vllm.platforms.interface import DeviceCapability
from vllm.plugins import load_general_plugins
from vllm.v1.attention import backend as vllm_backend
from vllm.v1.attention.backends.registry import AttentionBackendEnum
from vllm.v1.attention.selector import AttentionSelectorConfig

from flash_attn_sm120 import reference
from flash_attn_sm120.integrations import vllm_backend as own
from flash_attn_sm120.integrations.vllm import register
from flash_attn_sm120.matrix import LSE_SLACK, SLACK, largest_difference

NAME = "FLASH_ATTN_SM120"
BF16, E4M3 = torch.bfloat16, torch.float8_e4m3fn
FLOAT8 = ("fp8", "fp8_e4m3", "fp8_e5m2")
SIZE, HEADS, HEADS_KV, DIM = 16, 4, 2, 64  # rows of a block, heads, head size


@pytest.fixture(autouse=True)
def registered():
    load_general_plugins()
    return AttentionBackendEnum[NAME]


def test_the_entry_point_registers_the_backend(registered):
    assert registered.name == NAME and registered.get_class() is own.FlashAttnSm120Backend
    assert own.FlashAttnSm120Backend.get_name() == NAME
    assert NAME in AttentionBackendEnum.__members__ and registered in list(AttentionBackendEnum)
    assert AttentionBackendEnum(registered.value) is registered
    assert register() is registered


def test_custom_stands_for_it_where_members_cannot_be_added(registered):
    custom = AttentionBackendEnum.CUSTOM
    if hasattr(AttentionBackendEnum, "register"):
        assert not custom.is_overridden()
    else:
        assert custom.get_class() is own.FlashAttnSm120Backend


def test_a_spawned_process_knows_it(registered):
    """Which unpickles its configuration before it has loaded a plugin."""
    code = (
        "import pickle, sys; member = pickle.load(sys.stdin.buffer)\n"
        f"from vllm.v1.attention.backends.registry import AttentionBackendEnum as all\nassert member is all.{NAME}"
    )
    assert pickle.loads(pickle.dumps(registered)) is registered
    done = subprocess.run([sys.executable, "-c", code], input=pickle.dumps(registered), capture_output=True)
    assert done.returncode == 0, done.stderr.decode()


@pytest.mark.parametrize("text", [NAME, NAME.lower()])
def test_the_configuration_takes_the_name(registered, text):
    assert AttentionConfig(backend=text).backend is registered


def test_the_command_line_takes_the_name():
    from vllm.engine.arg_utils import EngineArgs
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parser = EngineArgs.add_cli_args(FlexibleArgumentParser())
    arguments = parser.parse_args(["--model", "any", "--attention-backend", NAME])
    assert EngineArgs.from_cli_args(arguments).attention_backend == NAME


def selector(**changes):
    return AttentionSelectorConfig(
        **{"head_size": 128, "dtype": BF16, "kv_cache_dtype": "auto", "block_size": 16, **changes}
    )


def test_the_platform_takes_it(registered):
    path = Platform.get_attn_backend_cls(registered, selector(has_sink=True, kv_cache_dtype="fp8"))
    assert path == "flash_attn_sm120.integrations.vllm_backend.FlashAttnSm120Backend"
    with pytest.raises(ValueError, match=r"not valid for this configuration.*'head_size not supported'"):
        Platform.get_attn_backend_cls(registered, selector(head_size=320))


TAKEN = [
    *({"head_size": size} for size in (8, 40, 64, 80, 96, 128, 192, 256)),
    *({"head_size": size, "kv_cache_dtype": name} for size in (16, 80, 256) for name in FLOAT8),
    *({"block_size": size} for size in (16, 32, 48, 128, 784, None)),
    *({"attn_type": name} for name in ("decoder", "encoder", "encoder_only", "encoder_decoder")),
    {"dtype": torch.float16}, {"kv_cache_dtype": None}, {"kv_cache_dtype": "bfloat16"},
    {"dtype": torch.float16, "kv_cache_dtype": "float16"}, {"has_sink": True}, {"use_non_causal": True},
    {"has_sliding_window": True}, {"use_dcp": True}, {"use_kv_connector": True},
    {"device_capability": (9, 0)}, {"device_capability": (10, 0)}, {"device_capability": (12, 1)},
]  # fmt: skip
REFUSED = [
    ({"head_size": 4}, "head_size"), ({"head_size": 60}, "head_size"), ({"head_size": 264}, "head_size"),
    ({"head_size": 40, "kv_cache_dtype": "fp8"}, "multiple of 16, got 40"),
    ({"head_size": 72, "kv_cache_dtype": "fp8_e5m2"}, "multiple of 16, got 72"),
    ({"kv_cache_dtype": "float16"}, "float16 KV cache"), ({"kv_cache_dtype": "nvfp4"}, "kv_cache_dtype"),
    ({"kv_cache_dtype": "int8_per_token_head"}, "kv_cache_dtype"), ({"dtype": torch.float32}, "dtype"),
    ({"block_size": 8}, "block_size"), ({"block_size": 24}, "block_size"), ({"use_mla": True}, "MLA"),
    ({"use_sparse": True}, "sparse"), ({"use_mm_prefix": True}, "multimodal"),
    ({"use_per_head_quant_scales": True}, "per-head"), ({"use_batch_invariant": True}, "batch invariance"),
    ({"device_capability": (8, 9)}, "compute capability"), ({"use_pcp": True}, "PCP"), ({"use_rswa": True}, "R-SWA"),
    ({"use_adaptive_verification": True}, "query lens mismatch"),
]  # fmt: skip


def reasons(changes):
    """What vLLM says; None where this version doesn't ask."""
    asked = inspect.signature(own.FlashAttnSm120Backend.validate_configuration).parameters
    if not set(changes) <= set(asked):
        return None
    given = selector()._asdict() | {"device_capability": (12, 0)} | changes
    given["device_capability"] = DeviceCapability(*given["device_capability"])
    return own.FlashAttnSm120Backend.validate_configuration(**given)


@pytest.mark.parametrize("changes", TAKEN, ids=str)
def test_taken(changes):
    assert reasons(changes) in ([], None)


@pytest.mark.parametrize(("changes", "reason"), REFUSED, ids=str)
def test_refused(changes, reason):
    found = reasons(changes)
    assert found is None or (len(found) == 1 and reason in found[0])


def test_0_33_asks_all():
    """Nothing of the tables above is skipped in every version."""
    if hasattr(AttentionBackendEnum, "register"):
        assert all(reasons(changes) is not None for changes in [*TAKEN, *(changes for changes, _ in REFUSED)])


@pytest.mark.parametrize(
    ("mine", "theirs", "methods"),
    [
        (own.FlashAttnSm120Impl, vllm_backend.AttentionImpl, ["__init__", "forward"]),
        (
            own.FlashAttnSm120MetadataBuilder,
            vllm_backend.AttentionMetadataBuilder,
            ["__init__", "build", "build_for_cudagraph_capture", "update_block_table"],
        ),
        (
            own.FlashAttnSm120Backend,
            vllm_backend.AttentionBackend,
            [
                "get_supported_kernel_block_sizes",
                "get_kv_cache_shape",
                "get_kv_cache_stride_order",
                "supports_head_size",
            ],
        ),
    ],
)
def test_methods_take_what_vllm_passes(mine, theirs, methods):
    assert not mine.__abstractmethods__
    for name in methods:
        if hasattr(theirs, name):
            asked = list(inspect.signature(getattr(theirs, name)).parameters)
            assert list(inspect.signature(getattr(mine, name)).parameters)[: len(asked)] == asked, name


def test_graphs_of_any_batch():
    builder = own.FlashAttnSm120MetadataBuilder
    assert builder.get_cudagraph_support(None, None) is vllm_backend.AttentionCGSupport.ALWAYS


def config(ranks=1, interleave=1, drafts=None, graphs="FULL_AND_PIECEWISE"):
    speculative = drafts and SimpleNamespace(num_speculative_tokens=drafts, parallel_drafting=False)
    parallel = SimpleNamespace(
        decode_context_parallel_size=ranks, cp_kv_cache_interleave_size=interleave, dcp_comm_backend="ag_rs"
    )
    return SimpleNamespace(
        parallel_config=parallel,
        speculative_config=speculative,
        compilation_config=SimpleNamespace(cudagraph_mode=CUDAGraphMode[graphs], static_forward_context={}),
        model_config=SimpleNamespace(dtype=BF16),
        use_v2_model_runner=True,
    )


def builder_of(spec=None, **options):
    return own.FlashAttnSm120MetadataBuilder(spec, ["layer"], config(**options), torch.device("cpu"))


def common(lengths_q, lengths_k, table, padding=(0, 0), **fields):
    """padding: requests and tokens that a graph has beyond the batch."""
    requests, tokens = padding
    starts = marks("cpu", *lengths_q, *[0] * requests)
    return vllm_backend.CommonAttentionMetadata(
        query_start_loc=starts,
        query_start_loc_cpu=starts,
        seq_lens=ints("cpu", *lengths_k, *[0] * requests),
        num_reqs=len(lengths_q) + requests,
        num_actual_tokens=sum(lengths_q) + tokens,
        max_query_len=max(lengths_q),
        max_seq_len=max(lengths_k),
        block_table_tensor=torch.cat([table, table.new_zeros(requests, table.shape[1])]),
        slot_mapping=torch.zeros(sum(lengths_q) + tokens, dtype=torch.int64),
        **fields,
    )


def tables(lengths):
    """Block tables with pages in no order, and how many there are."""
    counts = [-(-length // SIZE) for length in lengths]
    order = torch.randperm(sum(counts) + 2)
    table = torch.full((len(lengths), max(counts) + 1), 12345, dtype=torch.int32)
    for row, count in enumerate(counts):
        table[row, :count], order = order[:count].int(), order[count:]
    return table, sum(counts) + 2


def spans(metadata):
    return [(part.first, part.last, part.requests, part.max_query_len) for part in metadata.parts]


MIXED = ([1, 1, 1, 40, 1], [70, 33, 5, 60, 1])


def test_decodes_get_a_call_of_their_own():
    table, _ = tables(MIXED[1])
    metadata = builder_of().build(0, common(*MIXED, table))
    assert spans(metadata) == [(0, 3, slice(0, 3), 1), (3, 44, slice(3, 5), 40)]
    assert metadata.parts[1].query_start_loc.tolist() == [0, 40, 41]
    assert metadata.parts[1].seq_lens.tolist() == [60, 1]


@pytest.mark.parametrize("lengths_q", [[1, 1, 1], [40, 1, 1], [1]])
def test_one_kind_is_one_call(lengths_q):
    lengths_k = [50] * len(lengths_q)
    table, _ = tables(lengths_k)
    metadata = builder_of().build(0, common(lengths_q, lengths_k, table))
    assert spans(metadata) == [(0, sum(lengths_q), slice(0, len(lengths_q)), max(lengths_q))]


def test_a_captured_batch_is_whole():
    table, _ = tables(MIXED[1])
    metadata = builder_of().build_for_cudagraph_capture(common(*MIXED, table))
    assert spans(metadata) == [(0, 44, slice(0, 5), 40)]


@pytest.mark.parametrize(("graphs", "longest"), [("FULL", 24), ("FULL_DECODE_ONLY", 1), ("FULL_AND_PIECEWISE", 1)])
def test_a_graph_of_all_mixtures_bounds_none(graphs, longest):
    """vLLM 0.24 captures it with one token a request, and replays it with all tokens in one."""
    lengths = [1] * 24
    table, _ = tables(lengths)
    metadata = builder_of(graphs=graphs).build_for_cudagraph_capture(common(lengths, lengths, table))
    assert spans(metadata) == [(0, 24, slice(0, 24), longest)]


def test_a_builder_made_of_it_is_captured_with_its_own_batch():
    """As vLLM's builders of cross and chunked attention, which change the batch in build."""

    class Cross(own.FlashAttnSm120MetadataBuilder):
        def build(self, common_prefix_len, common_attn_metadata, fast_build=False):
            return super().build(common_prefix_len, common_attn_metadata.replace(causal=False), fast_build)

    table, _ = tables(MIXED[1])
    builder = Cross(None, ["layer"], config(), torch.device("cpu"))
    captured = builder.build_for_cudagraph_capture(common(*MIXED, table))
    assert captured.causal is False and len(captured.parts) == 1
    assert len(builder.build(0, common(*MIXED, table)).parts) == 2


def test_drafts_count_as_decodes():
    table, _ = tables([50, 50, 50])
    builder = builder_of(drafts=3)
    assert builder.reorder_batch_threshold == 4
    metadata = builder.build(0, common([4, 2, 30], [50, 50, 50], table))
    assert spans(metadata) == [(0, 6, slice(0, 2), 4), (6, 36, slice(2, 3), 30)]


def test_another_groups_blocks():
    table, _ = tables(MIXED[1])
    builder = builder_of()
    metadata = builder.build(0, common(*MIXED, table))
    slots = torch.arange(44)
    changed = builder.update_block_table(metadata, table + 1, slots)
    assert torch.equal(changed.block_table, table + 1) and changed.slot_mapping is slots
    assert torch.equal(torch.cat([part.block_table for part in changed.parts]), table + 1)
    assert torch.equal(torch.cat([part.block_table for part in metadata.parts]), table)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("causal", torch.ones(5, dtype=torch.int32)),
        ("mm_req_doc_ranges", {0: [(0, 3)]}),
        ("rswa_prefix_lens", torch.ones(5, dtype=torch.int32)),
    ],
)
def test_masks_that_are_not_offered(name, value):
    if name not in inspect.signature(vllm_backend.CommonAttentionMetadata).parameters:
        return
    table, _ = tables(MIXED[1])
    with pytest.raises(NotImplementedError, match=f"^{name}: expected"):
        builder_of().build(0, common(*MIXED, table, **{name: value}))


def blank_cache(layout, blocks, dtype):
    """As vLLM makes it. "two": of our shape, permuted; else (blocks, heads, rows, 2 * head size) of any strides."""
    if layout.startswith("two"):
        shape = own.FlashAttnSm120Backend.get_kv_cache_shape(blocks, SIZE, HEADS_KV, DIM)
        order = (0, 1, 3, 2, 4) if layout == "two HND" else (0, 1, 2, 3, 4)
        cache = torch.empty([shape[i] for i in order], dtype=torch.float32)
        inverse = [order.index(i) for i in range(5)]
        return cache.fill_(torch.nan).to(dtype).permute(inverse)
    rows = (SIZE, HEADS_KV) if layout == "one NHD" else (HEADS_KV, SIZE)
    cache = torch.full((blocks, *rows, 2 * DIM), torch.nan).to(dtype)
    return cache.transpose(1, 2) if layout == "one NHD" else cache


def write(key, value, k, v, slots, name, k_scale, v_scale):
    """vLLM's reshape_and_cache_flash: k and v (blocks, rows, heads, d) hold bytes where they are float8."""
    for rows, pool, scale in ((key, k, k_scale), (value, v, v_scale)):
        dtype = own.FLOAT8.get(name, pool.dtype)
        rows = (rows.float() / scale if name in own.FLOAT8 else rows).to(dtype)
        for row, slot in zip(rows, slots.tolist(), strict=False):
            if slot >= 0:
                pool[slot // SIZE, slot % SIZE] = row.view(pool.dtype)


def layer_of(k_scale=1.0, v_scale=1.0):
    return SimpleNamespace(_k_scale=torch.tensor(k_scale), _v_scale=torch.tensor(v_scale))


class Case:
    """A batch, its keys in a cache that the backend wrote, and what the reference makes of them."""

    def __init__(self, monkeypatch, lengths, *, layout="two NHD", name="auto", stored=None, share=lambda n: slice(n)):
        """share: of a sequence of n keys, those that this rank has."""
        monkeypatch.setattr(own, "_cache_writer", lambda _: write)
        self.lengths_q, self.lengths_k = lengths
        self.q = rand("cpu", sum(self.lengths_q), HEADS, DIM)
        self.keys = [[rand("cpu", n, HEADS_KV, DIM) for _ in "kv"] for n in self.lengths_k]
        kept = [[rows[share(len(rows))] for rows in pair] for pair in self.keys]
        self.table, blocks = tables([len(k) for k, _ in kept])
        stored = stored or (torch.uint8 if name in own.FLOAT8 else BF16)
        cache = blank_cache(layout, blocks, own.FLOAT8.get(name, BF16))
        self.cache = cache.view(stored)
        self.name, self.layer = name, layer_of(0.5, 1.5) if name in own.FLOAT8 else layer_of(7.0, 7.0)
        impl = self.impl()
        for row, (k, v) in enumerate(kept):
            slots = [int(self.table[row, i // SIZE]) * SIZE + i % SIZE for i in range(len(k))]
            slots = torch.tensor([-1, *slots])
            k, v = (torch.cat([rows.new_full((1, HEADS_KV, DIM), torch.nan), rows]) for rows in (k, v))
            impl.do_kv_cache_update(self.layer, k, v, self.cache, slots)

    def impl(self, **options):
        return own.FlashAttnSm120Impl(HEADS, DIM, 0.2, HEADS_KV, kv_cache_dtype=self.name, **options)

    def exact(self, dtype=torch.float32, **options):
        """Over the keys as they were rounded."""
        parts = []
        for k, v in self.keys:
            scales = (self.layer._k_scale, self.layer._v_scale)
            if self.name in own.FLOAT8:
                pair = zip((k, v), scales, strict=True)
                k, v = ((rows.float() / s).to(own.FLOAT8[self.name]).float() * s for rows, s in pair)
            parts.append((k, v))
        k, v = (
            torch.cat(side).to(BF16 if self.name not in own.FLOAT8 else torch.float32)
            for side in zip(*parts, strict=True)
        )
        lens = {"cu_seqlens_q": marks("cpu", *self.lengths_q), "cu_seqlens_k": marks("cpu", *self.lengths_k)}
        return reference.attention(self.q, k, v, **lens, softmax_scale=0.2, **options, dtype=dtype)

    def check(self, result, **options):
        exact, rounded = self.exact(**options)[0], self.exact(dtype=BF16, **options)[0]
        assert largest_difference(result, exact) <= 2 * largest_difference(rounded, exact) + SLACK


LAYOUTS = ["two NHD", "two HND", "one NHD", "one HND"]


def test_a_graphs_kernels_are_loaded_before_it_is_captured(recorder, monkeypatch):
    case = Case(monkeypatch, MIXED)
    builder = builder_of()
    layer = SimpleNamespace(impl=case.impl(sliding_window=20), kv_cache=case.cache, **vars(case.layer))
    encoder = SimpleNamespace(impl=case.impl(attn_type="encoder_only"), kv_cache=torch.tensor([]))
    unbound = SimpleNamespace(impl=case.impl(), kv_cache=torch.tensor([]))
    context = {"layer": layer, "encoder": encoder, "unbound": unbound, "other": SimpleNamespace(), "elsewhere": layer}
    builder.vllm_config.compilation_config.static_forward_context = context
    builder.layer_names = ["layer", "encoder", "unbound", "other", "gone"]
    metadata = builder.build_for_cudagraph_capture(common(*MIXED, case.table))
    (call,) = recorder.calls
    assert call.q.shape == (44, HEADS, DIM) and call.numbers.window_left == 19
    assert call.lengths.page_table is metadata.block_table and call.k.data_ptr() == case.cache.data_ptr()
    builder.build(0, common(*MIXED, case.table))
    assert len(recorder.calls) == 1


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", ["auto", "fp8", "fp8_e5m2"])
def test_a_layer_of_a_mixed_batch(reference_kernels, monkeypatch, layout, name):
    case = Case(monkeypatch, MIXED, layout=layout, name=name)
    metadata = builder_of().build(0, common(*MIXED, case.table))
    out = torch.full_like(case.q, torch.nan)
    assert case.impl().forward(case.layer, case.q, None, None, case.cache, metadata, out) is out
    case.check(out, causal=True)


def test_a_float8_cache_that_says_so(reference_kernels, monkeypatch):
    case = Case(monkeypatch, MIXED, name="fp8_e4m3", stored=E4M3)
    metadata = builder_of().build(0, common(*MIXED, case.table))
    case.check(
        case.impl().forward(case.layer, case.q, None, None, case.cache, metadata, torch.empty_like(case.q)), causal=True
    )


@pytest.mark.parametrize("pending", [False, True])
def test_keys_factor_is_a_number_once_vllm_has_it(reference_kernels, monkeypatch, pending):
    """While a first step is still to calculate it, the number beside the tensor isn't its value."""
    case, given = Case(monkeypatch, MIXED, name="fp8"), []
    number = 1.0 if pending else case.layer._k_scale.item()
    vars(case.layer).update(_k_scale_float=number, _v_scale_float=1.0, calculate_kv_scales=pending)
    call = own.flash_attn_varlen_func

    def record(*tensors, **options):
        given.append(options["k_descale"])
        return call(*tensors, **options)

    monkeypatch.setattr(own, "flash_attn_varlen_func", record)
    metadata, out = builder_of().build(0, common(*MIXED, case.table)), torch.empty_like(case.q)
    case.check(case.impl().forward(case.layer, case.q, None, None, case.cache, metadata, out), causal=True)
    assert given and all((scale is case.layer._k_scale) if pending else scale == number for scale in given)


def test_heads_with_factors_of_their_own_keep_them():
    """vLLM's number is the largest of them then."""
    layer = SimpleNamespace(_k_scale=torch.tensor([0.5, 2.0]), _k_scale_float=2.0, calculate_kv_scales=False)
    assert own._k_descale(layer) is layer._k_scale
    assert own._k_descale(layer_of(0.25)).item() == 0.25  # a layer without numbers


@pytest.mark.parametrize(
    ("options", "exact"),
    [
        ({"sliding_window": 20}, {"window_size": (19, 0)}),
        ({"logits_soft_cap": 5.0}, {"softcap": 5.0}),
        ({"alibi_slopes": [0.5, 0.25, 0.125, 0.1]}, {"alibi_slopes": torch.tensor([0.5, 0.25, 0.125, 0.1])}),
        ({"sinks": torch.arange(4.0)}, {"learnable_sink": torch.arange(4.0)}),
    ],
    ids=["window", "softcap", "slopes", "sinks"],
)
def test_what_layers_have(reference_kernels, monkeypatch, options, exact):
    case = Case(monkeypatch, MIXED)
    metadata = builder_of().build(0, common(*MIXED, case.table))
    out = case.impl(**options).forward(case.layer, case.q, None, None, case.cache, metadata, torch.empty_like(case.q))
    case.check(out, causal=True, **exact)


@pytest.mark.parametrize("window", [None, 9])
def test_rows_that_look_ahead(reference_kernels, monkeypatch, window):
    """Cross attention and decoders that aren't causal; a window reaches as far ahead as back."""
    case = Case(monkeypatch, MIXED)
    metadata = builder_of().build(0, common(*MIXED, case.table, causal=False))
    impl = case.impl(sliding_window=window, attn_type="encoder_decoder")
    out = impl.forward(case.layer, case.q, None, None, case.cache, metadata, torch.empty_like(case.q))
    case.check(out, window_size=(-1, -1) if window is None else (window - 1, window - 1))


def test_a_padded_batch(reference_kernels, monkeypatch):
    """What a graph has beyond the batch is left alone."""
    lengths = ([1, 1, 1], [70, 33, 5])
    case = Case(monkeypatch, lengths)
    metadata = builder_of().build_for_cudagraph_capture(common(*lengths, case.table, padding=(2, 5)))
    q = torch.cat([case.q, torch.full((5, HEADS, DIM), torch.nan, dtype=BF16)])
    out = torch.full_like(q, 3.0)
    case.impl().forward(case.layer, q, None, None, case.cache, metadata, out)
    case.check(out[:3], causal=True)
    assert (out[3:] == 3).all()


@pytest.mark.parametrize("attn_type", ["encoder", "encoder_only"])
@pytest.mark.parametrize("window", [None, 9])
def test_an_encoder(reference_kernels, attn_type, window):
    lengths = [1, 30, 17]
    q, k, v = (rand("cpu", 50, heads, DIM) for heads in (HEADS, HEADS_KV, HEADS_KV))
    metadata = builder_of().build(0, common(lengths, lengths, torch.zeros(3, 0, dtype=torch.int32), causal=False))
    impl = own.FlashAttnSm120Impl(HEADS, DIM, 0.2, HEADS_KV, sliding_window=window, attn_type=attn_type)
    impl.do_kv_cache_update(layer_of(), k, v, torch.tensor([]), torch.zeros(50))
    out = torch.full_like(q, torch.nan)[:48]
    impl.forward(layer_of(), q, k, v, torch.tensor([]), metadata, out)
    lens = {"cu_seqlens_q": marks("cpu", *lengths), "cu_seqlens_k": marks("cpu", *lengths), "softmax_scale": 0.2}
    side = -1 if window is None else window - 1
    exact, rounded = (
        reference.attention(q, k, v, **lens, window_size=(side, side), dtype=d)[0] for d in (torch.float32, BF16)
    )
    assert largest_difference(out, exact[:48]) <= 2 * largest_difference(rounded, exact) + SLACK


def test_ranks_combine_to_the_whole(reference_kernels, monkeypatch):
    """Each of two ranks has every other key and, of four heads, two; its kernel sees the heads of both."""
    outs, lses, finals = [], [], []
    state = torch.get_rng_state()
    for rank in range(2):
        torch.set_rng_state(state)
        case = Case(monkeypatch, MIXED, share=lambda n, rank=rank: slice(rank, n, 2))
        local = ints("cpu", *[len(range(rank, n, 2)) for n in MIXED[1]])
        metadata = builder_of(ranks=2).build(0, common(*MIXED, case.table, dcp_local_seq_lens=local))
        impl = case.impl(sliding_window=50)
        impl.dcp_world_size, impl.dcp_rank, impl.combine = 2, rank, Combine(outs, lses)
        group = SimpleNamespace(all_gather=lambda query, dim, q=case.q: q)
        heads = case.q[:, 2 * rank : 2 * rank + 2]
        with monkeypatch.context() as patch:
            patch.setattr("vllm.distributed.parallel_state.get_dcp_group", lambda group=group: group)
            finals.append(impl.forward(case.layer, heads, None, None, case.cache, metadata, torch.empty_like(heads)))
    out, lse = reference.combine(torch.stack(outs), torch.stack(lses))
    exact, exact_lse = case.exact(causal=True, window_size=(49, 0))
    rounded = case.exact(dtype=BF16, causal=True, window_size=(49, 0))[0]
    assert largest_difference(out, exact) <= 3 * largest_difference(rounded, exact) + SLACK
    assert largest_difference(lse.mT, exact_lse) <= 100 * LSE_SLACK
    assert all(torch.equal(final.float(), out[:, :2]) for final, out in zip(finals, outs, strict=True))


class Combine:
    """Stands in for vLLM's: keeps what a rank gives, returns its first heads."""

    def __init__(self, outs, lses):
        self.outs, self.lses = outs, lses

    def __call__(self, out, lse, group):
        self.outs.append(out.float())
        self.lses.append(lse)
        return out[:, :2]


def test_a_draft_that_every_rank_has_whole():
    table, _ = tables(MIXED[1])
    builder = builder_of(SimpleNamespace(dcp_sharded=False), ranks=2)
    assert builder.build(0, common(*MIXED, table)).parts[0].total_lens is None


def test_ranks_refuse():
    with pytest.raises(NotImplementedError, match=r"^cp_kv_cache_interleave_size: expected 1"):
        builder_of(ranks=2, interleave=16)


@pytest.mark.parametrize("name", ["sinks", "alibi_slopes"])
def test_ranks_refuse_what_is_of_a_head(monkeypatch, name):
    monkeypatch.setattr(own.FlashAttnSm120Impl, "__new__", staticmethod(of_two_ranks))
    with pytest.raises(NotImplementedError, match=f"^{name}: expected None where decode_context_parallel_size"):
        own.FlashAttnSm120Impl(HEADS, DIM, 0.2, HEADS_KV, **{name: [1.0] * HEADS})


def of_two_ranks(cls, *_, **__):
    impl = object.__new__(cls)
    impl.dcp_world_size, impl.dcp_rank = 2, 0
    return impl


def test_vllm_has_the_combine():
    assert callable(own._dcp_combine())


def test_a_measuring_run_is_zeros():
    out = torch.full((3, HEADS, DIM), torch.nan)
    impl = own.FlashAttnSm120Impl(HEADS, DIM, 0.2, HEADS_KV)
    assert impl.forward(None, None, None, None, None, None, out) is out and (out == 0).all()


@pytest.mark.parametrize("name", ["output_scale", "output_block_scale"])
def test_a_quantized_output_is_refused(name):
    impl = own.FlashAttnSm120Impl(HEADS, DIM, 0.2, HEADS_KV)
    with pytest.raises(NotImplementedError, match=f"^{name}: expected None"):
        impl.forward(None, None, None, None, None, None, None, **{name: torch.ones(1)})


def test_another_cache_is_refused():
    with pytest.raises(ValueError, match=r"^kv_cache_dtype: expected one of"):
        own.FlashAttnSm120Impl(HEADS, DIM, 0.2, HEADS_KV, kv_cache_dtype="nvfp4")


def test_who_writes_the_cache(monkeypatch):
    from vllm.v1.attention.ops import triton_reshape_and_cache_flash as triton

    assert own._cache_writer.__wrapped__("auto") is triton.triton_reshape_and_cache_flash
    with pytest.raises(NotImplementedError, match=r"^kv_cache_dtype: expected a dtype that vLLM can write"):
        own._cache_writer.__wrapped__("fp8_e5m2")
    from vllm import _custom_ops

    monkeypatch.setattr(torch.ops._C_cache_ops, "reshape_and_cache_flash", print, raising=False)
    assert own._cache_writer.__wrapped__("fp8_e5m2") is _custom_ops.reshape_and_cache_flash


@pytest.mark.parametrize("layout", ["NHD", "HND"])
def test_where_a_backend_lays_out_its_cache(monkeypatch, layout):
    """In vLLM that leaves the shape to backends, blocks come first in memory: what makes padding and transfers work."""
    if not hasattr(vllm_backend.AttentionBackend, "get_kv_cache_shape"):
        return
    monkeypatch.setattr("vllm.v1.attention.backends.utils.get_kv_cache_layout", lambda: layout)
    backend = own.FlashAttnSm120Backend
    theirs = {"NHD": ((0, 1, 2, 3, 4), (1, 0, 2, 3, 4, 5)), "HND": ((0, 1, 3, 2, 4), (1, 4, 0, 2, 3, 5))}[layout]
    assert tuple(backend.get_kv_cache_stride_order(layered) for layered in (False, True)) == theirs
    assert backend.get_kv_cache_shape(9, 32, 4, 64, "fp8") == (9, 2, 32, 4, 64)
    assert backend.get_kv_cache_block_dim(32, 4, 64) == 0 and backend.indexes_kv_by_block_stride()
    with pytest.raises(ValueError, match=r"^block_size: expected a multiple of 16, got 24"):
        backend.get_kv_cache_shape(9, 24, 4, 64)
