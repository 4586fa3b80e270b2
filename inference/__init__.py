"""Inference: engine → speaker → sweep → strategies → statistics → report.

Nothing is imported here, so that the command line can read `config` without loading torch.
"""


class Unfinished(Exception):
    """Some samples did not arrive; what did is kept, and `--resume` draws the rest."""
