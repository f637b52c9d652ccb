package vmmode

import (
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/cloudos-io/cloudos/api"
)

// TestMachine is the main path: a start, a container, a published port, a shared
// folder, an orderly stop.
func TestMachine(t *testing.T) {
	m := newMachine(t)
	if st := m.status(); st.State != api.VMOff {
		t.Fatalf("a new machine is %s", st.State)
	}
	if _, err := m.try("vm", "status"); err == nil || !strings.Contains(err.Error(), "exit status 3") {
		t.Errorf("status of a machine that is off: %v", err)
	}
	m.must("vm", "config", "--share", m.home)
	m.must("mode", "set", "vm", "--no-carry")
	if out := m.must("mode", "status"); !strings.Contains(out, "Mode:    vm") || !strings.Contains(out, "running") {
		t.Errorf("mode status: %s", out)
	}
	if out := m.must("run", "--rm", "servin/hello"); !strings.Contains(out, "Everything works") {
		t.Errorf("run: %s", out)
	}
	limits := strings.Join(strings.Fields(m.must("run", "--rm", "servin/hello", "cat", "/proc/self/limits")), " ")
	for _, want := range []string{"Max open files 1048576 1048576", "Max processes unlimited unlimited"} {
		if !strings.Contains(limits, want) {
			t.Errorf("a container has other limits than elsewhere: %s, want %s", limits, want)
		}
	}
	// A taken port is refused before anything starts; a free one is reachable at once.
	l, err := net.Listen("tcp4", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	if _, err := m.try("run", "-d", "-p", l.Addr().String()+":8080", "servin/hello", "serve"); err == nil || !strings.Contains(err.Error(), "address already in use") {
		t.Errorf("a port that is taken here: %v", err)
	}
	port := freePort(t)
	m.must("run", "-d", "--name", "web", "-p", port+":8080", "servin/hello", "serve")
	if page, err := get("http://127.0.0.1:"+port+"/", 5*time.Second); err != nil || !strings.Contains(page, "Hello from container") {
		t.Errorf("published port: %q %v", page, err)
	}
	if err := os.WriteFile(filepath.Join(m.home, "f"), []byte("from the host"), 0o644); err != nil {
		t.Fatal(err)
	}
	if out := m.must("run", "--rm", "-v", m.home+":/src", "servin/hello", "cat", "/src/f"); out != "from the host" {
		t.Errorf("shared folder: %q", out)
	}
	if _, err := m.try("run", "--rm", "-v", "/opt:/opt", "servin/hello", "true"); err == nil || !strings.Contains(err.Error(), "is not shared") {
		t.Errorf("a folder that is not shared: %v", err)
	}
	if st := m.status(); st.Containers != 1 || len(st.Shares) != 1 || st.Shares[0].Error != "" || len(st.Ports) == 0 {
		t.Errorf("status: %+v", st)
	}
	pid := m.status().PID
	m.must("vm", "stop")
	if st := m.status(); st.State != api.VMOff || syscall.Kill(pid, 0) == nil {
		t.Errorf("after stop: %s, process %v", st.State, syscall.Kill(pid, 0))
	}
	if _, err := get("http://127.0.0.1:"+port+"/", 0); err == nil {
		t.Error("the port is published though the machine is off")
	}
}

// TestLasting is what outlives what: containers and volumes a stop, a new image
// and the killed machine; the machine a killed servin-vmd.
func TestLasting(t *testing.T) {
	if !long {
		t.Skip("SKIP: part of make test-long")
	}
	m := newMachine(t)
	m.must("mode", "set", "vm", "--no-carry")
	port := freePort(t)
	m.must("volumes", "create", "kept")
	m.must("run", "-d", "--name", "web", "--restart", "always", "-v", "kept:/kept", "-p", port+":8080", "servin/hello", "serve")
	page := func() {
		t.Helper()
		if got, err := get("http://127.0.0.1:"+port+"/", 60*time.Second); err != nil || !strings.Contains(got, "Hello") {
			t.Fatalf("published port: %q %v", got, err)
		}
	}
	page()

	// servin-vmd is killed: the machine and its containers do not notice.
	before := m.status().PID
	kill(t, m.vmd())
	m.want("web", "ps")
	if st := m.status(); st.PID != before {
		t.Fatalf("the machine is process %d after servin-vmd was killed, was %d", st.PID, before)
	}
	page()

	// The machine is killed: it comes back by itself, since a container ran.
	if err := syscall.Kill(before, syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	for deadline := time.Now().Add(3 * time.Minute); ; time.Sleep(200 * time.Millisecond) {
		if st := m.status(); st.State == api.VMRunning && st.PID != before {
			break
		} else if time.Now().After(deadline) {
			t.Fatalf("the machine did not come back: %+v", st)
		}
	}
	m.want("Up", "ps", "--filter", "name=web")
	page()

	// Both at once: the next command finds no machine and starts one.
	before = m.status().PID
	kill(t, m.vmd())
	syscall.Kill(before, syscall.SIGKILL)
	m.want("kept", "volumes", "list")
	m.want("Up", "ps", "--filter", "name=web")
	if n := qemus(t, m); n != 1 {
		t.Errorf("%d machines run on one disk", n)
	}

	// An image from elsewhere: what is kept stays.
	img, _ := image()
	other := filepath.Join(m.root, "image")
	if err := os.CopyFS(other, os.DirFS(img)); err != nil {
		t.Fatal(err)
	}
	m.must("vm", "config", "--image", other, "--restart")
	if st := m.status(); st.Image != other {
		t.Errorf("the machine runs the image of %s", st.Image)
	}
	m.want("kept", "volumes", "list")
	m.want("Up", "ps", "--filter", "name=web")
	page()

	// Killed on its way up, again and again.
	for i := range 4 {
		m.must("vm", "stop", "--force")
		started := make(chan struct{})
		go func() { defer close(started); m.try("ps") }()
		time.Sleep(time.Duration(50+i*400) * time.Millisecond)
		if pid := m.vmd(); pid > 0 {
			kill(t, pid)
		}
		<-started
	}
	m.want("web", "ps", "-a")
	if n := qemus(t, m); n != 1 {
		t.Errorf("%d machines run on one disk", n)
	}

	// A reset says what goes, and asks.
	if _, err := m.try("vm", "reset"); err == nil || !strings.Contains(err.Error(), "1 volumes") || !strings.Contains(err.Error(), "kept") {
		t.Errorf("reset without a terminal: %v", err)
	}
	m.must("vm", "reset", "--force")
	if out := m.must("volumes", "list"); strings.Contains(out, "kept") {
		t.Errorf("a volume outlived the reset: %s", out)
	}
}

// TestStandsStill: a machine that stands still on its way up is noticed, ended and
// started once more.
func TestStandsStill(t *testing.T) {
	if !long {
		t.Skip("SKIP: part of make test-long")
	}
	m := newMachine(t)
	m.must("mode", "set", "vm", "--no-carry") // its start is the measure of the next
	m.must("volumes", "create", "kept")
	m.must("vm", "stop")
	still, started := m.starting()
	if err := syscall.Kill(still, syscall.SIGSTOP); err != nil {
		t.Fatal(err)
	}
	if err := <-started; err != nil {
		t.Fatal(err)
	}
	if st := m.status(); st.State != api.VMRunning || st.PID == still || syscall.Kill(still, 0) == nil {
		t.Errorf("the machine is %s, process %d; the one that stood still, %d: %v", st.State, st.PID, still, syscall.Kill(still, 0))
	}
	m.want("kept", "volumes", "list")
	if log, err := os.ReadFile(filepath.Join(m.root, "state", "vmd.log")); err != nil || strings.Count(string(log), "stands still") != 1 {
		t.Errorf("the log does not tell of it once: %v", err)
	}
	if n := qemus(t, m); n != 1 {
		t.Errorf("%d machines run on one disk", n)
	}
}

// TestForcedStop: who pulls the plug waits for no start, and the start says what became of it.
func TestForcedStop(t *testing.T) {
	if !long {
		t.Skip("SKIP: part of make test-long")
	}
	m := newMachine(t)
	pid, started := m.starting()
	if err := syscall.Kill(pid, syscall.SIGSTOP); err != nil { // it would be waited for
		t.Fatal(err)
	}
	m.must("vm", "stop", "--force")
	if err := <-started; err == nil || !strings.Contains(err.Error(), "cannot start the virtual machine: it was stopped meanwhile") {
		t.Errorf("the start that was ended: %v", err)
	}
	if st := m.status(); st.State != api.VMOff || st.Error != "" || syscall.Kill(pid, 0) == nil {
		t.Errorf("the machine is %s (%s); its process: %v", st.State, st.Error, syscall.Kill(pid, 0))
	}
	m.must("vm", "start")
	m.state(api.VMRunning, time.Second)
}

// starting begins to start the machine, and returns its process and where the command's end is told.
func (m *machine) starting() (pid int, started <-chan error) {
	m.t.Helper()
	end := make(chan error, 1)
	go func() { _, err := m.try("vm", "start"); end <- err }()
	for deadline := time.Now().Add(time.Minute); ; time.Sleep(20 * time.Millisecond) {
		// A process that has no start of ours behind it yet stands in nobody's record.
		if st := m.status(); st.State == api.VMStarting && st.PID > 0 {
			return st.PID, end
		} else if st.State == api.VMRunning || time.Now().After(deadline) {
			m.t.Fatalf("the machine was never seen to start: %+v", st)
		}
	}
}

// kill kills a process and waits until it has let everything go: before, its sockets
// may take what is asked next.
func kill(t *testing.T, pid int) {
	t.Helper()
	fd, err := unix.PidfdOpen(pid, 0)
	if errors.Is(err, unix.ESRCH) {
		return
	}
	if err == nil {
		defer unix.Close(fd)
		err = unix.PidfdSendSignal(fd, unix.SIGKILL, nil, 0)
	}
	if err == nil {
		err = unix.EINTR
		for errors.Is(err, unix.EINTR) {
			_, err = unix.Poll([]unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}, 10000)
		}
	}
	if err != nil && !errors.Is(err, unix.ESRCH) {
		t.Fatal(err)
	}
}

// qemus counts the machine's processes.
func qemus(t *testing.T, m *machine) int {
	t.Helper()
	n := 0
	procs, _ := filepath.Glob("/proc/[0-9]*")
	uuid := ""
	for _, p := range procs {
		b, _ := os.ReadFile(p + "/cmdline")
		args := strings.Split(string(b), "\x00")
		for i, a := range args {
			if a == "-uuid" && filepath.Base(p) == fmt.Sprint(m.status().PID) {
				uuid = args[i+1]
			}
		}
	}
	for _, p := range procs {
		b, _ := os.ReadFile(p + "/cmdline")
		if uuid != "" && strings.Contains(string(b), "\x00-uuid\x00"+uuid+"\x00") {
			n++
		}
	}
	return n
}

// TestSleep: an unused machine pauses, wakes for a command, and stops later.
func TestSleep(t *testing.T) {
	if !long {
		t.Skip("SKIP: part of make test-long")
	}
	m := newMachine(t, "--idle-time", "5s", "--off-time", "8s")
	m.must("mode", "set", "vm", "--no-carry")
	m.must("run", "--rm", "servin/hello", "true")
	pid := m.state(api.VMSleeping, time.Minute).PID
	cpu := func() uint64 { return ticks(t, pid) }
	a := cpu()
	time.Sleep(2 * time.Second)
	if b := cpu(); b-a > 10 {
		t.Errorf("a sleeping machine used %d ticks in 2 s", b-a)
	}
	begin := time.Now()
	m.must("ps")
	t.Logf("a command woke it in %v", time.Since(begin))
	if st := m.status(); st.State != api.VMRunning || st.PID != pid {
		t.Errorf("after a command the machine is %s", st.State)
	}
	// The clock is right again.
	if out := m.must("run", "--rm", "servin/hello", "true"); out != "" {
		t.Error(out)
	}
	m.state(api.VMSleeping, time.Minute)
	m.state(api.VMOff, time.Minute)
	// A container that runs keeps it awake.
	m.must("run", "-d", "--name", "busy", "servin/hello", "serve")
	time.Sleep(10 * time.Second)
	if st := m.status(); st.State != api.VMRunning {
		t.Errorf("a machine with a container is %s", st.State)
	}
}

func ticks(t *testing.T, pid int) uint64 {
	t.Helper()
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		t.Fatal(err)
	}
	f := strings.Fields(string(b[strings.LastIndexByte(string(b), ')')+1:]))
	var u, s uint64
	fmt.Sscan(f[11], &u)
	fmt.Sscan(f[12], &s)
	return u + s
}

