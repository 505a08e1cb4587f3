"""Training library and artifact store of the RLHF pipeline. Nothing in here imports Prefect."""

__version__ = "0.1.0"
