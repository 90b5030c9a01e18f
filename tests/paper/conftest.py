"""Makes the modules of examples/paper importable."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "examples" / "paper"))
