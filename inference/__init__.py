"""Inference: engine → samples → strategies → statistics → report.

Nothing is imported here, so that the command line can read `config` without loading torch.
"""
