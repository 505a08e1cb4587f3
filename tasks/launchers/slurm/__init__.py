"""The `slurm` launcher: a stage is a batch job with one node agent per node."""

from tasks.launchers.slurm.launcher import Slurm

__all__ = ["Slurm"]
