#!/bin/bash
# Boot Debian's cloud kernel under QEMU with the engine on a tmpfs root (cgroup v2
# there), run containers in it, and print what it said.
# usage: test/vm/smoke.sh BIN CACHE [SUITE]   BIN: folder with servin and servind
# SUITE: a static test program, with its testdata beside it, that is run there instead of the checks.
# env: SMOKE_CHECKS a folder whose script "run" is read there instead of the checks; SMOKE_APPEND more for the kernel's command line; SMOKE_DISK a disk's image
set -euo pipefail
bin=$(realpath "$1") cache=$2 suite=${3:-}
mkdir -p "$cache"
cache=$(realpath "$cache")
say() { echo "smoke: $*" >&2; }

# The kernel: its package is kept in the cache.
if ! ls "$cache"/x/boot/vmlinuz-* >/dev/null 2>&1; then
	find_package() { apt-cache depends linux-image-cloud-amd64 2>/dev/null | awk '/Depends: linux-image/ {print $2; exit}'; }
	package=$(find_package)
	[ -n "$package" ] || { apt-get update -q >/dev/null 2>&1 || :; package=$(find_package); }
	[ -n "$package" ] || { say "SKIP: Debian's cloud kernel is not to be had (apt-get update?)"; exit 77; }
	(cd "$cache" && { apt-get download "$package" || { apt-get update -q && apt-get download "$package"; }; } >/dev/null 2>&1) || { say "SKIP: cannot download $package"; exit 77; }
	mkdir -p "$cache/x.new"
	dpkg-deb -x "$cache/$package"_*.deb "$cache/x.new"
	mv "$cache/x.new" "$cache/x"
