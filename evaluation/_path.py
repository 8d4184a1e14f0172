"""Lets a script of this folder, run as a file, import the project: its own folder is all that Python adds."""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parent.parent)
