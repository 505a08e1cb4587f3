"""Warm workers: a flow run is forked from a process that has imported Prefect and the flows.

`worker` is Prefect's process worker with another command; `client` is that command, a small process
in whose place the worker would start Python anew; `server` imports once, and forks.
"""
