"""`python -m danlu` and the `danlu` command: the laboratory's command line, which needs the extra `danlu[lab]`."""

import sys


def main() -> None:
    """Run the command line, or say in one line which extra is missing."""
    try:
        from danlu.lab.cli import main as run
    except ModuleNotFoundError as error:
        if error.name is None or error.name.startswith("danlu"):
            raise
        sys.stderr.write(f"danlu: the command line needs {error.name}; install it with: pip install 'danlu[lab]'\n")
        raise SystemExit(2) from None
    run()


if __name__ == "__main__":
    main()
