"""Imports modules, trains and predicts where modules and names are absent that Windows and macOS lack.

The names are taken away after PyTorch and the other packages have been imported, since those look which system it is.
Data workers import this file again, because they are started as on Windows and macOS, by `spawn`.
"""

import importlib
import multiprocessing
import os
import signal
import sys

import torchvision  # noqa: F401

if __name__ == "__main__":  # data workers need none of these
    import matplotlib.figure  # noqa: F401
    import torch.distributed.fsdp  # noqa: F401
    import torch.distributed.tensor  # noqa: F401
    import transformers  # noqa: F401

MODULES = ("resource", "fcntl", "termios", "tty", "pty", "pwd", "grp", "syslog", "readline")
OF_OS = ("fork", "forkpty", "sched_getaffinity", "sched_setaffinity", "setsid", "killpg", "getpgid", "getpgrp",
         "getuid", "geteuid", "uname", "nice", "getloadavg", "mkfifo", "posix_fadvise", "sendfile")  # fmt: skip
OF_SIGNAL = ("SIGKILL", "SIGHUP", "SIGALRM", "SIGUSR1", "SIGUSR2", "SIGQUIT", "SIGTSTP", "alarm", "setitimer", "pause")

for name in MODULES:
    sys.modules[name] = None
for module, names in ((os, OF_OS), (signal, OF_SIGNAL)):
    for name in names:
        if hasattr(module, name):
            delattr(module, name)


def main(words):
    """Carry out commands, which the word "then" separates; returns the exit code of the first that fails, or 0."""
    while words:
        end = words.index("then") if "then" in words else len(words)
        if code := carry_out(*words[:end]):
            return code
        words = words[end + 1 :]
    return 0


def carry_out(what, *words):
    """Import the modules named by the words, or run the script `what` with them; returns the exit code."""
    if what == "import":
        for name in words:
            importlib.import_module(name)
        return 0
    script = importlib.import_module(what)
    sys.argv = [f"{what}.py", *words]
    if what == "predict":
        return script.main()
    config = next(value for name, value in vars(script).items() if name.endswith("Config"))
    return script.launch(script.main, config, "", "", "")


if __name__ == "__main__":
    multiprocessing.set_start_method("spawn")
    sys.exit(main(sys.argv[1:]))
