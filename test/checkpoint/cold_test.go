package checkpoint

import (
	"archive/tar"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	mcontainer "github.com/moby/moby/api/types/container"

	"github.com/cloudos-io/cloudos/api"
	"github.com/cloudos-io/cloudos/client"
	"github.com/cloudos-io/cloudos/internal/checkpoint"
)

// TestCold: a container moves with its files, its volumes and its image, and what
// it removed stays removed; nothing of it is left behind but the volumes.
func TestCold(t *testing.T) {
	a, b := start(t, ""), start(t, "")
	a.image()
	a.ok("run", "-d", "--name", "box", "--label", "l=1", "-e", "E=1", "-v", "data:/data", "-v", "/anon", "bb", "sh", "-c",
		"test -e /f || { echo kept > /f; rm /bin/ls; mkdir -p /d/e; ln -s /f /d/e/l; echo v > /data/v; echo w > /anon/w; chown 7:8 /f; chmod 4711 /f; }; sleep 1000")
	a.eventually("it has begun", func() bool { _, code := a.try("exec", "box", "test", "-e", "/anon/w"); return code == 0 })
	time.Sleep(100 * time.Millisecond)
	id := b.mustMatch(a.ok("containers", "migrate", "--cold", "--volumes", "-t", "0", "box", b.Host()))
	for cmd, want := range map[string]string{
		"cat /f /d/e/l /data/v /anon/w":     "kept\nkept\nv\nw",
		"stat -c %a/%u/%g /f":               "4711/7/8",
		"sh -c 'test -e /bin/ls || echo x'": "x",
		"echo $E":                           "1",
	} {
		out, code := b.sh("box", cmd)
		if code != 0 || out != want {
			t.Errorf("%s: exit %d: %q, want %q", cmd, code, out, want)
		}
	}
	if got := b.ok("inspect", "--format", "{{.Id}} {{.Config.Labels.l}} {{.Config.Image}}", "box"); got != id+" 1 bb" {
		t.Errorf("%s", got)
	}
	if s := a.status("box"); s != "" {
		t.Errorf("it is %s here", s)
	}
	if out := a.ok("volumes", "ls", "-q"); !strings.Contains(out, "data") {
		t.Errorf("its volume is gone here: %q", out)
	}
	if l, _ := os.ReadDir(a.Dir + "/root/checkpoints"); len(l) != 0 {
		t.Errorf("%v is left", l)
	}
	if l, _ := os.ReadDir(b.Dir + "/root/checkpoints"); len(l) != 0 {
		t.Errorf("%v is left on the target", l)
	}
	// A stopped one moves as it is.
	b.ok("stop", "-t", "0", "box")
	b.fails("it does not run; --cold", "containers", "migrate", "box", a.Host())
	b.fails("there is a volume data already", "containers", "migrate", "--cold", "--volumes", "box", a.Host())
	if s := b.status("box"); s != "exited" {
		t.Errorf("it is %s", s)
	}
	b.ok("containers", "migrate", "--cold", "--volumes", "--keep-volumes", "--keep", "--name", "again", "box", a.Host())
	if s, k := a.status("again"), b.status("box"); s != "created" || k != "exited" {
		t.Errorf("it is %s here and %s there", s, k)
	}
}

func (e *engine) mustMatch(id string) string {
	e.t.Helper()
	if len(id) != 64 {
		e.t.Fatalf("%q is no id", id)
	}
	return id
}

func (e *engine) sh(name, cmd string) (string, int) {
	return e.try("exec", name, "sh", "-c", cmd)
}

