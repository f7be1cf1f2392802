"""The operators of torch.library: what PyTorch asks of them; compiled and exported functions compute the same."""

import inspect
import subprocess
import sys

import pytest
import torch
from oracle import ints, marks, rand
from torch._dynamo.testing import CompileCounterWithBackend

from flash_attn_sm120 import flash_attn_combine, flash_attn_func, flash_attn_varlen_func
from flash_attn_sm120.block_sparse import BlockSparseTensors
from flash_attn_sm120.integrations import torch_ops
from flash_attn_sm120.mods import scores

OPS = getattr(torch.ops, torch_ops.NAMESPACE)


@pytest.fixture(autouse=True)
def nothing_compiled():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


class Model(torch.nn.Module):
    """Two layers of attention on (batch, seqlen, width)."""

    def __init__(self, device, heads=2, head_dim=32):
        super().__init__()
        self.heads, width = heads, heads * head_dim
        make = {"device": device, "dtype": torch.bfloat16}
        self.inward = torch.nn.ModuleList(torch.nn.Linear(width, 3 * width, **make) for _ in range(2))
        self.outward = torch.nn.ModuleList(torch.nn.Linear(width, width, **make) for _ in range(2))

    def forward(self, x):
        for inward, outward in zip(self.inward, self.outward, strict=True):
            q, k, v = inward(x).unflatten(-1, (3, self.heads, -1)).unbind(-3)
            x = x + outward(flash_attn_func(q, k, v, causal=True).flatten(-2))
        return x


def dense(device, batch=1, seqlen_q=20, seqlen_k=24):
    return (
        rand(device, batch, seqlen_q, 2, 32),
        rand(device, batch, seqlen_k, 1, 32),
        rand(device, batch, seqlen_k, 1, 32),
    )


def packed(device, *lengths, heads=2):
    total, where = sum(lengths), marks(device, *lengths)
    return rand(device, total, heads, 32), rand(device, total, 1, 32), rand(device, total, 1, 32), where


def paged(device):
    return rand(device, 2, 3, 2, 32), rand(device, 6, 8, 1, 32), rand(device, 6, 8, 1, 32), ints(device, 20, 9)


CHECKS = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")


@pytest.mark.parametrize("lse", [False, True])
def test_opcheck(lse, device):
    q, k, v = dense(device.torch_device)
    named = {"causal": True, "return_lse": lse}
    found = torch.library.opcheck(OPS.fwd.default, (q, k, v), named)
    found |= torch.library.opcheck(OPS.fwd_out.default, (q, k, v), named | {"out": torch.zeros_like(q)})
    assert found == dict.fromkeys(CHECKS, "SUCCESS")


def test_opcheck_varlen(device):
    q, k, v, where = packed(device.torch_device, 12, 9)
    arguments, named = (q, k, v, where, where, 12, 12), {"causal": True, "return_lse": True}
    torch.library.opcheck(OPS.varlen_fwd.default, arguments, named)
    torch.library.opcheck(OPS.varlen_fwd_out.default, arguments, named | {"out": torch.zeros_like(q)})


def test_opcheck_paged(device):
    q, k, v, used = paged(device.torch_device)
    table = ints(device.torch_device, 5, 1, 3, 4, 0, 2).view(2, 3)
    named = {"num_splits": 2, "return_lse": True}
    torch.library.opcheck(OPS.paged_fwd.default, (q, k, v, table, used), named)
    torch.library.opcheck(OPS.paged_fwd_out.default, (q, k, v, table, used), named | {"out": torch.zeros_like(q)})


def test_opcheck_combine(device):
    parts = torch.randn(3, 1, 5, 2, 32, device=device.torch_device)
    weights = torch.randn(3, 1, 5, 2, device=device.torch_device)
    named = {"out_dtype": torch.bfloat16}
    torch.library.opcheck(OPS.combine.default, (parts, weights), named)
    out = torch.zeros_like(parts[0], dtype=torch.bfloat16)
    torch.library.opcheck(OPS.combine_out.default, (parts, weights), {"out": out, "return_lse": False})


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_a_model_compiles_once_for_all_lengths(backend, device):
    model = Model(device.torch_device)
    compiled = torch.compile(model, backend=backend, fullgraph=True, dynamic=True)
    with torch.no_grad(), torch._dynamo.config.patch(error_on_recompile=True):
        for batch, seqlen in ((2, 20), (3, 9), (2, 33)):
            x = rand(device.torch_device, batch, seqlen, 64)
            torch.testing.assert_close(compiled(x), model(x), rtol=2e-2, atol=2e-2)


