package checkpoint

import (
	"context"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/cloudos-io/cloudos/client"
)

// criuWorks skips where CRIU does not know the kernel.
func criuWorks(t *testing.T) {
	t.Helper()
	if out, err := exec.Command("criu", "check").CombinedOutput(); err != nil {
		t.Skipf("SKIP: criu check fails on this kernel (TestSecondKernel runs this on another): %s", out[max(0, len(out)-300):])
	}
}

// goesOn waits until a container counts beyond n, and fails where it began again.
func (e *engine) goesOn(name string, n int) {
	e.t.Helper()
	e.eventually(name+" goes on counting", func() bool { return e.count(name) > n })
	if m := e.count(name); m > n+2000 {
		e.t.Errorf("%s is at %d, and was at %d", name, m, n)
	}
}

// TestRestoreInPlace: a container goes on where it was, more than once.
func TestRestoreInPlace(t *testing.T) {
	criuWorks(t)
	e := start(t, "")
	e.image()
	e.ok("run", "-d", "--name", "box", "-m", "64m", "--pids-limit", "50", "bb", "sh", "-c", counter)
	e.eventually("it counts", func() bool { return e.count("box") > 5 })
	e.ok("containers", "checkpoint", "--leave-running", "box", "first")
	n := e.count("box")
	e.goesOn("box", n)
	e.fails("already exists", "containers", "checkpoint", "box", "first")
	e.ok("containers", "checkpoint", "box", "second")
	if s := e.status("box"); s != "exited" {
		t.Fatalf("it is %s after its checkpoint", s)
	}
	if out := e.ok("containers", "checkpoint", "--ls", "box"); !strings.Contains(out, "first") || !strings.Contains(out, "second") {
		t.Errorf("%s", out)
	}

	for range 2 {
		e.ok("containers", "restore", "box", "second")
		e.goesOn("box", n)
		if out := e.ok("exec", "box", "cat", "/proc/1/status"); !strings.Contains(out, "Seccomp:\t2") || !strings.Contains(out, "CapEff:\t00000000a80425fb") {
			t.Errorf("its privileges are others: %s", out)
		}
		e.ok("logs", "box")
		e.ok("kill", "box")
		e.eventually("it ends", func() bool { return e.status("box") == "exited" })
	}
	e.ok("containers", "checkpoint", "--rm", "first", "box")
	e.fails("does not exist", "containers", "restore", "box", "first")
	e.ok("rm", "box")
	if l, err := os.ReadDir(e.Dir + "/root/checkpoints"); err != nil || len(l) != 0 {
		t.Errorf("checkpoints are left: %v, %v", l, err)
	}
}

// TestNewContainer: a checkpoint makes a second container, with the files of then,
// its volume, another address and its open port.
func TestNewContainer(t *testing.T) {
	criuWorks(t)
	e := start(t, "")
	e.image()
	e.ok("run", "-d", "--name", "web", "-v", "www:/www", "bb", "sh", "-c", "echo then > /file; echo hello > /www/index.html; httpd -p 8080 -h /www; "+counter)
	e.eventually("it counts", func() bool { return e.count("web") > 5 })
	n := e.count("web")
	e.ok("containers", "checkpoint", "--leave-running", "--volumes", "web", "cp")
	e.ok("exec", "web", "sh", "-c", "echo now > /file")
	e.ok("containers", "restore", "--name", "web2", "--keep-volumes", "web", "cp")
	e.goesOn("web2", n)
	if out := e.ok("exec", "web2", "cat", "/file"); out != "then" {
		t.Errorf("its file holds %q", out)
	}
	ip := func(c string) string {
		return e.ok("inspect", "--format", "{{.NetworkSettings.Networks.bridge.IPAddress}}", c)
	}
	if ip("web") == ip("web2") {
		t.Errorf("both have %s", ip("web"))
	}
	if out := e.ok("run", "--rm", "bb", "wget", "-qO-", "http://"+ip("web2")+":8080/"); out != "hello" {
		t.Errorf("its open port answers %q", out)
	}
	// The old one still has its own network.
	if out := e.ok("run", "--rm", "bb", "wget", "-qO-", "http://"+ip("web")+":8080/"); out != "hello" {
		t.Errorf("the first one's open port answers %q", out)
	}
}

// TestTerminal: a terminal container can be typed to afterwards.
func TestTerminal(t *testing.T) {
	criuWorks(t)
	e := start(t, "")
	e.image()
	e.ok("run", "-dit", "--name", "tty", "bb", "sh")
	say := func(line, want string) {
		t.Helper()
		ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
		defer cancel()
		c, err := client.New(client.Config{Host: e.Host()})
		if err != nil {
			t.Fatal(err)
		}
		s, err := c.ContainerAttach(ctx, "tty", client.AttachOptions{Stdin: true, Stdout: true})
		if err != nil {
			t.Fatal(err)
		}
		defer s.Close()
		if _, err := s.Write([]byte(line + "\n")); err != nil {
			t.Fatal(err)
		}
		var got strings.Builder
		b := make([]byte, 4096)
		for !strings.Contains(got.String(), want) {
			n, err := s.Read(b)
			got.Write(b[:n])
			if err != nil {
				t.Fatalf("%q has been said: %v", got.String(), err)
			}
		}
	}
	say("x=4; echo $((x+1))$((x+2))", "56")
	e.ok("containers", "checkpoint", "tty", "cp")
	e.ok("containers", "restore", "tty", "cp")
	say("echo $((x+3))$((x+4)); test -t 0 && echo is a tty", "78")
	if out := e.ok("exec", "-t", "tty", "sh", "-c", "test -t 1 && echo yes"); !strings.Contains(out, "yes") {
		t.Errorf("exec -t: %q", out)
	}
}

