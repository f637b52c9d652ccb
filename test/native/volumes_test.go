package native

import (
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"filippo.io/age"

	"github.com/cloudos-io/cloudos/test/harness"
)

// volumePlugin serves Docker's volume plugin protocol, with directories as volumes.
type volumePlugin struct {
	t    *testing.T
	root string
	srv  *http.Server
	sock string

	mu     sync.Mutex
	vols   map[string]map[string]string // name to options
	mounts map[string]map[string]bool   // name to ids
	log    []string
	// answer, if set, replaces the answer to a method.
	answer func(method string) (string, bool)
}

func startPlugin(t *testing.T, dir, name string) *volumePlugin {
	t.Helper()
	p := &volumePlugin{t: t, root: t.TempDir(), sock: filepath.Join(dir, name+".sock"), vols: map[string]map[string]string{}, mounts: map[string]map[string]bool{}}
	if err := os.MkdirAll(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	l, err := net.Listen("unix", p.sock)
	if err != nil {
		t.Fatal(err)
	}
	p.srv = &http.Server{Handler: p}
	go func() { _ = p.srv.Serve(l) }()
	t.Cleanup(func() { p.srv.Close() })
	return p
}

func (p *volumePlugin) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	var in struct {
		Name, ID string
		Opts     map[string]string
	}
	b, _ := io.ReadAll(r.Body)
	_ = json.Unmarshal(b, &in)
	method := strings.TrimPrefix(r.URL.Path, "/")
	p.mu.Lock()
	defer p.mu.Unlock()
	p.log = append(p.log, strings.TrimPrefix(method, "VolumeDriver.")+" "+in.Name)
	if p.answer != nil {
		if a, ok := p.answer(method); ok {
			_, _ = io.WriteString(w, a)
			return
		}
	}
	say := func(v any) { _ = json.NewEncoder(w).Encode(v) }
	fail := func(s string) {
		w.WriteHeader(http.StatusInternalServerError)
		say(map[string]string{"Err": s})
	}
	_, known := p.vols[in.Name]
	at := filepath.Join(p.root, in.Name)
	switch method {
	case "Plugin.Activate":
		say(map[string][]string{"Implements": {"VolumeDriver"}})
	case "VolumeDriver.Capabilities":
		say(map[string]any{"Capabilities": map[string]string{"Scope": "global"}})
	case "VolumeDriver.Create":
		if in.Opts["fail"] != "" {
			fail(in.Opts["fail"])
			return
		}
		p.vols[in.Name] = in.Opts
		_ = os.MkdirAll(at, 0o755)
		say(struct{}{})
	case "VolumeDriver.List":
		var l []any
		for n := range p.vols {
			l = append(l, map[string]string{"Name": n, "Mountpoint": filepath.Join(p.root, n)})
		}
		say(map[string]any{"Volumes": l})
	case "VolumeDriver.Get":
		if !known {
			fail("no such volume")
			return
		}
		say(map[string]any{"Volume": map[string]any{"Name": in.Name, "Mountpoint": at, "Status": map[string]any{"color": "blue"}}})
	case "VolumeDriver.Mount":
		if !known {
			fail("no such volume")
			return
		}
		if p.mounts[in.Name] == nil {
			p.mounts[in.Name] = map[string]bool{}
		}
		p.mounts[in.Name][in.ID] = true
		say(map[string]string{"Mountpoint": at})
	case "VolumeDriver.Unmount":
		delete(p.mounts[in.Name], in.ID)
		say(struct{}{})
	case "VolumeDriver.Path":
		say(map[string]string{"Mountpoint": at})
	case "VolumeDriver.Remove":
		delete(p.vols, in.Name)
		_ = os.RemoveAll(at)
		say(struct{}{})
	default:
		http.NotFound(w, r)
	}
}

func (p *volumePlugin) mounted(name string) int {
	p.mu.Lock()
	defer p.mu.Unlock()
	return len(p.mounts[name])
}

