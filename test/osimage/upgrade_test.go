package osimage

import (
	"bytes"
	"context"
	"crypto/ed25519"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/cloudos-io/cloudos/api/system"
	"github.com/cloudos-io/cloudos/internal/osimage"
	"github.com/cloudos-io/cloudos/internal/release"
	"github.com/cloudos-io/cloudos/internal/vmwire"
)

// relay listens on a socket and passes connections on to the machine's engine, until the test ends.
// It finds the conversation that is the newest, so that it outlives a restart of the machine.
func (m *machine) relay() string {
	m.t.Helper()
	path := filepath.Join(m.dir, "r")
	if _, err := os.Stat(path); err == nil {
		return path
	}
	l := m.pass(path, m.engine)
	m.t.Cleanup(func() { l.Close() })
	return path
}

// pass listens on a socket and passes connections on over streams that open makes.
func (m *machine) pass(path string, open func() (vmwire.Stream, error)) net.Listener {
	m.t.Helper()
	l, err := net.Listen("unix", path)
	if err != nil {
		m.t.Fatal(err)
	}
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			go func() {
				defer c.Close()
				s, err := open()
				if err != nil {
					return
				}
				defer s.Close()
				go func() { io.Copy(s, c); s.CloseWrite() }()
				io.Copy(c, s)
			}()
		}
	}()
	return l
}

// engine opens a stream to the engine over the newest conversation.
func (m *machine) engine() (vmwire.Stream, error) {
	m.mu.Lock()
	s := m.session
	m.mu.Unlock()
	return s.Open(context.Background(), vmwire.Purpose{Kind: vmwire.API})
}

// cloudos runs the command line against the machine.
func (m *machine) cloudos(args ...string) (string, error) {
	m.t.Helper()
	cmd := exec.CommandContext(m.t.Context(), filepath.Join(programs(m.t), "cloudos"), args...)
	cmd.Env = append(os.Environ(), "SERVIN_HOST=unix://"+m.relay())
	out, err := cmd.CombinedOutput()
	m.t.Logf("cloudos %s: %v\n%s", strings.Join(args, " "), err, out)
	return string(out), err
}

// os asks for the system's status until it is as wanted.
func (m *machine) os(what string, is func(system.Status) bool) system.Status {
	m.t.Helper()
	var s system.Status
	for end := time.Now().Add(3 * time.Minute); ; time.Sleep(time.Second) {
		out, err := m.cloudos("status", "--json")
		if err == nil {
			s = system.Status{}
			if err := json.Unmarshal([]byte(out), &s); err != nil {
				m.t.Fatal(err)
			}
			if s.Busy == "" && is(s) {
				return s
			}
		}
		if time.Now().After(end) {
			m.t.Fatalf("the machine is not %s: %v, %+v", what, err, s)
		}
	}
}

// again waits for the machine to start again and speaks to it anew.
func (m *machine) again() {
	m.t.Helper()
	m.went()
	m.connect()
}

// went waits until the machine is down, to start again.
func (m *machine) went() {
	m.t.Helper()
	// Nothing of the port tells that the other side went: the console does.
	m.restarts++
	for end := time.Now().Add(3 * time.Minute); strings.Count(m.said(), "the machine is down") < m.restarts; time.Sleep(100 * time.Millisecond) {
		if time.Now().After(end) {
			m.t.Fatal("the machine does not start again")
		}
	}
	m.session.Close()
}

// signer is a key of the tests'.
func signer(t *testing.T) ed25519.PrivateKey {
	t.Helper()
	_, k, err := ed25519.GenerateKey(nil)
	if err != nil {
		t.Fatal(err)
	}
	return k
}

// releaseOf builds a release.
func releaseOf(t *testing.T, version string, change func(*osimage.Options)) string {
	t.Helper()
	return filepath.Join(build(t, "release", func(o *osimage.Options) {
		o.Version, o.Platform = version, "cloud"
		change(o)
	}), "cloudos.release")
}

