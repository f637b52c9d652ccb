package rootless

import (
	"archive/tar"
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"log"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"regexp"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-containerregistry/pkg/name"
	"github.com/google/go-containerregistry/pkg/registry"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/remote"
	"github.com/google/go-containerregistry/pkg/v1/tarball"
)

// netRaw is a file capability as the kernel keeps it: cap_net_raw, effective.
const netRaw = "\x01\x00\x00\x02\x00\x20\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00"

// TestRootless is a day in an ordinary user's life.
func TestRootless(t *testing.T) {
	u := newUser(t, "newuidmap", "newgidmap", "pasta")
	busybox := rootfs(t)
	u.start()
	defer u.shutdown()
	u.importImage("bb", busybox)

	sub := func(name string, f func(t *testing.T)) {
		t.Run(name, func(t *testing.T) {
			outer := u.t
			u.t = t
			defer func() { u.t = outer }()
			f(t)
		})
	}
	sub("Run", u.testRun)
	sub("Refusals", u.testRefusals)
	sub("Isolation", u.testIsolation)
	sub("Volumes", u.testVolumes)
	sub("Images", u.testImages)
	sub("Pull", u.testPull)
	sub("Networks", u.testNetworks)
	sub("Ports", func(t *testing.T) { u.testPorts(t, true) })
	sub("Killed", u.testKilled)
	sub("NetworkKilled", u.testNetworkKilled)
}

func (u *user) testRun(t *testing.T) {
	if got := u.must("run", "--rm", "servin/hello"); got == "" {
		t.Error("the embedded image says nothing")
	}
	if got := u.must("run", "--rm", "bb", "id"); got != "uid=0(root) gid=0(root) groups=0(root)" {
		t.Errorf("root is %s", got)
	}
	if got := u.must("run", "--rm", "-u", "web", "bb", "id"); got != "uid=1000(web) gid=1000(web) groups=1000(web),2000(extra)" {
		t.Errorf("web is %s", got)
	}
	if r := u.run("run", "--rm", "bb", "sh", "-c", "echo out; echo err >&2; exit 42"); r.code != 42 || r.out != "out\n" || r.err != "err\n" {
		t.Errorf("streams and exit code: %s", r)
	}
	if r := u.pipe(strings.NewReader("abc"), "run", "--rm", "-i", "bb", "cat"); r.out != "abc" {
		t.Errorf("standard input: %s", r)
	}
	if got := u.must("run", "--rm", "-t", "bb", "sh", "-c", "tty; stty size"); !strings.HasPrefix(got, "/dev/pts/") {
		t.Errorf("terminal: %q", got)
	}
	if got := u.must("run", "--rm", "--privileged", "bb", "sh", "-c", "mount -t tmpfs x /mnt 2>/dev/null || mkdir /m && mount -t tmpfs x /m && echo mounted"); got != "mounted" {
		t.Errorf("privileged: %q", got)
	}
	if got := u.must("run", "--rm", "--device", "/dev/full:/dev/full", "--read-only", "--tmpfs", "/run", "--init", "bb", "sh", "-c", "echo x > /run/x; cat /run/x"); got != "x" {
		t.Errorf("options: %q", got)
	}
	for _, mode := range []string{"--pid", "--ipc", "--network", "--uts", "--cgroupns"} {
		if got := u.must("run", "--rm", mode, "host", "bb", "sh", "-c", "test -d /proc/self && test -d /sys/class && echo fine"); got != "fine" {
			t.Errorf("%s host: %q", mode, got)
		}
	}
	if got := u.must("run", "--rm", "--device", "/dev/full:/dev/brim", "bb", "stat", "-c", "%t:%T", "/dev/brim"); got != "1:7" {
		t.Errorf("a device in another place: %q", got)
	}
	u.must("run", "-d", "--name", "first", "--ipc", "shareable", "bb", "sleep", "1000")
	if got := u.must("run", "--rm", "--pid", "container:first", "--network", "container:first", "--ipc", "container:first", "bb", "cat", "/proc/1/comm"); got != "sleep" {
		t.Errorf("joined namespaces: process 1 is %q", got)
	}
	u.must("rm", "-f", "first")
	u.must("run", "-d", "--name", "long", "bb", "sh", "-c", "trap 'echo bye; exit 3' TERM; echo begun; while :; do sleep 0.1; done")
	if got := u.must("exec", "-u", "web", "long", "sh", "-c", "id -u; cat /proc/1/comm"); got != "1000\nsh" {
		t.Errorf("exec: %q", got)
	}
	if got := u.must("top", "long"); !strings.Contains(got, "sleep") {
		t.Errorf("top: %s", got)
	}
	u.must("stop", "long")
	if got := u.must("logs", "long"); got != "begun\nbye" {
		t.Errorf("logs: %q", got)
	}
	if got := u.must("inspect", "--format", "{{.State.ExitCode}}", "long"); got != "3" {
		t.Errorf("exit code %s", got)
	}
	u.must("start", "long")
	u.must("kill", "long")
	u.must("rm", "-f", "long")
}

