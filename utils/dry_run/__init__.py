"""`--dry_run`: the plan of a run and its memory estimate."""
