"""The artifact store: publishes folders, names them by their content, fetches them verified."""

from rlhf_core.store.artifact import Artifact, FileEntry
from rlhf_core.store.open import open_store
from rlhf_core.store.settings import StoreSettings
from rlhf_core.store.store import Store
from rlhf_core.system.home import rlhf_home

__all__ = ["Artifact", "FileEntry", "Store", "StoreSettings", "open_store", "rlhf_home"]
