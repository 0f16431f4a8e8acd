"""Compile the kernels of DeepSpeed that the tests need, side by side, where they are not compiled or no longer fit.

Compiled by the first tests that want them, they would keep both workers waiting for one lock, some for too long.
"""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from utils.machine.compile_locks import clear_stale_build_locks, extension_folder  # noqa: E402

BUILDERS = {
    "deepspeed_shm_comm": "ShareMemCommBuilder", "fused_adam": "FusedAdamBuilder", "cpu_adam": "CPUAdamBuilder",
}  # fmt: skip
LOAD = """
import sys
from deepspeed.accelerator import get_accelerator
get_accelerator().create_op_builder(sys.argv[1]).load()
"""


def main() -> None:
    """A kernel that can't be compiled is left to the tests: they say what becomes of a run without it."""
    folder = extension_folder()
    clear_stale_build_locks(folder)
    print(f"compiling {', '.join(BUILDERS)} in {folder}, where they are not up to date ...", flush=True)
    # All of them: those of an environment that was made anew are there, and are compiled again when they are loaded.
    compilers = [
        subprocess.Popen([sys.executable, "-c", LOAD, builder], stdout=subprocess.DEVNULL)
        for builder in BUILDERS.values()
    ]
    for compiler in compilers:
        compiler.wait()


if __name__ == "__main__":
    main()