func TestVolumePlugin(t *testing.T) {
	e := start(t)
	p := startPlugin(t, e.Dir+"/run/plugins", "fake")
	if out := e.must("info", "--format", "{{json .Plugins.Volume}}"); out != `["local","fake"]` {
		t.Errorf("info shows volume drivers %s", out)
	}
	e.must("volumes", "create", "-d", "fake", "-o", "a=b", "--label", "l=1", "pv")
	if got := p.vols["pv"]["a"]; got != "b" {
		t.Errorf("the plugin got option a=%q", got)
	}
	if out := e.must("volumes", "inspect", "pv", "--format", "{{.Driver}} {{.Scope}} {{.Mountpoint}} {{.Status.color}} {{.Labels.l}}"); out != "fake global "+p.root+"/pv blue 1" {
		t.Errorf("inspect: %s", out)
	}
	if r := e.run("volumes", "create", "-d", "fake", "-o", "fail=no room\x1b[31m", "x1"); r.code == 0 || !strings.Contains(r.err, "no room") || strings.Contains(r.err, "\x1b") {
		t.Errorf("a refusal: %s", r)
	}
	if r := e.run("volumes", "create", "-d", "nobody", "x2"); r.code == 0 || !strings.Contains(r.err, `plugin "nobody" not found`) {
		t.Errorf("no such plugin: %s", r)
	}
	if r := e.run("volumes", "create", "-d", "local", "pv"); r.code == 0 || !strings.Contains(r.err, "conflict") {
		t.Errorf("another driver's name: %s", r)
	}
	// New content of the image goes into a new volume, as into our own.
	e.must("run", "--rm", "-v", "pv:/etc", "bb", "true")
	if _, err := os.Stat(p.root + "/pv/passwd"); err != nil {
		t.Errorf("the volume was not filled from the image: %v", err)
	}
	harness.Eventually(t, "the use has ended", 5*time.Second, func() bool { return p.mounted("pv") == 0 })

	// One that only the plugin knows.
	p.mu.Lock()
	p.vols["theirs"] = nil
	p.mu.Unlock()
	if err := os.MkdirAll(p.root+"/theirs", 0o755); err != nil {
		t.Fatal(err)
	}
	if out := e.must("volumes", "ls", "-q"); !strings.Contains(out, "theirs") {
		t.Errorf("ls: %s", out)
	}
	e.must("run", "-d", "--name", "box", "-v", "theirs:/d", "bb", "sleep", "1000")
	e.must("exec", "box", "sh", "-c", "echo hi > /d/f")
	if b, err := os.ReadFile(p.root + "/theirs/f"); err != nil || string(b) != "hi\n" {
		t.Errorf("what the container wrote: %q %v", b, err)
	}
	if r := e.run("volumes", "rm", "theirs"); r.code == 0 || !strings.Contains(r.err, "in use") {
		t.Errorf("removal of one in use: %s", r)
	}

	// The engine is killed; the container goes on and its use with it.
	e.Kill()
	e.Boot()
	if p.mounted("theirs") != 1 {
		t.Errorf("%d uses after a restart", p.mounted("theirs"))
	}
	// Killed again, and the container ends meanwhile: its use ends with the next.
	pid := e.must("inspect", "box", "--format", "{{.State.Pid}}")
	e.Kill()
	if out, err := exec.Command("kill", "-9", pid).CombinedOutput(); err != nil {
		t.Fatalf("kill: %v: %s", err, out)
	}
	e.Boot()
	harness.Eventually(t, "the use of a container that ended unseen is ended", 5*time.Second, func() bool { return p.mounted("theirs") == 0 })
	e.must("rm", "box")
	e.must("volumes", "rm", "theirs", "pv")
	if len(p.vols) != 0 {
		t.Errorf("the plugin still has %v", p.vols)
	}
}

