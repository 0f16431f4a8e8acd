"""The earlier name of `python -m tools.inspect_data`; `python -m utils.data.inspect` runs it."""

import runpy

if __name__ == "__main__":
    runpy.run_module("tools.inspect_data", run_name="__main__")
