"""A pytest plugin that lets vLLM's Python import without a GPU, as if there were an RTX 5090."""

import sys
import types

# The CUDA platform imports vLLM's compiled ops, which tests without a GPU don't have.
sys.modules["vllm._C_stable_libtorch"] = types.ModuleType("vllm._C_stable_libtorch")

import vllm.platforms  # noqa: E402
from vllm.platforms.cuda import CudaPlatformBase  # noqa: E402
from vllm.platforms.interface import DeviceCapability  # noqa: E402


class Platform(CudaPlatformBase):
    @classmethod
    def get_device_capability(cls, device_id=0):
        return DeviceCapability(12, 0)

    @classmethod
    def get_device_name(cls, device_id=0):
        return "an RTX 5090"


vllm.platforms._current_platform = Platform()
