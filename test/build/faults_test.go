package build

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"context"
	"fmt"
	"io"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/cloudos-io/cloudos/test/harness"
)

// sleeper is a context whose build sleeps for a time that no other test uses.
func (e *engine) sleeper(seconds int) (ctx, prefix string) {
	ctx = e.context(map[string]string{"Dockerfile": fmt.Sprintf("FROM bb\nRUN sleep %d\n", seconds)})
	return ctx, fmt.Sprintf("sleep %d", seconds)
}

// background starts a program against the engine and waits for a step.
func (e *engine) background(prefix string, env []string, argv ...string) (*exec.Cmd, *bytes.Buffer) {
	e.t.Helper()
	cmd := exec.Command(argv[0], argv[1:]...)
	var out bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &out
	cmd.Env = append(append(os.Environ(), "DOCKER_HOST=unix://"+e.Sock(), "SERVIN_HOST=unix://"+e.Sock()), env...)
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	if err := cmd.Start(); err != nil {
		e.t.Fatal(err)
	}
	harness.Eventually(e.t, "the step runs", 30*time.Second, func() bool { return step(prefix) != 0 })
	return cmd, &out
}

func (e *engine) ended(prefix string) {
	e.t.Helper()
	harness.Eventually(e.t, "the step ends", 20*time.Second, func() bool { return step(prefix) == 0 })
}

// TestClientLeaves ends a build with its client, whichever that is.
func TestClientLeaves(t *testing.T) {
	e := start(t, "")
	ctx, prefix := e.sleeper(7001)
	for name, c := range map[string]struct {
		env  []string
		argv []string
	}{
		"servin":  {nil, []string{filepath.Join(e.Bin, "servin"), "build", ctx}},
		"classic": {[]string{"DOCKER_BUILDKIT=0"}, []string{"docker", "build", ctx}},
	} {
		cmd, _ := e.background(prefix, c.env, c.argv...)
		_ = syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL)
		_ = cmd.Wait()
		e.ended(prefix)
		if e.builder() == 0 {
			t.Errorf("%s: the builder ended with its client", name)
		}
	}
	// By name.
	var body bytes.Buffer
	writeTar(&body, map[string]string{"Dockerfile": "FROM bb\nRUN sleep 7001\n"})
	done := make(chan string, 1)
	go func() {
		resp, err := e.HTTP().Post("http://engine/build?buildid=mine", "application/x-tar", &body)
		if err != nil {
			done <- err.Error()
			return
		}
		defer resp.Body.Close()
		b, _ := io.ReadAll(resp.Body)
		done <- string(b)
	}()
	harness.Eventually(t, "the step runs", 30*time.Second, func() bool { return step(prefix) != 0 })
	if resp, err := e.HTTP().Post("http://engine/build/cancel?id=mine", "", nil); err != nil || resp.StatusCode != 200 {
		t.Errorf("cancel: %v %v", resp, err)
	}
	contains(t, <-done, "cancel")
	e.ended(prefix)
}