def test_lengths_that_choose_another_kernel_are_no_recompile(device):
    """max_seqlen_q of at most 16 is the decode kernel's."""

    def attend(q, k, v, where, most):
        return flash_attn_varlen_func(q, k, v, where, where, most, most, causal=True)

    compiled = torch.compile(attend, backend="aot_eager", fullgraph=True, dynamic=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for lengths in ((20, 7), (9, 8), (3, 18)):
            given = (*packed(device.torch_device, *lengths), max(lengths))
            assert torch.equal(compiled(*given), attend(*given))


def test_out_is_written_in_a_compiled_function(device):
    def attend(q, k, v, out):
        result, lse = flash_attn_func(q, k, v, out=out, return_lse=True)
        return result + 1, lse

    q, k, v = dense(device.torch_device)
    out, expected = torch.zeros_like(q), torch.zeros_like(q)
    plus, lse = torch.compile(attend, backend="inductor", fullgraph=True)(q, k, v, out)
    expected_plus, expected_lse = attend(q, k, v, expected)
    assert torch.equal(out, expected) and torch.equal(plus, expected_plus) and torch.equal(lse, expected_lse)


def test_export(device):
    model = Model(device.torch_device)
    x = rand(device.torch_device, 2, 20, 64)
    with torch.no_grad():
        program = torch.export.export(model, (x,), dynamic_shapes=({1: torch.export.Dim("seqlen", min=2)},))
        assert sum(node.target is OPS.fwd.default for node in program.graph.nodes) == 2
        for seqlen in (20, 13):
            x = rand(device.torch_device, 2, seqlen, 64)
            torch.testing.assert_close(program.module()(x), model(x), rtol=2e-2, atol=2e-2)


def every_option(device="cpu"):
    """(function, arguments, options): each option of the public functions is in one, with a value that matters."""
    q, k, v = dense(device, batch=2)
    sink, slopes = torch.randn(2, device=device), torch.rand(2, 2, device=device)
    scale = torch.rand(2, 1, device=device) + 0.5
    number = {"k_descale": 1.5, "v_descale": 0.75}
    seed = torch.tensor([7, 8], device=device)
    total = ints(device, 47, 48)
    packed_q, packed_k, packed_v, where = packed(device, 12, 9)
    pool = paged(device)
    table = ints(device, 5, 1, 3, 4, 0, 2).view(2, 3)
    return [
        (flash_attn_func, (q, k, v), {"softmax_scale": 0.3, "window_size": (5, 2), "softcap": 2.0, "s_aux": sink}),
        (flash_attn_func, (q, k, v), {"alibi_slopes": slopes, "attention_chunk": 5, "window_size": (None, 3)}),
        (flash_attn_func, (q, k, v), {"seqused_k": ints(device, 20, 3), "causal": True, "return_lse": True}),
        (flash_attn_func, (q[:, :3], k, v), {"num_splits": 3, "learnable_sink": sink, "return_lse": True}),
        (flash_attn_func, (q, k.to(torch.float8_e4m3fn), v.to(torch.float8_e4m3fn)), number),
        (flash_attn_func, (q, k, v), {"k_descale": scale, "v_descale": scale, "pack_gqa": True, "q_descale": 1}),
        (flash_attn_func, (q, k, v), {"cp_world_size": 2, "cp_rank": 1, "cp_tot_seqused_k": total, "causal": True}),
        (flash_attn_func, (q, k, v), {"dropout_p": 0.25, "dropout_seed": seed, "return_rng_state": True}),
        (flash_attn_func, (q, k, v), {"dropout_p": 0.25, "dropout_seed": 11 << 32 | 5, "return_lse": True}),
        (flash_attn_func, pool[:3], {"block_table": table, "seqused_k": pool[3], "causal": True}),
        (
            flash_attn_varlen_func,
            (packed_q, packed_k, packed_v, where, where, 12, 12),
            {"seqused_q": ints(device, 10, 9), "causal": True, "return_lse": True},
        ),
        (
            flash_attn_varlen_func,
            (packed_q[:6], *pool[1:3], marks(device, 4, 2), None, 4, 24),
            {"page_table": table, "seqused_k": pool[3], "window_size": (7, 0), "num_splits": 2},
        ),
        (
            flash_attn_combine,
            (torch.randn(3, 2, 5, 2, 32, device=device), torch.randn(3, 2, 5, 2, device=device)),
            {"out_dtype": torch.float16, "seqused": ints(device, 5, 2), "learnable_sink": sink},
        ),
    ]


@pytest.mark.parametrize("case", range(len(every_option())))
def test_every_option_reaches_the_kernel_from_a_graph(case, reference_kernels):
    function, arguments, options = every_option()[case]
    expected = function(*arguments, **options)
    found = torch.compile(lambda *given: function(*given, **options), backend="eager", fullgraph=True)(*arguments)
    expected, found = ((one,) if isinstance(one, torch.Tensor) else one for one in (expected, found))
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0, equal_nan=True)


def test_every_option_is_tried():
    """But those that a graph has no place for, and what only gives another name."""
    tried = {name for _, _, options in every_option() for name in options}
    tried |= {"q", "k", "v", "cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k", "out", "later"}
    outside = {"score_mod", "mask_mod", "aux_tensors", "aux_scalars", "block_sparse_tensors", "scheduler_metadata"}
    for function in (flash_attn_func, flash_attn_varlen_func):
        assert set(inspect.signature(function).parameters) <= tried | outside


