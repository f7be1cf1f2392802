"""The command line: what it prints and what it returns. No GPU needed."""

import re
import subprocess
import sys

import pytest
import torch

from flash_attn_sm120 import cli, dispatch, matrix, terminal, variants
from flash_attn_sm120.problem import AttentionProblem

no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="says what happens without a GPU")


def run(*arguments):
    return subprocess.run([sys.executable, "-m", "flash_attn_sm120", *arguments], capture_output=True, text=True)


def test_help_needs_neither_torch_nor_cutlass():
    code = (
        "import sys\nfrom flash_attn_sm120.cli import main\n"
        "try: main(['--help'])\nexcept SystemExit: pass\n"
        "sys.exit(any(name in sys.modules for name in ('torch', 'cutlass')))"
    )
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert answer.returncode == 0, answer.stderr
    for command in ("doctor", "check", "bench", "compile", "cache"):
        assert command in answer.stdout


def test_wrong_command_lines():
    for arguments in ([], ["mend"], ["compile", "--arch", "sm_90a"], ["check", "--seed", "x"]):
        answer = run(*arguments)
        assert answer.returncode == 2 and "usage: flash-attn-sm120" in answer.stderr
    assert "expected sm_120a or sm_121a, got 'sm_90a'" in run("compile", "--arch", "sm_90a").stderr


@no_gpu
def test_doctor_without_a_gpu():
    answer = run("doctor")
    assert answer.returncode == 1
    for text in (
        f"torch: {torch.__version__}",
        "nvidia-cutlass-dsl: ",
        "Not ready: no GPU",
        "flash-attn-sm120 compile",
    ):
        assert text in answer.stdout
    assert "\033" not in answer.stdout


@no_gpu
def test_check_on_a_gpu_that_is_not_there(capsys):
    assert cli.main(["check", "--device", "cuda:3"]) == 1
    assert "Not ready: there is no cuda:3" in capsys.readouterr().out


def test_check_without_numpy(monkeypatch, capsys):
    monkeypatch.setattr(cli.check, "find_spec", lambda name: None)
    assert cli.main(["check", "--device", "simulator"]) == 1
    assert 'pip install "flash-attn-sm120[simulator]"' in capsys.readouterr().out


@no_gpu
def test_check_without_a_gpu_runs_the_kernels(capsys, monkeypatch):
    some = matrix.configs()[7::29]
    monkeypatch.setattr(matrix, "configs", lambda: some)
    assert cli.main(["check"]) == 0
    text = capsys.readouterr().out
    assert "interpreted" in text and f"{len(some)} of {len(some)} within" in text


def test_doctor_on_a_gpu(gpu):
    answer = run("doctor")
    assert answer.returncode == 0, answer.stdout
    assert "a small call: right" in answer.stdout and "Ready." in answer.stdout


