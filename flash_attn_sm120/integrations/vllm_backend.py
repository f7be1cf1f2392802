"""The classes behind vLLM's attention backend FLASH_ATTN_SM120; they need vLLM.

One file for vLLM 0.24 and 0.33, which differ in how a cache is laid out, and in where helpers are: by what is there.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache
from typing import Any, ClassVar

import torch
from vllm.config import CUDAGraphMode, get_current_vllm_config_or_none
from vllm.v1.attention.backend import (
    AttentionBackend,
    AttentionCGSupport,
    AttentionImpl,
    AttentionMetadata,
    AttentionMetadataBuilder,
    AttentionType,
    CommonAttentionMetadata,
    MultipleOf,
)

from flash_attn_sm120 import checks
from flash_attn_sm120.integrations.vllm import BACKEND_NAME
from flash_attn_sm120.interface import flash_attn_varlen_func
from flash_attn_sm120.problem import MAX_HEAD_DIM

FLOAT8 = {"fp8": torch.float8_e4m3fn, "fp8_e4m3": torch.float8_e4m3fn, "fp8_e5m2": torch.float8_e5m2}
WITHOUT_CACHE = (AttentionType.ENCODER, AttentionType.ENCODER_ONLY)
BLOCK = 16  # block sizes are its multiples


class FlashAttnSm120Backend(AttentionBackend):
    """What the kernels can do, as vLLM asks for it."""

    supported_dtypes: ClassVar[list[torch.dtype]] = [torch.bfloat16, torch.float16]
    supported_kv_cache_dtypes: ClassVar[list] = ["auto", "bfloat16", "float16", *FLOAT8]
    forward_includes_kv_cache_update: bool = False
    supports_kv_cache_update_bypass: bool = True

    @staticmethod
    def get_name() -> str:
        return BACKEND_NAME

    @staticmethod
    def get_impl_cls() -> type[FlashAttnSm120Impl]:
        return FlashAttnSm120Impl

    @staticmethod
    def get_builder_cls() -> type[FlashAttnSm120MetadataBuilder]:
        return FlashAttnSm120MetadataBuilder

    @staticmethod
    def get_supported_kernel_block_sizes(kv_cache_spec: Any = None) -> list[int | MultipleOf]:
        return [MultipleOf(BLOCK)]

    @staticmethod
    def get_kv_cache_shape(
        num_blocks: int, block_size: int, num_kv_heads: int, head_size: int, cache_dtype_str: str = "auto"
    ) -> tuple[int, ...]:
        """(num_blocks, 2, block_size, num_kv_heads, head_size), where vLLM leaves the shape to a backend."""
        if block_size % BLOCK:
            checks.refuse("block_size", f"a multiple of {BLOCK}", block_size)
        return num_blocks, 2, block_size, num_kv_heads, head_size

    @staticmethod
    def get_kv_cache_stride_order(include_num_layers_dimension: bool = False) -> tuple[int, ...]:
        """In memory blocks come first; within one, rows before heads (NHD), or heads before K, V and rows (HND)."""
        from vllm.v1.attention.backends.utils import get_kv_cache_layout

        layout = get_kv_cache_layout()
        if layout == "NHD":
            return (1, 0, 2, 3, 4, 5) if include_num_layers_dimension else (0, 1, 2, 3, 4)
        if layout == "HND":
            return (1, 4, 0, 2, 3, 5) if include_num_layers_dimension else (0, 1, 3, 2, 4)
        return checks.refuse("VLLM_KV_CACHE_LAYOUT", "NHD or HND", layout)

    @classmethod
    def supports_head_size(cls, head_size: int) -> bool:
        return head_size % 8 == 0 and 8 <= head_size <= MAX_HEAD_DIM

    @classmethod
    def supports_attn_type(cls, attn_type: str) -> bool:
        return attn_type in tuple(AttentionType)

    @classmethod
    def supports_sink(cls) -> bool:
        return True

    @classmethod
    def supports_sliding_window(cls) -> bool:
        return True

    @classmethod
    def supports_non_causal(cls) -> bool:
        return True

    @classmethod
    def supports_device_cpu_query_lens_mismatch(cls) -> bool:
        """No: which requests are decodes is read off the lengths that the host has."""
        return False

    @classmethod
    def supports_compute_capability(cls, capability: Any) -> bool:
        """9.0 and up; the tiles are made for 12.x."""
        return capability.major >= 9

    @classmethod
    def supports_combination(
        cls, head_size: int, dtype: torch.dtype, kv_cache_dtype: str | None, *others: Any, **named: Any
    ) -> str | None:
        """Of all that vLLM passes, only the head size and the cache's dtype go together or don't."""
        if kv_cache_dtype in FLOAT8 and head_size % 16:
            return f"a float8 KV cache needs a head_size that is a multiple of 16, got {head_size}"
        if kv_cache_dtype in ("bfloat16", "float16") and kv_cache_dtype != str(dtype).removeprefix("torch."):
            return f"a {kv_cache_dtype} KV cache needs queries of that dtype, got {dtype}"
        return None


@dataclass
class Part:
    """Requests that are computed in one call: tokens [first, last) of the batch.

    query_start_loc: int32 (requests + 1,), from 0. seq_lens: int32 (requests,), keys on this rank; total_lens: on all.
    block_table: int32 (requests, blocks). max_query_len: of these requests at most.
    """

    first: int
    last: int
    requests: slice
    max_query_len: int
    query_start_loc: torch.Tensor
    seq_lens: torch.Tensor
    total_lens: torch.Tensor | None
    block_table: torch.Tensor


@dataclass
class FlashAttnSm120Metadata(AttentionMetadata):
    """Of one step. parts: decodes, then the rest, or all in one. The other fields are those of the whole batch.

    max_seq_len: keys of a request on this rank, or more.
    """

    num_actual_tokens: int
    max_query_len: int
    max_seq_len: int
    query_start_loc: torch.Tensor
    seq_lens: torch.Tensor
    block_table: torch.Tensor
    slot_mapping: torch.Tensor
    causal: bool
    parts: list[Part]


class FlashAttnSm120MetadataBuilder(AttentionMetadataBuilder[FlashAttnSm120Metadata]):
    """Splits a mixed batch in decodes and the rest, as the decode kernel is chosen by the longest of a call's rows.

    vLLM puts requests of at most reorder_batch_threshold rows first. A CUDA graph keeps the split that it was captured
    with, so graphs are captured whole: those of decodes alone with the decode kernel, mixed ones with that of prefill,
    which takes any mixture. Splits and launches follow from maxima that the host has; lengths are read on the device.
    """

    _cudagraph_support: ClassVar[AttentionCGSupport] = AttentionCGSupport.ALWAYS
    supports_update_block_table: bool = True

    def __init__(self, kv_cache_spec: Any, layer_names: list[str], vllm_config: Any, device: torch.device) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        parallel = vllm_config.parallel_config
        self.splits_batches = True
        # A draft model may have whole keys on every rank.
        sharded = getattr(kv_cache_spec, "dcp_sharded", True)
        self.ranks = parallel.decode_context_parallel_size if sharded else 1
        if self.ranks > 1 and parallel.cp_kv_cache_interleave_size != 1:
            got = parallel.cp_kv_cache_interleave_size
            checks.refuse("cp_kv_cache_interleave_size", "1 (keys dealt one by one)", got, NotImplementedError)
        self._init_reorder_batch_threshold(1, supports_spec_as_decode=True, supports_dcp_with_varlen=True)

    def build(
        self, common_prefix_len: int, common_attn_metadata: CommonAttentionMetadata, fast_build: bool = False
    ) -> FlashAttnSm120Metadata:
        """common_prefix_len and fast_build are of no use: a shared prefix is read from L2, and nothing here is slow."""
        decodes = self._leading_decodes(common_attn_metadata) if self.splits_batches else 0
        return self._build(common_attn_metadata, decodes)

    def build_for_cudagraph_capture(self, common_attn_metadata: CommonAttentionMetadata) -> FlashAttnSm120Metadata:
        """Where one graph serves every mixture, any request may have all its tokens, whatever this batch says."""
        mode = self.vllm_config.compilation_config.cudagraph_mode
        if mode is not None and mode.mixed_mode() == CUDAGraphMode.FULL:
            common_attn_metadata = replace(common_attn_metadata, max_query_len=common_attn_metadata.num_actual_tokens)
        self.splits_batches = False
        try:
            # vLLM makes builders of its own of this one, whose build changes the batch.
            metadata = self.build(0, common_attn_metadata)
        finally:
            self.splits_batches = True
        self._load_kernels(metadata)
        return metadata

    def update_block_table(
        self, metadata: FlashAttnSm120Metadata, blk_table: torch.Tensor, slot_mapping: torch.Tensor
    ) -> FlashAttnSm120Metadata:
        parts = [replace(part, block_table=blk_table[part.requests]) for part in metadata.parts]
        return replace(metadata, block_table=blk_table, slot_mapping=slot_mapping, parts=parts)

    def _load_kernels(self, metadata: FlashAttnSm120Metadata) -> None:
        """Runs the layers' attention once on anything: code can't be loaded while a graph is captured."""
        dtype = self.vllm_config.model_config.dtype
        for name in self.layer_names:
            layer = self.vllm_config.compilation_config.static_forward_context.get(name)
            impl = getattr(layer, "impl", None)
            if isinstance(impl, FlashAttnSm120Impl) and impl.attn_type not in WITHOUT_CACHE and layer.kv_cache.numel():
                shape = (metadata.num_actual_tokens, impl.num_heads, impl.head_size)
                query = torch.zeros(shape, dtype=dtype, device=self.device)
                out = torch.empty_like(query)
                FlashAttnSm120Impl.forward(impl, layer, query, None, None, layer.kv_cache, metadata, out)

    def _leading_decodes(self, common: CommonAttentionMetadata) -> int:
        """How many requests at the batch's front are short, where others follow; else 0."""
        if common.max_query_len <= self.reorder_batch_threshold:
            return 0
        lengths = common.query_start_loc_cpu.diff().tolist()
        long = (place for place, length in enumerate(lengths) if length > self.reorder_batch_threshold)
        return next(long, 0)

    def _build(self, common: CommonAttentionMetadata, decodes: int) -> FlashAttnSm120Metadata:
        """decodes: requests at the front that get a call of their own."""
        _refuse_masks(common)
        seq_lens, total_lens, max_seq_len = common.seq_lens, None, common.max_seq_len
        if self.ranks > 1:
            seq_lens, total_lens = common.dcp_local_seq_lens, common.seq_lens
            max_seq_len = -(-max_seq_len // self.ranks)
        tokens = common.num_actual_tokens
        whole = Part(
            0,
            tokens,
            slice(0, common.num_reqs),
            common.max_query_len,
            common.query_start_loc,
            seq_lens,
            total_lens,
            common.block_table_tensor,
        )
        parts = [whole]
        if decodes:
            last = int(common.query_start_loc_cpu[decodes])
            parts = [
                _part(whole, 0, decodes, 0, last, self.reorder_batch_threshold),
                _part(whole, decodes, common.num_reqs, last, tokens, common.max_query_len),
            ]
        return FlashAttnSm120Metadata(
            num_actual_tokens=tokens,
            max_query_len=common.max_query_len,
            max_seq_len=max_seq_len,
            query_start_loc=common.query_start_loc,
            seq_lens=seq_lens,
            block_table=common.block_table_tensor,
            slot_mapping=common.slot_mapping,
            causal=common.causal,
            parts=parts,
        )


class FlashAttnSm120Impl(AttentionImpl):
    """One layer's attention."""

    can_return_lse_for_decode: bool = True
    supports_dcp: bool = True
    # A query that comes in float8 would need another kernel.
    supports_quant_query_input: bool = False

    def __init__(
        self,
        num_heads: int,
        head_size: int,
        scale: float,
        num_kv_heads: int | None = None,
        alibi_slopes: list[float] | None = None,
        sliding_window: int | None = None,
        kv_cache_dtype: str = "auto",
        logits_soft_cap: float | None = None,
        attn_type: str = AttentionType.DECODER,
        kv_sharing_target_layer_name: str | None = None,
        sinks: torch.Tensor | None = None,
    ) -> None:
        """sliding_window: keys that a row sees, its own among them. sinks: (num_heads,) bfloat16 or float32.

        Raises NotImplementedError for sinks and slopes under decode context parallelism."""
        if kv_cache_dtype not in FlashAttnSm120Backend.supported_kv_cache_dtypes:
            checks.refuse("kv_cache_dtype", f"one of {FlashAttnSm120Backend.supported_kv_cache_dtypes}", kv_cache_dtype)
        self.num_heads = num_heads
        self.head_size = head_size
        self.scale = float(scale)
        self.num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        self.alibi_slopes = None if alibi_slopes is None else torch.tensor(alibi_slopes, dtype=torch.float32)
        self.kv_cache_dtype = kv_cache_dtype
        self.logits_soft_cap = float(logits_soft_cap or 0.0)
        self.attn_type = attn_type
        self.kv_sharing_target_layer_name = kv_sharing_target_layer_name
        self.sinks = sinks
        self.before = -1 if sliding_window is None else sliding_window - 1
        self.sliding_window = (self.before, -1 if sliding_window is None else 0)
        if self.dcp_world_size > 1:
            for name, given in (("sinks", sinks), ("alibi_slopes", alibi_slopes)):
                if given is not None:
                    expected = "None where decode_context_parallel_size is more than 1"
                    checks.refuse(name, expected, checks.describe(given), NotImplementedError)
            self.combine = _dcp_combine()

    def forward(
        self,
        layer: torch.nn.Module,
        query: torch.Tensor,
        key: torch.Tensor | None,
        value: torch.Tensor | None,
        kv_cache: torch.Tensor,
        attn_metadata: FlashAttnSm120Metadata | None,
        output: torch.Tensor,
        output_scale: torch.Tensor | None = None,
        output_block_scale: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Attention of one step into output; returns it. Rows past the last token of the batch are left as they are.

        query, output: (tokens, num_heads, head_size). key, value: (tokens, num_kv_heads, head_size), read by encoders;
            others find them in the cache. attn_metadata: None while vLLM measures memory: output is zeros then.
        kv_cache: (num_blocks, 2, block_size, num_kv_heads, head_size), or (num_blocks, num_kv_heads, block_size,
            2 * head_size), of query's dtype, uint8 or float8.

        Raises NotImplementedError for output_scale and output_block_scale, and as flash_attn_varlen_func does.
        """
        for name, given in (("output_scale", output_scale), ("output_block_scale", output_block_scale)):
            if given is not None:
                checks.refuse(name, "None (out isn't quantized)", checks.describe(given), NotImplementedError)
        if attn_metadata is None:
            return output.fill_(0)
        if self.attn_type in WITHOUT_CACHE:
            if key is None or value is None:
                checks.refuse("key", "key and value for layers without a cache", "None")
            self._encode(query, key, value, attn_metadata, output)
            return output
        k, v = self._halves(kv_cache)
        options: dict[str, Any] = {
            "softmax_scale": self.scale,
            "causal": attn_metadata.causal,
            "window_size": self._window(attn_metadata.causal),
            "softcap": self.logits_soft_cap,
            "alibi_slopes": self.alibi_slopes,
            "learnable_sink": self.sinks,
        }
        if self.kv_cache_dtype in FLOAT8:
            options["k_descale"], options["v_descale"] = _k_descale(layer), layer._v_scale
        if self.dcp_world_size == 1:
            self._attend(query, k, v, attn_metadata, options, output)
        else:
            self._attend_as_rank(query, k, v, attn_metadata, options, output)
        return output

    def do_kv_cache_update(
        self,
        layer: torch.nn.Module,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        slot_mapping: torch.Tensor,
    ) -> None:
        """Writes key and value, (tokens, num_kv_heads, head_size), into the cache's slots, divided by the layer's
        scales.

        slot_mapping: int64 (tokens,), block * block_size + row; negative for a token that isn't kept.
        """
        if self.attn_type in WITHOUT_CACHE:
            return
        k, v = self._halves(kv_cache, as_float8=False)
        write = _cache_writer(self.kv_cache_dtype)
        write(key, value, k, v, slot_mapping, self.kv_cache_dtype, layer._k_scale, layer._v_scale)

    def _encode(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        metadata: FlashAttnSm120Metadata,
        output: torch.Tensor,
    ) -> None:
        """Rows of a request see all of its rows, within the window; nothing is in a cache."""
        rows, lens, most = slice(0, metadata.num_actual_tokens), metadata.query_start_loc, metadata.max_query_len
        flash_attn_varlen_func(
            query[rows],
            key[rows],
            value[rows],
            lens,
            lens,
            most,
            most,
            softmax_scale=self.scale,
            window_size=self._window(False),
            softcap=self.logits_soft_cap,
            alibi_slopes=self.alibi_slopes,
            learnable_sink=self.sinks,
            out=output[rows],
        )

    def _attend(
        self,
        query: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        metadata: FlashAttnSm120Metadata,
        options: dict[str, Any],
        output: torch.Tensor,
    ) -> list:
        """One call for each part, into output; returns what the calls do."""
        returned = []
        for part in metadata.parts:
            rows = slice(part.first, part.last)
            returned.append(
                flash_attn_varlen_func(
                    query[rows],
                    k,
                    v,
                    part.query_start_loc,
                    None,
                    part.max_query_len,
                    metadata.max_seq_len,
                    seqused_k=part.seq_lens,
                    page_table=part.block_table,
                    cp_tot_seqused_k=part.total_lens,
                    out=output[rows],
                    **options,
                )
            )
        return returned

    def _attend_as_rank(
        self,
        query: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        metadata: FlashAttnSm120Metadata,
        options: dict[str, Any],
        output: torch.Tensor,
    ) -> None:
        """This rank's keys for the heads of all ranks of its group, which then combine; each keeps its own heads."""
        from vllm.distributed.parallel_state import get_dcp_group

        group, tokens = get_dcp_group(), slice(metadata.num_actual_tokens)
        heads = group.all_gather(query[tokens].contiguous(), dim=1)
        options |= {"cp_world_size": self.dcp_world_size, "cp_rank": self.dcp_rank, "return_lse": True}
        partial = torch.empty_like(heads)
        lse = torch.cat([lse for _, lse in self._attend(heads, k, v, metadata, options, partial)], dim=1)
        output[tokens] = self.combine(partial, lse.transpose(0, 1).contiguous(), group)

    def _window(self, causal: bool) -> tuple[int, int]:
        """A window that only looks back, where rows may look ahead, reaches as far ahead."""
        return self.sliding_window if causal else (self.before, self.before)

    def _halves(self, kv_cache: torch.Tensor, as_float8: bool = True) -> tuple[torch.Tensor, torch.Tensor]:
        """K and V of the cache, (num_blocks, block_size, num_kv_heads, head_size) each."""
        if kv_cache.dim() == 5:
            k, v = kv_cache.unbind(1)
        else:
            k, v = kv_cache.transpose(1, 2).split(self.head_size, dim=-1)
        if as_float8 and kv_cache.dtype == torch.uint8:
            dtype = FLOAT8[self.kv_cache_dtype]
            return k.view(dtype), v.view(dtype)
        return k, v


def _part(whole: Part, first_request: int, last_request: int, first: int, last: int, max_query_len: int) -> Part:
    """Requests [first_request, last_request) of a batch, tokens [first, last)."""
    requests = slice(first_request, last_request)
    starts = whole.query_start_loc[first_request : last_request + 1]
    return Part(
        first,
        last,
        requests,
        max_query_len,
        starts - first if first else starts,
        whole.seq_lens[requests],
        None if whole.total_lens is None else whole.total_lens[requests],
        whole.block_table[requests],
    )


def _k_descale(layer: Any) -> torch.Tensor | float:
    """The layer's factor of K as the number that vLLM keeps beside the tensor: scores take a number for nothing, a
    tensor costs prefill its largest tile. The tensor while a first step is still to calculate it, and where each head
    has one, of which the number is but the largest."""
    scale, number = layer._k_scale, getattr(layer, "_k_scale_float", None)
    if number is None or getattr(layer, "calculate_kv_scales", False) or scale.numel() > 1:
        return scale
    return number


def _refuse_masks(common: CommonAttentionMetadata) -> None:
    """Raises for what would change which keys a row sees, and isn't offered here."""
    if not isinstance(common.causal, bool):
        checks.refuse("causal", "bool, for all requests", checks.describe(common.causal), NotImplementedError)
    for name in ("mm_req_doc_ranges", "rswa_prefix_lens"):
        given = getattr(common, name, None)
        if given is not None and len(given):
            checks.refuse(name, "None", checks.describe(given), NotImplementedError)


@cache
def _cache_writer(kv_cache_dtype: str) -> Any:
    """vLLM's compiled op, or its Triton kernel where vLLM was built without; that one writes no e5m2."""
    from vllm import _custom_ops

    if hasattr(torch.ops._C_cache_ops, "reshape_and_cache_flash"):
        return _custom_ops.reshape_and_cache_flash
    if kv_cache_dtype == "fp8_e5m2":
        expected = "a dtype that vLLM can write without its compiled ops"
        checks.refuse("kv_cache_dtype", expected, kv_cache_dtype, NotImplementedError)
    from vllm.v1.attention.ops.triton_reshape_and_cache_flash import triton_reshape_and_cache_flash

    return triton_reshape_and_cache_flash


def _dcp_combine() -> Any:
    """(out, lse (tokens, heads), group) -> this rank's heads over all ranks' keys."""
    try:
        from vllm.v1.attention.ops.dcp import cp_lse_ag_out_rs, dcp_a2a_lse_reduce
    except ImportError:
        from vllm.v1.attention.ops.common import cp_lse_ag_out_rs
        from vllm.v1.attention.ops.dcp_alltoall import dcp_a2a_lse_reduce
    config = get_current_vllm_config_or_none()
    all_to_all = config is not None and config.parallel_config.dcp_comm_backend == "a2a"
    return dcp_a2a_lse_reduce if all_to_all else cp_lse_ag_out_rs