def test_a_drawn_seed_is_the_graphs(reference_kernels):
    q, k, v = dense("cpu")

    @torch.compile(backend="aot_eager", fullgraph=True)
    def attend(q, k, v):
        return flash_attn_func(q, k, v, dropout_p=0.5, return_rng_state=True)

    out, seed = attend(q, k, v)
    assert torch.equal(out, flash_attn_func(q, k, v, dropout_p=0.5, dropout_seed=seed))
    assert not torch.equal(seed, attend(q, k, v)[1])


def softcapped(q, k, v):
    return flash_attn_func(q * 1, k, v, score_mod=scores.softcap(5.0)) * 1


def test_mods_break_the_graph(device):
    q, k, v = dense(device.torch_device)
    counter = CompileCounterWithBackend("eager")
    assert torch.equal(torch.compile(softcapped, backend=counter)(q, k, v), softcapped(q, k, v))
    assert counter.frame_count == 2
    with pytest.raises(torch._dynamo.exc.Unsupported, match="score_mod, mask_mod"):
        torch.compile(softcapped, backend="eager", fullgraph=True)(q, k, v)


def test_mods_and_sparse_blocks_are_not_exported(recorder):
    q, k, v = dense("cpu")
    lists = (ints("cpu", 0).view(1, 1, 1), ints("cpu", 0).view(1, 1, 1, 1))
    blocks = BlockSparseTensors(*lists, *lists)

    class Attention(torch.nn.Module):
        def __init__(self, **options):
            super().__init__()
            self.options = options

        def forward(self, q, k, v):
            return flash_attn_func(q, k, v, **self.options)

    for name, value in (("score_mod", scores.softcap(5.0)), ("block_sparse_tensors", blocks)):
        with pytest.raises(NotImplementedError, match=rf"{name}: expected None in torch.export"):
            torch.export.export(Attention(**{name: value}), (q, k, v), strict=False)
    assert not recorder.calls


def test_gradients_are_refused(recorder):
    q, k, v = dense("cpu")
    q.requires_grad_()
    with pytest.raises(NotImplementedError, match="q: expected no gradient"):
        OPS.fwd(q, k, v)
    for backend in ("eager", "aot_eager"):
        with pytest.raises(Exception, match="q: expected no gradient"):
            torch.compile(flash_attn_func, backend=backend)(q, k, v)
    with torch.no_grad():
        assert torch.compile(flash_attn_func, backend="aot_eager")(q, k, v).shape == q.shape
    assert len(recorder.calls) == 1


def test_errors_are_those_of_the_functions(recorder):
    q, k, v = dense("cpu")
    with pytest.raises(ValueError, match=r"v: expected shape \(1, 24, 1, 'head_dim_v'\)"):
        OPS.fwd(q, k, v[:, :5])
    with pytest.raises(ValueError, match="dropout_seed: expected int64"):
        OPS.fwd(q, k, v, dropout_p=0.5)
    with pytest.raises(ValueError, match="k_descale_number: expected None beside k_descale"):
        OPS.fwd(q, k, v, k_descale=torch.ones(1), k_descale_number=2.0)
    with pytest.raises(ValueError, match="window_size: expected ints >= 0"):
        OPS.fwd(q, k, v, window_left=-3)
    with pytest.raises(ValueError, match="max_seqlen_q: expected an int >= 0"):
        OPS.varlen_fwd(q, k, v, max_seqlen_q=-1)
    assert not recorder.calls


def test_a_cpu_without_the_simulator_is_refused():
    with pytest.raises(
        ValueError, match=r"q: expected a tensor on a CUDA device, got cpu \(flash_attn_sm120.simulator"
    ):
        OPS.fwd(*dense("cpu"))


def test_operators_and_the_public_functions_agree_on_defaults():
    """A default that differs would be another result in a graph."""
    names = {"window_left": ("window_size", -1), "window_right": ("window_size", -1)}
    parameters = inspect.signature(flash_attn_varlen_func).parameters
    for argument in OPS.varlen_fwd.default._schema.arguments:
        if argument.name in ("q", "k", "v") or argument.name.endswith("_number"):
            continue
        name, default = names.get(argument.name, (argument.name, argument.default_value))
        assert name in parameters
        if name == argument.name:
            assert parameters[name].default == default
        else:
            assert parameters[name].default == (default, default) and argument.default_value == default


def test_libraries_are_loaded_when_they_are_used():
    """torch._dynamo and transformers take seconds to import."""
    code = (
        "import sys, flash_attn_sm120.interface, flash_attn_sm120.combine\n"
        "import flash_attn_sm120.integrations.transformers, flash_attn_sm120.integrations.torch_sdpa\n"
        "sys.exit('torch._dynamo' in sys.modules or 'transformers' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