// TestColdFails: whatever fails, the container runs where it was, and the target
// has nothing.
func TestColdFails(t *testing.T) {
	a, b := start(t, ""), start(t, "")
	a.image()
	a.ok("run", "-d", "--name", "box", "--restart", "always", "bb", "sh", "-c", "sleep 1000")
	runs := func(what string) {
		t.Helper()
		a.eventually(what+": it runs where it was", func() bool { return a.status("box") == "running" })
		if out := b.ok("ps", "-aq"); out != "" {
			t.Errorf("%s: the target has %s", what, out)
		}
		a.eventually(what+": nothing is left here", func() bool { l, _ := os.ReadDir(a.Dir + "/root/checkpoints"); return len(l) == 0 })
		b.eventually(what+": nothing is left there", func() bool { l, _ := os.ReadDir(b.Dir + "/root/checkpoints"); return len(l) == 0 })
	}
	a.fails("cannot be pulled; carry it along", "containers", "migrate", "--cold", "--no-image", "-t", "0", "box", b.Host())
	runs("no image")
	a.fails("unix:///nothing", "containers", "migrate", "--cold", "box", "unix:///nothing")
	runs("no target")

	c, err := client.New(client.Config{Host: a.Host()})
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	zero := 0
	broken := errors.New("broken")
	err = c.Checkpoint(ctx, "box", api.CheckpointStart{Cold: true, Timeout: &zero}, nil, func(r io.Reader) error {
		if _, err := io.Copy(io.Discard, r); err != nil {
			return err
		}
		if s := a.status("box"); s != "exited" {
			t.Errorf("it is %s while it is carried", s)
		}
		return broken
	})
	if !errors.Is(err, broken) {
		t.Error(err)
	}
	runs("refused in the end")

	// The engine is killed while the container is stopped for it.
	err = c.Checkpoint(ctx, "box", api.CheckpointStart{Cold: true, Timeout: &zero}, nil, func(r io.Reader) error {
		_, err := io.Copy(io.Discard, r)
		a.Kill()
		return err
	})
	if err == nil {
		t.Error("the engine was killed, and all is well")
	}
	a.Boot()
	runs("engine killed")

	// The command line is interrupted while it waits for the container to stop, and
	// while the target is at it.
	cmd := exec.Command(a.Bin+"/servin", "--host", a.Host(), "containers", "migrate", "--cold", "-t", "3", "box", b.Host())
	var out bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &out
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	time.Sleep(700 * time.Millisecond)
	_ = cmd.Process.Signal(syscall.SIGINT)
	if err := cmd.Wait(); err == nil || !strings.Contains(out.String(), "interrupted; it goes on here") {
		t.Errorf("%v: %s", err, out.String())
	}
	runs("interrupted")
	a.fails("is removed as soon as it stops", "containers", "migrate", "--cold", a.ok("run", "-d", "--rm", "bb", "sleep", "1000"), b.Host())
}

// TestNoCRIU: what to do is said, and the container goes on.
func TestNoCRIU(t *testing.T) {
	dir := t.TempDir()
	for _, p := range []string{"nft", "tar", "mount"} {
		if at, err := exec.LookPath(p); err == nil {
			_ = os.Symlink(at, filepath.Join(dir, p))
		}
	}
	e := start(t, "", "PATH="+dir)
	e.image()
	e.ok("run", "-d", "--name", "box", "bb", "sh", "-c", "sleep 1000")
	for _, args := range [][]string{{"checkpoint", "box", "cp"}, {"checkpoint", "--pre", "box", "cp"}, {"checkpoint", "--export", filepath.Join(dir, "x"), "box"}} {
		e.fails("criu is not installed (Debian: apt-get install criu)", append([]string{"containers"}, args...)...)
		if s := e.status("box"); s != "running" {
			t.Fatalf("%v: it is %s", args, s)
		}
	}
	if _, err := os.Stat(filepath.Join(dir, "x")); err == nil {
		t.Error("half a file is left")
	}
	e.fails("is not running", "containers", "checkpoint", e.ok("create", "bb", "true"), "cp")
	e.fails("No such container", "containers", "checkpoint", "nobody", "cp")
	e.fails("invalid checkpoint name", "containers", "checkpoint", "box", "../x")
	e.fails("does not exist", "containers", "restore", "--name", "n", "box", "cp")
	e.ok("pause", "box")
	e.fails("unpause it first", "containers", "checkpoint", "box", "cp")
	if l, _ := os.ReadDir(e.Dir + "/root/checkpoints"); len(l) != 0 {
		t.Errorf("%v is left", l)
	}
	if l, _ := os.ReadDir(e.Dir + "/run/held"); len(l) != 0 {
		t.Errorf("%v is held", l)
	}
}

