"""A real SLURM on this machine for the time of a test: munged, slurmctld and several slurmd, all as the current user."""

import contextlib
import getpass
import os
import shutil
import socket
import subprocess
import time
from pathlib import Path

NEEDED = ("munged", "slurmctld", "slurmd", "sbatch", "scontrol", "scancel", "squeue", "sinfo")
os.environ["PATH"] += os.pathsep + "/usr/sbin"
missing = [name for name in NEEDED if not shutil.which(name)]

CONF = """\
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
CredType=cred/munge
SlurmctldPort={port}
SlurmctldPidFile={folder}/slurmctld.pid
SlurmctldLogFile={folder}/slurmctld.log
StateSaveLocation={folder}/state
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmdLogFile={folder}/slurmd-%n.log
SlurmdSpoolDir={folder}/spool-%n
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
SchedulerType=sched/builtin
SelectType=select/linear
ReturnToService=2
SchedulerParameters=sched_min_interval=100000,batch_sched_delay=0
KillWait=3
MinJobAge=300
SlurmdTimeout=60
{nodes}
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


def _ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        found = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in found:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in found]


@contextlib.contextmanager
def cluster(folder: Path, nodes: int = 2):
    """Environment variables that make SLURM's commands talk to a cluster of `nodes` one-job nodes."""
    ports, host = _ports(nodes + 1), socket.gethostname()
    lines = [f"NodeName=n{i} NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[i]} CPUs=1 State=UNKNOWN" for i in range(nodes)]
    (folder / "state").mkdir(parents=True)
    conf = folder / "slurm.conf"
    conf.write_text(CONF.format(host=host, user=getpass.getuser(), folder=folder, port=ports[-1], nodes="\n".join(lines)))
    (folder / "munge.key").write_bytes(os.urandom(1024))
    (folder / "munge.key").chmod(0o400)
    env = {**os.environ, "SLURM_CONF": str(conf)}
    names = ("key-file", "socket", "pid-file", "log-file", "seed-file")
    own = [f"--{n}={folder}/munge.{n.split('-')[0]}" for n in names]
    commands = [
        ["munged", "--foreground", "--force", *own],
        ["slurmctld", "-D", "-f", str(conf)],
        *(["slurmd", "-D", "-N", f"n{i}", "-f", str(conf)] for i in range(nodes)),
    ]
    quiet = {"env": env, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    running = []
    try:
        for command in commands:
            running.append(subprocess.Popen(command, **quiet))
            time.sleep(0.5)
        for _ in range(100):
            shown = subprocess.run(["sinfo", "-h", "-o", "%T %D"], env=env, capture_output=True, text=True).stdout
            if shown.split() == ["idle", str(nodes)]:
                break
            time.sleep(0.2)
        else:
            raise RuntimeError(f"the nodes did not come up: {shown}\n{(folder / 'slurmctld.log').read_text()[-2000:]}")
        yield {"SLURM_CONF": str(conf), "PATH": os.environ["PATH"]}
    finally:
        subprocess.run(["scancel", "--user", getpass.getuser()], env=env, capture_output=True)
        for process in reversed(running):
            process.terminate()
        for process in running:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(10)
            process.kill()
