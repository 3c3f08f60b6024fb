"""A base and its parts: found by name, loaded part by part.

May import files, settings and lora.py and diffusion.py.
"""

import logging

# diffusers imports bitsandbytes if it is installed, which then misses a 4-bit kernel that nothing here calls.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
