"""Q beside K of 8 bits: each matrix warp brings its own rows to shared memory, as f16, which K's values fit exactly.

bfloat16 has eight significant bits and f16 eleven, but a smaller range. Elements are divided by 2^Q_SHIFT: all below
2^24 fit, and what those below 2^-6 lose is 2^-17 at most. Larger ones become NaN, and so do their rows' results. A
factor a row would fit any, but registers for it aren't left beside the largest tile.
"""

from __future__ import annotations

from cutlass import Float32, Int32, Int64, cute

from flash_attn_sm120.device.fp8 import floats
from flash_attn_sm120.device.paged_kv import LANES, RowSource, Sharing
from flash_attn_sm120.device.ptx import (
    infinite_to_nan,
    lane_anew,
    load_global_v4_if,
    pack_pair,
    store_shared_v4,
)

Q_SHIFT = 8


def load_query(
    source: RowSource, first_row: Int32, seqlen_q: Int32, shared: Int32, rows: int, factor: Float32 | float | None
) -> None:
    """A warp's `rows` rows, from first_row of the sequence on, to shared memory; zeros from seqlen_q on. factor: what
    elements, which are bf16 then, are multiplied by on the way to f16; None where they are f16."""
    layout = source.layout
    own = Sharing(lane_anew, LANES, layout.units, rows, neighbours=False).own()
    start = Int64(first_row + own.first) * source.row_stride
    loaded = [
        (i, first_unit, load_global_v4_if(address + first_unit * 16, exists))
        for i, first_unit, address, exists in source.units(own, first_row, start, None, seqlen_q)
    ]
    for i, first_unit, pairs in loaded:
        chunk, unit = divmod(first_unit, layout.units)
        place = own.offset(layout, i, own.unit + unit) + chunk * layout.chunk_bytes
        store_shared_v4(shared + place, pairs if factor is None else [to_f16(pair, factor) for pair in pairs])
    cute.arch.sync_warp()


def to_f16(pair: Int32, factor: Float32 | float) -> Int32:
    """A packed pair of bf16, times factor."""
    low, high = floats(pair)
    return infinite_to_nan(pack_pair(low * factor, high * factor, "f16"))
