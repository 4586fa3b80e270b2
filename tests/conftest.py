"""Tests run side by side, one a core: each keeps to one thread, and so do its child processes."""

import os

os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported
