"""Compile the kernels of DeepSpeed that the tests need, side by side, where they are not compiled yet.

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
    missing = [name for name in BUILDERS if not (folder / name / f"{name}.so").is_file()]
    if missing:
        print(f"compiling {', '.join(missing)} in {folder} ...", flush=True)
    compilers = [
        subprocess.Popen([sys.executable, "-c", LOAD, BUILDERS[name]], stdout=subprocess.DEVNULL) for name in missing
    ]
    for compiler in compilers:
        compiler.wait()


if __name__ == "__main__":
    main()
