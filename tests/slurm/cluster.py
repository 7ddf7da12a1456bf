"""What the tests do to the cluster: send jobs, wait, and break things."""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from tests.support.waiting import PATIENCE_S, wait_until

NEEDED = ("slurmctld", "slurmd", "munged", "ip", "nsenter", "unshare")
INSTALL = "apt-get install --no-install-recommends slurm-wlm munge iproute2"
SCRIPT = str(Path(__file__).with_name("cluster.sh"))


def obstacle() -> str | None:
    """Say why no cluster can be started here; None if one can."""
    if sys.platform != "linux" or os.geteuid() != 0:
        return "NO SLURM TESTS: they need Linux and root, for network namespaces"
    path = f"{os.environ['PATH']}:/usr/sbin:/sbin"
    missing = [name for name in NEEDED if shutil.which(name, path=path) is None]
    return f"NO SLURM TESTS: {', '.join(missing)} missing; {INSTALL}" if missing else None


def _run(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, timeout=30)
    assert done.returncode == 0, f"{command}: {done.stderr}"
    return done.stdout


class Cluster:
    """The running cluster; nodes are n0, n1 and n2."""

    def __init__(self) -> None:
        self.bin = _run(SCRIPT, "bin").strip()
        self.small_disk = str(Path(self.bin).with_name("small"))

    def __call__(self, *command: str) -> str:
        """Run a command of Slurm or of cluster.sh; return what it printed."""
        own = ("crash", "boot", "cut", "heal", "pids", "restart")
        return _run(SCRIPT, *command) if command[0] in own else _run(*command)

    def sbatch(self, *words: str) -> str:
        """Submit a job that is not ours, and leaves no log where the tests run; return its id."""
        return self("sbatch", "--parsable", "--output=/dev/null", *words).strip()

    def job(self, job_id: str, key: str) -> str:
        """Return what `scontrol show job` says of a job, such as JobState or Restarts."""
        words = self("scontrol", "--oneliner", "show", "job", job_id).split()
        return next(word.split("=", 1)[1] for word in words if word.startswith(f"{key}="))

    def wait_for_end(self, job_id: str, patience_s: float = PATIENCE_S) -> str:
        """Wait until the job is over for good; return its state."""
        from dist_vse.launch.schedulers.scontrol import job_state

        def state() -> str | None:
            now = job_state(job_id)
            return now.name if now.ended else None

        return str(wait_until(state, f"the end of job {job_id}", patience_s))

    def ranks(self, node: str) -> list[int]:
        """Return the node's processes that run a rank of a job, as this machine numbers them."""
        return [pid for pid in map(int, self("pids", node).split()) if _is_rank(_command_line(pid))]

    def received(self, node: str) -> int:
        """Return the bytes that came into a node over its network cable."""
        (pid, *_) = self("pids", node).split()
        for line in Path(f"/proc/{pid}/net/dev").read_text().splitlines():
            name, _, numbers = line.strip().partition(":")
            if name == "eth0":
                return int(numbers.split()[0])
        raise AssertionError(f"{node} has no eth0")

    def bring_down(self, node: str) -> None:
        """Have Slurm give a node up at once, as it would do by itself some minutes later."""
        self("scontrol", "update", f"nodename={node}", "state=down", "reason=test")

    def kill_slurmd(self, node: str) -> None:
        """End the node's slurmd, not what it has started."""
        for pid in self._slurmds(node):
            os.kill(pid, signal.SIGKILL)

    @contextlib.contextmanager
    def controller_away(self) -> Iterator[None]:
        """Have the cluster's controller answer nobody, as while it is restarted."""
        pids = map(int, self("pids", "ctl").split())
        (controller,) = [p for p in pids if _command_line(p).startswith("/usr/sbin/slurmctld")]
        os.kill(controller, signal.SIGSTOP)
        try:
            yield
        finally:
            os.kill(controller, signal.SIGCONT)

    def _slurmds(self, node: str) -> list[int]:
        pids = map(int, self("pids", node).split())
        return [pid for pid in pids if _command_line(pid).startswith("/usr/sbin/slurmd")]

    def clean(self) -> None:
        """End all jobs and have all nodes idle again."""
        self("scancel", "--user=root")
        for node in ("n0", "n1", "n2"):
            self("heal", node)
            if not self._slurmds(node):
                self("crash", node)
                self("boot", node)
        wait_until(lambda: self._resumed() == 3, "three idle nodes")

    def _resumed(self) -> int:
        """Take nodes that are down back into service; return how many are idle."""
        for node in ("n0", "n1", "n2"):
            if "DOWN" in self("sinfo", "-h", "-n", node, "-o", "%T").upper():
                with contextlib.suppress(AssertionError):  # it has come back by itself just now
                    self("scontrol", "update", f"nodename={node}", "state=resume")
        return int(self("sinfo", "-h", "-p", "main", "-t", "idle", "-o", "%D").strip() or 0)


def _command_line(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()
    except (FileNotFoundError, ProcessLookupError):
        return ""


def _is_rank(command_line: str) -> bool:
    return "submitit.core._submit" in command_line and command_line.split()[0].endswith("python")
