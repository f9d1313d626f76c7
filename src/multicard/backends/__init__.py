"""Backends of our own under ``torch.distributed``: nothing is imported until one is asked for."""
