"""Output of a run: console lines, metrics file, loss curve, trackers, and the log of the libraries."""