// tarOf makes a checkpoint's tar, as somebody else may.
func tarOf(t *testing.T, m *checkpoint.Manifest, parts map[string]string) []byte {
	t.Helper()
	var b bytes.Buffer
	w, err := checkpoint.NewWriter(&b, m)
	if err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"criu/1/inventory.img", checkpoint.LayerName, "volumes/1.tar.zst"} {
		if data, ok := parts[name]; ok {
			if err := w.Put(name, int64(len(data)), strings.NewReader(data)); err != nil {
				t.Fatal(err)
			}
		}
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

func emptyTar(t *testing.T, h ...*tar.Header) string {
	t.Helper()
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	for _, x := range h {
		if err := w.WriteHeader(x); err != nil {
			t.Fatal(err)
		}
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return b.String()
}

// TestForeign: a file from elsewhere gives nobody more than they may do here.
func TestForeign(t *testing.T) {
	dir := t.TempDir()
	rules := filepath.Join(dir, "policy.yaml")
	if err := os.WriteFile(rules, []byte("version: 1\nrules:\n- name: basics\n  privileged: deny\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	e := start(t, "policy: "+rules+"\n")
	e.image()
	var img struct{ ID string }
	if err := json.Unmarshal([]byte(strings.Trim(e.ok("inspect", "--type", "image", "bb"), "[] \n")), &img); err != nil {
		t.Fatal(err)
	}
	m := func(change func(*checkpoint.Manifest)) *checkpoint.Manifest {
		m := &checkpoint.Manifest{Version: 1, Created: time.Now().UTC(), Arch: "amd64", Cold: true, Container: checkpoint.Container{
			ID: strings.Repeat("a", 64), Name: "box", Config: &mcontainer.Config{Image: "bb", Cmd: []string{"sleep", "1000"}}, HostConfig: &mcontainer.HostConfig{},
			Image: checkpoint.Image{ID: img.ID, Ref: "bb"},
		}}
		change(m)
		return m
	}
	layer := map[string]string{checkpoint.LayerName: emptyTar(t)}
	live := map[string]string{checkpoint.LayerName: emptyTar(t), "criu/1/inventory.img": "x"}
	for name, c := range map[string]struct {
		m     *checkpoint.Manifest
		parts map[string]string
		want  string
	}{
		"privileged":    {m(func(m *checkpoint.Manifest) { m.Container.HostConfig.Privileged = true }), layer, "policy"},
		"processes":     {m(func(m *checkpoint.Manifest) { m.Cold, m.Rounds = false, 1 }), live, "takes the right to run privileged containers"},
		"another host":  {m(func(m *checkpoint.Manifest) { m.Cold, m.Rounds, m.Arch = false, 1, "s390x" }), live, "is of s390x"},
		"another image": {m(func(m *checkpoint.Manifest) { m.Container.Image.ID = "sha256:" + strings.Repeat("0", 64) }), layer, "is not here"},
		"later version": {m(func(m *checkpoint.Manifest) { m.Version = 2 }), layer, "is of version 2"},
		"no layer":      {m(func(*checkpoint.Manifest) {}), nil, "lacks layer.tar"},
		"network":       {m(func(m *checkpoint.Manifest) { m.Container.HostConfig.NetworkMode = "nothing" }), layer, "nothing"},
		"outside":       {m(func(*checkpoint.Manifest) {}), map[string]string{checkpoint.LayerName: emptyTar(t, &tar.Header{Name: "../../../../tmp/escaped-checkpoint", Typeflag: tar.TypeDir, Mode: 0o755})}, ""},
		"broken volume": {m(func(m *checkpoint.Manifest) {
			m.Container.HostConfig.Binds = []string{"vol:/v"}
			m.Volumes = []checkpoint.Volume{{Name: "vol", Target: "/v"}}
		}), map[string]string{checkpoint.LayerName: emptyTar(t), "volumes/1.tar.zst": "no archive"}, "cannot restore volume vol"},
		"missing volume": {m(func(m *checkpoint.Manifest) {
			m.Container.HostConfig.Binds = []string{"vol:/v"}
			m.Volumes = []checkpoint.Volume{{Name: "vol", Target: "/v"}}
		}), layer, "lacks volumes/1.tar.zst"},
	} {
		t.Run(name, func(t *testing.T) {
			out, code := e.pipe(bytes.NewReader(tarOf(t, c.m, c.parts)), "containers", "restore", "--import", "-")
			if c.want == "" && code != 0 || c.want != "" && (code == 0 || !strings.Contains(out, c.want)) {
				t.Errorf("exit %d: %s", code, out)
			}
			if c.want != "" {
				if out := e.ok("ps", "-aq") + e.ok("volumes", "ls", "-q"); out != "" {
					t.Errorf("%s is left", out)
				}
			}
			e.try("rm", "-f", "-v", "box")
		})
	}
	if _, err := os.Lstat("/tmp/escaped-checkpoint"); err == nil {
		_ = os.Remove("/tmp/escaped-checkpoint")
		t.Error("a layer has escaped")
	}
	whole := tarOf(t, m(func(*checkpoint.Manifest) {}), layer)
	for _, n := range []int{0, 100, 1024, len(whole) / 2, len(whole) - 1536} {
		e.fail(t, whole[:n])
	}
	for at := 600; at < len(whole)-1024; at += 97 {
		b := bytes.Clone(whole)
		b[at] ^= 0x20
		if out, code := e.pipe(bytes.NewReader(b), "containers", "restore", "--import", "-"); code == 0 {
			// A byte of padding may be anything.
			e.ok("rm", "-f", strings.TrimSpace(out[max(0, len(out)-64):]))
		}
	}
	if l, _ := os.ReadDir(e.Dir + "/root/checkpoints"); len(l) != 0 {
		t.Errorf("%v is left", l)
	}
}

// fail reads what must be refused.
func (e *engine) fail(t *testing.T, b []byte) {
	t.Helper()
	if out, code := e.pipe(bytes.NewReader(b), "containers", "restore", "--import", "-"); code == 0 || !strings.Contains(out, "cannot read the checkpoint") {
		t.Errorf("%d bytes of it: exit %d: %s", len(b), code, out)
	}
}
