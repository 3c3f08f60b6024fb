"""Two machines with a cable between them, in two network namespaces of this one.

A namespace lives as long as the process that holds it, so nothing has to be removed.  The first is made in a
user namespace of its own, so that it takes no rights, where the system allows that to its users.
"""

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from helpers import ROOT

DEVICE = "cable"  # of each machine


class Machine:
    """One of them, number 0 or 1."""

    def __init__(self, holder: subprocess.Popen, number: int):
        self.holder, self.number = holder, number

    def words(self, *words: str) -> list[str]:
        """Return what to type so that a command runs on this machine."""
        return ["nsenter", "--preserve-credentials", "--user", "--net", "--target", str(self.holder.pid), *words]

    def do(self, text: str) -> str:
        done = subprocess.run(self.words(*text.split()), capture_output=True, text=True)
        if done.returncode:
            raise OSError(f"{text}: {done.stderr.strip()}")
        return done.stdout

    def sent(self) -> int:
        """Return how many bytes have gone into the cable here, with the headers of Ethernet, IP and TCP."""
        lines = self.do("cat /proc/self/net/dev").splitlines()
        [numbers] = [line.split(":")[1].split() for line in lines if line.strip().startswith(f"{DEVICE}:")]
        return int(numbers[8])

    def torchrun(self, *words: str) -> subprocess.Popen:
        """Start torchrun with a process here, for one with a process on the other machine."""
        place = ["--nnodes", "2", "--node-rank", str(self.number), "--nproc-per-node", "1"]
        place += ["--master-addr", "10.77.0.1", "--master-port", "29501"]
        command = self.words(sys.executable, "-m", "torch.distributed.run", *place, *words)
        names = {"GLOO_SOCKET_IFNAME": DEVICE, "OMP_NUM_THREADS": "1"}
        out = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        return subprocess.Popen(command, cwd=ROOT, env=os.environ | names, **out)


def hold(words: list[str]) -> subprocess.Popen:
    """Start a process that holds the namespaces it is started in; OSError if that is not allowed."""
    process = subprocess.Popen(
        [*words, "sh", "-c", "echo; exec sleep 3600"], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    if not process.stdout.readline():
        raise OSError(process.communicate()[1].decode().strip())
    return process


@contextmanager
def two_machines() -> Iterator[tuple[Machine, Machine]]:
    """Build the machines, and remove them at the end.  Raises OSError where that is not allowed."""
    if missing := [program for program in ("unshare", "nsenter", "ip") if not shutil.which(program)]:
        raise OSError(f"there is no {' and no '.join(missing)} here")
    holders = []
    try:
        holders.append(hold(["unshare", "--user", "--map-root-user", "--net"]))
        one = Machine(holders[0], 0)
        holders.append(hold(one.words("unshare", "--net")))
        two = Machine(holders[1], 1)
        one.do(f"ip link add {DEVICE} type veth peer name {DEVICE} netns {two.holder.pid}")
        for machine in (one, two):
            machine.do("ip link set lo up")
            machine.do(f"ip addr add 10.77.0.{1 + machine.number}/24 dev {DEVICE}")
            machine.do(f"ip link set {DEVICE} up")
        yield one, two
    finally:
        for holder in holders:
            holder.kill()
            holder.communicate()
