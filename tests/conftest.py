"""Where the tests run: on a GPU if there is one, else in the simulator, else the tests that need either are skipped."""

import os
from dataclasses import dataclass

import pytest
import stand_in
import torch

from flash_attn_sm120 import calls, dispatch, launchers, loader
from flash_attn_sm120.arguments import (
    Arguments,
    ClassifyArguments,
    CombineArguments,
    DualGroupArguments,
    GroupLengths,
    Lengths,
    Modifiers,
    Partials,
)
from flash_attn_sm120.launchers import launches_on_cpu
from flash_attn_sm120.problem import AttentionProblem, ClassifyProblem, CombineProblem


@dataclass(frozen=True)
class Device:
    """torch_device: where inputs are made. size: "full", or "short" where every instruction is interpreted."""

    torch_device: torch.device
    size: str

    def pick(self, full, short):
        return full if self.size == "full" else short


@pytest.fixture
def device():
    if torch.cuda.is_available():
        yield Device(torch.device("cuda"), "full")
        return
    try:
        from flash_attn_sm120.simulator import simulate
    except ImportError:
        pytest.skip("needs a CUDA device or flash_attn_sm120.simulator, and there is neither")
    with simulate("sm_120a"):
        yield Device(torch.device("cpu"), "short")


@pytest.fixture
def gpu():
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    return torch.device("cuda")


@pytest.fixture
def plain_kernel_only(monkeypatch):
    """No problem goes through TMA; what was compiled before is set aside."""
    from flash_attn_sm120.simulator import attention

    monkeypatch.setattr(dispatch, "can_implement", lambda kernel, problem, arch: kernel == "forward")
    monkeypatch.setattr(dispatch, "use_decode", lambda *_: False)
    for module, name in ((calls, "known"), (launchers, "_launchers"), (launchers, "_plans"), (loader, "_loaded")):
        monkeypatch.setattr(module, name, {})
    monkeypatch.setattr(attention, "artifact", attention.artifact.__wrapped__)


@pytest.fixture(autouse=True)
def seed(request):
    """Inputs differ from test to test and stay from run to run, unless FLASH_ATTN_SM120_SEED says otherwise."""
    base = int(os.environ.get("FLASH_ATTN_SM120_SEED", "0"))
    torch.manual_seed(base + sum(map(ord, request.node.nodeid)))


class Recorder:
    """Stands in for the kernels: keeps what the interface would launch, and writes ones.

    calls: Arguments, CombineArguments or ClassifyArguments, whose lists stay as they are; partials: of each call of the
    decode kernel."""

    def __init__(self):
        self.problems, self.calls, self.partials = [], [], []

    def load(self, problem):
        self.problems.append(problem)

        def launch(*arguments):
            if isinstance(problem, AttentionProblem) and problem.dual_group:
                named = DualGroupArguments(*arguments)
                self.calls.append(named._replace(lengths=GroupLengths(*named.lengths)))
                for tensor in (named.out0, named.out1):
                    tensor.fill_(1.0)
                return
            if isinstance(problem, ClassifyProblem):
                named = ClassifyArguments(*arguments)
                self.calls.append(named._replace(lengths=Lengths(*named.lengths)))
                return
            if isinstance(problem, CombineProblem):
                named = CombineArguments(*arguments)
            else:
                named = Arguments(*arguments[:8])
                named = named._replace(lengths=Lengths(*named.lengths), modifiers=Modifiers(*named.modifiers))
                if problem.decode:
                    self.partials += [partials and Partials(*partials) for partials in arguments[8:]]
            self.calls.append(named)
            named.out.fill_(1.0)
            if named.lse is not None:
                named.lse.fill_(2.0)

        return launch


@pytest.fixture
def recorder():
    recorder = Recorder()
    with launches_on_cpu(recorder.load):
        yield recorder


@pytest.fixture
def reference_kernels():
    """Every problem is computed by the reference, on a CPU."""
    with launches_on_cpu(stand_in.load):
        yield
