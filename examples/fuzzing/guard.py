"""What an input must not do: write outside its folder, run anything, reach a network."""

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

#: Event of Python's audit -> places of the paths in its arguments.
_CHANGES: dict[str, tuple[int, ...]] = {
    "os.rename": (0, 1),
    "os.remove": (0,),
    "os.rmdir": (0,),
    "os.mkdir": (0,),
    "os.link": (1,),
    "os.symlink": (1,),
    "os.truncate": (0,),
    "os.chmod": (0,),
    "os.chown": (0,),
    "os.utime": (0,),
    "shutil.rmtree": (0,),
    "shutil.move": (0, 1),
    "shutil.copyfile": (1,),
}
_RUNS = (
    *("os.system", "os.exec", "os.posix_spawn", "os.spawn", "os.fork", "subprocess.Popen"),
    *("socket.connect", "socket.getaddrinfo", "socket.bind", "urllib.Request", "pickle.find_class"),
    *("ctypes.dlopen", "pty.spawn"),
)
_CODE = (".py", ".pyc", ".so")


def watch(inside: Path, also: Path, report: Callable[[str], None]) -> None:
    """Report, for the rest of the process, each change outside a folder and each thing that is run.

    Args:
        inside: absolute; relative paths are taken to be in it.
        also: another one, where the fuzzers themselves write.
        report: is told what was done.
    """
    root, other = (f"{os.path.realpath(place)}{os.sep}" for place in (inside, also))

    def is_inside(path: Any) -> bool:
        if isinstance(path, int):  # of an open file
            return True
        whole = os.path.realpath(os.path.join(root, os.fsdecode(path)))
        return f"{whole}{os.sep}".startswith((root, other)) or whole == os.devnull

    def hook(event: str, args: tuple[Any, ...]) -> None:
        if event == "open":
            path, mode, flags = args
            writes = isinstance(flags, int) and flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
            if not isinstance(path, str | bytes | os.PathLike):
                return
            if writes and not is_inside(path):
                report(f"opened for writing: {path!r} ({mode})")
            elif os.fsdecode(path).endswith(_CODE) and is_inside(path):
                report(f"opened code: {path!r}")
        elif event in _RUNS and args != (None,):  # ctypes.CDLL(None) is the program itself
            report(f"{event}: {args!r:.200}")
        elif event in ("exec", "compile"):
            name = args[0].co_filename if event == "exec" else args[1]
            if isinstance(name, str) and name.startswith(root):
                report(f"ran code of {name}")
        else:
            for place in _CHANGES.get(event, ()):
                if args[place] is not None and not is_inside(args[place]):
                    report(f"{event}: {args!r:.200}")

    sys.addaudithook(hook)
