#!/usr/bin/env bash
# A real Slurm cluster of several nodes on this one machine, for the tests.
# Needs Linux, root, and: apt-get install --no-install-recommends slurm-wlm munge iproute2
#
#   cluster.sh start N      controller and nodes n0 .. n(N-1), from nothing; an old cluster is stopped first
#   cluster.sh stop         end all of it; the logs stay
#   cluster.sh crash NODE   power cut: the cable first, then every process at once;  boot NODE starts it again
#   cluster.sh slow RATE    let each node send at most so much, as in 200mbit;  fast takes it back
#   cluster.sh cut NODE     take the network cable out;  heal NODE puts it back
#   cluster.sh pids NODE    the node's processes, as this machine numbers them
#   cluster.sh restart      end the controller at once, and start it again
#   cluster.sh bin          the folder with sbatch, scontrol .. for this cluster, for PATH
#
# A node is a network namespace with its own host name, processes and /dev/shm; files are shared, as on NFS. All nodes
# hang on a bridge in the controller's namespace: the machine's own network is not touched, and there is no way out.
set -euo pipefail
# Not below /tmp and not writable for a group: munged refuses such folders.
D=${DIST_VSE_SLURM_DIR:-/run/dist-vse-slurm}
export SLURM_CONF=$D/slurm.conf
PREFIX=vse

net() { ip -n "$PREFIX-$1" "${@:2}"; }

until_ok() {
    for _ in {1..600}; do "$@" >/dev/null 2>&1 && return; sleep .05; done
    echo "gave up: $*" >&2
    tail -n 20 "$D"/log/* >&2
    exit 1
}

# A machine; its process 1 is a shell that runs COMMANDS and reaps orphans. nsenter, not `ip netns exec`: that hides
# /sys/fs/cgroup, without which slurmd ends.
power_on() {  # NAME COMMANDS
    setsid nsenter --net="/run/netns/$PREFIX-$1" unshare --uts --ipc --pid --mount --fork --kill-child --mount-proc \
        bash -c "hostname $1; mount --bind $D/hosts /etc/hosts; mount -t tmpfs tmpfs /dev/shm
            $2
            while :; do wait; sleep 1; done" </dev/null >>"$D/log/$1.boot" 2>&1 &
}
boot() { mkdir -p "$D/spool/$1"; power_on "$1" "/usr/sbin/slurmd -D -N $1 &"; }
pids() { ip netns pids "$PREFIX-$1"; }
kill_all() { local p; while p=$(pids "$1") && [ -n "$p" ]; do kill -9 $p 2>/dev/null || :; sleep .02; done; }

stop() {
    local name
    for name in $(ip netns list | grep -oE "^$PREFIX-(ctl|n[0-9]+)"); do
        kill_all "${name#"$PREFIX-"}"
        ip netns del "$name"
    done
    ! mountpoint -q "$D/small" || umount "$D/small"
}

make_network() {  # N
    local i
    ip netns add $PREFIX-ctl
    net ctl link set lo up
    net ctl link add br0 type bridge
    net ctl addr add 10.99.0.1/24 dev br0
    net ctl link set br0 up
    printf '127.0.0.1 localhost\n10.99.0.1 ctl\n' >"$D/hosts"
    for ((i = 0; i < $1; i++)); do
        ip netns add "$PREFIX-n$i"
        net "n$i" link set lo up
        net ctl link add "n$i" type veth peer name eth0 netns "$PREFIX-n$i"
        net ctl link set "n$i" master br0 up
        net "n$i" addr add "10.99.0.$((10 + i))/24" dev eth0
        net "n$i" link set eth0 up
        echo "10.99.0.$((10 + i)) n$i" >>"$D/hosts"
    done
}

# Quick tests: jobs start and are requeued at once (cred_expire: a requeued job waits as long), dead nodes are noticed
# in 20 s and not in 400, finished jobs are remembered. A job in "high" takes the place of one in "main".
configure() {
    cat >"$D/slurm.conf" <<CONF
ClusterName=test
SlurmctldHost=ctl(10.99.0.1)
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket=$D/munge.socket,cred_expire=5
StateSaveLocation=$D/state
SlurmdSpoolDir=$D/spool/%n
SlurmctldPidFile=$D/slurmctld.pid
SlurmdPidFile=$D/slurmd-%n.pid
SlurmctldLogFile=$D/log/slurmctld.log
SlurmdLogFile=$D/log/slurmd-%n.log
MailProg=/bin/true
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SlurmdParameters=config_overrides
ReturnToService=2
SchedulerParameters=batch_sched_delay=0,sched_interval=1,bf_interval=1
KillWait=2
SlurmdTimeout=10
MessageTimeout=5
TCPTimeout=1
MinJobAge=3600
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
$(sed -nE 's/^(.*) (n[0-9]+)$/NodeName=\2 NodeAddr=\1 CPUs=8 RealMemory=16000/p' "$D/hosts")
PartitionName=main Nodes=ALL Default=YES PriorityTier=1 GraceTime=20
PartitionName=high Nodes=ALL PriorityTier=2 PreemptMode=OFF
CONF
    echo CgroupPlugin=cgroup/v1 >"$D/cgroup.conf"  # not used, but slurmd ends where it can't detect a version
}

# Outside of a job these step into the controller's network; within one they are the plain commands.
make_clients() {
    local name
    cat >"$D/bin/srun" <<CLIENT
#!/bin/bash
[ -n "\${SLURMD_NODENAME:-}" ] || in="nsenter --net=/run/netns/$PREFIX-ctl"
SLURM_CONF=$D/slurm.conf exec \${in:-} /usr/bin/\${0##*/} "\$@"
CLIENT
    chmod +x "$D/bin/srun"
    for name in sbatch squeue scancel scontrol sinfo; do ln -s srun "$D/bin/$name"; done
}

