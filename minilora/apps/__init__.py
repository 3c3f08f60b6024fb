"""What LoRA is used for: restore, morph, restyle, distill, evaluate, clips (motion.py), and the page in the browser.

May import everything except base/.  Only base/ imports it, to measure the bundled base.
"""
