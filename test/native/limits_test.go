package native

import (
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/cloudos-io/cloudos/test/harness"
)

// TestDescriptors gives the daemon few descriptors. Requests beyond them fail
// with the reason; what runs goes on, and once some are free so does the rest.
func TestDescriptors(t *testing.T) {
	e := &engine{Daemon: harness.New(t, "sv"), t: t}
	e.Wrap, e.Args = []string{"prlimit", "--nofile=160:160", "--"}, []string{"--pool", "2"}
	t.Cleanup(e.Close)
	e.Boot()
	e.importBusybox()
	e.must("run", "-d", "--name", "first", "bb", "sleep", "100000")
	pid := e.must("inspect", "--format", "{{.State.Pid}}", "first")
	refused := 0
	for i := range 80 {
		r := e.run("run", "-d", "--name", fmt.Sprint("fd", i), "bb", "sleep", "100000")
		if r.code == 0 {
			continue
		}
		if refused++; refused == 1 {
			t.Logf("after %d: %s", i, r.err)
		}
		if !strings.Contains(r.err, "too many open files") {
			t.Errorf("the error does not tell the cause: %s", r)
		}
		if refused == 3 {
			break
		}
	}
	if refused == 0 {
		t.Error("160 descriptors sufficed for 80 containers, so this test says nothing")
	}
	if got := e.must("inspect", "--format", "{{.State.Pid}} {{.State.Running}}", "first"); got != pid+" true" {
		t.Errorf("the first container: %q, want pid %s", got, pid)
	}
	ids := strings.Fields(e.must("ps", "-q", "--filter", "name=fd"))
	if len(ids) == 0 {
		t.Fatal("none was started")
	}
	e.must(append([]string{"rm", "-f"}, ids...)...)
	harness.Eventually(t, "a container again", 20*time.Second, func() bool { return e.run("run", "--rm", "bb", "true").code == 0 })
	if r := e.run("exec", "first", "echo", "alive"); r.out != "alive\n" {
		t.Errorf("exec: %s", r)
	}
	// As many again, but for the descriptors of the sandboxes parked meanwhile:
	// nothing was lost to the failures.
	for i := range len(ids) - 4 {
		name := fmt.Sprint("again", i)
		harness.Eventually(t, "as many containers as before", 20*time.Second, func() bool { // clearing away takes some for a moment
			ok := e.run("run", "-d", "--name", name, "bb", "sleep", "100000").code == 0
			if !ok {
				e.must("rm", "-f", name)
			}
			return ok
		})
	}
}

// TestMomentaryShortage takes every free descriptor from the daemon while containers are
// removed, and gives them back: what was asked for before that goes through, late, and
// nothing is left of it.
func TestMomentaryShortage(t *testing.T) {
	e := start(t, "--pool", "2")
	const n = 8
	var ids []string
	clients := make([]*http.Client, n)
	for i := range n {
		ids = append(ids, e.must("run", "-d", "-p", "80", "-v", fmt.Sprintf("vol%d:/v", i), "-v", "/anon", "bb", "sleep", "100000"))
		clients[i] = &http.Client{Transport: &http.Transport{DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			return (&net.Dialer{}).DialContext(ctx, "unix", e.Sock())
		}}}
		defer clients[i].CloseIdleConnections()
		// A request needs a descriptor, too: this connection is there already.
		resp, err := clients[i].Get("http://d/_ping")
		if err != nil {
			t.Fatal(err)
		}
		_, _ = io.Copy(io.Discard, resp.Body)
		resp.Body.Close()
	}
	limit := func(n uint64) {
		t.Helper()
		if err := unix.Prlimit(e.Cmd.Process.Pid, unix.RLIMIT_NOFILE, &unix.Rlimit{Cur: n, Max: 4096}, nil); err != nil {
			t.Fatal(err)
		}
	}
	limit(8) // below what is open: none more
	answers := make(chan string, n)
	for i, c := range clients {
		go func() {
			req, _ := http.NewRequest("DELETE", "http://d/containers/"+ids[i]+"?force=1&v=1", nil)
			resp, err := c.Do(req)
			if err != nil {
				answers <- err.Error()
				return
			}
			b, _ := io.ReadAll(resp.Body)
			resp.Body.Close()
			answers <- strings.TrimSpace(resp.Status + " " + string(b))
		}()
	}
	select {
	case a := <-answers:
		t.Errorf("a removal without descriptors did not wait: %s", a)
		answers <- a
	case <-time.After(2 * time.Second):
	}
	limit(4096)
	for range n {
		if a := <-answers; a != "204 No Content" {
			t.Errorf("a removal: %s", a)
		}
	}
	if left := e.must("ps", "-aq"); left != "" {
		t.Errorf("left: %s", left)
	}
	if vols := strings.Fields(e.must("volumes", "list", "-q")); len(vols) != n {
		t.Errorf("volumes: %v, want the %d named ones", vols, n)
	}
	// What goes on without (the pool, accepting) or tries again (collecting, trash) says so; the rest is done.
	for line := range strings.Lines(e.Log()) {
		if strings.Contains(line, "too many open files") && !strings.Contains(line, "cannot park") && !strings.Contains(line, "will try again") && !strings.Contains(line, "cannot collect") && !strings.Contains(line, "Accept error") {
			t.Errorf("something was given up: %s", line)
		}
	}
}