// testRefusals: what cannot work says so, and why.
func (u *user) testRefusals(t *testing.T) {
	for _, limit := range [][]string{{"-m", "64m"}, {"--cpus", "0.5"}, {"--pids-limit", "10"}, {"--cpuset-cpus", "0"}} {
		u.refuses("delegated", append(append([]string{"run", "--rm"}, limit...), "bb", "true")...)
	}
	u.must("run", "-d", "--name", "idle", "bb", "sleep", "1000")
	u.refuses("delegated", "pause", "idle")
	u.refuses("delegated", "stats", "--no-stream", "idle")
	u.refuses("delegated", "update", "-m", "64m", "idle")
	u.must("rm", "-f", "idle")
	u.refuses("cannot allot ids", "run", "--rm", "--userns", "auto", "bb", "true")
	u.refuses("ports below", "run", "--rm", "-p", "80:80", "bb", "true")
	if info := u.must("info"); !strings.Contains(info, "rootless") {
		t.Errorf("info does not say that this is rootless:\n%s", info)
	}
	if r := u.run("info"); !strings.Contains(r.out+r.err, "No limits of cpu, cpuset, io, memory, pids") {
		t.Errorf("info does not say that there are no limits: %s", r)
	}
}

// testIsolation compares a container with what one of root's engine has.
func (u *user) testIsolation(t *testing.T) {
	status := u.must("run", "--rm", "bb", "cat", "/proc/self/status")
	for _, want := range []string{"CapEff:\t00000000a80425fb", "CapBnd:\t00000000a80425fb", "Seccomp:\t2"} {
		if !strings.Contains(status, want) {
			t.Errorf("no %q in\n%s", want, status)
		}
	}
	for _, c := range []string{
		"echo h > /proc/sysrq-trigger", "echo 1 > /proc/sys/kernel/panic", "mount -t tmpfs x /root", "mknod /tmp/n c 1 3",
		"test -s /proc/kcore && head -c1 /proc/kcore | grep -q .", "ls /sys/firmware | grep -q .", "echo 1 > /sys/fs/cgroup/cgroup.procs", "chroot /proc/1/root/../.. ls /home",
	} {
		if r := u.run("run", "--rm", "bb", "sh", "-c", c); r.code == 0 {
			t.Errorf("%q worked: %s", c, r)
		}
	}
	// Outside, a container's processes are the user's and the user's subordinates'.
	u.must("run", "-d", "--name", "who", "-u", "web", "bb", "sleep", "1000")
	st, err := os.Stat("/proc/" + u.must("inspect", "--format", "{{.State.Pid}}", "who"))
	must(t, err)
	if got := int(st.Sys().(*syscall.Stat_t).Uid); got != firstSub+999 {
		t.Errorf("user 1000 is %d on the host, want %d", got, firstSub+999)
	}
	u.must("rm", "-f", "who")
}