// TestFile: a file carries a container to another engine, which has nothing of it.
func TestFile(t *testing.T) {
	criuWorks(t)
	a, b := start(t, ""), start(t, "")
	a.image()
	a.ok("run", "-d", "--name", "box", "-v", "data:/data", "bb", "sh", "-c", "echo kept > /data/f; "+counter)
	a.eventually("it counts", func() bool { return a.count("box") > 5 })
	n := a.count("box")
	file := filepath.Join(a.Dir, "box.tar")
	a.ok("containers", "checkpoint", "--export", file, "--image", "--volumes", "box")
	if s := a.status("box"); s != "exited" {
		t.Errorf("it is %s", s)
	}
	id := b.ok("containers", "restore", "--import", file)
	b.goesOn("box", n)
	if out := b.ok("exec", "box", "cat", "/data/f"); out != "kept" {
		t.Errorf("its volume holds %q", out)
	}
	if got := b.ok("inspect", "--format", "{{.Id}}", "box"); got != id {
		t.Errorf("%s and %s", got, id)
	}
	b.fails("in use", "containers", "restore", "--import", file)
	b.fails("there is a volume data already", "containers", "restore", "--import", file, "--name", "other")
	b.ok("containers", "restore", "--import", file, "--name", "other", "--keep-volumes")
	b.goesOn("other", n)
	// A restart of the engine changes nothing for it.
	b.Kill()
	b.Boot()
	b.goesOn("box", n)
	b.ok("stop", "-t", "0", "box")
	b.ok("start", "box")
}

// TestMigrate: a container moves while it runs, in rounds, and goes on there.
func TestMigrate(t *testing.T) {
	criuWorks(t)
	a, b := start(t, ""), start(t, "")
	a.image()
	a.ok("run", "-d", "--name", "box", "--restart", "always", "bb", "sh", "-c", counter)
	a.eventually("it counts", func() bool { return a.count("box") > 5 })
	n := a.count("box")
	a.ok("containers", "migrate", "--rounds", "2", "box", b.Host())
	b.goesOn("box", n)
	if s := a.status("box"); s != "" {
		t.Errorf("it is %s here", s)
	}
	// And back, kept there.
	n = b.count("box")
	b.ok("containers", "migrate", "--keep", "--rounds", "0", "box", a.Host())
	a.goesOn("box", n)
	if s := b.status("box"); s != "exited" {
		t.Errorf("it is %s there", s)
	}
	// What fails leaves the source as it was: there is one of that name.
	n = a.count("box")
	a.fails("in use", "containers", "migrate", "box", b.Host())
	a.goesOn("box", n)
	if s := b.status("box"); s != "exited" {
		t.Errorf("it is %s there", s)
	}
}

// TestPreDump: what is written down beforehand is used.
func TestPreDump(t *testing.T) {
	criuWorks(t)
	e := start(t, "")
	e.image()
	e.ok("run", "-d", "--name", "box", "bb", "sh", "-c", counter)
	e.eventually("it counts", func() bool { return e.count("box") > 5 })
	e.ok("containers", "checkpoint", "--pre", "box", "cp")
	e.ok("containers", "checkpoint", "--pre", "box", "cp")
	n := e.count("box")
	e.goesOn("box", n)
	n = e.count("box")
	e.ok("containers", "checkpoint", "box", "cp")
	e.ok("containers", "restore", "box", "cp")
	e.goesOn("box", n)
}

// TestKilled: an engine that is killed while it writes a container down leaves it
// running.
func TestKilled(t *testing.T) {
	criuWorks(t)
	e := start(t, "")
	e.image()
	e.ok("run", "-d", "--name", "box", "bb", "sh", "-c", counter)
	e.eventually("it counts", func() bool { return e.count("box") > 5 })
	for _, after := range []time.Duration{20, 60, 120, 250, 500, 900, 1500} {
		n := e.count("box")
		done := make(chan struct{})
		go func() { defer close(done); e.try("containers", "checkpoint", "--leave-running", "box", "cp") }()
		time.Sleep(after * time.Millisecond)
		e.Kill()
		<-done
		e.Boot()
		e.goesOn("box", n)
		if s := e.status("box"); s != "running" {
			t.Fatalf("after %d ms it is %s", after, s)
		}
		e.try("containers", "checkpoint", "--rm", "cp", "box")
	}
	for _, dir := range []string{"held", "criu"} {
		if l, _ := os.ReadDir(filepath.Join(e.Dir, "run", dir)); len(l) != 0 {
			t.Errorf("%s is left in %s", l, dir)
		}
	}
	// And it can still be written down and brought back.
	n := e.count("box")
	e.ok("containers", "checkpoint", "box", "last")
	e.ok("containers", "restore", "box", "last")
	e.goesOn("box", n)
}

// TestExecInTheWay: what cannot be written down is said, and goes on.
func TestExecInTheWay(t *testing.T) {
	criuWorks(t)
	e := start(t, "")
	e.image()
	e.ok("run", "-d", "--name", "box", "bb", "sh", "-c", counter)
	e.eventually("it counts", func() bool { return e.count("box") > 5 })
	e.ok("exec", "-d", "box", "sleep", "1000")
	n := e.count("box")
	e.fails("processes of exec run in it", "containers", "checkpoint", "box", "cp")
	e.goesOn("box", n)
	e.ok("run", "-d", "--name", "shares", "--pid", "container:box", "bb", "sleep", "1000")
	e.fails("shares its process namespace", "containers", "checkpoint", "shares", "cp")
	if s := e.status("shares"); s != "running" {
		t.Errorf("it is %s", s)
	}
}
