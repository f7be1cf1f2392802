"""What this GPU gives at most: mma.sync, copies, reads: see --help. The code is flash_attn_sm120/bench/ceiling.py."""

from flash_attn_sm120.bench.ceiling import main

if __name__ == "__main__":
    main()
