#!/bin/bash
# Adopt what another engine has. Run in a network and mount namespace of its own:
#   unshare -m -n --propagation private test/adopt/adopt.sh docker|podman BIN
# It prints "ADOPT ok" at its end.
set -euo pipefail
who=$1 bin=$2
export PATH=/usr/sbin:$PATH
mount -t tmpfs tmpfs /run
ip link set lo up
d=$(mktemp -d /tmp/adXXXXXX)
pids=()
cleanup() {
	[ ! -S "$d/s.sock" ] || "$bin/servin" --host "unix://$d/s.sock" system shutdown --force || :
	for p in "${pids[@]}"; do kill "$p" 2>/dev/null || :; wait "$p" 2>/dev/null || :; done
	rm -rf "$d"
}
trap cleanup EXIT
fail() { echo "ADOPT FAILED: $*"; exit 1; }
"$bin/servind" --root "$d/root" --run-root "$d/run" --listen "unix://$d/s.sock" >"$d/servind.log" 2>&1 & pids+=($!)
export SERVIN_HOST=unix://$d/s.sock
servin=$bin/servin
case $who in
docker)
	echo '{}' >"$d/daemon.json"
	dockerd --config-file "$d/daemon.json" --data-root "$d/there" --exec-root "$d/exec" -H "unix://$d/d.sock" --pidfile "$d/d.pid" >"$d/dockerd.log" 2>&1 & pids+=($!)
	there="docker -H unix://$d/d.sock" from=(--from "unix://$d/d.sock")
	for _ in $(seq 120); do $there version >/dev/null 2>&1 && break; sleep 0.5; done
	;;
podman)
	printf '[storage]\ndriver="vfs"\ngraphroot="%s/there"\nrunroot="%s/therun"\n' "$d" "$d" >"$d/storage.conf"
	printf '[network]\nnetwork_config_dir="%s/nets"\n' "$d" >"$d/containers.conf"
	export CONTAINERS_STORAGE_CONF=$d/storage.conf CONTAINERS_CONF=$d/containers.conf
	there="podman --cgroup-manager cgroupfs --events-backend file" from=()
	;;
esac
for _ in $(seq 100); do [ -S "$d/s.sock" ] && break; sleep 0.1; done
mkdir -p "$d/img/bin" "$d/img/tmp"
cp /bin/busybox "$d/img/bin/"
for a in sh sleep true cat; do ln -s busybox "$d/img/bin/$a"; done
tar -C "$d/img" -cf "$d/img.tar" .
$there import "$d/img.tar" localhost/bb:1 >/dev/null
$there volume create --label k=v data >/dev/null
$there network create --subnet 10.77.0.0/24 --label n=l mynet >/dev/null
$there create --name web --restart always -v data:/data -v /anon -e A=b --label x=y --network mynet --ip 10.77.0.9 -p 18080:80 --memory 64m localhost/bb:1 sleep 1000 >/dev/null
$there create --name side --network container:web localhost/bb:1 sleep 1000 >/dev/null
file=$($there volume inspect data --format '{{.Mountpoint}}')/f
echo hello >"$file"
chown 5:6 "$file"
before=$($there inspect web | md5sum)

"$servin" system adopt "$who" "${from[@]}" --dry-run | tee "$d/dry"
[ "$("$servin" ps -aq)" = "" ] || fail "a dry run did something"
"$servin" system adopt "$who" "${from[@]}" | tee "$d/first"
"$servin" system adopt "$who" "${from[@]}" | tee "$d/again"
grep -q "^nothing to adopt" "$d/again" || fail "the second run found more to do"
[ "$before" = "$($there inspect web | md5sum)" ] || fail "the other side was changed"

[ "$("$servin" run --rm -v data:/d localhost/bb:1 cat /d/f)" = hello ] || fail "the volume's content"
[ "$(stat -c %u:%g "$("$servin" volumes inspect data --format '{{.Mountpoint}}')/f")" = 5:6 ] || fail "the owner of a file"
[ "$("$servin" volumes inspect data --format '{{.Labels.k}}')" = v ] || fail "the volume's label"
[ "$("$servin" networks inspect mynet --format '{{(index .IPAM.Config 0).Subnet}} {{.Labels.n}}')" = "10.77.0.0/24 l" ] || fail "the network"
got=$("$servin" inspect web --format '{{.HostConfig.Memory}} {{.HostConfig.RestartPolicy.Name}} {{(index (index .HostConfig.PortBindings "80/tcp") 0).HostPort}} {{.Config.Labels.x}} {{.State.Status}} {{len .Mounts}}')
[ "$got" = "67108864 always 18080 y created 2" ] || fail "the container: $got"
"$servin" inspect web --format '{{json .Config.Env}}' | grep -q '"A=b"' || fail "the environment"
"$servin" start web side >/dev/null
got=$("$servin" inspect web --format '{{.State.Running}} {{.NetworkSettings.Networks.mynet.IPAddress}}')
case "$who $got" in
"docker true 10.77.0.9" | "podman true 10.77.0."*) ;; # Podman's API does not tell a fixed address
*) fail "the started container: $got" ;;
esac
[ "$("$servin" inspect side --format '{{.State.Running}}')" = true ] || fail "the container in its network"
$there rm -f web side >/dev/null 2>&1 || :
echo "ADOPT ok"
