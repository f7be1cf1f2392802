"""Decode from a paged KV cache: see --help. The code is flash_attn_sm120/bench/decode.py."""

from flash_attn_sm120.bench.decode import main

if __name__ == "__main__":
    main()
