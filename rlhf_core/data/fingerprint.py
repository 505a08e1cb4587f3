"""The torch-free functions about data that the orchestrator calls."""

from rlhf_core.data.check import check_source
from rlhf_core.data.sources import fingerprint

__all__ = ["check_source", "fingerprint"]
