"""Prefect tasks, one per stage, and the launchers that run their jobs. No torch in here.

Nothing is imported here: launchers start before Prefect is there.
"""
