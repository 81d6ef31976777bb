"""Fused Triton kernels, each with its plain-PyTorch reference in the same file. `plugin.py` offers them to the core."""
