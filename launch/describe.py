"""What a submission would do, in words: the script, every rank's environment, all conflicts."""

import os
from collections.abc import Mapping, Sequence

from launch import local, slurm
from launch.environment import IDENTITY, conflicts, launcher_of, nested_slurm_names
from launch.submit import Plan


def describe(
    plan: Plan,
    *,
    runs: int = 1,
    parallel: int = 1,
    inherited: Mapping[str, str] = os.environ,
) -> str:
    """Say in full what `submit` would do; `runs` of a sweep are one array."""
    cluster = plan.cluster
    if plan.scheduler == "slurm":
        array = {"map_count": runs, "array_parallelism": parallel} if runs > 1 else {}
        head = slurm.sbatch_text(plan.job_folder, plan.python, plan.parameters | array).rstrip()
        address, port = "<first node>", "<from the job's id and its restarts>"
    else:
        head = f"{cluster.world_size} processes on this machine: {plan.python} -u -m submitit ..."
        address, port = "127.0.0.1", "<a free port>"
    shared = plan.env | {
        "WORLD_SIZE": str(cluster.world_size),
        "LOCAL_WORLD_SIZE": str(cluster.processes_per_node),
        "MASTER_ADDR": address,
        "MASTER_PORT": port,
    }
    lines = [head, "", f"config: {plan.config_path}", f"logs: {plan.job_folder}/%j_RANK_log.err"]
    lines += ["", "environment of all ranks:"]
    lines += [f"  {name}={value}" for name, value in sorted(shared.items())]
    lines += ["", "ranks:"]
    for rank in range(cluster.world_size):
        node, local_rank = divmod(rank, cluster.processes_per_node)
        lines.append(f"  RANK={rank} LOCAL_RANK={local_rank} on node {node}")
    told = find_conflicts(plan, inherited)
    lines += ["", "conflicts in this shell's environment:"]
    lines += [f"  {line}" for line in told or ["none"]]
    vain = ignored(plan)
    return "\n".join([*lines, "", vain] if vain else lines)


def ignored(plan: Plan) -> str:
    """Say what the cluster's file asks for in vain; nothing if there is no such thing."""
    names = local.ignored(plan.cluster) if plan.scheduler == "local" else []
    return f"not heeded by local processes: {', '.join(names)}" if names else ""


def find_conflicts(plan: Plan, inherited: Mapping[str, str]) -> list[str]:
    """Say, a line each, what around us contradicts the job, and what becomes of it."""
    wanted = plan.env | {name: "" for name in IDENTITY}
    several_nodes = plan.cluster.nodes > 1
    told = [
        str(conflict)
        for conflict in conflicts(inherited, wanted, several_nodes=several_nodes)
        if conflict.name not in IDENTITY
    ]
    told += [f"{n}={inherited[n]}: every rank gets its own" for n in IDENTITY if n in inherited]
    cores, threads = plan.cluster.cpus_per_process, inherited.get("OMP_NUM_THREADS")
    if plan.env["OMP_NUM_THREADS"] == threads != str(cores):
        told.append(f"OMP_NUM_THREADS={threads}: kept, though cpus_per_process is {cores}")
    if plan.scheduler == "slurm":
        told += _of_slurm(plan, inherited)
    return _launchers(inherited) + sorted(told)


def _launchers(inherited: Mapping[str, str]) -> list[str]:
    """Say which launchers have started this shell: `submit` would run once in each process."""
    found = {who for who in map(launcher_of, inherited) if who is not None}
    if inherited.get("SLURM_STEP_NUM_TASKS", "1") != "1":
        found.add("srun")
    if "OMPI_COMM_WORLD_SIZE" in inherited:
        found.add("mpirun")
    return [
        f"two launchers: {who} is around this shell, and submit starts the ranks by itself; "
        f"run it without {who}"
        for who in sorted(found)
    ]


def _of_slurm(plan: Plan, inherited: Mapping[str, str]) -> Sequence[str]:
    nested = nested_slurm_names(inherited)
    told = [f"{n}={inherited[n]}: removed, of the Slurm job around this shell" for n in nested]
    overriding = slurm.overriding(inherited, plan.parameters)
    for name in sorted(name for name in inherited if name.startswith("SBATCH_")):
        fate = "removed, the cluster's file decides" if name in overriding else "taken by sbatch"
        told.append(f"{name}={inherited[name]}: {fate}")
    gpus, visible = plan.cluster.gpus_per_node, inherited.get("CUDA_VISIBLE_DEVICES")
    if gpus and visible is not None:
        told.append(f"CUDA_VISIBLE_DEVICES={visible}: Slurm sets the {gpus} GPUs of each node")
    return told
