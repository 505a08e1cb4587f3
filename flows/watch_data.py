"""Watches a data source, and sends the event that starts a retraining when it changes."""

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
def rlhf_watch_data(source: str, store: str | None = None) -> State[None]:
    """Sends the event rlhf.data.new when files, votes or thumbs were added, changed or removed.

    Args:
        source: path, pattern or s3:// prefix, playground-votes or playground-thumbs, as in a data
            section's source.
        store: URL of the artifact store, which records the last fingerprint; empty: RLHF_STORE.
    """
    opened = open_store(store)
    name = hashlib.sha256(source.encode()).hexdigest()[:16]
    path = f"watched/{name}.json"
    seen = (opened.read_record(path) or {}).get("fingerprint")
    found = fingerprint(DataSettings(source=source), opened)
    if found == seen:
        return Completed(name="NothingNew", message=f"{source} has not changed")
    record = {"source": source, "fingerprint": found, "time": now()}
    if seen is None:
        opened.write_record(path, record)
        return Completed(message=f"{source} is watched from now on")
    emit_event(
        event=NEW_DATA,
        resource={"prefect.resource.id": f"rlhf.data.{name}", "prefect.resource.name": source},
    )
    opened.write_record(path, record)  # last: an event twice is better than none
    log_event(get_run_logger(), "note", "watch", f"{source} has changed")
    return Completed(name="NewData", message=f"{source} has changed; sent {NEW_DATA}")
