"""The same inputs on a GPU and on the simulator."""

import itertools

import pytest
import torch

from flash_attn_sm120 import flash_attn_func, flash_attn_varlen_func, simulator

CASES = list(itertools.product((64, 128), (torch.bfloat16, torch.float16), (False, True), ("dense", "packed")))
CASES += list(itertools.product((96, 256), (torch.bfloat16,), (False, True), ("dense",)))


def last_places(x: torch.Tensor) -> torch.Tensor:
    """Numbers that differ by 1 where values of x's 16-bit dtype are neighbours."""
    bits = x.contiguous().view(torch.int16).int()
    return torch.where(bits < 0, -(bits & 0x7FFF), bits)


@pytest.mark.parametrize("head_dim, dtype, causal, form", CASES)
def test_outputs_agree(gpu, head_dim, dtype, causal, form):
    """At least 99% of out bitwise equal, the rest within one unit in the last place; lse within 1e-5."""
    q = torch.randn(2, 150, 4, head_dim).to(dtype)
    k, v = (torch.randn(2, 201, 2, head_dim).to(dtype) for _ in range(2))
    function, options = flash_attn_func, {"causal": causal, "return_lse": True}
    if form == "packed":
        q, k, v = (x.flatten(0, 1) for x in (q, k, v))
        options["cu_seqlens_q"] = torch.tensor([0, 17, 18, 300], dtype=torch.int32)
        options["cu_seqlens_k"] = torch.tensor([0, 190, 200, 402], dtype=torch.int32)
        options |= {"max_seqlen_q": 282, "max_seqlen_k": 202}
        function = flash_attn_varlen_func
    on_gpu = {name: x.to(gpu) if isinstance(x, torch.Tensor) else x for name, x in options.items()}
    out, lse = (x.cpu() for x in function(q.to(gpu), k.to(gpu), v.to(gpu), **on_gpu))
    with simulator.simulate():
        simulated, simulated_lse = function(q, k, v, **options)
    equal = (out.view(torch.int16) == simulated.view(torch.int16)).float().mean().item()
    apart = (last_places(out) - last_places(simulated)).abs().max().item()
    lse_equal = (lse == simulated_lse).float().mean().item()
    found = f"out: {equal:.4%} bitwise equal, at most {apart} last places apart; lse: {lse_equal:.2%} bitwise equal"
    print(found)
    assert equal >= 0.99 and apart <= 1, found
    torch.testing.assert_close(lse, simulated_lse, rtol=0, atol=1e-5)
