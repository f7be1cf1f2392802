"""PyTorch's and transformers' integrations on a GPU; from the root: python tests/integration/transformers_gpu.py.

It needs the package, torch 2.11 or later and transformers 5.17 or later, and no network: models are made from
configurations, with random weights. Prints a table; the exit status is the number of rows that failed.
"""

from __future__ import annotations

import argparse
import sys
import time
import traceback
from collections.abc import Callable, Iterator

import torch
import transformers
from torch.nn import attention

from flash_attn_sm120 import flash_attn_func
from flash_attn_sm120.integrations import torch_ops, torch_sdpa
from flash_attn_sm120.integrations import transformers as integration

DEVICE = torch.device("cuda")
OUR_KERNEL = "flash_attn_sm120"  # is in the names of all that the DSL compiles of us
NAME = "flash_attn_sm120"
COMMON = {
    "vocab_size": 1024, "hidden_size": 512, "intermediate_size": 1024, "num_hidden_layers": 4,
    "num_attention_heads": 8, "num_key_value_heads": 2, "initializer_range": 0.05, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": None, "max_position_embeddings": 4096,
}  # fmt: skip
SLIDING = {"layer_types": ["sliding_attention", "full_attention"] * 2, "sliding_window": 128}
MODELS = {
    "Llama": ("LlamaConfig", "LlamaForCausalLM", {"head_dim": 128}),
    "Qwen3": ("Qwen3Config", "Qwen3ForCausalLM", {"head_dim": 128}),
    "Gemma-3": ("Gemma3TextConfig", "Gemma3ForCausalLM", {"head_dim": 256, **SLIDING}),
    "gpt-oss": (
        "GptOssConfig",
        "GptOssForCausalLM",
        {"head_dim": 64, "num_local_experts": 4, "num_experts_per_tok": 4, **SLIDING},
    ),
}
PROMPT = 300
NEW_TOKENS = 64


def make_model(name: str) -> torch.nn.Module:
    config_name, model_name, changes = MODELS[name]
    torch.manual_seed(0)
    model = getattr(transformers, model_name)(getattr(transformers, config_name)(**{**COMMON, **changes}))
    for parameter_name, parameter in model.named_parameters():
        if parameter_name.endswith("sinks"):
            torch.nn.init.normal_(parameter)
    return model.to(DEVICE, torch.bfloat16).eval()


def make_inputs(padded: bool) -> dict[str, torch.Tensor]:
    """Two prompts, the first of which is padded on the left."""
    torch.manual_seed(1)
    mask = torch.ones(2, PROMPT, dtype=torch.long, device=DEVICE)
    if padded:
        mask[0, :77] = 0
    return {"input_ids": torch.randint(2, COMMON["vocab_size"], mask.shape, device=DEVICE), "attention_mask": mask}


@torch.no_grad()
def logits(model: torch.nn.Module, implementation: str, dtype: torch.dtype, inputs: dict) -> torch.Tensor:
    model.set_attn_implementation(implementation)
    return model.to(dtype)(**inputs).logits.float()


def check_logits(name: str, padded: bool) -> str:
    """The error against eager in float32 is at most twice that of eager in bfloat16."""
    model, inputs = make_model(name), make_inputs(padded)
    there = inputs["attention_mask"].bool()
    exact = logits(model, "eager", torch.float32, inputs)[there]
    rounded, found = (logits(model, way, torch.bfloat16, inputs)[there] for way in ("eager", NAME))
    error, limit = (found - exact).abs().max().item(), 2 * (rounded - exact).abs().max().item()
    assert error <= limit, f"error {error:.4f}, at most {limit:.4f} is allowed"
    return f"error {error:.4f} (limit {limit:.4f}), logits up to {exact.abs().max().item():.2f}"


