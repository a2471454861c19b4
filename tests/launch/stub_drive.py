"""What `dstune drive RUN_DIR --address A` does, with the stub worker in place of the real one."""

import argparse
import sys
from pathlib import Path

from dstune.launch.driver import DriveLimits, Observer, drive
from dstune.launch.local import RayExecutor
from dstune.paths import RunPaths
from tests.launch.process_executor import ROOT, planner

WRAPPER = f"""#!/bin/bash
# python, but `-m dstune.cli.main drive` drives a stub
export PYTHONPATH={ROOT} OMP_NUM_THREADS=1
if [ "$2" = dstune.cli.main ]; then shift 3; set -- -m tests.launch.stub_drive "$@"; fi
exec {sys.executable} "$@"
"""


class Speaker(Observer):
    def on_event(self, record):
        print(f"event {record['event']}", flush=True)


def wrapper(folder: Path) -> Path:
    """An interpreter that drives stubs."""
    path = folder / "python"
    path.write_text(WRAPPER)
    path.chmod(0o755)
    return path


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("run_directory", type=Path)
    parser.add_argument("--address")
    args = parser.parse_args()
    paths = RunPaths(args.run_directory)
    entry = "tests.launch.stub_worker:main"
    with RayExecutor(2, address=args.address, log_directory=paths.logs / "ray", entry=entry) as executor:
        limits = DriveLimits(workers_wanted=2, workers_min=2, wait_seconds=120)
        end = drive(paths, executor, planner(paths), limits, Speaker())
    print(f"end {end.state} at step {end.step} {end.message}", flush=True)
    return end.exit_status


if __name__ == "__main__":
    sys.exit(main())
