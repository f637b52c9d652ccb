package runtimetest

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"

	contract "github.com/cloudos-io/cloudos/internal/runtime"
	"golang.org/x/sys/unix"
)

func testAttach(t *testing.T, dr Driver) {
	e := dr.env(t)
	if out, errs, x := e.output(sh("echo one; echo two >&2; echo three")); out != "one\nthree\n" || errs != "two\n" || x.Code != 0 {
		t.Errorf("%q %q %+v", out, errs, x)
	}
	// Without stdin it is empty, not closed.
	if out, _, _ := e.output(sh("cat; echo done; readlink /proc/self/fd/0")); !strings.HasPrefix(out, "done\n") {
		t.Errorf("%q", out)
	}
	// Standard input until its end.
	task := e.start(Spec("/bin/cat"), attached(true))
	s, err := task.Attach(e.ctx(), contract.AttachOptions{Stdin: true, Stdout: true, Stderr: true})
	if err != nil {
		t.Fatal(err)
	}
	data := bytes.Repeat([]byte("0123456789abcdef\n"), 20000)
	go func() {
		_, _ = s.Stdin.Write(data)
		s.Stdin.Close()
	}()
	out, _ := e.drain(s)
	s.Close()
	if out != string(data) {
		t.Errorf("cat gave %d bytes of %d", len(out), len(data))
	}
	if x := e.wait(task); x.Code != 0 {
		t.Errorf("%+v", x)
	}
	// A later client sees what comes after; two see the same.
	task = e.start(sh("read a; echo got $a; read b; echo got $b"), func(r *contract.StartRequest) { r.Stdio.Stdin = true })
	a, err := task.Attach(e.ctx(), contract.AttachOptions{Stdin: true, Stdout: true, Stderr: true})
	if err != nil {
		t.Fatal(err)
	}
	b, err := task.Attach(e.ctx(), contract.AttachOptions{Stdout: true})
	if err != nil {
		t.Fatal(err)
	}
	fmt.Fprintln(a.Stdin, "x")
	buf := make([]byte, 64)
	if n, _ := io.ReadAtLeast(a.Stdout, buf, 6); string(buf[:n]) != "got x\n" {
		t.Errorf("%q", buf[:n])
	}
	a.Close() // leaving does not end standard input
	time.Sleep(20 * time.Millisecond)
	c, err := task.Attach(e.ctx(), contract.AttachOptions{Stdin: true})
	if err != nil {
		t.Fatal(err)
	}
	fmt.Fprintln(c.Stdin, "y")
	if out, _ := e.drain(b); out != "got x\ngot y\n" {
		t.Errorf("%q", out)
	}
	c.Close()
	b.Close()
	e.wait(task)
	if _, err := task.Attach(e.ctx(), contract.AttachOptions{Stdout: true}); err == nil {
		t.Error("attached to an ended container")
	}
	// StdinOnce: the first client's leaving ends standard input.
	task = e.start(Spec("/bin/cat"), attached(true), func(r *contract.StartRequest) { r.Stdio.StdinOnce = true })
	if s, err = task.Attach(e.ctx(), contract.AttachOptions{Stdin: true, Stdout: true}); err != nil {
		t.Fatal(err)
	}
	s.Close()
	e.wait(task)
	// A process of another user may open its output again.
	spec := sh("echo again > /dev/stdout; echo err > /dev/stderr")
	spec.Process.User.UID, spec.Process.User.GID = 1000, 1000
	if out, errs, x := e.output(spec); out != "again\n" || errs != "err\n" || x.Code != 0 {
		t.Errorf("%q %q %+v", out, errs, x)
	}
}

func testBigOutput(t *testing.T, dr Driver) {
	e := dr.env(t)
	log := filepath.Join(e.dir, "log")
	out, _, x := e.output(sh("seq 1 300000"), logged(log))
	if x.Code != 0 || !strings.HasPrefix(out, "1\n2\n") || !strings.HasSuffix(out, "\n300000\n") || strings.Count(out, "\n") != 300000 {
		t.Errorf("%d bytes, %+v", len(out), x)
	}
	var b strings.Builder
	for _, r := range e.records(log) {
		b.WriteString(r.Log)
	}
	if b.String() != out {
		t.Error("the log differs from the output")
	}
}

