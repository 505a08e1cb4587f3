"""Prefect tasks, one per stage, and the launchers that run their jobs. Does not import torch.

This file imports nothing: launchers are used before Prefect is imported.
"""
