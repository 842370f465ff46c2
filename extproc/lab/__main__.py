"""`python -m extproc.lab`: the same as `extproc lab`."""

import argparse
import sys

from extproc.errors import ConfigError
from extproc.lab import cli


def main() -> int:
    """Returns the exit status: 2 for wrong flags or a bad trace."""
    parser = argparse.ArgumentParser(prog="extproc lab", description="Compare routing policies on modelled engines.")
    cli.add_arguments(parser)
    try:
        return cli.run(parser.parse_args())
    except ConfigError as error:
        sys.stderr.write(f"extproc lab: {error}\n")
        return 2
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
