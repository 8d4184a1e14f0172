"""Lets the scripts of this folder import the project when run as files: Python adds only their own folder."""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parent.parent)
