#!/usr/bin/env bash
# One host: process 1 of its own PID namespace, with network, mounts, name and IPC of its own. tests/system/cluster/hosts.py starts it.
# host.sh NAME FOLDER CHECKOUT: FOLDER holds `hosts` (for /etc/hosts) and the key pair `id`, `id.pub` that all hosts accept.
# Its root folder is the machine's, with every write kept in memory; it ends with this process, and so do all its processes.
set -euo pipefail
name=$1 folder=$2 checkout=$3

mount --make-rprivate /
keys=$(cat "$folder/id.pub")
private=$(cat "$folder/id")
names=$(cat "$folder/hosts")
mount -t tmpfs -o size=4g tmpfs "$folder" # seen by this host alone
mkdir "$folder"/{written,work,root,written-checkout,work-checkout}
mount -t overlay overlay -o "lowerdir=/,upperdir=$folder/written,workdir=$folder/work" "$folder/root"
root=$folder/root
mount -t proc proc "$root/proc"
mount -t sysfs -o ro sysfs "$root/sys"
mount --rbind /dev "$root/dev"
mount -t tmpfs -o size=512m tmpfs "$root/dev/shm"
mount -t tmpfs -o mode=1777 tmpfs "$root/tmp"
mount -t tmpfs tmpfs "$root/run"
mkdir -p "$root$checkout" # it may lie in what has just been hidden
mount -t overlay overlay -o "lowerdir=$checkout,upperdir=$folder/written-checkout,workdir=$folder/work-checkout" "$root$checkout"

hostname "$name"
echo "$name" >"$root/etc/hostname"
echo "$names" >"$root/etc/hosts"
rm -rf "$root"/root/{.ray,.outrider,.ssh,outrider}
mkdir -p -m 700 "$root/root/.ssh" "$root/run/sshd"
echo "$keys" >"$root/root/.ssh/authorized_keys"
(umask 077 && echo "$private" >"$root/root/.ssh/id_ed25519")

# What `make install` would bring in minutes and over the network is here already: it finds nothing to do.
mkdir "$root/root/outrider"
ln -s "$checkout/.venv" "$root/root/outrider/.venv"
touch "$root$checkout/.venv/installed"
# The packages are the ones that `ray up` has brought, not those of the checkout that the environment points to.
echo 'export PYTHONPATH=$HOME/outrider HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1' >>"$root/root/.bashrc"

ssh-keygen -q -t ed25519 -N '' -f "$root/run/sshd/host"
cat >"$root/run/sshd/config" <<CONFIG
HostKey /run/sshd/host
PidFile /run/sshd/pid
PasswordAuthentication no
UsePAM no
UseDNS no
MaxStartups 50
MaxSessions 50
CONFIG
chroot "$root" /usr/sbin/sshd -f /run/sshd/config -E /run/sshd/log
exec chroot "$root" /bin/bash -c 'trap "" TERM INT; while :; do sleep 3600 & wait; done' # takes in orphans, as process 1 must
