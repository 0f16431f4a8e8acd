"""The machine of a run: device, precision, memory allocation on a CPU, processor, compile locks."""
