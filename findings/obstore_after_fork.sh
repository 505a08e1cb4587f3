#!/usr/bin/env bash
# obstore 0.12.1: in a child that was forked after its parent had used obstore, every call waits for ever.
#
# One would have guessed: an error, or that it works. obstore runs on a tokio runtime whose threads do not survive a fork.
# Nothing says so, and no time limit of the client ends the call, since the request is never begun.
#
# Whom it hurts: DataLoader workers, multiprocessing's default start method on Linux before Python 3.14, and torchrun agents that fork.
# What helps: load a second copy of the extension module in the child, which brings a runtime of its own.
set -euo pipefail
folder=$(mktemp -d); trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --disable-pip-version-check obstore==0.12.1
cat > "$folder/probe.py" <<'PY'
import importlib.metadata, os, pathlib, shutil, sys, time
import obstore
from obstore.store import LocalStore

place = pathlib.Path(sys.argv[1])
store = LocalStore(str(place), mkdir=True)
obstore.put(store, "key", b"value")
print("obstore", importlib.metadata.version("obstore"), "in the parent:", bytes(obstore.get(store, "key").bytes()))


def child(fresh):
    if fresh:
        from importlib.machinery import ExtensionFileLoader
        from importlib.util import module_from_spec, spec_from_loader

        name = "obstore._obstore"
        copy = shutil.copy(sys.modules[name].__file__, place)
        for loaded in [m for m in sys.modules if m.startswith("obstore")]:
            del sys.modules[loaded]
        loader = ExtensionFileLoader(name, copy)
        sys.modules[name] = module_from_spec(spec_from_loader(name, loader))
        loader.exec_module(sys.modules[name])
    import obstore
    from obstore.store import LocalStore

    obstore.get(LocalStore(str(place)), "key").bytes()


def forked(fresh):
    """Whether a forked child ends within ten seconds."""
    if (pid := os.fork()) == 0:
        child(fresh)
        os._exit(0)
    for _ in range(100):
        if os.waitpid(pid, os.WNOHANG)[0]:
            return True
        time.sleep(0.1)
    os.kill(pid, 9)
    os.waitpid(pid, 0)
    return False


found = forked(False), forked(True)
print("a forked child answers:", found[0], "- with a copy of its own:", found[1])
sys.exit(found != (False, True))
PY
"$folder/venv/bin/python" "$folder/probe.py" "$folder/store"
