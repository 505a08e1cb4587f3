"""Watches the sources of data, and sends the event that starts a retraining when they change."""

from __future__ import annotations

import hashlib

from prefect import flow
from prefect.client.schemas.objects import State
from prefect.events import emit_event
from prefect.logging import get_run_logger
from prefect.states import Completed

from rlhf_core.data.fingerprint import fingerprint
from rlhf_core.jobs import DataSettings
from rlhf_core.store import open_store
from tasks.events import log_event, tidy_logs
from tasks.run import now

NEW_DATA = "rlhf.data.new"
"""Name of the event. Other programs can send it too, see docs/operations.md."""

tidy_logs()


@flow(name="rlhf-watch-data", flow_run_name="watch {source}", persist_result=False)
def rlhf_watch_data(source: str | list[str], store: str | None = None) -> State[None]:
    """Sends the event rlhf.data.new when files, votes or thumbs were added, changed or removed.

    Args:
        source: path, pattern or s3:// prefix, playground-votes or playground-thumbs, as in a data
            section's source; a list of those of a mixture, of which any may change.
        store: URL of the artifact store, which records the last fingerprint; empty: RLHF_STORE.
    """
    opened = open_store(store)
    sources = [source] if isinstance(source, str) else source
    shown = ", ".join(sources)
    name = hashlib.sha256("\n".join(sources).encode()).hexdigest()[:16]
    path = f"watched/{name}.json"
    seen = (opened.read_record(path) or {}).get("fingerprint")
    found = " + ".join(fingerprint(DataSettings(source=one), opened) for one in sources)
    if found == seen:
        return Completed(name="NothingNew", message=f"nothing has changed in {shown}")
    record = {"source": source, "fingerprint": found, "time": now()}
    if seen is None:
        opened.write_record(path, record)
        return Completed(message=f"from now on watched: {shown}")
    emit_event(
        event=NEW_DATA,
        resource={"prefect.resource.id": f"rlhf.data.{name}", "prefect.resource.name": shown},
    )
    opened.write_record(path, record)  # last: an event twice is better than none
    log_event(get_run_logger(), "note", "watch", f"changed: {shown}")
    return Completed(name="NewData", message=f"changed: {shown}; sent {NEW_DATA}")