func (u *user) testVolumes(t *testing.T) {
	u.must("volume", "create", "vol")
	u.must("run", "--rm", "-v", "vol:/data", "bb", "sh", "-c", "echo kept > /data/f; chown web /data/f")
	if got := u.must("run", "--rm", "-v", "vol:/data:ro", "bb", "stat", "-c", "%U %s", "/data/f"); got != "web 5" {
		t.Errorf("volume: %q", got)
	}
	u.refuses("Read-only", "run", "--rm", "-v", "vol:/data:ro", "bb", "touch", "/data/g")
	u.must("volume", "rm", "vol")
	dir := filepath.Join(u.dir, "home", "project")
	must(t, os.Mkdir(dir, 0o755))
	must(t, os.Chown(dir, uid, uid))
	u.must("run", "--rm", "-v", dir+":/src", "bb", "sh", "-c", "echo made > /src/file; id -u > /src/id")
	st, err := os.Stat(dir + "/file")
	must(t, err)
	if got := int(st.Sys().(*syscall.Stat_t).Uid); got != uid {
		t.Errorf("a file that root of a container made is user %d's on the host, want %d", got, uid)
	}
}

// testImages unpacks what takes more than being root of a user namespace.
func (u *user) testImages(t *testing.T) {
	u.importImage("dev", rootfs(t, entry{name: "srv/node", typ: tar.TypeChar, mode: 0o666}))
	if got := u.must("run", "--rm", "dev", "sh", "-c", "ls /srv"); got != "hello" {
		t.Errorf("a device node of an image: %q (want it left out)", got)
	}
	r := u.pipe(bytes.NewReader(rootfs(t, entry{name: "srv/far", mode: 0o644, id: subs + 100, data: []byte("x")})), "import", "-", "far")
	if r.code == 0 || !strings.Contains(r.err, "/etc/subuid") {
		t.Errorf("a file of a user that is not mapped: %s", r)
	}
	grep := rootfs(t)
	h := tar.NewReader(bytes.NewReader(grep))
	var program []byte
	for {
		e, err := h.Next()
		must(t, err)
		if e.Name == "bin/busybox" {
			program, err = io.ReadAll(h)
			must(t, err)
			break
		}
	}
	u.importImage("caps", rootfs(t, entry{name: "srv/grep", mode: 0o755, data: program, xattr: map[string]string{"security.capability": netRaw}}))
	if got := u.must("run", "--rm", "-u", "web", "caps", "/srv/grep", "CapEff", "/proc/self/status"); got != "CapEff:\t0000000000002000" {
		t.Errorf("a file's capability: %q", got)
	}
	// What a container changes becomes a layer, what is removed is gone.
	u.must("run", "--name", "change", "bb", "sh", "-c", "rm /srv/hello; mkdir /srv/d; echo new > /srv/d/f; chown -R web /srv/d")
	u.must("commit", "change", "changed")
	u.must("rm", "change")
	if got := u.must("run", "--rm", "changed", "sh", "-c", "ls /srv; stat -c %U /srv/d/f"); got != "d\nweb" {
		t.Errorf("a committed image: %q", got)
	}
	u.must("rmi", "dev", "caps", "changed")
}