// slotDisk builds a disk with a system in slot a.
func slotDisk(t *testing.T, version string, key ed25519.PrivateKey) string {
	t.Helper()
	return filepath.Join(build(t, "disk", func(o *osimage.Options) {
		o.DiskFormat, o.Version, o.Sign = "raw", version, []ed25519.PrivateKey{key}
	}), "disk.raw")
}

// fromDisk starts a machine from a disk, and starts it again when it asks for it.
func fromDisk(t *testing.T, p string) *machine {
	t.Helper()
	m := start(t, 20*time.Minute, "-action", "reboot=reset", "-drive", "file="+p+",format=raw,if=none,id=d", "-device", "virtio-blk-pci,drive=d,bootindex=0,serial=disk-1")
	m.connect()
	return m
}

// resealed copies a release with parts and manifest changed, signed by other keys.
func resealed(t *testing.T, from string, change func(m *release.Manifest, content map[string][]byte), keys ...ed25519.PrivateKey) string {
	t.Helper()
	f, err := os.Open(from)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	a, err := release.ReadArchive(f)
	if err != nil {
		t.Fatal(err)
	}
	m, _, err := release.Open(a.Envelope(), nil)
	if err != nil {
		t.Fatal(err)
	}
	content := map[string][]byte{}
	for i := range m.Parts {
		r, err := a.Open(&m.Parts[i])
		if err != nil {
			t.Fatal(err)
		}
		if content[m.Parts[i].Name], err = io.ReadAll(r); err != nil {
			t.Fatal(err)
		}
	}
	if change != nil {
		change(m, content)
	}
	for i, p := range m.Parts {
		if m.Parts[i], err = release.NewPart(p.Name, p.Use, bytes.NewReader(content[p.Name])); err != nil {
			t.Fatal(err)
		}
	}
	sealed, err := release.Seal(m, keys...)
	if err != nil {
		t.Fatal(err)
	}
	to, err := os.Create(filepath.Join(t.TempDir(), "cloudos.release"))
	if err != nil {
		t.Fatal(err)
	}
	defer to.Close()
	if err := release.Pack(to, sealed, m, func(p *release.Part) (io.ReadCloser, error) {
		return io.NopCloser(bytes.NewReader(content[p.Name])), nil
	}); err != nil {
		t.Fatal(err)
	}
	return to.Name()
}

func version(v string) func(*release.Manifest, map[string][]byte) {
	return func(m *release.Manifest, _ map[string][]byte) { m.Version = v }
}

// broken builds programs of which the engine ends as soon as it starts.
func broken(t *testing.T) string {
	t.Helper()
	dir := t.TempDir()
	list, err := os.ReadDir(programs(t))
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range list {
		if e.Type().IsRegular() && e.Name() != "servind" {
			if err := os.Symlink(filepath.Join(programs(t), e.Name()), filepath.Join(dir, e.Name())); err != nil {
				t.Fatal(err)
			}
		}
	}
	if err := os.Symlink(filepath.Join(programs(t), "cloudos-modprobe"), filepath.Join(dir, "servind")); err != nil {
		t.Fatal(err)
	}
	return dir
}

