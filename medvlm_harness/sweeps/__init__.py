"""Grids of stock runs; see docs/sweeps.md."""

import os

# Importing submitit sets up logging anew, which closes the handlers of everybody else; this value leaves it alone.
os.environ.setdefault("SUBMITIT_LOG_LEVEL", "NOCONFIG")