// testPull takes an image from a registry on the host's loopback, which pasta
// shows at the same address.
func (u *user) testPull(t *testing.T) {
	l := listen(t, u.host, "127.0.0.1:5055")
	srv := &http.Server{Handler: registry.New(registry.Logger(log.New(io.Discard, "", 0)))}
	go srv.Serve(l)
	defer srv.Close()
	data := rootfs(t, entry{name: "srv/owned", mode: 0o600, id: 1000, data: []byte("mine")})
	layer, err := tarball.LayerFromOpener(func() (io.ReadCloser, error) { return io.NopCloser(bytes.NewReader(data)), nil })
	must(t, err)
	img, err := mutate.AppendLayers(empty.Image, layer)
	must(t, err)
	cf, err := img.ConfigFile()
	must(t, err)
	cf = cf.DeepCopy()
	cf.OS, cf.Architecture, cf.Config.User, cf.Config.Cmd = "linux", runtime.GOARCH, "web", []string{"cat", "/srv/owned"}
	img, err = mutate.ConfigFile(img, cf)
	must(t, err)
	const ref = "127.0.0.1:5055/team/app:1"
	n, err := name.ParseReference(ref)
	must(t, err)
	must(t, remote.Write(n, img, remote.WithTransport(&http.Transport{DialContext: func(_ context.Context, network, addr string) (net.Conn, error) {
		return dialIn(u.host, network, addr)
	}})))
	// pasta looks for new listeners once a second.
	var r result
	eventually(t, "the registry to be seen from inside", 15*time.Second, func() bool {
		r = u.run("pull", ref)
		return r.code == 0 || !strings.Contains(r.err, "refused")
	})
	if r.code != 0 {
		t.Fatalf("pull: %s", r)
	}
	if got := u.must("run", "--rm", ref); got != "mine" {
		t.Errorf("the pulled image says %q", got)
	}
	u.must("tag", ref, "127.0.0.1:5055/team/app:2")
	u.must("push", "127.0.0.1:5055/team/app:2")
}

// fetch is a shell command that prints a page: a static busybox's own wget may
// need libraries that are not there.
func fetch(ip string, port int, path string) string {
	return fmt.Sprintf(`(printf 'GET %s HTTP/1.0\r\n\r\n'; sleep 1) | timeout 5 nc -w 3 %s %d > /tmp/page; sed '1,/^\r*$/d' /tmp/page | grep .`, path, ip, port)
}

func (u *user) testNetworks(t *testing.T) {
	l := listen(t, u.peer, peerIP+":8000")
	srv := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { fmt.Fprint(w, "neighbour") })}
	go srv.Serve(l)
	defer srv.Close()
	if got := u.must("run", "--rm", "bb", "sh", "-c", fetch(peerIP, 8000, "/")); got != "neighbour" {
		t.Errorf("the world beyond the host: %q", got)
	}
	u.must("network", "create", "net1")
	u.must("run", "-d", "--name", "server", "--network", "net1", "--network-alias", "www", "bb", "httpd", "-f", "-p", "80", "-h", "/srv")
	ip := u.must("inspect", "--format", "{{.NetworkSettings.Networks.net1.IPAddress}}", "server")
	if got := u.must("run", "--rm", "--network", "net1", "bb", "sh", "-c", "nslookup www | tail -n +3; "+fetch(ip, 80, "/hello")); !strings.Contains(got, ip) || !strings.HasSuffix(got, "hello from inside") {
		t.Errorf("by name: %q", got)
	}
	if r := u.run("run", "--rm", "bb", "sh", "-c", fetch(ip, 80, "/hello")); r.code == 0 {
		t.Error("networks are not isolated from one another")
	}
	u.must("rm", "-f", "server")
	u.must("network", "rm", "net1")
	if r := u.run("run", "--rm", "--network", "none", "bb", "sh", "-c", fetch(peerIP, 8000, "/")); r.code == 0 {
		t.Error("network none reaches the neighbour")
	}
	// The namespace's network has the host's addresses and not the host's sockets.
	if got := u.must("run", "--rm", "--network", "host", "bb", "sh", "-c", fetch(peerIP, 8000, "/")); got != "neighbour" {
		t.Errorf("network host: %q", got)
	}
	secret := listen(t, u.host, "127.0.0.1:8010")
	go http.Serve(secret, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { fmt.Fprint(w, "secret") }))
	for _, addr := range []string{"127.0.0.1", peerIP} { // the gateway must not stand for the host's loopback
		if r := u.run("run", "--rm", "bb", "sh", "-c", fetch(addr, 8010, "/")); r.code == 0 {
			t.Errorf("a container reaches the host's loopback by %s: %s", addr, r)
		}
	}
}

