# The profile of ordinary containers. It stands by itself (no include), so that
# any host's apparmor_parser takes it and precompile.sh gives the same bytes
# everywhere. A container may do to its own files and processes what its ids and
# capabilities let it; the host's kernel interfaces stay shut even for root in it.
abi <abi/3.0>,

profile servin-default flags=(attach_disconnected,mediate_deleted) {
  network,
  capability,
  file,
  umount,
  unix,
  dbus,

  # The engine and whoever administers the host are not confined; on some
  # distributions other runtimes are, by profiles of their names.
  signal (receive) peer=unconfined,
  signal (receive) peer={runc,crun,servind,servin-shim},
  signal (receive) set=("exists"),
  signal (send,receive) peer=servin-default,

  # Processes of a container may trace one another; the host may look in.
  ptrace (trace,read,tracedby,readby) peer=servin-default,
  ptrace (readby,tracedby) peer=unconfined,

  deny mount,

  # Of /proc, only the directories of processes and /proc/sys/kernel/shm* can be
  # written. Further rules spell out "any name but this one", letter by letter.
  deny /proc/* w,
  deny /proc/{[^1-9s]*,s[^y]*,sy[^s]*,sys[^/]*}/** w,
  deny /proc/sys/[^k]** w,
  deny /proc/sys/k[^e]** w,
  deny /proc/sys/kernel/{[^s]**,s[^h]**,sh[^m]**} w,
  deny /proc/sysrq-trigger rwklx,
  deny /proc/kcore rwklx,
  deny /proc/interrupts rwklx,

  # Of /sys, only the container's cgroups.
  deny /sys/{[^f]*,f[^s]*,fs[^/]*}/** wklx,
  deny /sys/fs/{[^c]*,c[^g]*,cg[^r]*}/** wklx,
  deny /sys/firmware/** rwklx,
  deny /sys/devices/virtual/powercap/** rwklx,
  deny /sys/devices/system/cpu/cpu*/thermal_throttle/** rwklx,
  deny /sys/kernel/security/** rwklx,
}
