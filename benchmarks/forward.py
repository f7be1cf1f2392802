"""Dense prefill beside other attention kernels: see --help. The code is flash_attn_sm120/bench/forward.py."""

from flash_attn_sm120.bench.forward import main

if __name__ == "__main__":
    main()
