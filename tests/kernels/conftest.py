"""Puts this folder on sys.path for `from three_way import check`; import mode importlib does not."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
