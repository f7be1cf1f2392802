"""vLLM: the backend FLASH_ATTN_SM120 and the functions of vLLM's flash-attention fork.

vLLM calls `register` through the entry point `vllm.general_plugins`, so that an installed package is enough:

    vllm serve MODEL --attention-backend FLASH_ATTN_SM120

This module imports without vLLM; `register` needs it. The backend's classes are in vllm_backend.py.
"""

from __future__ import annotations

import logging
from typing import Any

from flash_attn_sm120.integrations.vllm_functions import (
    flash_attn_varlen_func,
    flash_attn_with_kvcache,
    get_scheduler_metadata,
)

__all__ = [
    "BACKEND_NAME",
    "flash_attn_varlen_func",
    "flash_attn_with_kvcache",
    "get_scheduler_metadata",
    "register",
]

BACKEND_NAME = "FLASH_ATTN_SM120"
CLASS_PATH = "flash_attn_sm120.integrations.vllm_backend.FlashAttnSm120Backend"

logger = logging.getLogger(__name__)


def register() -> Any:
    """Makes FLASH_ATTN_SM120 a member of vLLM's AttentionBackendEnum; returns it. Calling it again changes nothing.

    Where vLLM can't add members yet (0.24), one is added all the same, and the placeholder CUSTOM, if nobody has it,
    stands for the same classes.

    Raises ImportError without vLLM.
    """
    from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

    member = AttentionBackendEnum.__members__.get(BACKEND_NAME)
    if member is not None:
        return member
    if hasattr(AttentionBackendEnum, "register"):
        member = AttentionBackendEnum.register(BACKEND_NAME, CLASS_PATH)
    else:
        member = _add_member(AttentionBackendEnum)
        custom = getattr(AttentionBackendEnum, "CUSTOM", None)
        if custom is not None and not custom.is_overridden():
            register_backend(custom, CLASS_PATH)
    # A process that is spawned unpickles its configuration before it loads plugins.
    member.__reduce_ex__ = lambda protocol: (register, ())
    logger.info("attention backend %s is registered", BACKEND_NAME)
    return member


def _add_member(enum: Any) -> Any:
    """A new member of an Enum that offers no way to add one."""
    member = object.__new__(enum)
    member._name_, member._value_ = BACKEND_NAME, CLASS_PATH
    type.__setattr__(enum, BACKEND_NAME, member)
    enum._member_map_[BACKEND_NAME] = member
    enum._value2member_map_[CLASS_PATH] = member
    enum._member_names_.append(BACKEND_NAME)
    return member