// testSlowClient: one that reads nothing may hold back neither log nor exit.
func testSlowClient(t *testing.T, dr Driver) {
	e := dr.env(t)
	log := filepath.Join(e.dir, "log")
	task := e.start(sh("read x; seq 1 200000"), logged(log), func(r *contract.StartRequest) { r.Stdio.Stdin = true })
	s, err := task.Attach(e.ctx(), contract.AttachOptions{Stdin: true, Stdout: true})
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	fmt.Fprintln(s.Stdin, "go")
	if x := e.wait(task); x.Code != 0 {
		t.Errorf("%+v", x)
	}
	if r := e.records(log); len(r) != 200000 {
		t.Errorf("%d records", len(r))
	}
}

func testLog(t *testing.T, dr Driver) {
	e := dr.env(t)
	log := filepath.Join(e.dir, "log")
	long := strings.Repeat("x", 16384*2+10)
	task := e.start(sh(`printf 'a "b" \\ <&>\t\001\377\303\251\342\200\250\n'; echo err >&2; sleep 0.05; echo `+long+`; printf tail`), logged(log))
	e.wait(task)
	var out []string
	for _, r := range e.records(log) {
		if time.Since(r.Time) > time.Minute || r.Time.Location() != time.UTC {
			t.Errorf("time %v", r.Time)
		}
		out = append(out, r.Stream+":"+r.Log)
	}
	want := []string{"stdout:a \"b\" \\ <&>\t\x01\ufffdé\u2028\n", "stderr:err\n", "stdout:" + long[:16384], "stdout:" + long[:16384], "stdout:" + long[:10] + "\n", "stdout:tail"}
	if len(out) > 1 && strings.HasPrefix(out[0], "stderr") {
		out[0], out[1] = out[1], out[0] // two pipes have no common order
	}
	if fmt.Sprintf("%q", out) != fmt.Sprintf("%q", want) {
		t.Errorf("got  %.300q\nwant %.300q", out, want)
	}
	if st, err := os.Stat(log); err != nil || st.Mode().Perm() != 0o640 {
		t.Errorf("%v %v", st, err)
	}
	log = filepath.Join(e.dir, "k8s")
	task = e.start(sh("echo hello; printf "+strings.Repeat("y", 16384+3)+"; printf end"), func(r *contract.StartRequest) {
		r.Log = contract.Log{Format: "k8s-file", Path: log}
	})
	e.wait(task)
	b, _ := os.ReadFile(log)
	re := regexp.MustCompile(`^\S+Z stdout F hello\n\S+Z stdout P y+\n\S+Z stdout P yyyend\n$`)
	if !re.Match(b) {
		t.Errorf("%.200q", b)
	}
	// Opening again after somebody else's rotation.
	log = filepath.Join(e.dir, "reopen")
	task = e.start(sh("echo 1; read x; echo 2"), logged(log), func(r *contract.StartRequest) { r.Stdio.Stdin = true })
	e.until("first line", func() bool { b, _ := os.ReadFile(log); return len(b) > 0 })
	if err := os.Rename(log, log+".old"); err != nil {
		t.Fatal(err)
	}
	if err := task.ReopenLog(e.ctx()); err != nil {
		t.Fatal(err)
	}
	s, err := task.Attach(e.ctx(), contract.AttachOptions{Stdin: true})
	if err != nil {
		t.Fatal(err)
	}
	fmt.Fprintln(s.Stdin, "x")
	e.wait(task)
	s.Close()
	if r := e.records(log); len(r) != 1 || r[0].Log != "2\n" {
		t.Errorf("%v", r)
	}
}

func testRotation(t *testing.T, dr Driver) {
	e := dr.env(t)
	log := filepath.Join(e.dir, "log")
	for _, nonblock := range []bool{false, true} {
		task := e.start(sh("seq 1 3000"), func(r *contract.StartRequest) {
			r.Log = contract.Log{Format: "json-file", Path: log, MaxSize: 50000, MaxFiles: 3, NonBlocking: nonblock}
		})
		if x := e.wait(task); x.Dropped != 0 {
			t.Errorf("%d records were dropped", x.Dropped)
		}
		last := 0
		for _, f := range []string{log + ".2", log + ".1", log} {
			st, err := os.Stat(f)
			if err != nil || st.Size() > 50000 || st.Size() == 0 {
				t.Fatalf("%s: %v %v", f, st, err)
			}
			for _, r := range e.records(f) {
				var n int
				if _, err := fmt.Sscan(r.Log, &n); err != nil || last != 0 && n != last+1 {
					t.Fatalf("%q after %d", r.Log, last)
				}
				last = n
			}
		}
		if last != 3000 {
			t.Errorf("the last record is %d", last)
		}
		if _, err := os.Stat(log + ".3"); err == nil {
			t.Error("too many files are kept")
		}
		for _, f := range []string{log, log + ".1", log + ".2"} {
			os.Remove(f)
		}
	}
}

