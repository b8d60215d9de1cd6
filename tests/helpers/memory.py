"""How much memory a piece of code takes, in a process of its own."""

import subprocess
import sys

from tests.helpers.commands import ROOT

# Not ru_maxrss: that of a child begins at what its parent held when it was started. And the peak is set back before it
# is read: imports leave one that lies tens of megabytes above what the process still holds, more or less by chance.
_PEAK = """
import gc, re, sys
def peak():
    return 1024 * int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1])
{prepare}
gc.collect()
open("/proc/self/clear_refs", "w").write("5")
before = peak()
{measured}
print("bytes", peak() - before)
"""


def growth(prepare: str, measured: str, *arguments) -> int:
    """Bytes by which the peak of a fresh process grows while it runs `measured`, after `prepare` (imports, say).

    Both are Python; `arguments` are in `sys.argv`.
    """
    code = _PEAK.format(prepare=prepare, measured=measured)
    command = [sys.executable, "-c", code, *map(str, arguments)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return int(done.stdout.rsplit("bytes ", 1)[1])