func TestHostilePlugin(t *testing.T) {
	e := start(t)
	p := startPlugin(t, e.Dir+"/run/plugins", "evil")
	e.must("volumes", "create", "-d", "evil", "v1")
	for what, answer := range map[string]string{
		"root": `{"Mountpoint":"/"}`, "etc": `{"Mountpoint":"/etc"}`, "relative": `{"Mountpoint":"a/b"}`, "dots": `{"Mountpoint":"/tmp/../etc"}`,
		"proc": `{"Mountpoint":"/proc/self/root"}`, "nothing": `{}`, "missing": `{"Mountpoint":"/no/such/place"}`, "not json": `hello`,
		"huge": `{"Mountpoint":"` + strings.Repeat("a", 8<<20) + `"}`, "wrong type": `{"Mountpoint":17}`,
	} {
		p.mu.Lock()
		p.answer = func(m string) (string, bool) {
			return answer, m == "VolumeDriver.Mount" || m == "VolumeDriver.Path"
		}
		p.mu.Unlock()
		if r := e.run("run", "--rm", "-v", "v1:/d", "bb", "cat", "/d/passwd"); r.code == 0 || len(r.err) > 4096 {
			t.Errorf("%s: %.2000s", what, r)
		}
	}
	p.mu.Lock()
	p.answer = func(m string) (string, bool) {
		var l []string
		for i := range 20000 {
			l = append(l, fmt.Sprintf(`{"Name":"v%d"}`, i))
		}
		return `{"Volumes":[null,{"Name":"../x"},{"Name":"a\u001b[0m"},` + strings.Join(l, ",") + `]}`, m == "VolumeDriver.List"
	}
	p.mu.Unlock()
	r := e.run("volumes", "ls", "-q")
	if n := strings.Count(r.out, "\n"); r.code != 0 || n > 10001 || strings.Contains(r.out, "..") || strings.Contains(r.out, "\x1b") {
		t.Errorf("a long list: %d lines, exit %d", n, r.code)
	}
	// A socket of somebody else's is no plugin.
	q := startPlugin(t, e.Dir+"/run/plugins", "theirs")
	if err := os.Chown(q.sock, 12345, 12345); err != nil {
		t.Fatal(err)
	}
	if r := e.run("volumes", "create", "-d", "theirs", "v2"); r.code == 0 {
		t.Error("a plugin of an ordinary user was believed")
	}
	// One that is gone: the volume can still be forgotten.
	p.srv.Close()
	os.Remove(p.sock)
	if r := e.run("volumes", "rm", "v1"); r.code == 0 {
		t.Error("removed without its plugin")
	}
	e.must("volumes", "rm", "-f", "v1")
}

// volumeDigest describes what a volume holds.
func (e *engine) volumeDigest(name string) string {
	e.t.Helper()
	return e.must("run", "--rm", "-v", name+":/v", "bb", "sh", "-c",
		`cd /v && find . | sort | while read f; do stat -c '%n %F %a %u:%g %h %Y' "$f"; [ -f "$f" ] && md5sum < "$f"; [ -L "$f" ] && readlink "$f"; done; true`)
}

func (e *engine) fillVolume(name string) {
	e.t.Helper()
	e.must("run", "--rm", "-v", name+":/v", "bb", "sh", "-c", `cd /v && mkdir -p a/b && echo one > a/f && ln a/f a/g && ln -s ../../etc/passwd a/l && mkfifo p &&
		chown 1000:2000 a && chmod 2750 a && dd if=/dev/urandom of=big bs=1M count=3 2>/dev/null && dd if=/dev/zero of=sparse bs=1 count=1 seek=33554432 2>/dev/null &&
		printf 'x%.0s' $(seq 1 700) > odd && : > empty && touch -d '2001-02-03 04:05:06' a/f . && chmod 1777 .`)
}

