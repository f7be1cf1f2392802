"""PyTorch's SDPA and varlen attention on these kernels, by PyTorch's own dispatcher, and back on its own."""

import logging

import pytest
import torch
from oracle import ints, marks, rand
from torch.nn import attention
from torch.nn.attention import varlen

from flash_attn_sm120 import reference
from flash_attn_sm120.integrations import torch_sdpa

NAMES = tuple(torch_sdpa.WAYS)


class Own:
    """Stands in for the kernels that a PyTorch without CUDA lacks; counts its calls."""

    def __init__(self, library, dispatch_key):
        self.calls = []
        for name in NAMES:
            library.impl(name, self.kernel(name), dispatch_key)

    def kernel(self, name):
        def run(*arguments, **named):
            self.calls.append((name, arguments, named))
            if name.endswith("inplace"):
                return torch.zeros(1)
            query = arguments[0]
            empty = query.new_empty
            ends = (torch.zeros(query.shape[:-1]),)
            ends += (None, None, query.size(2), query.size(2)) if name.startswith("_scaled") else ()
            seed = (empty(2, dtype=torch.uint64), empty((), dtype=torch.uint64), empty(0))
            return (torch.zeros_like(query), *ends, *seed)

        return run


@pytest.fixture
def own():
    """On a CPU; a GPU's kernels are PyTorch's."""
    library = torch.library.Library("aten", "IMPL")
    yield Own(library, "CPU")
    library._destroy()


@pytest.fixture
def active(own, device):
    """The override on the test's device. A CPU needs `own` behind it."""
    handle = torch_sdpa.override(device.torch_device.type.upper())
    yield device.torch_device
    handle.remove()


def heads_first(device, batch, heads, seqlen, head_dim=32):
    """As a projection leaves it: (batch, seqlen, heads, head_dim) seen as (batch, heads, seqlen, head_dim)."""
    return rand(device, batch, seqlen, heads, head_dim).transpose(1, 2)


def assert_near(found, expected):
    torch.testing.assert_close(found.float(), expected.float(), rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("causal", [False, True])
def test_sdpa(causal, active, own):
    q, k, v = (heads_first(active, 2, heads, 21) for heads in (4, 2, 2))
    found = torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, 0.0, causal, False, scale=0.3)
    options = {"is_causal": causal, "scale": 0.3, "enable_gqa": True}
    with attention.sdpa_kernel(attention.SDPBackend.MATH):
        expected = torch.nn.functional.scaled_dot_product_attention(q.float(), k.float(), v.float(), **options)
    assert_near(found[0], expected)
    assert found[0].stride() == torch.empty_like(q).stride()
    _, lse = reference.attention(*(x.transpose(1, 2) for x in (q, k, v)), causal=causal, softmax_scale=0.3)
    assert_near(found[1], lse)
    assert found[2:6] == (None, None, 21, 21) and found[6].shape == (2,) and found[7].shape == ()
    assert found[6].dtype == found[7].dtype == torch.uint64 and found[8].numel() == 0
    assert not own.calls


def test_forward_with_windows_slopes_and_lengths(active, own):
    q, k, v = (rand(active, 2, 20, heads, 32) for heads in (4, 2, 2))
    slopes, used = torch.rand(4, device=active), ints(active, 20, 7)
    out, lse, *_ = torch.ops.aten._flash_attention_forward(
        q, k, v, None, None, 20, 20, 0.0, False, False,
        window_size_left=6, window_size_right=2, alibi_slopes=slopes, seqused_k=used,
    )  # fmt: skip
    expected, expected_lse = reference.attention(q, k, v, window_size=(6, 2), alibi_slopes=slopes, seqused_k=used)
    assert_near(out, expected)
    assert_near(lse, expected_lse)
    assert not own.calls


def test_varlen_attn(active, own):
    q, k, v, where = rand(active, 25, 4, 32), rand(active, 25, 2, 32), rand(active, 25, 2, 32), marks(active, 16, 9)
    named = {"window_size": (-1, 0), "enable_gqa": True, "return_aux": varlen.AuxRequest(lse=True)}
    out, lse = varlen.varlen_attn(q, k, v, where, where, 16, 16, **named)
    expected, expected_lse = reference.attention(q, k, v, cu_seqlens_q=where, cu_seqlens_k=where, causal=True)
    assert_near(out, expected)
    assert_near(lse, expected_lse)
    written = torch.zeros_like(q)
    _, lse = varlen.varlen_attn_out(written, q, k, v, where, where, 16, 16, **named)
    assert torch.equal(written, out)
    assert_near(lse, expected_lse)
    assert not own.calls


def test_pages(device):
    """By the function behind the operator, as not every PyTorch hands pages to it."""
    where = device.torch_device
    q, pool, marks_q, used = rand(where, 5, 2, 32), rand(where, 6, 8, 2, 32), marks(where, 3, 2), ints(where, 20, 9)
    table = ints(where, 5, 1, 3, 4, 0, 2).view(2, 3)
    named = {"seqused_k": used, "block_table": table, "num_splits": 2, "scale": 0.25}
    out, *_ = torch_sdpa.forward(q, pool, pool, marks_q, None, 3, 24, 0.0, False, False, **named)
    lengths = {"cu_seqlens_q": marks_q, "seqused_k": used, "page_table": table}
    assert_near(out, reference.attention(q, pool, pool, softmax_scale=0.25, **lengths)[0])


def float32(q, k, v):
    return torch.ops.aten._scaled_dot_product_flash_attention(q.float(), k.float(), v.float())


