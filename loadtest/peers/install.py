"""An environment of its own for each gateway, under .venv-peers. What is there is left alone."""

import subprocess
import sys

from loadtest.peers.gateways import Gateway

_DONE = ".installed"


def install(gateway: Gateway) -> str:
    """Returns:  why it cannot be installed; "": it is."""
    if not gateway.installs:
        return ""
    folder = gateway.bin.parent
    done, wanted = folder / _DONE, repr(gateway.installs)
    if done.exists() and done.read_text() == wanted:
        return ""
    print(f"installing {gateway.name} into {folder.relative_to(folder.parents[1])} …", flush=True)
    calls = [[sys.executable, "-m", "venv", "--clear", str(folder)]]
    calls += [[str(gateway.bin / "pip"), "install", "-q", *words] for words in gateway.installs]
    for argv in calls:
        ended = subprocess.run(argv, capture_output=True, text=True, check=False)
        if ended.returncode:
            lines = [line for line in (ended.stderr or ended.stdout).splitlines() if not line.startswith("WARNING")]
            return f"not installed: {(lines or ['pip failed'])[-1]}"
    done.write_text(wanted)
    return ""
