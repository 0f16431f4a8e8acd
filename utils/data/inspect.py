"""Keep `python -m utils.data.inspect` working: runs `python -m tools.inspect_data`."""

import runpy

if __name__ == "__main__":
    runpy.run_module("tools.inspect_data", run_name="__main__")