@torch.no_grad()
def check_generation(name: str, cache: str, padded: bool, compiled: bool = False) -> str:
    """Tokens equal eager's up to where eager's two best logits are closer than twice the noise of bfloat16: from there
    the two go on from different texts. Each step of ours is checked on eager's text too, so that every step counts."""
    model, inputs = make_model(name), make_inputs(padded)
    options = {"max_new_tokens": NEW_TOKENS, "do_sample": False, "cache_implementation": cache}
    texts = {}
    for way in ("eager", NAME):
        model.set_attn_implementation(way)
        skip = way == "eager" or not compiled
        texts[way] = model.generate(**inputs, **options, disable_compile=skip)[:, PROMPT:]
    equal = (texts["eager"] == texts[NAME]).all(dim=1)
    grown = {
        "input_ids": torch.cat((inputs["input_ids"], texts["eager"]), dim=1),
        "attention_mask": torch.nn.functional.pad(inputs["attention_mask"], (0, NEW_TOKENS), value=1),
    }
    there = slice(PROMPT - 1, -1)
    eager, ours = (logits(model, way, torch.bfloat16, grown)[:, there] for way in ("eager", NAME))
    best, noise = eager.topk(2).values, (eager - ours).abs().max()
    clear = best[..., 0] - best[..., 1] > 2 * noise
    wrong = (eager.argmax(-1) != ours.argmax(-1)) & clear
    assert not wrong.any(), f"{wrong.sum().item()} tokens differ although eager's choice is clear"
    for row in (~equal).nonzero().flatten().tolist():
        first = (texts["eager"][row] != texts[NAME][row]).nonzero()[0].item()
        assert not clear[row, first], f"sequence {row} differs from token {first} on, where eager's choice is clear"
    shares = f"{clear.float().mean().item():.0%} of the choices clear"
    return f"{equal.sum().item()} of {len(equal)} sequences equal for {NEW_TOKENS} tokens, the rest to a tie; {shares}"


@torch.no_grad()
def check_packed() -> str:
    """Three sequences in one row, by their positions and by cu_seq_lens."""
    model = make_model("Llama")
    lengths = (100, 57, 143)
    positions = torch.cat([torch.arange(length) for length in lengths])[None].to(DEVICE)
    inputs = {"input_ids": make_inputs(False)["input_ids"][:1], "position_ids": positions, "use_cache": False}
    where = torch.tensor([0, 100, 157, 300], dtype=torch.int32, device=DEVICE)
    given = {"cu_seq_lens_q": where, "cu_seq_lens_k": where, "max_length_q": 143, "max_length_k": 143}
    exact = logits(model, "eager", torch.float32, inputs)
    limit = 2 * (logits(model, "eager", torch.bfloat16, inputs) - exact).abs().max().item()
    errors = [(logits(model, NAME, torch.bfloat16, inputs | extra) - exact).abs().max().item() for extra in ({}, given)]
    assert max(errors) <= limit, f"errors {errors}, at most {limit:.4f} is allowed"
    return f"errors {errors[0]:.4f}, {errors[1]:.4f} (limit {limit:.4f})"


def kernels_of(function: Callable) -> list[str]:
    """Names of the kernels that run on the GPU inside."""
    from torch.profiler import ProfilerActivity, profile

    function()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as recorded:
        function()
        torch.cuda.synchronize()
    return [event.name for event in recorded.events() if event.device_type == torch.autograd.DeviceType.CUDA]


def our_name(names: list[str]) -> str:
    ours = [name for name in names if OUR_KERNEL in name]
    assert ours, f"none of ours is among {sorted(set(names))}"
    return f"{len(ours)} x {ours[0][:60]}"


@torch.no_grad()
def check_kernel(name: str) -> str:
    """That a model's attention is ours."""
    model, inputs = make_model(name), make_inputs(True)
    model.set_attn_implementation(NAME)
    return our_name(kernels_of(lambda: model(**inputs)))


