"""What a submission would do, as text: the script, every rank's environment, all conflicts."""

import os
from collections.abc import Mapping

from dist_vse.launch.environment import IDENTITY, conflicts, launcher_of
from dist_vse.launch.submit import Plan


def dry_run(
    plan: Plan,
    *,
    runs: int = 1,
    parallel: int = 1,
    inherited: Mapping[str, str] = os.environ,
) -> str:
    """Return in full what `submit` would do; more than one run are a sweep."""
    cluster = plan.cluster
    address, port = plan.scheduler.rendezvous_hint
    shared = plan.env | {
        "WORLD_SIZE": str(cluster.world_size),
        "LOCAL_WORLD_SIZE": str(cluster.processes_per_node),
        "MASTER_ADDR": address,
        "MASTER_PORT": port,
    }
    lines = [plan.scheduler.script(plan.spec, runs=runs, parallel=parallel), ""]
    lines += [f"config: {plan.config_path}", f"logs: {plan.job_folder}/%j_RANK_log.err"]
    lines += ["", "environment of all ranks:"]
    lines += [f"  {name}={value}" for name, value in sorted(shared.items())]
    lines += ["", "ranks:"]
    for rank in range(cluster.world_size):
        node, local_rank = divmod(rank, cluster.processes_per_node)
        lines.append(f"  RANK={rank} LOCAL_RANK={local_rank} on node {node}")
    lines += ["", "conflicts in this shell's environment:"]
    lines += [f"  {line}" for line in find_conflicts(plan, inherited) or ["none"]]
    ignored = report_ignored(plan)
    return "\n".join([*lines, "", ignored] if ignored else lines)


def report_ignored(plan: Plan) -> str:
    """Return a line with the settings that the scheduler ignores; empty if there are none."""
    names = plan.scheduler.ignored_settings(plan.cluster)
    return f"ignored by scheduler {plan.scheduler.name}: {', '.join(names)}" if names else ""


def find_conflicts(plan: Plan, inherited: Mapping[str, str]) -> list[str]:
    """Return a line for each variable that contradicts the job, with what is done about it."""
    wanted = plan.env | {name: "" for name in IDENTITY}
    several_nodes = plan.cluster.nodes > 1
    lines = [
        str(conflict)
        for conflict in conflicts(inherited, wanted, several_nodes=several_nodes)
        if conflict.name not in IDENTITY
    ]
    lines += [f"{n}={inherited[n]}: every rank gets its own" for n in IDENTITY if n in inherited]
    cores, threads = plan.cluster.cpus_per_process, inherited.get("OMP_NUM_THREADS")
    if plan.env["OMP_NUM_THREADS"] == threads != str(cores):
        lines.append(f"OMP_NUM_THREADS={threads}: kept, though cpus_per_process is {cores}")
    lines += plan.scheduler.conflicts(plan.cluster, inherited, plan.parameters)
    return _launchers(inherited) + sorted(lines)


def _launchers(inherited: Mapping[str, str]) -> list[str]:
    """Name the launchers that have started this shell: `submit` would run once in each process."""
    found = {who for who in map(launcher_of, inherited) if who is not None}
    if inherited.get("SLURM_STEP_NUM_TASKS", "1") != "1":
        found.add("srun")
    if "OMPI_COMM_WORLD_SIZE" in inherited:
        found.add("mpirun")
    return [
        f"two launchers: {who} started this shell, and submit starts the ranks itself; run it "
        f"without {who}"
        for who in sorted(found)
    ]
