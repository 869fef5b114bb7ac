"""Caption, question, match, search and encode your own images with any BLIP checkpoint."""

import signal

if __name__ == "__main__":  # Ctrl-C during the imports, which take seconds, ends the program without a stack trace
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import sys

from inference.options import parse


def main() -> int:
    """Run a command; returns the exit code."""
    args = parse(__doc__ or "", sys.argv[1:])
    from inference.commands import run  # imports PyTorch, which --help and a wrong option do not wait for

    if __name__ == "__main__":
        signal.signal(signal.SIGINT, signal.default_int_handler)
    return run(args)


if __name__ == "__main__":
    sys.exit(main())
