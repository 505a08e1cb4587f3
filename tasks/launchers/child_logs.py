"""The log messages of another flow run, as they come."""

from __future__ import annotations

from datetime import datetime, timedelta
from typing import Any
from uuid import UUID

from prefect.client.schemas.filters import LogFilter, LogFilterFlowRunId, LogFilterTimestamp
from prefect.client.schemas.sorting import LogSort

from tasks.events import BOILERPLATE

LINK = " of the pipeline http"  # the child's link to the pipeline, which shows these messages
LOG_DELAY = timedelta(seconds=10)  # a log line may reach the server this long after a newer one


class Logs:
    """A flow run's log messages, each once, including those that arrive late."""

    def __init__(self, flow_run: UUID) -> None:
        self.flow_run = flow_run
        self._seen: set[UUID] = set()
        self._newest: datetime | None = None

    def new(self, client: Any) -> list[str]:
        after = None if self._newest is None else self._newest - LOG_DELAY
        found = []
        offset = 0
        while True:
            page = client.read_logs(
                log_filter=LogFilter(
                    flow_run_id=LogFilterFlowRunId(any_=[self.flow_run]),
                    timestamp=LogFilterTimestamp(after_=after) if after else None,
                ),
                sort=LogSort.TIMESTAMP_ASC,
                limit=200,
                offset=offset,
            )
            for log in page:
                if log.id not in self._seen:
                    self._seen.add(log.id)
                    self._newest = max(filter(None, (self._newest, log.timestamp)))
                    if not BOILERPLATE.match(log.message) and LINK not in log.message:
                        found.append(log.message)
            if len(page) < 200:
                return found
            offset += len(page)
