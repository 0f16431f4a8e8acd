"""Keep `python -m utils.memory` working: runs `python -m tools.memory_table`."""

import runpy

if __name__ == "__main__":
    runpy.run_module("tools.memory_table", run_name="__main__")
