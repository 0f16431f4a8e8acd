"""Ranks: launchers, process group, collectives, ZeRO 3 gathering, and how a failing rank ends a run."""
