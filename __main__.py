"""`python -m ponder` and the command `ponder`."""

import sys
from pathlib import Path


def main() -> None:
    # `python -m` puts the current folder first on the path; in the repository's root our kernels/
    # would then hide the package of that name that Transformers imports.
    root = Path(__file__).resolve().parent
    sys.path[:] = [p for p in sys.path if Path(p or ".").resolve() != root]

    from .cli import run

    sys.exit(run(sys.argv[1:]))


if __name__ == "__main__":
    main()