func (u *user) testPorts(t *testing.T, sources bool) {
	u.must("run", "-d", "--name", "web", "-p", "18080:80", "-p", "127.0.0.1:18081:80", "-p", "80", "bb", "httpd", "-f", "-vv", "-p", "80", "-h", "/srv")
	defer u.must("rm", "-f", "web")
	reach := func(netns, addr string) {
		t.Helper()
		eventually(t, addr+" answers", 15*time.Second, func() bool {
			body, err := get(t, netns, "http://"+addr+"/hello")
			return err == nil && body == "hello from inside\n"
		})
	}
	any := u.must("inspect", "--format", `{{(index (index .NetworkSettings.Ports "80/tcp") 2).HostPort}}`, "web")
	reach(u.host, "127.0.0.1:18080")
	reach(u.host, hostIP+":18080")
	reach(u.peer, hostIP+":18080")
	reach(u.host, "127.0.0.1:18081")
	if _, err := strconv.Atoi(any); err != nil {
		t.Errorf("an ephemeral port: %q", any)
	}
	if body, err := get(t, u.peer, "http://"+hostIP+":18081/hello"); err == nil {
		t.Errorf("a port published on loopback answers the neighbour: %q", body)
	}
	if r := u.run("logs", "web"); sources && !strings.Contains(r.err, peerIP+"]:") {
		t.Errorf("the neighbour's address is lost: %s", r)
	}
	u.refuses("already allocated", "run", "--rm", "-p", "18080:80", "bb", "true")
	// Somebody else's port on the host.
	listen(t, u.host, "0.0.0.0:18090")
	eventually(t, "a port that the host uses is refused", 15*time.Second, func() bool {
		r := u.run("run", "--rm", "-p", "18090:80", "bb", "true")
		return r.code != 0 && strings.Contains(r.err, "already allocated")
	})
	u.must("rm", "-f", "web")
	eventually(t, "the port to be closed", 15*time.Second, func() bool {
		_, err := get(t, u.host, "http://127.0.0.1:18080/hello")
		return err != nil
	})
	u.must("run", "-d", "--name", "web", "-p", "18080:80", "bb", "httpd", "-f", "-p", "80", "-h", "/srv")
	reach(u.peer, hostIP+":18080")
}

type record struct {
	PID  int
	Link struct {
		Kind string
		PID  int
	}
}

func (u *user) record() record {
	u.t.Helper()
	var r record
	data, err := os.ReadFile(filepath.Join(u.dir, "run/servin/rootless.json"))
	must(u.t, err)
	must(u.t, json.Unmarshal(data, &r))
	return r
}

// testKilled kills the daemon: containers go on, and the next one enters the
// same namespaces.
func (u *user) testKilled(t *testing.T) {
	u.must("run", "-d", "--name", "steady", "-p", "18085:80", "bb", "httpd", "-f", "-p", "80", "-h", "/srv")
	u.must("run", "-d", "--name", "writer", "bb", "sh", "-c", "for i in 1 2 3 4 5; do echo $i; sleep 0.2; done; exit 7")
	pid := u.must("inspect", "--format", "{{.State.Pid}}", "steady")
	before := u.record()
	for range 2 {
		u.kill()
		u.start()
		if got := u.must("inspect", "--format", "{{.State.Pid}} {{.State.Running}}", "steady"); got != pid+" true" {
			t.Fatalf("after a crash: %q, want pid %s", got, pid)
		}
	}
	if after := u.record(); after != before {
		t.Errorf("the namespaces changed: %+v, were %+v", after, before)
	}
	if got := u.must("exec", "steady", "cat", "/srv/hello"); got != "hello from inside" {
		t.Errorf("exec after take-over: %q", got)
	}
	eventually(t, "the writer's end", 10*time.Second, func() bool {
		return u.must("inspect", "--format", "{{.State.Status}} {{.State.ExitCode}}", "writer") == "exited 7"
	})
	if got := u.must("logs", "writer"); got != "1\n2\n3\n4\n5" {
		t.Errorf("the writer's log: %q", got)
	}
	eventually(t, "the published port answers again", 15*time.Second, func() bool {
		body, err := get(t, u.peer, "http://"+hostIP+":18085/hello")
		return err == nil && body == "hello from inside\n"
	})
	u.must("rm", "-f", "steady", "writer")
}

