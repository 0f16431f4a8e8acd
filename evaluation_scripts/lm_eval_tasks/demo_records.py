"""The demo's evaluation records as a data set for lm-evaluation-harness."""

import json
from pathlib import Path
from typing import Any

import datasets

FILE = Path(__file__).resolve().parents[2] / "data" / "eval.json"


def load(**settings: Any) -> dict[str, datasets.Dataset]:
    """Return the split "test": questions in the form that training asks them, and their answers."""
    records = json.loads(FILE.read_text(encoding="utf-8"))
    rows = [{"prompt": f" {record['prompt']}", "answer": record["chosen"]} for record in records]
    return {"test": datasets.Dataset.from_list(rows)}
