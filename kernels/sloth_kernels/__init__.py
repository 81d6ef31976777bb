"""Fused Triton kernels, each beside its plain-PyTorch reference; `plugin.py` offers them to the core."""
