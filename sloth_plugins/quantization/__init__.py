"""4-bit checkpoints of bitsandbytes with bytes where they buy accuracy, and rounding that knows the data.

docs/quantization.md tells what is measured, chosen and rounded how.
"""

from sloth_plugins.quantization.plan import Choice, QuantizationPlan
from sloth_plugins.quantization.run import Options, Result, plan_quantization, quantize

__all__ = ["Choice", "Options", "QuantizationPlan", "Result", "plan_quantization", "quantize"]
