"""The 64 configurations, on whatever device there is; and that the rule they pass by can be failed."""

import math

import pytest
import torch

from flash_attn_sm120 import calls, compile, dispatch, launchers, matrix
from flash_attn_sm120.simulator import attention


def test_there_are_64():
    configs = matrix.configs()
    assert len(configs) == len({config.name for config in configs}) == 64
    assert {config.heads for config in configs} == {(8, 8), (16, 8), (32, 8), (8, 1)}


@pytest.mark.parametrize("config", matrix.configs(), ids=lambda config: config.name)
def test_config(config, device):
    result = matrix.run(config, device.torch_device, device.size)
    assert result.passed, result.complaints


@pytest.fixture
def plain_kernel_only(monkeypatch):
    """No problem goes through TMA; what was compiled before is set aside."""
    monkeypatch.setattr(dispatch, "can_implement", lambda kernel, problem, arch: kernel == "forward")
    monkeypatch.setattr(dispatch, "use_decode", lambda *_: False)
    for module, name in ((calls, "known"), (launchers, "_launchers"), (compile, "_loaded")):
        monkeypatch.setattr(module, name, {})
    monkeypatch.setattr(attention, "artifact", attention.artifact.__wrapped__)


@pytest.mark.parametrize("config", [c for c in matrix.configs() if not c.varlen], ids=lambda config: config.name)
def test_dense_config_on_the_plain_kernel(config, device, plain_kernel_only):
    result = matrix.run(config, device.torch_device, device.size)
    assert result.passed, result.complaints


@pytest.mark.parametrize("index", [0, 21, 42, 63])
def test_short_inputs_reach_the_kernel(index, recorder):
    """A kernel that writes ones doesn't pass: the rule has teeth, and inputs are ragged and no multiple of a tile."""
    config = matrix.configs()[index]
    result = matrix.run(config, "cpu", "short")
    assert not result.passed and len(result.complaints) == 3
    q, k = recorder.calls[0][:2]
    rows = [x.shape[0 if config.varlen else 1] for x in (q, k)]
    assert config.varlen or all(length % 16 for length in rows)
    assert q.shape[-2:] == (config.heads[0], 128) and k.shape[-2:] == (config.heads[1], 128)


@pytest.mark.parametrize("size", matrix.SIZES)
def test_lengths(size):
    low, high = matrix.SIZES[size]
    for config in matrix.configs():
        lengths = matrix._lengths(config, size, torch.Generator().manual_seed(1))
        assert len(lengths) == (config.batch if config.varlen else 1)
        assert all(length % 16 and 1 <= length <= high + 1 for length in lengths)
        assert lengths[0] >= low


def test_rule():
    config = matrix.configs()[0]
    assert matrix.Result(config, 0.004, 0.002, 0.0, 0.0).passed
    assert not matrix.Result(config, 0.0041, 0.002, 0.0, 0.0).passed
    assert not matrix.Result(config, 0.016, 0.1, 0.0, 0.0).passed
    assert not matrix.Result(config, math.nan, 0.002, 0.0, 0.0).passed
    assert not matrix.Result(config, 0.001, 0.002, math.nan, 0.0).passed
    assert not matrix.Result(config, 0.001, 0.002, 0.01, 0.0).passed


def test_largest_difference():
    inf, nan = math.inf, math.nan
    cases = {(-inf, -inf): 0.0, (1.0, 1.5): 0.5, (-inf, 0.0): nan, (nan, 0.0): nan, (0.0, -inf): nan, (nan, nan): nan}
    for (actual, expected), result in cases.items():
        given = matrix.largest_difference(torch.tensor([0.0, actual]), torch.tensor([0.0, expected]))
        assert given == result or (math.isnan(given) and math.isnan(result))
    assert matrix.largest_difference(torch.empty(0), torch.empty(0)) == 0.0
