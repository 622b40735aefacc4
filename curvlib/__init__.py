"""Curvature of fine-tuned language models: the helper module behind the notebooks."""

import logging

__version__ = "0.1.0"

# On CPUs with AVX512-BF16, bitsandbytes warns at import that it found no extra kernel to fetch from a hub; curvlib
# computes with its own 4-bit map (curvlib.nf4) and never uses that kernel.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