func TestVolumeArchives(t *testing.T) {
	e := start(t)
	e.must("volumes", "create", "--label", "keep=yes", "src")
	e.fillVolume("src")
	want := e.volumeDigest("src")

	file := e.Dir + "/b.tar.zst"
	e.must("volumes", "backup", "-o", file, "src")
	// Other tools read it.
	if out, err := exec.Command("sh", "-c", "tar --help >/dev/null && zstd -q -t "+file+" && zstd -dc "+file+" | tar -tf - | grep -c '^data/'").CombinedOutput(); err == nil && strings.TrimSpace(string(out)) == "0" {
		t.Errorf("tar lists no data: %s", out)
	}
	e.must("volumes", "restore", "-i", file, "dst")
	if got := e.volumeDigest("dst"); got != want {
		t.Errorf("restored:\n%s\nwant:\n%s", got, want)
	}
	if out := e.must("volumes", "inspect", "dst", "--format", "{{.Labels.keep}}"); out != "yes" {
		t.Errorf("labels: %s", out)
	}
	if blocks := e.must("run", "--rm", "-v", "dst:/v", "bb", "du", "-k", "/v/sparse"); !strings.HasPrefix(blocks, "0\t") && !strings.HasPrefix(blocks, "4\t") {
		t.Errorf("the holes were filled: %s", blocks)
	}

	// Clone, export, import.
	e.must("volumes", "clone", "src", "twin")
	if got := e.volumeDigest("twin"); got != want {
		t.Errorf("cloned:\n%s\nwant:\n%s", got, want)
	}
	e.must("volumes", "export", "-o", e.Dir+"/x.tar", "src")
	e.must("volumes", "import", "imp", e.Dir+"/x.tar")
	// What has no end replaces nothing: whoever made it failed.
	tarred, err := os.ReadFile(e.Dir + "/x.tar")
	if err != nil {
		t.Fatal(err)
	}
	for _, n := range []int{0, 512} {
		if r := e.pipe(bytes.NewReader(tarred[:n]), "volumes", "import", "--replace", "imp", "-"); r.code == 0 {
			t.Errorf("%d bytes of an archive were taken for it: %s", n, r)
		}
	}
	strip := func(s string) string { _, s, _ = strings.Cut(s, "\n"); return s } // a tar does not hold the top
	if got := e.volumeDigest("imp"); strip(got) != strip(want) {
		t.Errorf("imported:\n%s\nwant:\n%s", got, want)
	}

	// What is there is not replaced unasked, nor while somebody uses it.
	if r := e.run("volumes", "restore", "-i", file, "dst"); r.code == 0 || !strings.Contains(r.err, "holds data already") {
		t.Errorf("unasked: %s", r)
	}
	e.must("run", "-d", "--name", "user", "-v", "dst:/v", "bb", "sleep", "1000")
	if r := e.run("volumes", "restore", "--replace", "-i", file, "dst"); r.code == 0 || !strings.Contains(r.err, "running container") {
		t.Errorf("in use: %s", r)
	}
	e.must("rm", "-f", "user")
	e.must("run", "--rm", "-v", "dst:/v", "bb", "sh", "-c", "rm -rf /v/a && echo other > /v/other")
	changed := e.volumeDigest("dst")

	// Damaged in any way: refused, and the volume is what it was.
	good, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	bad := map[string][]byte{"empty": {}, "text": []byte("hello"), "a tar": nil}
	bad["a tar"], _ = os.ReadFile(e.Dir + "/x.tar")
	for _, n := range []int{4, 100, len(good) / 3, len(good) - 5, len(good) - 1} {
		bad[fmt.Sprint("cut at ", n)] = good[:n]
	}
	for _, n := range []int{40, len(good) / 2, len(good) - 30} {
		b := bytes.Clone(good)
		b[n] ^= 1
		bad[fmt.Sprint("flipped at ", n)] = b
	}
	bad["trailing"] = append(bytes.Clone(good), good...)
	for what, b := range bad {
		if r := e.pipe(bytes.NewReader(b), "volumes", "restore", "--replace", "dst"); r.code == 0 {
			t.Errorf("%s: restored", what)
		}
		if r := e.pipe(bytes.NewReader(b), "volumes", "restore", "fresh"); r.code == 0 {
			t.Errorf("%s: restored into a new volume", what)
		}
	}
	if got := e.volumeDigest("dst"); got != changed {
		t.Errorf("a refused restore changed the volume:\n%s\nwas:\n%s", got, changed)
	}
	if r := e.run("volumes", "inspect", "fresh"); r.code == 0 {
		t.Error("a refused restore left a volume")
	}
	e.must("volumes", "restore", "--replace", "-i", file, "dst")
	if got := e.volumeDigest("dst"); got != want {
		t.Errorf("replaced:\n%s\nwant:\n%s", got, want)
	}

	// Encrypted: nothing of the content shows, and only the key opens it.
	id, err := age.GenerateX25519Identity()
	if err != nil {
		t.Fatal(err)
	}
	other, _ := age.GenerateX25519Identity()
	must := func(err error) {
		if err != nil {
			t.Fatal(err)
		}
	}
	must(os.WriteFile(e.Dir+"/key", []byte(id.String()+"\n"), 0o600))
	must(os.WriteFile(e.Dir+"/other", []byte(other.String()+"\n"), 0o600))
	must(os.WriteFile(e.Dir+"/pass", []byte("correct horse\n"), 0o600))
	e.must("volumes", "backup", "-r", id.Recipient().String(), "-o", e.Dir+"/b.age", "src")
	if b, _ := os.ReadFile(e.Dir + "/b.age"); !bytes.HasPrefix(b, []byte("age-encryption.org/v1")) {
		t.Error("not encrypted")
	}
	for _, args := range [][]string{nil, {"-I", e.Dir + "/other"}} {
		if r := e.run(append([]string{"volumes", "restore", "-i", e.Dir + "/b.age", "sec"}, args...)...); r.code == 0 {
			t.Errorf("opened with %v", args)
		}
	}
	e.must("volumes", "restore", "-i", e.Dir+"/b.age", "-I", e.Dir+"/key", "sec")
	if got := e.volumeDigest("sec"); got != want {
		t.Errorf("decrypted:\n%s\nwant:\n%s", got, want)
	}
	b, _ := os.ReadFile(e.Dir + "/b.age")
	if r := e.pipe(bytes.NewReader(b[:len(b)-3]), "volumes", "restore", "-I", e.Dir+"/key", "cut"); r.code == 0 {
		t.Error("a cut off encrypted archive was restored")
	}
	e.must("volumes", "backup", "--passphrase-file", e.Dir+"/pass", "-o", e.Dir+"/p.age", "src")
	e.must("volumes", "restore", "-i", e.Dir+"/p.age", "--passphrase-file", e.Dir+"/pass", "sec2")
}

