"""Writes docs/api.md from the signatures and docstrings of the public functions. Reads the sources, imports nothing.

python docs/make_api.py
"""

from __future__ import annotations

import ast
from pathlib import Path

DOCS = Path(__file__).parent
PACKAGE = DOCS.parent / "flash_attn_sm120"
ZIGZAG = ("zigzag_attention", "zigzag_attention_varlen")
SHARDS = ("shard", "shard_varlen", "unshard", "unshard_varlen")
# (title, import, file, names; () for all that have a docstring and no underscore)
SECTIONS = (
    ("Attention", "flash_attn_sm120", "interface", ("flash_attn_func", "flash_attn_varlen_func")),
    (
        "Two query groups",
        "flash_attn_sm120",
        "dual_group",
        ("fused_zigzag_llama3_flash_attn_varlen_forward",),
    ),
    (
        "Ring attention's grouped call",
        "flash_attn_sm120",
        "grouped_attention",
        ("replace_execute_grouped_attention_with_fused_varlen",),
    ),
    ("Zigzag over several GPUs", "flash_attn_sm120.distributed", "distributed/gathered", ZIGZAG),
    ("Ring attention", "flash_attn_sm120.distributed", "distributed/ring", ("ring_attention", "ring_attention_varlen")),
    ("Decode over several GPUs", "flash_attn_sm120.distributed", "distributed/decode", ("decode_context_parallel",)),
    ("Shards of a zigzag", "flash_attn_sm120.distributed", "distributed/shards", SHARDS),
    ("Split results", "flash_attn_sm120", "combine", ("flash_attn_combine",)),
    ("Scheduler metadata", "flash_attn_sm120", "scheduling", ("get_scheduler_metadata",)),
    ("Block sparsity", "flash_attn_sm120", "block_sparse", ("BlockSparseTensors",)),
    ("Dropout", "flash_attn_sm120", "dropout", ("dropout_mask",)),
    ("Kernels before the first call", "flash_attn_sm120", "warm", ("warmup",)),
    ("Shapes of models", "flash_attn_sm120", "shipped", ("Shapes",)),
    ("Score mods", "flash_attn_sm120.mods", "mods/scores", ()),
    ("Mask mods", "flash_attn_sm120.mods", "mods/masks", ()),
    ("PyTorch's SDPA", "flash_attn_sm120.integrations.torch_sdpa", "integrations/torch_sdpa", ("register",)),
    ("transformers", "flash_attn_sm120.integrations.transformers", "integrations/transformers", ("register",)),
    ("vLLM's backend", "flash_attn_sm120.integrations.vllm", "integrations/vllm", ("register",)),
    (
        "vLLM's functions",
        "flash_attn_sm120.integrations.vllm",
        "integrations/vllm_functions",
        ("flash_attn_varlen_func", "get_scheduler_metadata", "flash_attn_with_kvcache"),
    ),
    ("What selects a kernel", "flash_attn_sm120", "problem", ("AttentionProblem",)),
    ("The simulator", "flash_attn_sm120.simulator", "simulator/attention", ("simulate",)),
)
HEAD = """# API

Made from the docstrings by `python docs/make_api.py`; a test fails where it isn't up to date.
"""


def page() -> str:
    """The text of api.md."""
    parts = [HEAD, "\n".join(f"- [{title}](#{anchor(title)})" for title, *_ in SECTIONS) + "\n"]
    for title, place, file, names in SECTIONS:
        source = (PACKAGE / f"{file}.py").read_text()
        parts.append(f"## {title}\n\n`from {place} import ...`\n")
        found = [node for node in ast.parse(source).body if is_wanted(node, names)]
        if missing := set(names) - {node.name for node in found}:
            raise ValueError(f"{file}.py: expected {', '.join(sorted(missing))}, found none")
        parts += [entry(node, source) for node in found]
    return "\n".join(parts)


def anchor(title: str) -> str:
    """The link to a heading, as GitHub makes it."""
    kept = "".join(c for c in title.lower() if c.isalnum() or c in " _-")
    return kept.replace(" ", "-")


def is_wanted(node: ast.AST, names: tuple[str, ...]) -> bool:
    if not isinstance(node, (ast.FunctionDef, ast.ClassDef)) or not ast.get_docstring(node):
        return False
    return node.name in names if names else not node.name.startswith("_")


def entry(node: ast.FunctionDef | ast.ClassDef, source: str, owner: str = "") -> str:
    """A function, or a class with its public methods."""
    lines = [f"### {owner}{node.name}\n", f"```python\n{signature(node, source)}\n```\n"]
    lines.append(f"```text\n{ast.get_docstring(node)}\n```\n")
    if isinstance(node, ast.ClassDef):
        lines += [entry(method, source, f"{node.name}.") for method in node.body if is_wanted(method, ())]
    return "\n".join(lines)


def signature(node: ast.FunctionDef | ast.ClassDef, source: str) -> str:
    """Decorators and what stands before the docstring; of a dataclass its fields too."""
    begin = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
    text = source.splitlines()[begin - 1 : node.body[0].lineno - 1]
    indent = len(text[0]) - len(text[0].lstrip())
    text = [line[indent:] for line in text]
    if isinstance(node, ast.ClassDef):
        return "\n".join(text + [f"    {ast.get_source_segment(source, field)}" for field in fields(node)])
    return "\n".join(text) + " ..."


def fields(node: ast.ClassDef) -> list[ast.AnnAssign]:
    return [field for field in node.body if isinstance(field, ast.AnnAssign)]


if __name__ == "__main__":
    (DOCS / "api.md").write_text(page())
