"""stand_ins.py DIR LIBRARY: what loads in place of the cuBLAS and cuDNN that TensorRT 8's plugin library names.

They have the symbols, with the versions that the loader looks for, and end the program at a call. odtk's engines make
none: csrc/engine takes both out of TensorRT's tactic sources.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path


def undefined_symbols(library: str) -> dict[str, list[str]]:
    """Library → the symbols that are to come from it, of cuBLAS and cuDNN."""
    listing = subprocess.run(["nm", "-D", "--undefined-only", library], capture_output=True, text=True, check=True)
    wanted: dict[str, list[str]] = {}
    for line in listing.stdout.splitlines():
        name, _, version = line.split()[-1].partition("@")
        if version.startswith(("libcublas", "libcudnn")):
            wanted.setdefault(version, []).append(name)
    return wanted


def main(folder: str, library: str) -> None:
    target = Path(folder)
    target.mkdir(parents=True, exist_ok=True)
    for soname, names in undefined_symbols(library).items():
        source, versions = target / f"{soname}.c", target / f"{soname}.map"
        source.write_text("#include <stdlib.h>\n" + "".join(f"void {name}(void) {{ abort(); }}\n" for name in names))
        versions.write_text(f"{soname} {{ global: *; }};\n")
        flags = ["-shared", "-fPIC", f"-Wl,-soname,{soname}", f"-Wl,--version-script,{versions}"]
        subprocess.run(["gcc", *flags, str(source), "-o", str(target / soname)], check=True)
        print(f"{target / soname}: {len(names)} symbols")


if __name__ == "__main__":
    main(*sys.argv[1:])