// testNetworkKilled: the next daemon brings the network back.
func (u *user) testNetworkKilled(t *testing.T) {
	r := u.record()
	if r.Link.PID <= 1 {
		t.Fatalf("no network is recorded: %+v", r)
	}
	must(t, syscall.Kill(r.Link.PID, syscall.SIGKILL))
	u.kill()
	eventually(t, "the network's process to be gone", 10*time.Second, func() bool {
		return !slices.ContainsFunc(u.processes(), func(p string) bool { return strings.HasPrefix(p, strconv.Itoa(r.Link.PID)+" ") })
	})
	u.start()
	l := listen(t, u.peer, peerIP+":8001")
	go http.Serve(l, http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { fmt.Fprint(w, "back") }))
	// Early data may be lost by a pasta that has just begun.
	eventually(t, "the world is reached again", 30*time.Second, func() bool {
		return u.run("run", "--rm", "bb", "sh", "-c", fetch(peerIP, 8001, "/")).out == "back\n"
	})
	if now := u.record(); now.Link.PID == r.Link.PID || now.PID != r.PID {
		t.Errorf("record %+v, was %+v", now, r)
	}
}

// TestSlirp publishes through the other user-mode network.
func TestSlirp(t *testing.T) {
	u := newUser(t, "newuidmap", "newgidmap", "slirp4netns")
	fs := rootfs(t)
	u.start()
	defer u.shutdown()
	if r := u.record(); r.Link.Kind != "slirp4netns" {
		t.Fatalf("the network is %+v", r.Link)
	}
	u.importImage("bb", fs)
	u.testPorts(t, false)
	u.must("run", "-d", "--name", "steady", "-p", "18085:80", "bb", "httpd", "-f", "-p", "80", "-h", "/srv")
	u.kill()
	u.start()
	eventually(t, "the published port answers after a crash", 10*time.Second, func() bool {
		body, err := get(t, u.peer, "http://"+hostIP+":18085/hello")
		return err == nil && body == "hello from inside\n"
	})
}

// TestAlone has neither subordinate ids nor a network.
func TestAlone(t *testing.T) {
	u := newUser(t)
	u.subIDs = false
	fs := rootfs(t)
	u.start()
	defer u.shutdown()
	for _, want := range []string{"only root exists in containers", "no network beyond this engine"} {
		if !strings.Contains(u.log(), want) {
			t.Errorf("the daemon does not say %q:\n%s", want, u.log())
		}
	}
	u.importImage("bb", fs)
	if got := u.must("run", "--rm", "bb", "sh", "-c", "id -u; cat /srv/hello; ls /dev/null"); got != "0\nhello from inside\n/dev/null" {
		t.Errorf("%q", got)
	}
	if got := u.must("run", "--rm", "-t", "bb", "tty"); !strings.HasPrefix(got, "/dev/pts/") {
		t.Errorf("a terminal: %q", got)
	}
	u.refuses("map", "run", "--rm", "-u", "web", "bb", "id")
	if r := u.pipe(bytes.NewReader(rootfs(t, entry{name: "srv/other", mode: 0o644, id: 1000, data: []byte("x")})), "import", "-", "other"); r.code == 0 || !strings.Contains(r.err, "/etc/subuid") {
		t.Errorf("a file of another user: %s", r)
	}
}