// TestBrokenUpgrade upgrades to a system whose root is nothing, and to one whose engine
// does not run: the machine goes back by itself, and says why.
func TestBrokenUpgrade(t *testing.T) {
	long(t)
	needs(t, "grub-mkimage")
	key := signer(t)
	disk := slotDisk(t, "1.0.0", key)
	dead := releaseOf(t, "1.1.0", func(o *osimage.Options) { o.Sign, o.Programs = []ed25519.PrivateKey{key}, broken(t) })
	panics := resealed(t, dead, func(m *release.Manifest, content map[string][]byte) {
		m.Version = "1.2.0"
		content["root.img"] = bytes.Repeat([]byte("nothing "), 1<<18)
	}, key)
	m := fromDisk(t, disk)
	m.must("version")
	m.keep()
	for _, c := range []struct {
		release, version, want, said string
	}{
		{dead, "1.1.0", "the engine does not stay up", "slot a runs instead (the engine"},
		{panics, "1.2.0", "never came up", "slot a runs instead (it was started"},
	} {
		if out, err := m.cloudos("upgrade", "--wait", "0", c.release); err != nil {
			t.Fatal(out)
		}
		m.went()
		m.await(c.said, 8*time.Minute) // a kernel that panics waits before it starts again
		m.restarts = strings.Count(m.said(), "the machine is down")
		m.connect()
		s := m.os("back", func(s system.Status) bool { return s.Last != nil && s.Last.Outcome == system.RolledBack })
		if s.Version != "1.0.0" || s.Last.To != c.version || !strings.Contains(s.Last.Reason, c.want) || s.Next != "a" || !s.Slots[1].Failed || len(s.Problems) != 1 {
			t.Fatalf("the machine is %+v, %+v", s, s.Last)
		}
		if out, err := m.cloudos("status"); err != nil || !strings.Contains(out, "did not come up") || !strings.Contains(out, "starts next") {
			t.Errorf("the status says %q, %v", out, err)
		}
		if out, err := m.cloudos("rollback", "--no-reboot"); err == nil || !strings.Contains(out, "did not come up") {
			t.Errorf("to what did not come up: %v, %s", err, out)
		}
	}
	if out := m.must("run", "--rm", "-v", "kept:/v", "servin/hello", "cat", "/v/f"); !strings.Contains(out, "x") {
		t.Fatalf("what was kept is %q", out)
	}
	m.off()
}

// cut kills the machine as a power cut does.
func (m *machine) cut() {
	m.t.Helper()
	m.cmd.Process.Kill()
	<-m.done
	m.done <- nil
}

// TestPowerCutUpgrade cuts the power at several moments of an upgrade: the machine comes up with the
// earlier system or with the new one, and can be upgraded then.
func TestPowerCutUpgrade(t *testing.T) {
	long(t)
	needs(t, "grub-mkimage")
	key := signer(t)
	disk := slotDisk(t, "1.0.0", key)
	next := releaseOf(t, "1.1.0", func(o *osimage.Options) { o.Sign = []ed25519.PrivateKey{key} })
	const last = "engine answers"
	for _, after := range []string{"writing system", "half", "starts next", last} {
		m := fromDisk(t, disk)
		m.must("version")
		if s := m.os("up", func(s system.Status) bool { return s.State == "ready" && s.Next != "" }); s.Version != "1.0.0" {
			t.Fatalf("before the cut after %q the machine is %+v", after, s)
		}
		seen := strings.Count(m.said(), after)
		done := make(chan struct{})
		go func() { defer close(done); m.cloudos("upgrade", "--wait", "0", next) }()
		if after == "half" {
			m.await("writing system", time.Minute)
			time.Sleep(4 * time.Second)
		} else {
			for end := time.Now().Add(3 * time.Minute); strings.Count(m.said(), after) <= seen && time.Now().Before(end); time.Sleep(10 * time.Millisecond) {
			}
		}
		m.cut()
		<-done
		if strings.Contains(m.said(), "is kept") {
			t.Fatalf("the cut after %q came too late", after)
		}
		if after == "writing system" || after == "half" {
			continue
		}
		// It was whole: the next start is the new one's, and going back leads to the beginning.
		m = fromDisk(t, disk)
		m.must("version")
		s := m.os("upgraded", func(s system.Status) bool { return s.Last != nil && s.Last.Outcome == system.Succeeded })
		if s.Version != "1.1.0" {
			t.Fatalf("after the cut after %q the machine is %+v", after, s)
		}
		if after != last {
			if out, err := m.cloudos("rollback", "--wait", "0"); err != nil {
				t.Fatal(out)
			}
			m.again()
			m.os("back", func(s system.Status) bool { return s.Last.Kind == "rollback" && s.Last.Outcome == system.Succeeded })
		}
		m.off()
	}
}

