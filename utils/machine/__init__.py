"""The machine a run is on: device, precision, memory allocation on a CPU, compile locks."""