// TestDelegated starts the daemon in a cgroup v2 subtree that was handed to the user.
func TestDelegated(t *testing.T) {
	u := newUser(t, "newuidmap", "newgidmap", "pasta")
	mount := ""
	data, err := os.ReadFile("/proc/self/mountinfo")
	must(t, err)
	if m := regexp.MustCompile(`(?m)^\S+ \S+ \S+ / (\S+) .* - cgroup2 `).FindSubmatch(data); m != nil {
		mount = string(m[1])
	}
	if mount == "" {
		t.Skip("SKIP: no cgroup v2 is mounted")
	}
	u.cgroup = filepath.Join(mount, "svr"+strconv.Itoa(os.Getpid()))
	must(t, os.Mkdir(u.cgroup, 0o755))
	defer func() {
		if err := os.Remove(u.cgroup); err != nil {
			t.Errorf("cgroups are left: %v\n%s", err, sh(t, "find", u.cgroup, "-type", "d"))
			sh(t, "find", u.cgroup, "-depth", "-type", "d", "-exec", "rmdir", "{}", ";")
		}
	}()
	for _, f := range []string{"", "cgroup.procs", "cgroup.subtree_control", "cgroup.threads"} {
		must(t, os.Chown(filepath.Join(u.cgroup, f), uid, uid))
	}
	fs := rootfs(t)
	u.start()
	down := false
	defer func() {
		if !down {
			u.shutdown()
		}
		// The daemon's own group is empty now; it could not remove that itself.
		_ = os.Remove(filepath.Join(u.cgroup, "servin-engine"))
	}()
	u.importImage("bb", fs)
	u.must("run", "-d", "--name", "calm", "bb", "sleep", "1000")
	pid := u.must("inspect", "--format", "{{.State.Pid}}", "calm")
	own, err := os.ReadFile("/proc/" + pid + "/cgroup")
	must(t, err)
	if want := "0::/" + filepath.Base(u.cgroup) + "/servin"; !strings.Contains(string(own), want) {
		t.Errorf("the container is in %s, want it below %s", own, want)
	}
	u.must("pause", "calm")
	if got := u.must("inspect", "--format", "{{.State.Status}}", "calm"); got != "paused" {
		t.Errorf("status %s", got)
	}
	u.must("unpause", "calm")
	have, err := os.ReadFile(u.cgroup + "/cgroup.controllers")
	must(t, err)
	for flag, c := range map[string]string{"-m": "memory", "--pids-limit": "pids"} {
		args := []string{"run", "--rm", flag, "67108864", "bb", "true"}
		if strings.Contains(string(have), c) {
			u.must(args...)
		} else {
			u.refuses("the "+c+" controller is not delegated", args...)
		}
	}
	u.kill()
	u.start()
	if got := u.must("inspect", "--format", "{{.State.Pid}}", "calm"); got != pid {
		t.Errorf("pid %s after a crash, was %s", got, pid)
	}
	u.must("pause", "calm")
	u.must("unpause", "calm")
	u.must("run", "--rm", "bb", "true")
	down = true
	u.shutdown()
}

// TestPlaces: other roots, no XDG_RUNTIME_DIR inside, and folders that are not the
// user's are refused.
func TestPlaces(t *testing.T) {
	u := newUser(t, "newuidmap", "newgidmap")
	try := func(args ...string) string {
		ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
		defer cancel()
		out, err := u.as(ctx, append([]string{filepath.Join(u.bin, "servind")}, args...)...).CombinedOutput()
		if err == nil {
			t.Errorf("servind %v did not fail: %s", args, out)
		}
		return string(out)
	}
	bad := filepath.Join(u.dir, "bad")
	must(t, os.Mkdir(bad, 0o777))
	must(t, os.Chmod(bad, 0o777))
	if out := try("--run-root", bad); !strings.Contains(out, "is not this user's alone") {
		t.Errorf("a folder of root's that all may write to: %s", out)
	}
	if out := try("--run-root", "run"); !strings.Contains(out, "must be an absolute path") {
		t.Errorf("a relative run root: %s", out)
	}
	config := filepath.Join(u.dir, "home", "servind.yaml")
	must(t, os.WriteFile(config, []byte("version: 1\ncgroupDriver: systemd\n"), 0o644))
	if out := try("--config", "servind.yaml"); !strings.Contains(out, "cgroup driver systemd") {
		t.Errorf("a relative configuration, found from inside too: %s", out)
	}
	// That one had made its namespaces already.
	r := u.record()
	must(t, syscall.Kill(r.PID, syscall.SIGTERM))
	eventually(t, "the namespaces to end", 5*time.Second, func() bool { return len(u.processes()) == 0 })
	u.start()
	u.must("info")
	u.shutdown()
}