fi
kernel=$(echo "$cache"/x/boot/vmlinuz-*)
version=${kernel##*/vmlinuz-}

root=$(mktemp -d)
trap 'rm -rf "$root"' EXIT
mkdir -p "$root"/{bin,sbin,proc,sys,dev,run,tmp,etc,var/lib,root,newroot} "$root/lib/modules/$version/kernel"
cp /usr/bin/busybox "$root/bin/busybox"
for a in $(/usr/bin/busybox --list); do [ "$a" = busybox ] || ln -sf busybox "$root/bin/$a"; done
ln -sf ../bin/busybox "$root/sbin/modprobe"
cp "$bin/servin" "$bin/servind" "$root/bin/"
echo 'root:x:0:0:root:/root:/bin/sh' > "$root/etc/passwd"
echo 'root:x:0:' > "$root/etc/group"
echo 'nameserver 192.0.2.53' > "$root/etc/resolv.conf"
# What containers need of the kernel's modules, with what those need.
m=lib/modules/$version
depmod -b "$cache/x" "$version"
want='/('${SMOKE_MODULES:+$SMOKE_MODULES|}'overlay|ext4|quota_v2|quota_tree|crc32c_generic|virtio_blk|virtio_pci|veth|bridge|br_netfilter|nf_tables|nft_[a-z0-9_]+|nf_(nat|conntrack|dup_ipv4|dup_ipv6|reject_ipv4|reject_ipv6|defrag_ipv4|defrag_ipv6)|nfnetlink|tun|dummy)\.ko'
grep -E "$want" "$cache/x/$m/modules.dep" | tr -d ':' | tr ' ' '\n' | sort -u | while read -r ko; do
	[ -n "$ko" ] || continue
	mkdir -p "$root/$m/$(dirname "$ko")"
	cp "$cache/x/$m/$ko" "$root/$m/$ko"
done
cp "$cache/x/$m"/modules.{order,builtin,builtin.modinfo} "$root/$m/"
depmod -b "$root" "$version"

if [ -n "$suite" ]; then
	mkdir -p "$root/suite" "$root/usr/bin"
	cp "$bin/servin-build" "$bin/servin-buildd" "$bin/servin-compose" "$root/bin/"
	cp "$suite" "$root/suite/suite.test"
	cp -r "$(dirname "$suite")/testdata" "$root/suite/"
	ln -s ../../bin/busybox "$root/usr/bin/busybox"
	rm "$root/bin/bash" 2>/dev/null || :
	cp "$(command -v bash)" "$root/bin/bash"
	ldd "$root/bin/bash" | grep -o '/[^ ]*' | while read -r lib; do mkdir -p "$root$(dirname "$lib")"; cp "$lib" "$root$lib"; done
fi
# Further programs that a suite needs, with their libraries.
for p in ${SMOKE_EXTRA:-}; do
	p=$(command -v "$p") || continue
	rm -f "$root/bin/$(basename "$p")"
	cp -L "$p" "$root/bin/$(basename "$p")"
	{ ldd "$p" 2>/dev/null || :; } | { grep -o '/[^ ]*' || :; } | while read -r lib; do mkdir -p "$root$(dirname "$lib")"; cp -L "$lib" "$root$lib"; done
done
for f in ${SMOKE_FILES:-}; do
	[ ! -e "$f" ] || { mkdir -p "$root$(dirname "$f")" && cp -L "$f" "$root$f"; }
done
[ -z "${SMOKE_CHECKS:-}" ] || cp -r "$SMOKE_CHECKS" "$root/checks"
cat > "$root/init" <<'I'
#!/bin/sh
# pivot_root does not work on the initramfs: move to a tmpfs root first.
mount -t tmpfs -o mode=755 tmpfs /newroot
for d in bin sbin lib lib64 usr suite checks etc var root tmp; do [ ! -e /$d ] || cp -a /$d /newroot/; done
mkdir -p /newroot/proc /newroot/sys /newroot/dev /newroot/run
cp /second /newroot/second
exec switch_root /newroot /second
I
cat > "$root/second" <<'I'
#!/bin/sh
export PATH=/bin:/sbin
mount -t proc proc /proc; mount -t sysfs sysfs /sys; mount -t devtmpfs dev /dev; mkdir -p /dev/pts /dev/shm
mount -t devpts devpts /dev/pts; mount -t tmpfs tmpfs /run; mount -t cgroup2 cgroup2 /sys/fs/cgroup
ln -s /proc/self/fd /dev/fd; ln -s fd/0 /dev/stdin; ln -s fd/1 /dev/stdout; ln -s fd/2 /dev/stderr
echo /sbin/modprobe > /proc/sys/kernel/modprobe
exec >/dev/ttyS0 2>&1
ip link set lo up
echo "SMOKE kernel $(uname -r), up $(cut -d' ' -f1 /proc/uptime) s"
if [ -d /suite ]; then
	# On a disk: tmpfs cannot map ids before 6.3.
	modprobe virtio_pci; modprobe virtio_blk; modprobe ext4; modprobe quota_v2
	mount -o prjquota /dev/vda /tmp || echo "SUITE FAILED: no disk"
	cd /suite
	SERVIN_TEST_SLOW=5 SERVIN_TEST_QUOTA=/tmp SERVIN_BIN=/bin ./suite.test -test.v -test.timeout 40m && echo "SUITE passed" || echo "SUITE FAILED"
	poweroff -f
fi
check() { # check NAME WANTED COMMAND...
	name=$1 want=$2; shift 2
	got=$("$@" 2>&1); code=$?
	case "$code $got" in "0 "*"$want"*) echo "SMOKE ok $name";; *) echo "SMOKE FAILED $name: exit $code: $got";; esac
}
if [ -d /checks ]; then . /checks/run; poweroff -f; fi
servind > /run/servind.log 2>&1 &
for i in $(seq 600); do servin version >/dev/null 2>&1 && break; sleep 0.1; done
check hello "Everything works" servin run --rm servin/hello
check exit-code "status 7" sh -c 'servin run --rm servin/hello exit 7; echo status $?'
check cgroup-v2 "Cgroup version: 2" servin info
check start "" servin run -d --name web -m 32m --pids-limit 50 -p 8080:8080 servin/hello serve
check limit 33554432 sh -c 'cat /sys/fs/cgroup/servin-*/$(servin inspect --format "{{.Id}}" web)/memory.max'
check pids 50 sh -c 'cat /sys/fs/cgroup/servin-*/$(servin inspect --format "{{.Id}}" web)/pids.max'
sleep 1
check published "Hello from container" wget -qO- http://127.0.0.1:8080/
check exec "uid=0" servin exec web /servin-hello id
check update 67108864 sh -c 'servin update -m 64m --memory-swap 64m web && cat /sys/fs/cgroup/servin-*/$(servin inspect --format "{{.Id}}" web)/memory.max'
check pause paused sh -c 'servin pause web && servin inspect --format "{{.State.Status}}" web && servin unpause web'
check stats web servin stats --no-stream web
check volume f sh -c 'mkdir /tmp/v && echo x > /tmp/v/f && servin run --rm -v /tmp/v:/v:ro servin/hello ls /v'
check device "not permitted" sh -c 'servin run --rm --device-cgroup-rule "c 1:1 r" -v /dev/mem:/m servin/hello cat /m; true'
check names web sh -c 'servin networks create n && servin run -d --name peer --network n servin/hello serve && servin run --rm --network n servin/hello get peer:8080 && servin ps'
# tmpfs cannot map ids before 6.3: the error has to say what to do.
check userns "keep the engine's root on ext4" sh -c 'servin run --rm --userns=auto servin/hello id 2>&1; true'
check restart "Up" sh -c 'kill -9 $(pidof servind); sleep 1; servind > /run/servind2.log 2>&1 & for i in $(seq 300); do servin version >/dev/null 2>&1 && break; sleep 0.1; done; servin ps'
# The clock is set ahead by years, and back before its beginning.
check clock-start "" servin run -d --name steady --restart always --health-cmd "/servin-hello id" --health-interval 1s servin/hello serve
date -s 2037-05-05 >/dev/null
check clock-ahead "Everything works" servin run --rm servin/hello
check clock-ahead-exec "uid=0" servin exec web /servin-hello id
date -s 2001-01-01 >/dev/null
check clock-back "Everything works" servin run --rm servin/hello
check clock-back-restart "Up" sh -c 'servin restart -t 1 web && servin ps --filter name=web'
check clock-back-kept "true 1" sh -c 'kill -9 $(servin inspect --format "{{.State.Pid}}" steady); for i in $(seq 100); do s=$(servin inspect --format "{{.State.Running}} {{.RestartCount}}" steady); [ "$s" = "true 1" ] && break; sleep 0.1; done; echo "$s"'
check clock-back-health healthy sh -c 'for i in $(seq 100); do s=$(servin inspect --format "{{.State.Health.Status}}" steady); [ "$s" = healthy ] && break; sleep 0.1; done; echo "$s"'
check clock-back-daemon "Up" sh -c 'kill -9 $(pidof servind); sleep 1; servind > /run/servind3.log 2>&1 & for i in $(seq 300); do servin version >/dev/null 2>&1 && break; sleep 0.1; done; servin ps --filter name=steady'
check clock-back-logs "serving http" sh -c 'servin logs --tail 1 steady 2>&1'
check shutdown "" servin system shutdown --force
sleep 2
check no-cgroups "0" sh -c 'find /sys/fs/cgroup -name "servin-*" | wc -l'
check no-mounts "0" sh -c 'grep -c servin /proc/mounts; true'
grep -h '"level":"\(WARN\|ERROR\)"' /run/servind.log /run/servind2.log /run/servind3.log | cut -c1-300
echo "SMOKE done, up $(cut -d' ' -f1 /proc/uptime) s"
poweroff -f
I
chmod +x "$root/init" "$root/second"
(cd "$root" && find . | busybox cpio -o -H newc 2>/dev/null | gzip -1) > "$cache/initrd.$$"
accel=tcg
# A /dev/kvm that answers need not run a guest: only a boot tells, and TCG is sure.
memory=1024 disk=()
if [ -n "$suite" ]; then
	memory=2048
	truncate -s 8G "$cache/disk.$$"
	mkfs.ext4 -q -O quota,project -E quotatype=prjquota,lazy_itable_init=1,lazy_journal_init=1 "$cache/disk.$$"
	trap 'rm -rf "$root" "$cache/disk.$$"' EXIT
	disk=(-drive "file=$cache/disk.$$,format=raw,if=virtio,cache=unsafe")
fi
[ -z "${SMOKE_DISK:-}" ] || disk=(-drive "file=$SMOKE_DISK,format=raw,if=virtio,cache=unsafe")
timeout "${SMOKE_TIMEOUT:-240}" qemu-system-x86_64 -accel $accel -cpu max -smp 2 -m $memory -nographic -no-reboot -nodefaults -serial stdio "${disk[@]}" \
	-kernel "$kernel" -initrd "$cache/initrd.$$" -append "console=ttyS0 quiet panic=-1 random.trust_cpu=on ${SMOKE_APPEND:-}" </dev/null || say "qemu ended with $?"
rm -f "$cache/initrd.$$"