# The controller's machine stays up: its first process waits for whatever it has started.
restart() {
    local p
    for p in $(pids ctl); do
        [[ $(tr '\0' ' ' <"/proc/$p/cmdline") != /usr/sbin/slurmctld* ]] || { kill -9 "$p"; break; }
    done
    until_ok test ! -e "/proc/$p/exe"  # it holds the port and its file of the process id until it is gone
    setsid nsenter --target "$(pids ctl | head -n 1)" --net --uts --ipc --pid --mount \
        /usr/sbin/slurmctld -D </dev/null >>"$D/log/ctl.boot" 2>&1 &
    until_ok "$D/bin/scontrol" ping
}

# Bandwidth has its price, by tbf; a delay would need netem, which not every kernel has.
slow() {  # RATE
    local name
    for name in $(ip netns list | grep -oE "^$PREFIX-n[0-9]+"); do
        tc -n "$name" qdisc replace dev eth0 root tbf rate "$1" burst 256kb latency 400ms
    done
}
fast() {
    local name
    for name in $(ip netns list | grep -oE "^$PREFIX-n[0-9]+"); do
        tc -n "$name" qdisc del dev eth0 root 2>/dev/null || :
    done
}

start() {  # N
    local i
    stop
    rm -rf "$D"
    mkdir -p -m 755 "$D"/{log,spool,state,bin}
    mkdir "$D/small"
    mount -t tmpfs -o size=24m tmpfs "$D/small"  # a disk for a few checkpoints, to be filled
    make_network "$1"
    configure
    make_clients
    install -m 600 <(head -c 128 /dev/urandom) "$D/munge.key"
    power_on ctl "/usr/sbin/munged --key-file=$D/munge.key --socket=$D/munge.socket --pid-file=$D/munged.pid \
            --log-file=$D/log/munged.log --seed-file=$D/munged.seed
        /usr/sbin/slurmctld -D &"
    until_ok "$D/bin/scontrol" ping
    for ((i = 0; i < $1; i++)); do boot "n$i"; done
    until_ok bash -c "[ \$($D/bin/sinfo -h -p main -t idle -o %D) = $1 ]"
}

case ${1:-} in
    start) start "$2" ;;
    stop) stop ;;
    crash) net ctl link set "$2" down; kill_all "$2" ;;  # the cable first: else the dying kernel takes leave of its peers
    boot) net ctl link set "$2" up; boot "$2" ;;
    slow) slow "$2" ;;
    fast) fast ;;
    cut) net ctl link set "$2" down ;;
    heal) net ctl link set "$2" up ;;
    pids) pids "$2" ;;
    restart) restart ;;
    bin) echo "$D/bin" ;;
    *) sed -n '2,/^set/{/^set/d;s/^# \?//;p}' "$0"; exit 2 ;;
esac
