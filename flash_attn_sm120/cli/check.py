"""flash-attn-sm120 check: the 64-configuration matrix against float32."""

from __future__ import annotations

import argparse
from importlib.util import find_spec
from typing import TYPE_CHECKING

from flash_attn_sm120.cli.words import add_command, verdict
from flash_attn_sm120.terminal import paint, progress, table

if TYPE_CHECKING:
    from flash_attn_sm120.matrix import Result

DESCRIPTION = """\
Runs 64 configurations (MHA and GQA, dense and packed, causal and full, bfloat16 and float16) and compares each with
float32 attention in PyTorch. Without a GPU the kernels' PTX is interpreted, with short lengths (about two minutes).
"""
EPILOG = """\
examples:
  flash-attn-sm120 check                      on a GPU where there is one, else in the simulator
  flash-attn-sm120 check --device cuda:1
  flash-attn-sm120 check --device simulator

Exit code: 0 if all configurations pass, 1 if one fails, or the device or NumPy, for the simulator, isn't there.
"""


def add(commands: argparse._SubParsersAction) -> None:
    text = "run the 64-config matrix against float32, on a GPU or in the simulator"
    parser = add_command(commands, "check", text, DESCRIPTION, EPILOG)
    parser.add_argument(
        "--device", default="auto", help="such as cuda:1, or simulator (default: a GPU where there is one)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the random inputs (default: 0)")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """The 64-config matrix on a GPU, or with short lengths in the simulator. 1 if a configuration fails."""
    import torch

    from flash_attn_sm120 import matrix

    device, seed = arguments.device, arguments.seed
    gpu = torch.cuda.is_available()
    if device == "auto":
        device = "cuda" if gpu else "simulator"
    if device == "simulator" and find_spec("numpy") is None:
        return verdict('the simulator needs NumPy: pip install "flash-attn-sm120[simulator]"')
    if device == "simulator":
        from flash_attn_sm120.simulator import simulate

        print("check: every kernel interpreted from its sm_120a PTX, short lengths, no GPU")
        with simulate("sm_120a"):
            results = [matrix.run(config, "cpu", "short", seed) for config in progress(matrix.configs(), "check")]
    elif not gpu or torch.device(device).type != "cuda":
        return verdict(f"there is no {device} that PyTorch can use (see doctor; --device simulator needs no GPU)")
    else:
        print(f"check: on {torch.cuda.get_device_name(device)}")
        results = [matrix.run(config, device, seed=seed) for config in progress(matrix.configs(), "check")]
    return _show_results(results)


def _show_results(results: list[Result]) -> int:
    from flash_attn_sm120.matrix import MAX_DIFF

    rows, colours = [], []
    for result in results:
        numbers = (result.max_diff, result.same_dtype_diff, result.lse_diff)
        verdict = "; ".join(result.complaints) or "pass"
        rows.append((result.config.name, *(f"{n:.5f}" for n in numbers), verdict))
        colours.append(None if result.passed else "red")
    print(table(("configuration", "max diff", "of PyTorch", "of lse", "verdict"), rows, colours))
    passed = sum(result.passed for result in results)
    limit = f"{MAX_DIFF} and twice the error of PyTorch in the same dtype"
    print(paint(f"{passed} of {len(results)} within {limit}", "green" if passed == len(results) else "red"))
    return 0 if passed == len(results) else 1
