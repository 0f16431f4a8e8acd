"""Ranks: launchers, process group, collectives, ZeRO 3 gathering, and the end of a failed run."""