def dropout(q, k, v):
    return torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, 0.1, True)


def debug_mask(q, k, v):
    return torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, 0.0, False, True)


def gradient(q, k, v):
    return torch.ops.aten._scaled_dot_product_flash_attention(q.clone().requires_grad_(), k, v)


def narrow_v(q, k, v):
    return torch.ops.aten._flash_attention_forward(q, k, v[..., :8], None, None, 20, 20, 0.0, False, False)


def odd_head_dim(q, k, v):
    return torch.ops.aten._flash_attention_forward(
        q[..., :12], k[..., :12], v[..., :12], None, None, 20, 20, 0.0, False, False
    )


def long_lengths(q, k, v):
    where = torch.tensor([0, 9, 20])
    q, k, v = (x[0].transpose(0, 1) for x in (q, k, v))
    return torch.ops.aten._flash_attention_forward(q, k, v, where, where, 11, 11, 0.0, False, False)


CASES = {
    float32: "q: expected bfloat16",
    dropout: "dropout_p: expected 0",
    debug_mask: "return_debug_mask: expected False",
    gradient: "expected no gradient",
    narrow_v: "value: expected a head_dim of 32",
    odd_head_dim: "multiple of 8",
    long_lengths: "cu_seqlens_q: expected int32",
}


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.__name__)
def test_the_rest_goes_to_pytorchs_kernel(case, own, recorder, caplog):
    handle = torch_sdpa.override("CPU")
    q, k, v = (heads_first("cpu", 1, 2, 20) for _ in range(3))
    try:
        with caplog.at_level(logging.DEBUG, "flash_attn_sm120.sdpa"):
            case(q, k, v)
    finally:
        handle.remove()
    ((name, arguments, _),) = own.calls
    assert name in NAMES and arguments[0].shape[-2] in (20, 2)
    assert CASES[case] in caplog.text
    assert not recorder.calls


def test_arguments_reach_pytorchs_kernel_as_they_came(own, recorder):
    handle = torch_sdpa.override("CPU")
    q = heads_first("cpu", 1, 2, 20)
    torch.ops.aten._scaled_dot_product_flash_attention(q, q, q, 0.25, True, scale=0.5)
    handle.remove()
    ((_, arguments, named),) = own.calls
    assert arguments[3:5] == (0.25, True) and named == {"scale": 0.5}


def test_gradients_without_a_graph_are_ours(active, own):
    q, k, v = (heads_first(active, 1, 2, 20).requires_grad_() for _ in range(3))
    with torch.no_grad():
        torch.ops.aten._scaled_dot_product_flash_attention(q, k, v)
    assert not own.calls


def test_removing_gives_back_pytorchs_kernels(own, recorder):
    q = heads_first("cpu", 1, 2, 20)
    handle = torch_sdpa.override("CPU")
    torch.ops.aten._scaled_dot_product_flash_attention(q, q, q)
    assert len(recorder.calls) == 1 and not own.calls
    handle.remove()
    handle.remove()
    torch.ops.aten._scaled_dot_product_flash_attention(q, q, q)
    assert len(recorder.calls) == 1 and len(own.calls) == 1


def test_the_name_is_activated_and_restored_by_pytorch(monkeypatch):
    asked = []

    class Handle:
        def remove(self):
            asked.append("removed")

    def override(dispatch_key="CUDA"):
        asked.append(dispatch_key)
        return Handle()

    monkeypatch.setattr(torch_sdpa, "override", override)
    torch_sdpa.register()
    assert torch_sdpa.NAME in attention.list_flash_attention_impls()
    attention.activate_flash_attention_impl("FLASH_ATTN_SM120")
    assert attention.current_flash_attention_impl() == "FLASH_ATTN_SM120"
    attention.restore_flash_attention_impl()
    assert attention.current_flash_attention_impl() is None
    assert asked == ["CUDA", "removed"]


def test_activation_without_the_flash_backend_leaves_pytorch_alone():
    """As in a PyTorch that was built without CUDA."""
    torch_sdpa.register()
    attention.activate_flash_attention_impl("FLASH_ATTN_SM120")
    try:
        q = torch.randn(1, 2, 20, 32)
        assert torch.nn.functional.scaled_dot_product_attention(q, q, q).shape == q.shape
    finally:
        attention.restore_flash_attention_impl()


def test_an_older_pytorch_is_told_so(monkeypatch):
    monkeypatch.delattr(attention, "register_flash_attention_impl")
    with pytest.raises(NotImplementedError, match=r"torch: expected 2\.11 or later"):
        torch_sdpa.register()


def test_on_a_gpu_sdpa_is_ours(gpu, caplog):
    q, k, v = (heads_first(gpu, 2, heads, 300, 64) for heads in (4, 2, 2))
    torch_sdpa.register()
    options = {"is_causal": True, "enable_gqa": True}
    with attention.sdpa_kernel(attention.SDPBackend.MATH):
        expected = torch.nn.functional.scaled_dot_product_attention(q.float(), k.float(), v.float(), **options)
    attention.activate_flash_attention_impl("FLASH_ATTN_SM120")
    try:
        caplog.set_level(logging.DEBUG, "flash_attn_sm120.sdpa")
        with attention.sdpa_kernel(attention.SDPBackend.FLASH_ATTENTION):
            found = torch.nn.functional.scaled_dot_product_attention(q, k, v, **options)
    finally:
        attention.restore_flash_attention_impl()
    assert_near(found, expected)
    assert not caplog.records