@torch.no_grad()
def check_sdpa(causal: bool) -> str:
    """Activated, SDPA equals the math backend, by our kernel; restored, it isn't ours."""
    torch.manual_seed(2)
    make = {"device": DEVICE, "dtype": torch.bfloat16}
    q, k, v = (torch.randn(2, 1000, heads, 128, **make).transpose(1, 2) for heads in (8, 2, 2))
    options = {"is_causal": causal, "enable_gqa": True}

    def flash() -> torch.Tensor:
        with attention.sdpa_kernel(attention.SDPBackend.FLASH_ATTENTION):
            return torch.nn.functional.scaled_dot_product_attention(q, k, v, **options)

    with attention.sdpa_kernel(attention.SDPBackend.MATH):
        exact = torch.nn.functional.scaled_dot_product_attention(q.float(), k.float(), v.float(), **options)
    own = (flash().float() - exact).abs().max().item()
    torch_sdpa.register()
    attention.activate_flash_attention_impl(torch_sdpa.NAME)
    try:
        names = kernels_of(flash)
        error = (flash().float() - exact).abs().max().item()
        without = kernels_of(lambda: torch.nn.functional.scaled_dot_product_attention(q, k, v, **options))
    finally:
        if hasattr(attention, "restore_flash_attention_impl"):
            attention.restore_flash_attention_impl()
    found = our_name(names)
    assert error <= 2 * own + 1e-4, f"error {error}, PyTorch's flash has {own}"
    if hasattr(attention, "restore_flash_attention_impl"):
        assert not any(OUR_KERNEL in name for name in kernels_of(flash)), "restored, it is still ours"
    default = "ours" if any(OUR_KERNEL in name for name in without) else "not ours (another backend comes first)"
    return f"error {error:.5f} (PyTorch's flash {own:.5f}), {found}; without sdpa_kernel: {default}"


