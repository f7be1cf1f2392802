"""Attention over several ranks: the arithmetic of zigzag here, the rest in four processes on gloo."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from flash_attn_sm120.distributed import merge, shard, shard_varlen, unshard, unshard_varlen
from flash_attn_sm120.distributed.layout import Zigzag

HERE = Path(__file__).parent
WORLD = 4
SECONDS = 200


def test_four_ranks(tmp_path):
    """Every case of distributed_ranks.py, on every rank; the last one ends in the last case, on purpose."""
    processes = [start(rank, tmp_path) for rank in range(WORLD)]
    try:
        texts = [process.communicate(timeout=SECONDS)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    found = {file.name: json.loads(file.read_text()) for file in tmp_path.glob("*.json")}
    failed = [text for one in found.values() for text in one["failed"].values()]
    assert not failed, "\n".join(failed)
    assert sorted(found) == [f"{rank}.json" for rank in range(WORLD - 1)], "\n".join(texts)
    assert [process.returncode for process in processes] == [0] * (WORLD - 1) + [3]
    assert len(found["0.json"]["ran"]) >= 6


def start(rank, folder):
    command = [sys.executable, HERE / "distributed_ranks.py", str(rank), str(WORLD), folder]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "PYTHONPATH": str(HERE.parent)}
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