// TestSettings: what a running machine takes at once, and what waits.
func TestSettings(t *testing.T) {
	if !long {
		t.Skip("SKIP: part of make test-long")
	}
	m := newMachine(t)
	m.must("mode", "set", "vm", "--no-carry")
	m.must("volumes", "create", "kept")
	size := m.status().Disk.Size
	if out := m.must("vm", "config", "--disk", "6g"); !strings.Contains(out, "Changed: disk") {
		t.Errorf("growing the disk of a running machine: %s", out)
	}
	if st := m.status(); st.Disk.Size <= size {
		t.Errorf("the disk has %d bytes, had %d", st.Disk.Size, size)
	}
	if _, err := m.try("vm", "config", "--disk", "5g"); err == nil || !strings.Contains(err.Error(), "cannot shrink") {
		t.Errorf("shrinking the disk: %v", err)
	}
	if out := m.must("vm", "config", "--memory", "768m"); !strings.Contains(out, "Changed: memory") {
		t.Errorf("less memory: %s", out)
	}
	if out := m.must("vm", "config", "--cpus", "1"); !strings.Contains(out, "At the next start") {
		t.Errorf("processors: %s", out)
	}
	extra := filepath.Join(m.root, "extra")
	ro := filepath.Join(m.root, "ro")
	for _, d := range []string{extra, ro} {
		if err := os.Mkdir(d, 0o755); err != nil {
			t.Fatal(err)
		}
		os.WriteFile(filepath.Join(d, "f"), []byte("x"), 0o644)
	}
	if out := m.must("vm", "config", "--share", extra, "--share", ro+":ro"); !strings.Contains(out, "Changed: shares") {
		t.Errorf("shares: %s", out)
	}
	if out := m.must("run", "--rm", "-v", extra+":/e", "-v", ro+":/r", "servin/hello", "cat", "/e/f", "/r/f"); out != "xx" {
		t.Errorf("shares that came later: %q", out)
	}
	m.must("vm", "restart")
	if st := m.status(); len(st.Pending) != 0 || len(st.Shares) != 3 {
		t.Errorf("after a restart: %+v", st)
	}
	m.want("kept", "volumes", "list")
	if out := m.must("run", "--rm", "-v", extra+":/e", "-v", ro+":/r", "servin/hello", "cat", "/e/f", "/r/f"); out != "xx" {
		t.Errorf("shares after a restart: %q", out)
	}
}