def check_sdpa_gradients(compiled: bool) -> str:
    """Activated, training goes on: by PyTorch's kernels, in a graph with our forward."""
    torch.manual_seed(3)
    q = torch.randn(1, 4, 256, 64, device=DEVICE, dtype=torch.bfloat16, requires_grad=True)

    def loss(q: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.scaled_dot_product_attention(q, q, q, is_causal=True).float().square().sum()

    def gradient(loss: Callable) -> torch.Tensor:
        q.grad = None
        with attention.sdpa_kernel(attention.SDPBackend.FLASH_ATTENTION):
            loss(q).backward()
        return q.grad

    before = gradient(loss)
    torch_sdpa.register()
    attention.activate_flash_attention_impl(torch_sdpa.NAME)
    try:
        chosen = torch.compile(loss) if compiled else loss
        names = kernels_of(lambda: gradient(chosen))
        after = gradient(chosen)
    finally:
        if hasattr(attention, "restore_flash_attention_impl"):
            attention.restore_flash_attention_impl()
    torch.testing.assert_close(before, after, rtol=0.02, atol=0.02)
    return f"gradients equal; of ours: {sum(OUR_KERNEL in name for name in names)} kernels"


@torch.no_grad()
def check_varlen_attn() -> str:
    from torch.nn.attention.varlen import varlen_attn

    make = {"device": DEVICE, "dtype": torch.bfloat16}
    q, k, v = (torch.randn(300, 4, 64, **make) for _ in range(3))
    where = torch.tensor([0, 100, 300], dtype=torch.int32, device=DEVICE)
    own = varlen_attn(q, k, v, where, where, 200, 200)
    torch_sdpa.register()
    attention.activate_flash_attention_impl(torch_sdpa.NAME)
    try:
        names = kernels_of(lambda: varlen_attn(q, k, v, where, where, 200, 200))
        found = varlen_attn(q, k, v, where, where, 200, 200)
    finally:
        if hasattr(attention, "restore_flash_attention_impl"):
            attention.restore_flash_attention_impl()
    torch.testing.assert_close(found, own, rtol=0.02, atol=0.02)
    return our_name(names)


class TwoLayers(torch.nn.Module):
    """(batch, seqlen, 256) through two layers of attention."""

    def __init__(self) -> None:
        super().__init__()
        self.inward = torch.nn.ModuleList(torch.nn.Linear(256, 768) for _ in range(2))
        self.outward = torch.nn.ModuleList(torch.nn.Linear(256, 256) for _ in range(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for inward, outward in zip(self.inward, self.outward, strict=True):
            q, k, v = inward(x).unflatten(-1, (3, 4, 64)).unbind(-3)
            x = x + outward(flash_attn_func(q, k, v, causal=True).flatten(-2))
        return x


@torch.no_grad()
def check_compile(mode: str) -> str:
    """One graph for all lengths; with CUDA graphs in the mode "reduce-overhead"."""
    torch.compiler.reset()
    torch.manual_seed(4)
    model = TwoLayers().to(DEVICE, torch.bfloat16)
    dynamic = mode == "default"
    compiled = torch.compile(model, fullgraph=True, dynamic=dynamic, mode=mode)
    worst = 0.0
    with torch._dynamo.config.patch(error_on_recompile=dynamic):
        for batch, seqlen in ((2, 300), (4, 77), (3, 1000)) if dynamic else ((2, 300),) * 4:
            x = torch.randn(batch, seqlen, 256, device=DEVICE, dtype=torch.bfloat16)
            torch.compiler.cudagraph_mark_step_begin()
            worst = max(worst, (compiled(x).float() - model(x).float()).abs().max().item())
    assert worst < 0.05, f"off by {worst}"
    return f"fullgraph, off by at most {worst:.4f}"


@torch.no_grad()
def check_opcheck() -> str:
    make = {"device": DEVICE, "dtype": torch.bfloat16}
    q, k = torch.randn(1, 100, 4, 64, **make), torch.randn(1, 120, 2, 64, **make)
    operators = getattr(torch.ops, torch_ops.NAMESPACE)
    torch.library.opcheck(operators.fwd.default, (q, k, k), {"causal": True, "return_lse": True})
    torch.library.opcheck(operators.fwd_out.default, (q, k, k), {"out": torch.empty_like(q)})
    return "fwd, fwd_out"


def rows() -> Iterator[tuple[str, Callable[[], str]]]:
    for name in MODELS:
        for padded in (False, True):
            yield f"{name}, logits{', padded' * padded}", lambda name=name, padded=padded: check_logits(name, padded)
        for cache in ("dynamic", "static"):
            for padded in (False, True):
                label = f"{name}, generate, {cache} cache{', padded' * padded}"
                yield label, lambda name=name, cache=cache, padded=padded: check_generation(name, cache, padded)
        label = f"{name}, generate, static cache, compiled"
        yield label, lambda name=name: check_generation(name, "static", True, compiled=True)
        yield f"{name}, kernel", lambda name=name: check_kernel(name)
    yield "Llama, packed", check_packed
    yield "SDPA", lambda: check_sdpa(False)
    yield "SDPA, causal", lambda: check_sdpa(True)
    yield "SDPA, gradients", lambda: check_sdpa_gradients(False)
    yield "SDPA, gradients in a graph", lambda: check_sdpa_gradients(True)
    yield "varlen_attn", check_varlen_attn
    yield "opcheck", check_opcheck
    yield "compile, dynamic shapes", lambda: check_compile("default")
    yield "compile, CUDA graphs", lambda: check_compile("reduce-overhead")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="", help="rows with this in their name")
    only = parser.parse_args().only
    integration.register()
    versions = f"torch {torch.__version__}, transformers {transformers.__version__}"
    print(f"{torch.cuda.get_device_name()}, {versions}\n\n| check | result | s |\n| --- | --- | --- |", flush=True)
    failed = 0
    for label, check in rows():
        if only not in label:
            continue
        begin = time.perf_counter()
        try:
            result = check()
        except Exception as error:
            failed += 1
            traceback.print_exc()
            result = f"FAILED: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        print(f"| {label} | {result} | {time.perf_counter() - begin:.0f} |", flush=True)
    print(f"\n{failed} failed")
    return failed


if __name__ == "__main__":
    sys.exit(main())