// TestKilledCopies kills the engine in the middle of a backup and of a restore.
func TestKilledCopies(t *testing.T) {
	e := start(t)
	e.must("run", "-d", "--name", "box", "-v", "src:/v", "bb", "sh", "-c", "dd if=/dev/urandom of=/v/big bs=1M count=40 2>/dev/null; touch /v/done; while :; do date >> /v/log; sleep 0.05; done")
	harness.Eventually(t, "the volume is filled", 30*time.Second, func() bool { return e.run("exec", "box", "test", "-e", "/v/done").code == 0 })
	file := e.Dir + "/b"
	e.must("volumes", "backup", "--pause", "-o", file, "src")
	if out := e.must("inspect", "box", "--format", "{{.State.Status}}"); out != "running" {
		t.Errorf("after a backup the container is %s", out)
	}
	e.must("volumes", "restore", "-i", file, "old")
	e.must("run", "--rm", "-v", "old:/v", "bb", "sh", "-c", "rm /v/big; echo mine > /v/mine")

	// A reader that stops reading keeps the backup, and the pause, going.
	resp, err := e.HTTP().Get("http://engine/servin/volumes/src/backup?pause=1")
	if err != nil {
		t.Fatal(err)
	}
	if out := e.must("inspect", "box", "--format", "{{.State.Status}}"); out != "paused" {
		t.Errorf("during a backup the container is %s", out)
	}
	e.Kill()
	resp.Body.Close()
	e.Boot()
	if out := e.must("inspect", "box", "--format", "{{.State.Status}}"); out != "running" {
		t.Errorf("the backup was killed and left the container %s", out)
	}
	n := e.must("exec", "box", "wc", "-l", "/v/log")
	harness.Eventually(t, "the container goes on", 5*time.Second, func() bool { return e.must("exec", "box", "wc", "-l", "/v/log") != n })

	good, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"old", "fresh"} {
		pr, pw := io.Pipe()
		done := make(chan error, 1)
		go func() {
			req, _ := http.NewRequest("POST", "http://engine/servin/volumes/"+name+"/restore?replace=1", pr)
			resp, err := e.HTTP().Do(req)
			if err == nil {
				resp.Body.Close()
				if resp.StatusCode < 300 {
					err = nil
				} else {
					err = fmt.Errorf("%s", resp.Status)
				}
			}
			done <- err
		}()
		if _, err := pw.Write(good[:len(good)*3/4]); err != nil {
			t.Fatal(err)
		}
		// It is being written aside.
		harness.Eventually(t, "content appears aside", 10*time.Second, func() bool {
			for _, pat := range []string{"/root/volumes/old/.copy-*/big", "/root/volumes/.new-*/_data/big"} {
				if l, _ := filepath.Glob(e.Dir + pat); len(l) > 0 {
					return true
				}
			}
			return false
		})
		e.Kill()
		pw.CloseWithError(io.ErrUnexpectedEOF)
		if err := <-done; err == nil {
			t.Error("a killed engine acknowledged a restore")
		}
		e.Boot()
	}
	if out := e.must("run", "--rm", "-v", "old:/v", "bb", "ls", "/v"); !slices.Contains(strings.Fields(out), "mine") || slices.Contains(strings.Fields(out), "big") {
		t.Errorf("after a killed restore the volume holds %q", out)
	}
	if r := e.run("volumes", "inspect", "fresh"); r.code == 0 {
		t.Error("a killed restore left a volume")
	}
	harness.Eventually(t, "what was aside is cleared", 10*time.Second, func() bool {
		var l []string
		for _, pat := range []string{"/root/volumes/*/.copy-*", "/root/volumes/.new-*", "/root/volumes/.trash/*"} {
			m, _ := filepath.Glob(e.Dir + pat)
			l = append(l, m...)
		}
		return len(l) == 0
	})
	e.must("volumes", "restore", "--replace", "-i", file, "old")
	e.must("rm", "-f", "box")
}
