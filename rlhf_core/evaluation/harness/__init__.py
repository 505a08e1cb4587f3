"""Standard benchmarks: the stage around EleutherAI's lm-evaluation-harness (package lm_eval).

tasks.py is for the orchestrator and imports neither torch nor lm_eval; the others are the stage.
"""
