// Package rootless drives the shipped programs as an ordinary user: the daemon
// started by nobody special, on a host made for it. That host is a network
// namespace with a neighbour to talk to and a mount namespace in which /etc knows
// the user; the machine's own /etc and network stay as they are.
package rootless

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

const (
	subs   = 65536
	hostIP = "198.18.7.1"
	peerIP = "198.18.7.2"
)

// Ids that nobody else has, so that what is left can be found by them.
var (
	uid      = 20000 + os.Getpid()%20000
	firstSub = 1<<20 + os.Getpid()%1000*subs
)

// user is an ordinary user with an engine.
type user struct {
	t          *testing.T
	dir        string
	bin        string
	host, peer string // network namespaces, by path
	subIDs     bool
	cgroup     string // directory to start the daemon in
	cmd        *exec.Cmd
	exited     chan struct{}
}

func need(t *testing.T, tools ...string) {
	t.Helper()
	if os.Getuid() != 0 {
		t.Skip("SKIP: becoming another user takes root")
	}
	for _, tool := range tools {
		if _, err := exec.LookPath(tool); err != nil {
			t.Skipf("SKIP: %s is not installed", tool)
		}
	}
	for _, f := range []string{"/etc/passwd", "/etc/group", "/etc/subuid", "/etc/subgid", "/dev/net/tun"} {
		if _, err := os.Stat(f); err != nil {
			t.Skipf("SKIP: there is no %s to stand another one in for", f)
		}
	}
	if b, err := os.ReadFile("/proc/sys/kernel/unprivileged_userns_clone"); err == nil && strings.TrimSpace(string(b)) == "0" {
		t.Skip("SKIP: kernel.unprivileged_userns_clone is 0")
	}
	if b, err := os.ReadFile("/proc/sys/kernel/apparmor_restrict_unprivileged_userns"); err == nil && strings.TrimSpace(string(b)) == "1" {
		t.Skip("SKIP: kernel.apparmor_restrict_unprivileged_userns is 1")
	}
}

