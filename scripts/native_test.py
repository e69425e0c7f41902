"""Build and run the C++ tests, plain or under sanitizers, each in a build folder of its own below build/."""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

# A sanitizer that only prints would let ctest pass.
SANITIZER_OPTIONS = {
    "TSAN_OPTIONS": "halt_on_error=1 exitcode=66",
    "ASAN_OPTIONS": "halt_on_error=1 detect_leaks=1",
    "UBSAN_OPTIONS": "halt_on_error=1 print_stacktrace=1",
}


def tool(name: str) -> str:
    """The path of `name`, from the running environment or from the system.

    Raises:
        SystemExit: there is none.
    """
    beside = Path(sys.executable).parent / name
    found = str(beside) if beside.exists() else shutil.which(name)
    if found is None:
        raise SystemExit(f"{name} is not installed: `pip install {name}`")
    return found


def main() -> int:
    """Exit status: 0 all passed, else that of the step that failed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--sanitize", default="", metavar="LIST", help="e.g. thread, or address,undefined")
    parser.add_argument("--filter", default="", metavar="REGEX", help="only these areas (ctest -R)")
    arguments = parser.parse_args()
    build_dir = ROOT / "build" / ("native-" + (arguments.sanitize.replace(",", "-") or "plain"))
    configure = [tool("cmake"), "-S", str(ROOT), "-B", str(build_dir)]
    configure += ["-DSNAPD_BINDINGS=OFF", "-DSNAPD_TESTS=ON", f"-DSNAPD_SANITIZE={arguments.sanitize}"]
    run = [tool("ctest"), "--test-dir", str(build_dir), "--output-on-failure", "--no-tests=error"]
    if arguments.filter:
        run += ["-R", arguments.filter]
    for command in (configure, [tool("cmake"), "--build", str(build_dir), "--parallel", "2"], run):
        code = subprocess.run(
            command, cwd=ROOT, env=SANITIZER_OPTIONS | dict(os.environ), check=False
        ).returncode
        if code != 0:
            return code
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
