"""Prefill from a paged KV cache against dense prefill: see --help. The code is flash_attn_sm120/bench/prefill.py."""

from flash_attn_sm120.bench.prefill import main

if __name__ == "__main__":
    main()
