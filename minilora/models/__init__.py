"""A base and its parts: found by name, loaded part by part.

May import files, settings, lora.py and diffusion.py.
"""

import logging
import os

# Before transformers is imported: otherwise it warns about parts that are not used here.
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
# diffusers imports bitsandbytes if it is installed, which then misses a 4-bit kernel that nothing here calls.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
