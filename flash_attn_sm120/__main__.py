"""python -m flash_attn_sm120"""

import sys

from flash_attn_sm120.cli import main

sys.exit(main())
