"""A cluster without machines: an API server over HTTP, the controllers of Job and JobSet as far as
the launcher sees them, and pods that are functions or processes. It follows the sources of
Kubernetes 1.34 and JobSet 0.10; no real cluster was there to compare it with."""
