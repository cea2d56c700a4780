"""Generates the code of speculation.proto.

Run `python -m protos.generate`; with --check it only reports whether the code is stale.
"""

import argparse
import sys
import tempfile
from pathlib import Path

from grpc_tools import protoc

ROOT = Path(__file__).resolve().parent.parent
SOURCE = "protos/speculation.proto"


def compile_protos() -> dict[Path, bytes]:
    """Returns the compiler's output by the file it belongs in."""
    with tempfile.TemporaryDirectory() as folder:
        outputs = [f"--{kind}_out={folder}" for kind in ("python", "pyi", "grpc_python")]
        # Run from the root of the repository, so that the output imports `from protos`.
        status = protoc.main(["protoc", f"-I{ROOT}", *outputs, str(ROOT / SOURCE)])
        if status:
            sys.exit(f"protoc could not compile {SOURCE} (status {status}): see the lines above")
        found = sorted(Path(folder).rglob("*.py*"))
        return {ROOT / path.relative_to(folder): path.read_bytes() for path in found}


def stale_files() -> list[Path]:
    """Returns the generated files that differ from the compiler's output."""
    return [
        path
        for path, content in compile_protos().items()
        if not path.exists() or path.read_bytes() != content
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--check", action="store_true", help="write nothing; exit with 1 if a file is stale"
    )
    if not parser.parse_args().check:
        for path, content in compile_protos().items():
            path.write_bytes(content)
    elif names := [str(path.relative_to(ROOT)) for path in stale_files()]:
        sys.exit(f"stale: {', '.join(names)}: run `make proto` and commit the result")


if __name__ == "__main__":
    main()