// newUser makes the user and the host. Of the programs that the engine may
// find only those named are on the user's path.
func newUser(t *testing.T, programs ...string) *user {
	t.Helper()
	need(t, append([]string{"ip", "nsenter", "unshare", "setpriv"}, programs...)...)
	bin := os.Getenv("SERVIN_BIN")
	if bin == "" {
		bin, _ = filepath.Abs("../../bin")
	}
	if _, err := os.Stat(filepath.Join(bin, "servind")); err != nil {
		t.Fatalf("no programs in %s: run make build first", bin)
	}
	// A short path: unix socket names are limited to 107 bytes.
	dir, err := os.MkdirTemp("", "svr")
	if err != nil {
		t.Fatal(err)
	}
	u := &user{t: t, dir: dir, subIDs: true}
	t.Cleanup(func() {
		// Nothing is left after a shutdown; this is for tests that failed before.
		for _, p := range u.processes() {
			pid, _, _ := strings.Cut(p, " ")
			if n, err := strconv.Atoi(pid); err == nil {
				_ = syscall.Kill(n, syscall.SIGKILL)
			}
		}
		if err := os.RemoveAll(dir); err != nil {
			t.Errorf("cannot remove the user's folders: %v", err)
		}
	})
	must(t, os.Chmod(dir, 0o755))
	for _, d := range []string{"etc", "home", "run", "dev", "path", "bin"} {
		must(t, os.Mkdir(filepath.Join(dir, d), 0o755))
	}
	for _, d := range []string{"home", "run"} {
		must(t, os.Chown(filepath.Join(dir, d), uid, uid))
		must(t, os.Chmod(filepath.Join(dir, d), 0o700))
	}
	for _, p := range programs {
		path, err := exec.LookPath(p)
		must(t, err)
		must(t, os.Symlink(path, filepath.Join(dir, "path", p)))
	}
	// The user need not be able to reach the folder of the build.
	u.bin = filepath.Join(dir, "bin")
	for _, p := range []string{"servind", "servin"} {
		if err := os.Link(filepath.Join(bin, p), filepath.Join(u.bin, p)); err != nil {
			data, err := os.ReadFile(filepath.Join(bin, p))
			must(t, err)
			must(t, os.WriteFile(filepath.Join(u.bin, p), data, 0o755))
		}
	}
	u.network()
	return u
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// sh runs a command as root that has to succeed.
func sh(t *testing.T, argv ...string) string {
	t.Helper()
	out, err := exec.Command(argv[0], argv[1:]...).CombinedOutput()
	if err != nil {
		t.Fatalf("%s: %v: %s", strings.Join(argv, " "), err, out)
	}
	return string(out)
}

// network makes two hosts joined by a cable; the first one's way to the world
// is the second.
func (u *user) network() {
	name := fmt.Sprintf("svr%d", os.Getpid())
	h, p := name+filepath.Base(u.dir)[3:]+"h", name+filepath.Base(u.dir)[3:]+"p"
	for _, n := range []string{h, p} {
		sh(u.t, "ip", "netns", "add", n)
		u.t.Cleanup(func() { sh(u.t, "ip", "netns", "del", n) })
		sh(u.t, "ip", "-n", n, "link", "set", "lo", "up")
	}
	sh(u.t, "ip", "-n", h, "link", "add", "eth0", "type", "veth", "peer", "name", "eth0", "netns", p)
	sh(u.t, "ip", "-n", h, "addr", "add", hostIP+"/24", "dev", "eth0")
	sh(u.t, "ip", "-n", p, "addr", "add", peerIP+"/24", "dev", "eth0")
	sh(u.t, "ip", "-n", h, "link", "set", "eth0", "up")
	sh(u.t, "ip", "-n", p, "link", "set", "eth0", "up")
	sh(u.t, "ip", "-n", h, "route", "add", "default", "via", peerIP)
	u.host, u.peer = "/run/netns/"+h, "/run/netns/"+p
}

// in runs f on a thread in a network namespace; sockets made there stay there.
func in[T any](t *testing.T, netns string, f func() (T, error)) T {
	t.Helper()
	type result struct {
		v   T
		err error
	}
	done := make(chan result)
	go func() {
		runtime.LockOSThread() // the thread ends with the goroutine
		var r result
		fd, err := unix.Open(netns, unix.O_RDONLY|unix.O_CLOEXEC, 0)
		if err == nil {
			err = unix.Setns(fd, unix.CLONE_NEWNET)
			unix.Close(fd)
		}
		if r.err = err; err == nil {
			r.v, r.err = f()
		}
		done <- r
	}()
	r := <-done
	must(t, r.err)
	return r.v
}

// listen opens a socket in a network namespace.
func listen(t *testing.T, netns, addr string) net.Listener {
	t.Helper()
	l := in(t, netns, func() (net.Listener, error) { return net.Listen("tcp", addr) })
	t.Cleanup(func() { l.Close() })
	return l
}

// get fetches a page from a network namespace.
func get(t *testing.T, netns, url string) (string, error) {
	t.Helper()
	type page struct {
		body string
		err  error
	}
	p := in(t, netns, func() (page, error) {
		c := &http.Client{Timeout: 5 * time.Second, Transport: &http.Transport{DisableKeepAlives: true, Proxy: nil,
			DialContext: func(_ context.Context, network, addr string) (net.Conn, error) {
				return dialIn(netns, network, addr)
			}}}
		resp, err := c.Get(url)
		if err != nil {
			return page{err: err}, nil
		}
		defer resp.Body.Close()
		b, err := io.ReadAll(resp.Body)
		return page{string(b), err}, nil
	})
	return p.body, p.err
}

func dialIn(netns, network, addr string) (c net.Conn, err error) {
	done := make(chan struct{})
	go func() {
		defer close(done)
		runtime.LockOSThread()
		var fd int
		if fd, err = unix.Open(netns, unix.O_RDONLY|unix.O_CLOEXEC, 0); err != nil {
			return
		}
		defer unix.Close(fd)
		if err = unix.Setns(fd, unix.CLONE_NEWNET); err != nil {
			return
		}
		c, err = net.DialTimeout(network, addr, 5*time.Second)
	}()
	<-done
	return c, err
}

// as is a command of the user's on the user's host.
func (u *user) as(ctx context.Context, argv ...string) *exec.Cmd {
	etc := filepath.Join(u.dir, "etc")
	for _, f := range []string{"passwd", "group", "subuid", "subgid"} {
		data, err := os.ReadFile("/etc/" + f)
		must(u.t, err)
		switch f {
		case "passwd":
			data = fmt.Appendf(data, "svrtest:x:%d:%d::%s/home:/bin/sh\n", uid, uid, u.dir)
		case "group":
			data = fmt.Appendf(data, "svrtest:x:%d:\n", uid)
		default:
			data = nil
			if u.subIDs {
				data = fmt.Appendf(nil, "svrtest:%d:%d\n", firstSub, subs)
			}
		}
		must(u.t, os.WriteFile(filepath.Join(etc, f), data, 0o644))
	}
	const script = `set -e
d=$1 cg=$2; shift 2
for f in passwd group subuid subgid; do mount --bind "$d/etc/$f" "/etc/$f"; done
mount -t tmpfs -o mode=755 svr "$d/dev"
mknod -m 666 "$d/dev/tun" c 10 200
mount --bind "$d/dev/tun" /dev/net/tun
if [ -d "$cg/servin-engine" ]; then cg=$cg/servin-engine; fi # as systemd's DelegateSubgroup= has it
[ -z "$cg" ] || echo $$ > "$cg/cgroup.procs"
cd "$d/home"
exec setpriv --reuid "$0" --regid "$0" --clear-groups -- env -i HOME="$d/home" XDG_RUNTIME_DIR="$d/run" PATH="$d/path" USER=svrtest LANG=C "$@"`
	args := append([]string{"--net=" + u.host, "unshare", "-m", "--propagation", "private", "bash", "-c", script, strconv.Itoa(uid), u.dir, u.cgroup}, argv...)
	return exec.CommandContext(ctx, "nsenter", args...)
}

// start begins the daemon and waits until it answers.
func (u *user) start() {
	u.t.Helper()
	log, err := os.OpenFile(u.dir+"/servind.log", os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o644)
	must(u.t, err)
	defer log.Close()
	u.cmd = u.as(context.Background(), filepath.Join(u.bin, "servind"))
	u.cmd.Stdout, u.cmd.Stderr = log, log
	u.cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	must(u.t, u.cmd.Start())
	u.exited = make(chan struct{})
	go func(cmd *exec.Cmd, done chan struct{}) { _ = cmd.Wait(); close(done) }(u.cmd, u.exited)
	deadline := time.Now().Add(30 * time.Second)
	for u.run("version").code != 0 {
		if time.Now().After(deadline) {
			u.t.Fatalf("the daemon does not answer:\n%s", u.log())
		}
		select {
		case <-u.exited:
			u.t.Fatalf("the daemon ended:\n%s", u.log())
		case <-time.After(20 * time.Millisecond):
		}
	}
}

// kill ends the daemon as a crash would: it kept the pid of what was started.
func (u *user) kill() {
	_ = u.cmd.Process.Kill()
	<-u.exited
}

func (u *user) log() string {
	data, _ := os.ReadFile(u.dir + "/servind.log")
	if len(data) > 6000 {
		data = data[len(data)-6000:]
	}
	return string(data)
}

// shutdown ends everything and looks for what is left.
func (u *user) shutdown() {
	u.t.Helper()
	if res := u.run("system", "shutdown", "--force"); res.code != 0 {
		u.t.Errorf("shutdown: %s", res)
	}
	select {
	case <-u.exited:
	case <-time.After(30 * time.Second):
		u.t.Errorf("the daemon did not end after shutdown:\n%s", u.log())
		u.kill()
	}
	if u.t.Failed() {
		u.t.Logf("daemon's log:\n%s", u.log())
	}
	for deadline := time.Now().Add(10 * time.Second); len(u.processes()) > 0; time.Sleep(20 * time.Millisecond) {
		if time.Now().After(deadline) {
			u.t.Errorf("processes are left: %q", u.processes())
			break
		}
	}
	if left, _ := filepath.Glob(u.dir + "/run/servin/*.sock"); len(left) > 0 {
		u.t.Errorf("sockets are left: %v", left)
	}
	if out := sh(u.t, "cat", "/proc/self/mountinfo"); strings.Contains(out, u.dir) {
		u.t.Errorf("mounts are left:\n%s", out)
	}
}

// processes lists what runs as the user or as one of the user's subordinates.
func (u *user) processes() (out []string) {
	dirs, _ := filepath.Glob("/proc/[0-9]*")
	for _, d := range dirs {
		st, err := os.Stat(d)
		if err != nil {
			continue
		}
		id := int(st.Sys().(*syscall.Stat_t).Uid)
		if id != uid && (id < firstSub || id >= firstSub+subs) {
			continue
		}
		status, _ := os.ReadFile(d + "/stat")
		if i := bytes.LastIndexByte(status, ')'); i < 0 || bytes.HasPrefix(status[i:], []byte(") Z")) {
			continue
		}
		cmdline, _ := os.ReadFile(d + "/cmdline")
		out = append(out, filepath.Base(d)+" "+string(bytes.ReplaceAll(cmdline, []byte{0}, []byte(" "))))
	}
	return out
}

type result struct {
	out, err string
	code     int
}

func (r result) String() string {
	return fmt.Sprintf("exit %d\nstdout: %s\nstderr: %s", r.code, r.out, r.err)
}

// run runs the command line, which has to find the user's engine by itself.
func (u *user) run(args ...string) result { return u.pipe(nil, args...) }

func (u *user) pipe(stdin io.Reader, args ...string) result {
	u.t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	cmd := exec.CommandContext(ctx, filepath.Join(u.bin, "servin"), args...)
	cmd.Env = []string{"HOME=" + u.dir + "/home", "XDG_RUNTIME_DIR=" + u.dir + "/run", "PATH=" + u.dir + "/path"}
	cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: uint32(uid), Gid: uint32(uid)}}
	cmd.Dir = "/"
	var out, errb bytes.Buffer
	cmd.Stdin, cmd.Stdout, cmd.Stderr = stdin, &out, &errb
	err := cmd.Run()
	r := result{out: out.String(), err: errb.String()}
	var ee *exec.ExitError
	switch {
	case err == nil:
	case errors.As(err, &ee):
		r.code = ee.ExitCode()
	default:
		u.t.Fatalf("servin %s: %v", strings.Join(args, " "), err)
	}
	return r
}

// must runs the command line, which has to succeed, and returns its output.
func (u *user) must(args ...string) string {
	u.t.Helper()
	r := u.run(args...)
	if r.code != 0 {
		u.t.Fatalf("servin %s: %s\n%s", strings.Join(args, " "), r, u.log())
	}
	return strings.TrimSpace(r.out)
}

// refuses runs the command line, which has to fail and say why.
func (u *user) refuses(why string, args ...string) {
	u.t.Helper()
	r := u.run(args...)
	if r.code == 0 || !strings.Contains(r.err, why) {
		u.t.Errorf("servin %s: want a failure with %q: %s", strings.Join(args, " "), why, r)
	}
}

// eventually polls until ok holds.
func eventually(t *testing.T, what string, limit time.Duration, ok func() bool) {
	t.Helper()
	for deadline := time.Now().Add(limit); !ok(); time.Sleep(20 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("%s: not within %s", what, limit)
		}
	}
}
