"""Output of a run: console lines, metrics file, loss curve, trackers, and the libraries' own logs."""
