"""transformers' models on these kernels against their own eager attention; the models are small and random."""

import math
from types import SimpleNamespace

import pytest
import torch
import transformers
from oracle import ints, rand
from transformers import masking_utils

from flash_attn_sm120.integrations import transformers as integration

integration.register()

SMALL = {
    "vocab_size": 48, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 32, "initializer_range": 0.3, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": None,
}  # fmt: skip
BOTH = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 6}
MODELS = {
    "llama": ("Llama", {}),
    "qwen3": ("Qwen3", {}),
    "gemma2": ("Gemma2", {**BOTH, "attn_logit_softcapping": 3.0}),
    "gemma3": ("Gemma3", {**BOTH, "head_dim": 256, "num_key_value_heads": 2}),
    "gpt_oss": ("GptOss", {**BOTH, "num_local_experts": 2, "num_experts_per_tok": 2}),
}
# Without what sets a model apart: as far off as the test would have to notice.
WITHOUT = {
    "gemma2": {"attn_logit_softcapping": None},
    "gemma3": {"layer_types": ["full_attention"] * 2},
    "gpt_oss": {"layer_types": ["full_attention"] * 2},
}


def model_of(name, device, **changes):
    kind, own = MODELS[name]
    config_name = f"{kind}TextConfig" if name == "gemma3" else f"{kind}Config"
    torch.manual_seed(5)
    config = getattr(transformers, config_name)(**{**SMALL, **own, **changes})
    model = getattr(transformers, f"{kind}ForCausalLM")(config).eval()
    for parameter_name, parameter in model.named_parameters():
        if parameter_name.endswith("sinks"):
            torch.nn.init.normal_(parameter)
    return model.to(device)


def run(model, implementation, dtype, inputs):
    model.set_attn_implementation(implementation)
    with torch.no_grad():
        return model.to(dtype)(**inputs).logits.float()


def tokens(device, batch, seqlen):
    return torch.randint(2, SMALL["vocab_size"], (batch, seqlen), device=device)


def assert_as_eager(model, inputs, where=slice(None)):
    """Of the rows `where`: the error against float32 is at most twice that of eager in bfloat16. Returns both."""
    exact = run(model.to(torch.bfloat16), "eager", torch.float32, inputs)[where]
    rounded = run(model, "eager", torch.bfloat16, inputs)[where]
    found = run(model, "flash_attn_sm120", torch.bfloat16, inputs)[where]
    limit = 2 * (rounded - exact).abs().max().item()
    error = (found - exact).abs().max().item()
    assert error <= limit, f"logits are off by {error}, at most {limit} is allowed"
    return limit, exact


@pytest.mark.parametrize("name", MODELS)
def test_prefill(name, device):
    model = model_of(name, device.torch_device)
    inputs = {"input_ids": tokens(device.torch_device, 1, 20)}
    limit, exact = assert_as_eager(model, inputs)
    if name in WITHOUT:
        other = run(model_of(name, device.torch_device, **WITHOUT[name]), "eager", torch.float32, inputs)
        assert (other - exact).abs().max() > 2 * limit


def padded(device, *rows):
    """attention_mask of rows such as "..###"."""
    return torch.tensor([[letter == "#" for letter in row] for row in rows], device=device).long()


PADDING = {
    "left": ("....########", "############"),
    "right": ("########....", "############"),
    "mixed": ("..########..", "#####......."),
}