@pytest.mark.parametrize("good", [True, False])
def test_check_counts(good, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU")
    diffs = (0.001, 0.001, 0.0, 0.0)
    monkeypatch.setattr(
        matrix,
        "run",
        lambda config, device, seed: matrix.Result(config, *(diffs if good or config.causal else (1.0, *diffs[1:]))),
    )
    assert cli.main(["check"]) == (0 if good else 1)
    text = capsys.readouterr().out
    assert ("64 of 64" if good else "32 of 64") in text
    assert text.count("max diff 1.00000 > 0.0156") == (0 if good else 32)
    assert "GQA-LLaMA-3-varlen-bf16-causal-b3" in text and "\033" not in text


@pytest.mark.parametrize("stack, warps, verdict", [(0, 8, "ok"), (176, 8, "spills"), (0, 4, "too few matrix warps")])
def test_compile_judges(stack, warps, verdict, monkeypatch, capsys):
    pytest.importorskip("cutlass")
    from flash_attn_sm120 import compile as compile_module
    from flash_attn_sm120 import cubin

    problem = AttentionProblem("float16", 192, 128, mask="causal", packed_q=True, packed_k=True, lse=True)
    plan = dispatch.choose(problem)
    fields = {name: getattr(plan, name) for name in plan.__dataclass_fields__}
    plan = dispatch.Plan(**{**fields, "num_warps": warps, "smem_bytes": 96 << 10})
    monkeypatch.setattr(variants, "variants", lambda: [problem])
    monkeypatch.setattr(variants, "changed_variants", list)
    monkeypatch.setattr(variants, "dual_group_variants", list)
    monkeypatch.setattr(compile_module, "candidates", lambda problem, arch: [plan])
    monkeypatch.setattr(compile_module, "build", lambda *a, **k: type("Built", (), {"__cubin__": b""}))
    monkeypatch.setattr(cubin, "read", lambda data: [cubin.KernelResources("k", 168, stack, 1024)])
    assert cli.main(["compile", "--arch", "sm_120a,sm_121a"]) == (0 if verdict == "ok" else 1)
    text = capsys.readouterr().out
    for arch in cli.compile.ARCHES:
        (line,) = (line for line in text.splitlines() if line.startswith(arch))
        assert "fp16 192/128 causal packed lse" in line and verdict in line and " 96.0 " in line
    assert f"{2 if verdict == 'ok' else 0} of 2 without a stack" in text


def test_compile_shows_predictions_and_says_when_it_cannot(monkeypatch, capsys):
    pytest.importorskip("cutlass")
    from flash_attn_sm120 import sass

    problem = AttentionProblem("bfloat16", 64, 64)
    monkeypatch.setattr(variants, "variants", lambda: [problem])
    monkeypatch.setattr(variants, "changed_variants", list)
    monkeypatch.setattr(variants, "dual_group_variants", list)
    assert cli.main(["compile", "--arch", "sm_120a"]) == 0
    header, line, *rest = capsys.readouterr().out.splitlines()
    cells = dict(zip(re.split("  +", header), re.split("  +", line), strict=True))
    assert int(cells["HMMA"]) > 0 and 0 < float(cells["slots/HMMA"]) < 10 and cells["warps/sub-partition"] == "2"
    assert 50 < int(cells["% at 16"]) <= int(cells["% at 32"]) <= 100 and cells["binds"]
    assert "GB10, RTX PRO 6000" in " ".join(rest)

    monkeypatch.setattr(sass, "find_nvdisasm", lambda: None)
    assert cli.main(["compile", "--arch", "sm_120a"]) == 0
    header, line, *rest = capsys.readouterr().out.splitlines()
    assert "not available: no nvdisasm" in line and "pip install nvidia-cuda-nvdisasm" in rest[0]


def test_compile_to_files(tmp_path, monkeypatch, capsys):
    from flash_attn_sm120 import precompile

    jobs = []

    def made(problems, arches, hosts, folder, processes, cuda):
        for problem in problems:
            jobs.append(precompile.Job(problem, *arches, hosts, str(folder), cuda))
            yield precompile.Made(jobs[-1], "" if problem.split else f"no {problem.head_dim}")

    monkeypatch.setattr(precompile, "precompile", made)
    options = [
        "--out",
        str(tmp_path),
        "--arch",
        "sm_90a",
        "--host",
        "aarch64",
        "--cuda",
        "12",
        "--only",
        "192/128 causal",
    ]
    assert cli.main(["compile", *options]) == 1
    text = capsys.readouterr().out
    assert len(jobs) == 16 and text.count("no 192") == 11 and "0 files of 16 variants" in text
    assert {(job.arch, job.hosts, job.cuda) for job in jobs} == {("sm_90a", ("aarch64",), 12)}
    for wrong, message in (
        (["--arch", "sm_90"], "--arch: expected targets such as sm_120a, got 'sm_90'"),
        (["--host", "riscv64"], "--host: expected x86_64 or aarch64, got 'riscv64'"),
    ):
        with pytest.raises(SystemExit) as stopped:
            cli.main(["compile", "--out", str(tmp_path), *wrong])
        assert stopped.value.code == 2 and message in capsys.readouterr().err


def test_explain():
    assert "made for" in cli.doctor.explain((12, 0))[0] and "sm_120a" in cli.doctor.explain((12, 0))[1]
    assert "aren't the best" in cli.doctor.explain((9, 0))[0] and "sm_90a" in cli.doctor.explain((9, 0))[1]
    assert "can't be used" in cli.doctor.explain((8, 9))[0]


def test_table_and_colours(monkeypatch):
    text = terminal.table(("name", "n"), [("a", 1), ("longer", 100)], [None, "red"])
    assert text.splitlines() == ["name      n", "a         1", "longer  100"]
    monkeypatch.setattr(terminal, "coloured", lambda: True)
    assert terminal.table(("name", "n"), [("a", 1)], ["red"]).splitlines()[1] == "\033[31ma     1\033[0m"


def test_colours_are_for_terminals_that_want_them(monkeypatch):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    monkeypatch.delenv("NO_COLOR", raising=False)
    assert terminal.coloured()
    monkeypatch.setenv("NO_COLOR", "1")
    assert not terminal.coloured()
    monkeypatch.setenv("NO_COLOR", "")
    assert terminal.coloured()
    monkeypatch.setattr(sys.stdout, "isatty", lambda: False, raising=False)
    assert not terminal.coloured()


def test_an_interrupted_command_and_a_reader_that_leaves(monkeypatch):
    def interrupted(arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(cli.doctor, "run", interrupted)
    assert cli.main(["doctor"]) == cli.INTERRUPTED == 130
    code = (
        "import sys\nfrom flash_attn_sm120 import cli\ndef run(arguments):\n for _ in range(9999): print('line')\n"
        " return 0\ncli.doctor.run = run\nsys.exit(cli.main(['doctor']))"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout.readline() == b"line\n"
    process.stdout.close()
    assert process.wait() == 1 and process.stderr.read() == b""
