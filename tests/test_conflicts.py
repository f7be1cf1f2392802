"""What CONFLICTS_LOG.md says is held, held: by looking at the classes and at the sources of the kernels."""

import ast
import importlib
import inspect
import pkgutil
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from sparse_cases import random_blocks

import flash_attn_sm120
from flash_attn_sm120 import dispatch, flash_attn_func
from flash_attn_sm120.problem import AttentionProblem
from flash_attn_sm120.variants import changed_variants, variants

PACKAGE = Path(flash_attn_sm120.__file__).parent
SOURCES = sorted([*PACKAGE.glob("kernels/*.py"), *PACKAGE.glob("device/*.py")])


def kernel_classes():
    """Every class of flash_attn_sm120.kernels that is called with a stream."""
    pytest.importorskip("cutlass")
    from flash_attn_sm120 import kernels

    found = {}
    for module in pkgutil.iter_modules(kernels.__path__, f"{kernels.__name__}."):
        for name, value in vars(importlib.import_module(module.name)).items():
            if inspect.isclass(value) and value.__module__ == module.name and hasattr(value, "kernel"):
                found[name] = value
    return found


def test_stream_is_last():
    classes = kernel_classes()
    assert {"FlashAttentionForwardSm80", "FlashAttentionForwardSm120"} <= set(classes)
    for name, value in classes.items():
        parameters = list(inspect.signature(value.__call__).parameters.values())
        assert parameters[-1].name == "stream", f"{name}.__call__ ends in {parameters[-1].name}"
        assert all(p.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD for p in parameters)


def test_pack_gqa_is_off():
    classes = {name: value for name, value in kernel_classes().items() if name.startswith("FlashAttentionForwardSm120")}
    assert classes
    problem = AttentionProblem("bfloat16", 128, 128)
    for value in classes.values():
        assert value(problem, dispatch.choose(problem)).pack_gqa is False
    assert "pack_gqa" not in {field.name for field in fields(AttentionProblem)}


def offences(source):
    """Lines that break the rule of compile-time conditions, with the reason."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.If | ast.IfExp | ast.While):
            continue
        if isinstance(node.test, ast.BoolOp):
            static = [is_static(operand) for operand in node.test.values]
            if any(static) and not all(static):
                found.append((node.lineno, "a compile-time condition joined with a run-time one"))
        if isinstance(node, ast.If) and "spars" in ast.unparse(node.test):
            both = assigned(node.body) & assigned(node.orelse)
            if both:
                found.append((node.lineno, f"{', '.join(sorted(both))} in the block-sparse branch without bs_"))
    return found


def is_static(node):
    return isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-1] == "const_expr"


def assigned(statements):
    return {
        node.id
        for statement in statements
        for node in ast.walk(statement)
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)
    }


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_conditions_are_nested_and_sparse_names_are_their_own(path):
    assert not offences(path.read_text())


@pytest.mark.parametrize(
    "source, count",
    [
        ("if const_expr(a) and b > 0: x = 1", 1),
        ("if cutlass.const_expr(a) or b: x = 1", 1),
        ("while const_expr(a) and b: x = 1", 1),
        ("if const_expr(a and b): x = 1", 0),
        ("if const_expr(a) and const_expr(b): x = 1", 0),
        ("if const_expr(a):\n    if b > 0: x = 1", 0),
        ("if const_expr(self.use_block_sparsity):\n    row_scale = 1\nelse:\n    row_scale = 2", 1),
        ("if const_expr(self.use_block_sparsity):\n    bs_row_scale = 1\nelse:\n    row_scale = 2", 0),
    ],
)
def test_the_rule_itself(source, count):
    assert len(offences(source)) == count


def test_sources_are_there():
    assert len(SOURCES) > 5


def test_varlen_never_takes_tma():
    for problem in variants():
        for packed in (False, True):
            for seqused in (False, True):
                mixed = {"packed_q": packed, "packed_k": packed, "seqused_q": seqused, "seqused_k": seqused}
                values = {field.name: getattr(problem, field.name) for field in fields(problem)}
                varied = AttentionProblem(**{**values, **mixed})
                if varied.varlen:
                    assert "tma" not in dispatch.choose(varied).kernel


@pytest.mark.parametrize("arch", ["sm_90a", "sm_120a", "sm_121a"])
def test_tma_brings_zeros_only_where_the_tensor_ends(arch):
    pytest.importorskip("cutlass")
    ways = set()
    for problem in changed_variants():
        for plan in dispatch.candidates(problem, arch):
            ways.add(plan.way)
            assert plan.way != "tma" or not (problem.varlen or problem.paged)
            assert plan.way != "page_boxes" or not problem.block_sparse
    assert ways == {"tma", "cp_async", "pages", "page_boxes", "fp8"}


def keep_all(batch, head, q_idx, kv_idx, seqlen_info, aux_tensors):
    return kv_idx >= 0


@pytest.mark.parametrize("rows", [1, 16])
def test_changed_calls_of_few_rows_are_not_decoded(rows, recorder):
    q, k = (torch.zeros(2, n, 2, 64, dtype=torch.bfloat16) for n in (rows, 99))
    lists = random_blocks(1, 1, rows, 99, (64, 32), 0.5, ("full",))
    for given in ({"dropout_p": 0.1}, {"mask_mod": keep_all}, {"block_sparse_tensors": lists}, {}):
        flash_attn_func(q, k, k, **given)
    assert [problem.decode for problem in recorder.problems] == [False, False, False, True]


def test_only_decode_lets_keys_give_way_in_l2():
    """Prefill's blocks of other heads and rows read them again."""
    pytest.importorskip("cutlass")
    from flash_attn_sm120.compile import build

    for decode in (False, True):
        problem = AttentionProblem("bfloat16", 64, 64, seqused_k=True, page_size=24, decode=decode, split=decode)
        ptx = build(problem, dispatch.choose(problem), "sm_120a", keep=True).__ptx__
        copies = [line for line in ptx.splitlines() if "cp.async.cg" in line]
        assert copies and all(("L2::cache_hint" in line) == decode for line in copies)
