"""Pictures of what the other scripts measured: see --help. The code is flash_attn_sm120/bench/plot.py."""

from flash_attn_sm120.bench.plot import main

if __name__ == "__main__":
    main()
