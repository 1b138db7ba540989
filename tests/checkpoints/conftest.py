"""The small trainings of the tests of rl and callbacks serve here as well."""

import sys
from pathlib import Path

sys.path += [str(Path(__file__).parent.parent / folder) for folder in ("rl", "callbacks")]
