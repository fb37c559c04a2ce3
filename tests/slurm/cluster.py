"""A Slurm of one node on this machine, for as long as a test needs it, with every file of it in one folder."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import time
from pathlib import Path

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "scancel", "squeue")
SYSTEM_PATH = "/usr/sbin:/usr/bin:/sbin:/bin"
GPUS = 2  # devices that are none: Slurm counts and assigns them all the same

SLURM_CONF = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
AuthType=auth/munge
# cred_expire: seconds that a requeued job waits before it starts again; two minutes by default
AuthInfo=socket={folder}/munge.sock,cred_expire=5
CredType=cred/munge
SlurmUser=root
SlurmdUser=root
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
SlurmctldPort={controller_port}
SlurmdPort={node_port}
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=1,bf_interval=1,batch_sched_delay=0
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
ReturnToService=2
MpiDefault=none
SwitchType=switch/none
GresTypes=gpu
NodeName={host} NodeAddr=127.0.0.1 CPUs={cpus} Gres=gpu:{gpus} State=UNKNOWN
PartitionName=low Nodes={host} Default=YES MaxTime=INFINITE State=UP PriorityTier=1 PreemptMode=REQUEUE GraceTime=60
PartitionName=high Nodes={host} MaxTime=INFINITE State=UP PriorityTier=10 PreemptMode=OFF
"""


def why_not() -> str | None:
    """Why there can be no Slurm on this machine."""
    missing = [name for name in PROGRAMS if shutil.which(name, path=SYSTEM_PATH) is None]
    if missing:
        return f"no {', '.join(missing)}: apt-get install slurm-wlm munge"
    if os.geteuid() != 0:
        return "Slurm's daemons need root"
    return None if len(os.sched_getaffinity(0)) >= 2 else "Slurm needs 2 processors for 2 tasks"


class Cluster:
    """Controller and node; `environment` is what Slurm's commands need."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.host = socket.gethostname().split(".")[0]
        own = {key: value for key, value in os.environ.items() if not key.startswith(("SLURM_", "SBATCH_"))}
        path = f"{own.get('PATH', '')}:{SYSTEM_PATH}"
        self.environment = {**own, "SLURM_CONF": str(folder / "slurm.conf"), "PATH": path}

    def start(self) -> None:
        """Until the node is idle; RuntimeError with what the daemons said where it does not become so."""
        for name in ("state", "spool"):
            (self.folder / name).mkdir()
        self.folder.chmod(0o755)
        key = self.folder / "munge.key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o400)
        paths = {name: str(self.folder / f"munge.{name}") for name in ("sock", "pid", "log", "seed")}
        self._run(
            "munged", "--force", f"--socket={paths['sock']}", f"--key-file={key}", f"--pid-file={paths['pid']}",
            f"--log-file={paths['log']}", f"--seed-file={paths['seed']}",
        )  # fmt: skip
        controller_port, node_port = free_ports(2)
        (self.folder / "slurm.conf").write_text(
            SLURM_CONF.format(
                host=self.host, folder=self.folder, gpus=GPUS, cpus=len(os.sched_getaffinity(0)),
                controller_port=controller_port, node_port=node_port,
            )
        )  # fmt: skip
        devices = ["/dev/null", "/dev/zero"]
        (self.folder / "gres.conf").write_text("".join(f"Name=gpu File={device}\n" for device in devices[:GPUS]))
        self._run("slurmctld", "-c", "-f", str(self.folder / "slurm.conf"))
        self._run("slurmd", "-f", str(self.folder / "slurm.conf"), "-N", self.host)
        ends_sec = time.monotonic() + 30
        while "State=IDLE" not in self._run("scontrol", "show", "node", self.host, check=False):
            if time.monotonic() > ends_sec:
                logs = [file.read_text()[-2000:] for file in self.folder.glob("*.log")]
                raise RuntimeError("the node did not become idle:\n" + "\n".join(logs))
            time.sleep(0.2)

    def stop(self) -> None:
        """The jobs, then the daemons by the numbers they have left."""
        self._run("scancel", "--user=root", check=False)
        ends_sec = time.monotonic() + 10
        while self._run("squeue", "--noheader", check=False).strip() and time.monotonic() < ends_sec:
            time.sleep(0.2)
        for name in ("slurmd.pid", "slurmctld.pid", "munge.pid"):
            file = self.folder / name
            if file.exists():
                os.kill(int(file.read_text()), signal.SIGTERM)

    def submit(self, *words: str, cwd: Path) -> str:
        """The number of a job, by sbatch."""
        return self._run("sbatch", "--parsable", *words, cwd=cwd).strip()

    def signal(self, job: str, name: str) -> None:
        """To every task of the job, as --signal does near the limit."""
        self._run("scancel", f"--signal={name}", job)

    def facts(self, job: str) -> str:
        """What Slurm knows of a job."""
        return self._run("scontrol", "show", "job", "--oneliner", job)

    def wait(self, job: str, text: str, limit_sec: float = 400) -> str:
        """Until `text` is among the facts of the job; fails with them where it never is."""
        ends_sec = time.monotonic() + limit_sec
        while text not in (facts := self.facts(job)):
            assert time.monotonic() < ends_sec, facts
            time.sleep(0.2)
        return facts

    def _run(self, *command: str, check: bool = True, cwd: Path | None = None) -> str:
        # A file, not a pipe: the daemons keep their output open.
        with (self.folder / "output.txt").open("w+") as output:
            done = subprocess.run(command, env=self.environment, stdout=output, stderr=output, cwd=cwd, check=False)
            output.seek(0)
            answer = output.read()
        if check and done.returncode:
            raise RuntimeError(f"{' '.join(command)}: exit code {done.returncode}: {answer}")
        return answer


def free_ports(count: int) -> list[int]:
    """Ports that nobody listens on at the moment."""
    sockets = [socket.socket() for _ in range(count)]
    try:
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [int(one.getsockname()[1]) for one in sockets]
    finally:
        for one in sockets:
            one.close()