// TestBuilderKilled kills servin-buildd in the middle of a step: the client is
// told, nothing is left, and the next build works with the cache of before.
func TestBuilderKilled(t *testing.T) {
	e := start(t, "")
	warm := e.context(map[string]string{"Dockerfile": "FROM bb\nRUN cat /proc/sys/kernel/random/uuid > /id\n"})
	e.must("build", "-t", "warm", warm)
	before := e.must("run", "--rm", "warm", "cat", "/id")
	ctx, prefix := e.sleeper(7002)
	cmd, out := e.background(prefix, nil, filepath.Join(e.Bin, "servin"), "build", ctx)
	if err := syscall.Kill(e.builder(), syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	if err := cmd.Wait(); err == nil {
		t.Errorf("the client says it went well: %s", out)
	}
	e.ended(prefix)
	harness.Eventually(t, "cgroups go", 10*time.Second, func() bool { return len(e.groups()) == 0 })
	e.must("build", "-t", "warm", warm)
	if after := e.must("run", "--rm", "warm", "cat", "/id"); after != before {
		t.Error("the cache did not outlive the builder")
	}
	harness.Eventually(t, "networks of the dead step go", 10*time.Second, func() bool {
		return !strings.Contains(e.must("networks", "inspect", "bridge"), "build-")
	})
}

// TestEngineKilled kills servind in the middle of a step: the builder goes with
// it, and the next engine cleans up.
func TestEngineKilled(t *testing.T) {
	e := start(t, "")
	ctx, prefix := e.sleeper(7003)
	cmd, out := e.background(prefix, nil, filepath.Join(e.Bin, "servin"), "build", ctx)
	builder := e.builder()
	e.Kill()
	if err := cmd.Wait(); err == nil {
		t.Errorf("the client says it went well: %s", out)
	}
	e.ended(prefix)
	harness.Eventually(t, "the builder goes", 10*time.Second, func() bool {
		b, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", builder))
		return err != nil || strings.Contains(string(b), ") Z ")
	})
	e.Boot()
	harness.Eventually(t, "cgroups go", 10*time.Second, func() bool { return len(e.groups()) == 0 })
	e.must("build", "-t", "after", e.context(map[string]string{"Dockerfile": "FROM bb\nRUN true\n"}))
}

// TestTornMachine starts an engine after the machine, not the engine, stopped
// during a build: the cache is not trusted.
func TestTornMachine(t *testing.T) {
	e := start(t, "")
	ctx := e.context(map[string]string{"Dockerfile": "FROM bb\nRUN cat /proc/sys/kernel/random/uuid > /id\n"})
	e.must("build", "-t", "torn", ctx)
	before := e.must("run", "--rm", "torn", "cat", "/id")
	e.Kill()
	if err := os.WriteFile(filepath.Join(e.Dir, "root/build/boot"), []byte("another boot\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	e.Boot()
	if got := e.must("run", "--rm", "torn", "cat", "/id"); got != before {
		t.Errorf("the image holds %q", got)
	}
	e.must("build", "-t", "torn", ctx)
	if after := e.must("run", "--rm", "torn", "cat", "/id"); after == before {
		t.Error("the cache of another boot was used")
	}
}

func writeTar(w io.Writer, files map[string]string) {
	tw := tar.NewWriter(w)
	for name, body := range files {
		_ = tw.WriteHeader(&tar.Header{Name: name, Mode: 0o644, Size: int64(len(body))})
		_, _ = tw.Write([]byte(body))
	}
	_ = tw.Close()
}

// TestHostileContext posts contexts that try to get out, or to be too much.
func TestHostileContext(t *testing.T) {
	e := start(t, "")
	outside := filepath.Join(e.Dir, "outside")
	if err := os.WriteFile(outside, []byte("secret"), 0o644); err != nil {
		t.Fatal(err)
	}
	dockerfile := func(body string) tar.Header {
		return tar.Header{Name: "Dockerfile", Mode: 0o644, Size: int64(len(body)), PAXRecords: map[string]string{"SERVIN.body": body}}
	}
	make := func(hs ...tar.Header) []byte {
		var b bytes.Buffer
		w := tar.NewWriter(&b)
		for _, h := range hs {
			body := h.PAXRecords["SERVIN.body"]
			h.PAXRecords = nil
			if err := w.WriteHeader(&h); err != nil {
				t.Fatal(err)
			}
			_, _ = io.WriteString(w, body)
		}
		_ = w.Close()
		return b.Bytes()
	}
	post := func(body io.Reader) (int, string) {
		req, _ := http.NewRequestWithContext(context.Background(), http.MethodPost, "http://engine/build?t=hostile", body)
		resp, err := e.HTTP().Do(req)
		if err != nil {
			return 0, err.Error()
		}
		defer resp.Body.Close()
		b, _ := io.ReadAll(resp.Body)
		return resp.StatusCode, string(b)
	}
	good := dockerfile("FROM bb\n")
	for name, hs := range map[string][]tar.Header{
		"parent":           {good, {Name: "../up", Mode: 0o644}},
		"deep parent":      {good, {Name: "a/../../up", Mode: 0o644}},
		"device":           {good, {Name: "dev", Typeflag: tar.TypeBlock, Devmajor: 254, Devminor: 0, Mode: 0o666}},
		"below a link":     {good, {Name: "l", Typeflag: tar.TypeSymlink, Linkname: "/etc"}, {Name: "l/passwd", Mode: 0o644}},
		"hard link out":    {good, {Name: "h", Typeflag: tar.TypeLink, Linkname: "../../etc/passwd"}},
		"hard link to dir": {good, {Name: "d/", Typeflag: tar.TypeDir}, {Name: "h", Typeflag: tar.TypeLink, Linkname: "d"}},
		"no Dockerfile":    {{Name: "other", Mode: 0o644}},
	} {
		if code, text := post(bytes.NewReader(make(hs...))); code != 400 {
			t.Errorf("%s: %d %s", name, code, text)
		}
	}
	// A file that claims more than the disk has, sparse or not.
	var huge bytes.Buffer
	w := tar.NewWriter(&huge)
	_ = w.WriteHeader(&tar.Header{Name: "huge", Mode: 0o644, Size: 1 << 50})
	if code, text := post(bytes.NewReader(huge.Bytes())); code != 400 || !strings.Contains(text, "no space left") {
		t.Errorf("a huge file: %d %s", code, text)
	}
	for name, b := range map[string][]byte{"nonsense": []byte("this is no tar"), "cut short": make(good)[:515], "bad gzip": {0x1f, 0x8b, 8, 0, 1, 2}, "empty": nil} {
		if code, text := post(bytes.NewReader(b)); code != 400 {
			t.Errorf("%s: %d %s", name, code, text)
		}
	}
	// Links that point out are no way out: they are links in the image, too.
	code, text := post(bytes.NewReader(make(dockerfile("FROM bb\nCOPY . /ctx/\nRUN cat /ctx/l; ls -l /ctx/l; echo done\n"),
		tar.Header{Name: "l", Typeflag: tar.TypeSymlink, Linkname: outside})))
	if code != 200 || strings.Contains(text, "secret") || !strings.Contains(text, "Successfully built") {
		t.Errorf("a link out: %d %s", code, text)
	}
	code, text = post(bytes.NewReader(make(dockerfile("FROM bb\nCOPY l /f\n"), tar.Header{Name: "l", Typeflag: tar.TypeSymlink, Linkname: "../../../../../../../.." + outside})))
	if code == 200 && strings.Contains(text, "Successfully built") {
		if got := e.servin("run", "--rm", "hostile", "cat", "/f"); strings.Contains(got.out, "secret") {
			t.Errorf("COPY followed a link out of the context: %s", got)
		}
	}
	// Wrong options are named.
	for _, q := range []string{"version=3", "t=UPPER", "buildargs={", "networkmode=nosuch", "platform=a/b/c/d/e", "memory=x", "squash=1", "ulimits=[", "outputs=[{\"Type\":\"local\"}]"} {
		resp, err := e.HTTP().Post("http://engine/build?"+q, "application/x-tar", bytes.NewReader(make(good)))
		if err != nil || resp.StatusCode != 400 {
			t.Errorf("%s: %v %v", q, resp, err)
		}
	}
	// Upgrades that are none.
	for _, p := range []string{"/grpc", "/session"} {
		resp, err := e.HTTP().Post("http://engine"+p, "", nil)
		if err != nil || resp.StatusCode != 400 {
			t.Errorf("%s without an upgrade: %v %v", p, resp, err)
		}
	}
	// A Dockerfile's steps see neither the host nor the builder.
	r := e.classic(e.context(map[string]string{"Dockerfile": `FROM bb
RUN ls -d ` + e.Dir + ` 2>&1; cat /proc/1/comm; mount -t tmpfs x /mnt 2>&1; mknod /dev/sdx b 8 0 2>&1 && cat /dev/sdx; echo 1 > /proc/sys/kernel/panic; true
`}))
	if r.code != 0 || strings.Contains(r.out, e.Dir+"\n") && !strings.Contains(r.out, "No such file") {
		t.Errorf("what a step sees: %s", r)
	}
	contains(t, r.out, "ermitted", "Read-only file system")
}

// TestBomb sends a small stream that unpacks to more than there is room for, on a
// small disk.
func TestBomb(t *testing.T) {
	dir := t.TempDir()
	if err := syscall.Mount("tmpfs", dir, "tmpfs", 0, "size=640m"); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = syscall.Unmount(dir, syscall.MNT_DETACH) })
	t.Setenv("TMPDIR", dir)
	e := start(t, "")
	pr, pw := io.Pipe()
	go func() {
		z, _ := gzip.NewWriterLevel(pw, gzip.BestSpeed)
		w := tar.NewWriter(z)
		zeros := make([]byte, 1<<20)
		for i := range 1024 {
			if w.WriteHeader(&tar.Header{Name: fmt.Sprint("f", i), Mode: 0o644, Size: int64(len(zeros))}) != nil {
				break
			}
			if _, err := w.Write(zeros); err != nil {
				break
			}
		}
		_ = w.Close()
		_ = z.Close()
		_ = pw.Close()
	}()
	resp, err := e.HTTP().Post("http://engine/build", "application/x-tar", pr)
	if err != nil {
		t.Fatal(err)
	}
	b, _ := io.ReadAll(resp.Body)
	resp.Body.Close()
	_ = pr.Close()
	if resp.StatusCode != 400 || !strings.Contains(string(b), "disk") {
		t.Errorf("%d %s", resp.StatusCode, b)
	}
	// A step that fills the disk fails; the engine and the next build do not.
	full := e.servin("build", e.context(map[string]string{"Dockerfile": "FROM bb\nRUN dd if=/dev/zero of=/big bs=1M\n"}))
	if full.code == 0 || !strings.Contains(full.all(), "No space left") {
		t.Errorf("a step on a full disk: %s", full)
	}
	harness.Eventually(t, "a build works again", 30*time.Second, func() bool {
		return e.exec(strings.NewReader("FROM bb\nRUN echo fits\n"), nil, filepath.Join(e.Bin, "servin"), "build", "-t", "fine", "-").code == 0
	})
	e.must("run", "--rm", "fine", "true")
}