@pytest.mark.parametrize("side", PADDING)
@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_padding(name, side, device):
    there = padded(device.torch_device, *PADDING[side])
    inputs = {"input_ids": tokens(device.torch_device, 2, 12), "attention_mask": there}
    inputs["position_ids"] = (there.cumsum(-1) - 1).clamp(min=0)
    model = model_of(name, device.torch_device)
    limit, exact = assert_as_eager(model, inputs, there.bool())
    if side == "right":
        return  # behind the tokens it changes nothing for causal ones
    del inputs["attention_mask"]
    assert (run(model, "eager", torch.float32, inputs)[there.bool()] - exact).abs().max() > 2 * limit


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt_oss"])
def test_generation(name, cache, device):
    """Six more tokens: beyond the window of sliding layers, and with a row that is padded on the left."""
    model = model_of(name, device.torch_device).to(torch.bfloat16)
    inputs = {"input_ids": tokens(device.torch_device, 2, 5)}
    inputs["attention_mask"] = padded(device.torch_device, "..###", "#####")
    options = {"max_new_tokens": 5, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    options |= {"cache_implementation": cache, "disable_compile": True}
    found = {}
    for implementation in ("eager", "flash_attn_sm120"):
        model.set_attn_implementation(implementation)
        found[implementation] = model.generate(**inputs, **options)
    eager, ours = found.values()
    assert torch.equal(ours.sequences, eager.sequences)
    for one, other in zip(ours.logits, eager.logits, strict=True):
        torch.testing.assert_close(one, other, rtol=0.05, atol=0.05 * other.abs().max().item())


def test_packed_sequences(device):
    model = model_of("gemma2", device.torch_device)
    input_ids = tokens(device.torch_device, 1, 20)
    where = ints(device.torch_device, 0, 9, 20)
    positions = torch.cat((torch.arange(9), torch.arange(11))).to(device.torch_device)[None]
    inputs = {"input_ids": input_ids, "position_ids": positions, "use_cache": False}
    limit, exact = assert_as_eager(model, inputs)
    lengths = {"cu_seq_lens_q": where, "cu_seq_lens_k": where, "max_length_q": 11, "max_length_k": 11}
    found = run(model, "flash_attn_sm120", torch.bfloat16, inputs | lengths)
    assert (found - exact).abs().max() <= limit
    alone = run(model, "eager", torch.float32, {"input_ids": input_ids[:, 9:], "use_cache": False})
    torch.testing.assert_close(alone, exact[:, 9:], rtol=1e-3, atol=1e-3)


def test_an_encoder_with_padding(device):
    torch.manual_seed(5)
    sizes = {"vocab_size": 48, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1}
    config = transformers.BertConfig(**sizes, num_attention_heads=2, initializer_range=0.3)
    model = transformers.BertForMaskedLM(config).eval().to(device.torch_device)
    for side in ("mixed", "right"):
        there = padded(device.torch_device, *PADDING[side])
        inputs = {"input_ids": tokens(device.torch_device, 2, 12), "attention_mask": there}
        assert_as_eager(model, inputs, there.bool())


def test_a_decoder_that_looks_both_ways(device):
    inputs = {"input_ids": tokens(device.torch_device, 1, 12)}
    model = model_of("llama", device.torch_device, is_causal=False)
    limit, exact = assert_as_eager(model, inputs | {"is_causal": False})
    causal = run(model_of("llama", device.torch_device), "eager", torch.float32, inputs)
    assert (causal - exact).abs().max() > 2 * limit


def layer(**attributes):
    return SimpleNamespace(is_causal=True, **attributes)


def scores_of(mask, q, k, v):
    """Attention with (batch, 1, seqlen_q, seqlen_k) bool, in float32."""
    k, v = (x.float().repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
    scores = (q.float() @ k.mT / math.sqrt(q.shape[-1])).masked_fill(~mask, -math.inf)
    return (scores.softmax(-1).nan_to_num() @ v).transpose(1, 2)


SITUATIONS = [  # q_length, kv_length, q_offset, kv_offset, the mask's tokens
    (6, 6, 0, 0, 6),  # prefill
    (1, 9, 8, 0, 9),  # a step of a cache that grows
    (3, 9, 6, 0, 9),  # a chunk
    (6, 12, 0, 0, 6),  # prefill into a static cache
    (1, 12, torch.tensor(7), 0, 8),  # a step there
    (3, 12, torch.tensor(4), 0, 7),  # a chunk there
    (1, 4, 8, 5, 9),  # a step of a cache that holds a window of 4
    (2, 5, 8, 5, 10),  # two of them
]


def patterns_of():
    overlay = masking_utils.sliding_window_bidirectional_overlay(3)
    return {
        "causal": (masking_utils.causal_mask_function, None, True),
        "sliding": (masking_utils.sliding_window_causal_mask_function(4), 4, True),
        "bidirectional": (masking_utils.bidirectional_mask_function, None, False),
        "bidirectional_sliding": (
            masking_utils.and_masks(overlay, masking_utils.bidirectional_mask_function),
            4,
            False,
        ),
    }


def masks_of(total):
    """Attention masks of two sequences over `total` tokens; the last has padding between them."""
    tail = total // 3
    yield None
    for first in ("#" * total, "." * tail + "#" * (total - tail), "#" * (total - tail) + "." * tail):
        yield padded("cpu", first, "#" * total).bool()
    yield padded("cpu", "." + "#" * (total - 2) + ".", "#" * (total - tail) + "." * tail).bool()
    yield padded("cpu", "#.#" + "#" * (total - 3), "#" * total).bool()


# A cache with room left is a decoder's.
WHERE = [
    (i, pattern)
    for i in range(len(SITUATIONS))
    for pattern in patterns_of()
    if i not in (3, 4, 5) or "bi" not in pattern
]


@pytest.mark.parametrize("traced", [False, True])
@pytest.mark.parametrize("situation, pattern", WHERE)
def test_masks_are_those_of_eager(situation, pattern, traced, reference_kernels, monkeypatch):
    """By what attention makes of them, for the rows of tokens that there are; traced: as a graph would have them."""
    q_length, kv_length, q_offset, kv_offset, total = SITUATIONS[situation]
    function, window, causal = patterns_of()[pattern]
    sizes = {"batch_size": 2, "q_length": q_length, "kv_length": kv_length}
    sizes |= {"q_offset": q_offset, "kv_offset": kv_offset, "mask_function": function}
    q = rand("cpu", 2, 2, q_length, 16)
    k, v = rand("cpu", 2, 1, kv_length, 16), rand("cpu", 2, 1, kv_length, 8)
    written = int(q_offset) + q_length - kv_offset
    k[:, :, written:], v[:, :, written:] = math.nan, math.nan
    clean = (k.nan_to_num(), v.nan_to_num())
    if traced:
        monkeypatch.setattr(integration, "_layout", integration._traced_layout)
    for there in masks_of(total):
        if "sliding" in pattern and there is not None and there[0, 0] and not there[0, 1]:
            continue  # a window doesn't go with padding between tokens
        expected = masking_utils.sdpa_mask(**sizes, attention_mask=there, allow_is_causal_skip=False)
        given = integration.mask(**sizes, attention_mask=there)
        found, weights = integration.attention(
            layer(), q, *(k, v) if causal else clean, given, is_causal=causal, sliding_window=window
        )
        rows = slice(None) if there is None else there[:, int(q_offset) : int(q_offset) + q_length]
        exact = scores_of(expected, q, *clean)
        torch.testing.assert_close(found.float()[rows], exact[rows], rtol=2e-2, atol=2e-2)
        assert weights is None


def test_only_what_is_needed_is_said():
    sizes = {"batch_size": 2, "mask_function": masking_utils.causal_mask_function}
    prefill = {**sizes, "q_length": 12, "kv_length": 12}
    assert integration.mask(**prefill) is None
    assert integration.mask(**prefill, attention_mask=torch.ones(2, 12, dtype=torch.bool)) is None
    fields = {side: integration.mask(**prefill, attention_mask=padded("cpu", *PADDING[side])).shape for side in PADDING}
    assert fields == {"left": (13, 1, 1, 2), "right": (2, 1, 1, 2), "mixed": (26, 1, 1, 2)}
    step = integration.mask(**sizes, q_length=1, kv_length=20, q_offset=torch.tensor(7))
    assert step.tolist() == [[[[8, 8]]]]
    assert integration.mask(**sizes, q_length=1, kv_length=20, q_offset=19) is None


def test_a_graph_of_a_model(reference_kernels):
    """The mask function and the layers, in one graph, with a mask and packed."""
    torch.compiler.reset()
    model = model_of("gemma2", "cpu").to(torch.bfloat16)
    model.set_attn_implementation("flash_attn_sm120")
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    there = padded("cpu", *PADDING["mixed"])
    packed = {"position_ids": torch.cat((torch.arange(5), torch.arange(7)))[None].expand(2, -1)}
    with torch.no_grad():
        for given, rows in (({"attention_mask": there}, there.bool()), (packed, slice(None))):
            inputs = {"input_ids": tokens("cpu", 2, 12), "use_cache": False, **given}
            found, expected = compiled(**inputs).logits, model(**inputs).logits
            torch.testing.assert_close(found[rows], expected[rows], rtol=2e-2, atol=2e-2)
    torch.compiler.reset()


def test_padding_between_tokens_in_a_window_fails_in_a_graph(recorder):
    @torch.compile(backend="aot_eager", fullgraph=True)
    def layout(there):
        function = masking_utils.sliding_window_causal_mask_function(4)
        sizes = {"batch_size": 1, "q_length": 8, "kv_length": 8}
        return integration.mask(**sizes, mask_function=function, attention_mask=there, allow_is_causal_skip=True)

    layout(padded("cpu", "..######").bool())
    with pytest.raises(RuntimeError, match="padding at the ends only"):
        layout(padded("cpu", "##..####").bool())
    torch.compiler.reset()


@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_generation_with_a_graph_of_each_step(name, reference_kernels):
    """As transformers does it on GPUs with a static cache."""
    torch.compiler.reset()
    model = model_of(name, "cpu").to(torch.bfloat16)
    model.set_attn_implementation("flash_attn_sm120")
    inputs = {"input_ids": tokens("cpu", 2, 5), "attention_mask": padded("cpu", "..###", "#####")}
    options = {"max_new_tokens": 5, "do_sample": False, "cache_implementation": "static"}
    graphs = []

    def backend(graph, _):
        graphs.append(graph)
        return graph.forward

    how = transformers.CompileConfig(backend=backend, mode=None)
    how._compile_all_devices = True
    found = model.generate(**inputs, **options, compile_config=how)
    calls = [node for graph in graphs for node in graph.graph.nodes if "flash_attn_sm120" in str(node.target)]
    assert len(calls) >= 2
    assert torch.equal(found, model.generate(**inputs, **options, disable_compile=True))
    torch.compiler.reset()


def test_dropout_reaches_the_kernel(recorder):
    q = rand("cpu", 1, 2, 8, 16)
    integration.attention(layer(), q, q, q, None, dropout=0.25)
    assert recorder.calls[0].modifiers.dropout.factor == pytest.approx(4 / 3)


def test_sinks_in_half_precision(recorder):
    q = rand("cpu", 1, 2, 8, 16, dtype=torch.float16)
    integration.attention(layer(), q, q, q, None, s_aux=torch.ones(2, dtype=torch.float16))
    assert recorder.calls[0].modifiers.learnable_sink.dtype == torch.float32


@pytest.mark.parametrize(
    "kind, message, options",
    [
        (NotImplementedError, "output_attentions: expected False", {"output_attentions": True}),
        (NotImplementedError, "cache: expected None", {"cache": object()}),
        (TypeError, "position_bias: expected no such option", {"position_bias": torch.zeros(1)}),
        (NotImplementedError, "attention_mask: expected None", {"attention_mask": torch.zeros(1, 1, 8, 8)}),
        (NotImplementedError, "attention_mask: expected None", {"attention_mask": torch.ones(1, 8)}),
        (ValueError, "attention_mask: expected one for 1", {"attention_mask": torch.ones(4, 1, 1, 1).int()}),
        (ValueError, "cu_seq_lens_q: expected cu_seq_lens_k", {"cu_seq_lens_q": ints("cpu", 0, 8)}),
        (TypeError, "q: expected bfloat16 or float16", {"query": torch.zeros(1, 2, 8, 16)}),
        (NotImplementedError, "sliding_window: expected an int", {"kinds": ["sliding_attention"]}),
    ],
)
def test_what_is_refused(kind, message, options, recorder):
    q = rand("cpu", 1, 2, 8, 16)
    config = SimpleNamespace(layer_types=options.pop("kinds", None))
    given = {"query": q, "key": q, "value": q, "attention_mask": None} | options
    with pytest.raises(kind, match=message):
        integration.attention(layer(config=config, layer_idx=0), **given)
    assert not recorder.calls


def test_masks_that_are_refused():
    causal = masking_utils.causal_mask_function
    blocks = masking_utils.blockwise_overlay(torch.zeros(1, 8))
    sizes = {"batch_size": 1, "q_length": 8, "kv_length": 8}
    for function in (lambda *_: True, masking_utils.or_masks(causal, blocks), masking_utils.and_masks(causal, blocks)):
        with pytest.raises(NotImplementedError, match="mask_function: expected a causal"):
            integration.mask(**sizes, mask_function=function)
    with pytest.raises(NotImplementedError, match="mask_function: expected a causal"):
        integration.mask(**sizes, mask_function=causal, use_vmap=True)
    sliding = masking_utils.sliding_window_causal_mask_function(4)
    with pytest.raises(NotImplementedError, match="padding between"):
        integration.mask(**sizes, mask_function=sliding, attention_mask=padded("cpu", "##..####"))


def test_an_older_transformers_is_told_so(monkeypatch):
    monkeypatch.setattr("transformers.__version__", "4.57.6")
    with pytest.raises(NotImplementedError, match="transformers: expected 5 or later"):
        integration.register()


def test_registering_again_changes_nothing():
    from transformers import modeling_flash_attention_utils as loader

    model = transformers.PreTrainedModel
    before = (loader._lazy_imports, model._check_and_adjust_attn_implementation)
    integration.register()
    assert (loader._lazy_imports, model._check_and_adjust_attn_implementation) == before
    with pytest.raises(ImportError, match="kernels"):
        loader._lazy_imports("flash_attention_2")