// testLogFull: a full disk stops the container until there is space, and
// nothing is lost; in non-blocking mode it goes on and records are counted.
func testLogFull(t *testing.T, dr Driver) {
	e := dr.env(t)
	small := filepath.Join(e.dir, "small")
	if err := os.Mkdir(small, 0o700); err != nil {
		t.Fatal(err)
	}
	if err := unix.Mount("tmpfs", small, "tmpfs", 0, "size=128k"); err != nil {
		t.Fatal(err)
	}
	defer unix.Unmount(small, unix.MNT_DETACH)
	log := filepath.Join(small, "log")
	task := e.start(sh("seq 1 20000; touch /data/done"), logged(log))
	e.until("full disk", func() bool { st, _ := os.Stat(log); return st != nil && st.Size() >= 120<<10 })
	select {
	case <-task.Exited():
		t.Fatal("the container went on")
	case <-time.After(300 * time.Millisecond):
	}
	// It can be handled meanwhile.
	ctx, cancel := context.WithTimeout(e.ctx(), 2*time.Second)
	defer cancel()
	if _, err := task.Pids(ctx); err != nil {
		t.Error(err)
	}
	if err := unix.Mount("", small, "tmpfs", unix.MS_REMOUNT, "size=64m"); err != nil {
		t.Fatal(err)
	}
	if x := e.wait(task); x.Code != 0 || x.Dropped != 0 {
		t.Errorf("%+v", x)
	}
	if r := e.records(log); len(r) != 20000 || r[19999].Log != "20000\n" {
		t.Errorf("%d records", len(r))
	}
	os.Remove(log)
	if err := unix.Mount("", small, "tmpfs", unix.MS_REMOUNT, "size=128k"); err != nil {
		t.Fatal(err)
	}
	task = e.start(sh("seq 1 200000; exit 5"), func(r *contract.StartRequest) {
		r.Log = contract.Log{Format: "json-file", Path: log, NonBlocking: true, BufferSize: 65536}
	})
	if x := e.wait(task); x.Code != 5 || x.Dropped == 0 {
		t.Errorf("%+v", x)
	}
	if r := e.records(log); len(r) == 0 {
		t.Error("nothing was logged")
	}
}

func testTerminal(t *testing.T, dr Driver) {
	e := dr.env(t)
	spec := sh("tty; stty size; read a; stty size; echo got $a >&2; read b; exit 4")
	spec.Process.Terminal = true
	log := filepath.Join(e.dir, "log")
	task := e.start(spec, attached(true), logged(log), func(r *contract.StartRequest) { r.Stdio.Terminal, r.Stdio.Width, r.Stdio.Height = true, 100, 40 })
	s, err := task.Attach(e.ctx(), contract.AttachOptions{Stdin: true, Stdout: true, Stderr: true})
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	if s.Stderr != nil {
		t.Error("a terminal has no standard error of its own")
	}
	var got strings.Builder
	expect := func(want string) {
		t.Helper()
		buf := make([]byte, 256)
		for !strings.Contains(got.String(), want) {
			n, err := s.Stdout.Read(buf)
			got.Write(buf[:n])
			if err != nil {
				t.Fatalf("%q: %v, want %q", got.String(), err, want)
			}
		}
	}
	expect("/dev/pts/0")
	expect("40 100")
	if err := task.Resize(e.ctx(), 132, 50); err != nil {
		t.Fatal(err)
	}
	fmt.Fprint(s.Stdin, "hey\r")
	expect("50 132")
	expect("got hey")
	fmt.Fprint(s.Stdin, "\r")
	if x := e.wait(task); x.Code != 4 {
		t.Errorf("%+v", x)
	}
	if _, err := io.ReadAll(s.Stdout); err != nil {
		t.Error(err)
	}
	if r := e.records(log); len(r) == 0 || r[0].Log != "/dev/pts/0\r\n" {
		t.Errorf("%q", r)
	}
}