// TestUpgrade upgrades a machine, refuses what is not to be trusted, older or damaged, and
// goes back on demand.
func TestUpgrade(t *testing.T) {
	long(t)
	needs(t, "grub-mkimage")
	key := signer(t)
	signed := func(o *osimage.Options) { o.Sign = []ed25519.PrivateKey{key} }
	disk, next := slotDisk(t, "1.0.0", key), releaseOf(t, "1.1.0", signed)
	m := fromDisk(t, disk)
	m.must("version")
	m.keep()
	s := m.os("ready", func(s system.Status) bool { return s.State == "ready" })
	if len(s.Slots) != 2 || s.Slots[0].Version != "1.0.0" || s.Slots[0].SignedBy == "" || !s.Slots[0].Running || s.Slots[1].Version != "" || s.Next != "a" || len(s.Keys) != 1 {
		t.Fatalf("the machine is %+v", s)
	}
	for name, c := range map[string]struct {
		release string
		want    string
	}{
		"by another key": {resealed(t, next, nil, signer(t)), "none of the keys"},
		"by nobody":      {resealed(t, next, nil), "not signed"},
		"older":          {resealed(t, next, version("0.9.0"), key), "older than 1.0.0"},
		"of unknown age": {resealed(t, next, version("abcdef0"), key), "cannot be told"},
		"damaged":        {damaged(t, next), "not what was signed"},
		"cut off":        {cutOff(t, next), "ends after"},
		"something else": {disk, "no release"},
	} {
		if out, err := m.cloudos("upgrade", c.release); err == nil || !strings.Contains(out, c.want) {
			t.Errorf("%s: %v, %q, want %q", name, err, out, c.want)
		}
	}
	if s := m.os("at rest", func(s system.Status) bool { return s.Busy == "" }); s.Next != "a" || s.Slots[1].Version != "" || s.Last != nil {
		t.Fatalf("after what was refused the machine is %+v", s)
	}
	// The machine fetches it; 10.0.2.2 is the host's loopback.
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	server := &http.Server{Handler: http.FileServer(http.Dir(filepath.Dir(next)))}
	go server.Serve(l)
	defer server.Close()
	from := fmt.Sprintf("http://10.0.2.2:%d/", l.Addr().(*net.TCPAddr).Port)
	if out, err := m.cloudos("upgrade", from+"missing"); err == nil || !strings.Contains(out, "404") {
		t.Errorf("from where there is none: %v, %s", err, out)
	}
	if out, err := m.cloudos("upgrade", "--wait", "0", from+"cloudos.release"); err != nil {
		t.Fatal(out)
	}
	m.again()
	s = m.os("upgraded", func(s system.Status) bool { return s.Last != nil && s.Last.Outcome == system.Succeeded })
	if s.Version != "1.1.0" || s.Next != "b" || !s.Slots[1].Good || !s.Slots[1].Running || s.Slots[0].Version != "1.0.0" {
		t.Fatalf("the machine is %+v", s)
	}
	if out := m.must("run", "--rm", "-v", "kept:/v", "servin/hello", "cat", "/v/f"); !strings.Contains(out, "x") {
		t.Fatalf("what was kept is %q", out)
	}
	if out, err := m.cloudos("rollback", "--wait", "0"); err != nil {
		t.Fatal(out)
	}
	m.again()
	s = m.os("back", func(s system.Status) bool {
		return s.Last != nil && s.Last.Kind == "rollback" && s.Last.Outcome == system.Succeeded
	})
	if s.Version != "1.0.0" || s.Next != "a" {
		t.Fatalf("the machine is %+v", s)
	}
	m.off()
}

// change copies a release and changes it.
func change(t *testing.T, from string, how func([]byte) []byte) string {
	t.Helper()
	b, err := os.ReadFile(from)
	if err != nil {
		t.Fatal(err)
	}
	to := filepath.Join(t.TempDir(), "changed.release")
	if err := os.WriteFile(to, how(b), 0o600); err != nil {
		t.Fatal(err)
	}
	return to
}

func damaged(t *testing.T, from string) string {
	return change(t, from, func(b []byte) []byte { b[len(b)/2] ^= 1; return b })
}

func cutOff(t *testing.T, from string) string {
	return change(t, from, func(b []byte) []byte { return b[:len(b)/2] })
}