// TestReadOnlyRoot makes the directory of what is kept read-only under the
// daemon. Requests that must write fail with the reason, what runs goes on, and
// all is well once it can be written again.
func TestReadOnlyRoot(t *testing.T) {
	e := start(t)
	e.must("create", "--name", "before", "bb", "true")
	e.must("run", "-d", "--name", "steady", "bb", "sleep", "100000")
	pid := e.must("inspect", "--format", "{{.State.Pid}}", "steady")
	h := startRegistry(t)
	ref, _ := h.push(t, "x:1", 1<<20, 1)
	root := e.Dir + "/root"
	// Another mount of it over it: files that are open stay writable, as those of
	// a file system never are once it is read-only; what is opened anew is not.
	if err := syscall.Mount(root, root, "", syscall.MS_BIND, ""); err != nil {
		t.Fatal(err)
	}
	mounted := true
	undo := func() {
		if mounted {
			mounted = false
			if err := syscall.Unmount(root, syscall.MNT_DETACH); err != nil {
				t.Error(err)
			}
		}
	}
	t.Cleanup(undo)
	if err := syscall.Mount("", root, "", syscall.MS_REMOUNT|syscall.MS_BIND|syscall.MS_RDONLY, ""); err != nil {
		t.Fatal(err)
	}
	for _, args := range [][]string{{"create", "--name", "no", "bb", "true"}, {"volumes", "create", "no"}, {"networks", "create", "no"}, {"pull", ref}, {"run", "--name", "no2", "bb", "true"}} {
		r := e.run(args...)
		if r.code == 0 {
			t.Logf("%s went through on what was open", strings.Join(args, " "))
		} else if !strings.Contains(strings.ToLower(r.err), "read-only file system") {
			t.Errorf("%s: the error does not tell the cause: %s", strings.Join(args, " "), r)
		}
	}
	if r := e.run("exec", "steady", "echo", "alive"); r.out != "alive\n" {
		t.Errorf("exec: %s", r)
	}
	// A daemon that starts now says why it cannot.
	e.Kill()
	if out := e.refuse(); !strings.Contains(strings.ToLower(out), "read-only file system") {
		t.Errorf("start on a read-only root: %s", out)
	}
	if _, err := os.Stat("/proc/" + pid); err != nil {
		t.Error("the running container ended")
	}
	undo()
	e.Boot()
	if got := e.must("inspect", "--format", "{{.State.Pid}} {{.State.Running}}", "steady"); got != pid+" true" {
		t.Errorf("afterwards: %q, want pid %s", got, pid)
	}
	if got := e.must("inspect", "--format", "{{.State.Status}}", "before"); got != "created" {
		t.Errorf("acknowledged before, now %q", got)
	}
	e.must("pull", ref)
	e.must("run", "--name", "yes", "-v", "vol:/v", "bb", "true")
	e.must("rm", "before")
}

// TestCorruptBlob changes and cuts what the engine stored of an image. Whatever
// hands it out says so; a fresh pull mends it.
func TestCorruptBlob(t *testing.T) {
	e := start(t)
	h := startRegistry(t)
	for _, how := range []string{"changed", "missing", "cut"}[:pick(2, 3)] {
		t.Run(how, func(t *testing.T) {
			ref, img := h.push(t, how+":1", 1<<20, 2)
			e.must("pull", ref)
			ls, err := img.Layers()
			if err != nil {
				t.Fatal(err)
			}
			d, err := ls[0].Digest()
			if err != nil {
				t.Fatal(err)
			}
			path := e.Dir + "/root/images/content/blobs/sha256/" + d.Hex
			data, err := os.ReadFile(path)
			if err != nil {
				t.Fatal(err)
			}
			switch how {
			case "changed":
				data[len(data)/2] ^= 1
				err = os.WriteFile(path, data, 0o444)
			case "cut":
				err = os.Truncate(path, int64(len(data)/2))
			case "missing":
				err = os.Remove(path)
			}
			if err != nil {
				t.Fatal(err)
			}
			r := e.run("save", "-o", e.Dir+"/out.tar", ref)
			if r.code == 0 {
				t.Errorf("saved: %s", r)
			}
			t.Logf("save: %s", strings.TrimSpace(r.err))
			if fi, err := os.Stat(e.Dir + "/out.tar"); err == nil {
				t.Errorf("half an archive of %d bytes is there", fi.Size())
			}
			to := h.addr + "/copy-" + how + ":1"
			e.must("tag", ref, to)
			h2 := startRegistry(t) // has no layer of it
			far := h2.addr + "/copy:1"
			e.must("tag", ref, far)
			r = e.run("push", far)
			if r.code == 0 {
				t.Errorf("pushed: %s", r)
			}
			t.Logf("push: %s", strings.TrimSpace(r.err))
			e.must("rmi", "-f", ref, to, far)
			e.must("pull", ref)
			e.must("save", "-o", e.Dir+"/out.tar", ref)
			_ = os.Remove(e.Dir + "/out.tar")
		})
	}
}
