package distro

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/cloudos-io/cloudos/internal/vmwire"
)

const envReplace = "SERVIN_DISTROTEST_REPLACE"

func TestMain(m *testing.M) {
	if root := os.Getenv(envReplace); root != "" { // one that is killed at its work
		if err := (Distribution{Root: root}).Replace(os.Args[1], os.Stdin); err != nil {
			os.Exit(1)
		}
		os.Exit(0)
	}
	os.Exit(m.Run())
}

type entry struct {
	name, text, link string
	kind             byte
}

func pack(t testing.TB, entries ...entry) (packed []byte, digest string) {
	t.Helper()
	var b bytes.Buffer
	z := gzip.NewWriter(&b)
	w := tar.NewWriter(z)
	for _, e := range entries {
		h := &tar.Header{Name: e.name, Typeflag: e.kind, Mode: 0o755, Linkname: e.link}
		if e.kind == tar.TypeReg {
			h.Size = int64(len(e.text))
		}
		if err := w.WriteHeader(h); err != nil {
			t.Fatal(err)
		}
		if _, err := w.Write([]byte(e.text)); err != nil {
			t.Fatal(err)
		}
	}
	if err := errors.Join(w.Close(), z.Close()); err != nil {
		t.Fatal(err)
	}
	sum := sha256.Sum256(b.Bytes())
	return b.Bytes(), hex.EncodeToString(sum[:])
}

// image is one of a version.
func image(t testing.TB, version string) ([]byte, string) {
	return pack(t, entry{name: "etc/", kind: tar.TypeDir}, entry{name: "etc/passwd", text: "not for slots", kind: tar.TypeReg},
		entry{name: "slots/a/", kind: tar.TypeDir}, entry{name: "slots/a/bin/", kind: tar.TypeDir},
		entry{name: "slots/a/bin/program", text: version + strings.Repeat("x", 1<<20), kind: tar.TypeReg},
		entry{name: "slots/a/etc", link: "/run/etc", kind: tar.TypeSymlink},
		entry{name: "slots/a/distribution/", kind: tar.TypeDir}, entry{name: "slots/a/distribution/etc/", kind: tar.TypeDir},
		entry{name: "slots/a/distribution/etc/wsl.conf", text: version, kind: tar.TypeReg},
		entry{name: "system", link: "slots/a", kind: tar.TypeSymlink})
}

func distribution(t testing.TB) Distribution {
	t.Helper()
	root, err := os.MkdirTemp("", "distro") // sockets want a short path
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(root) })
	for _, d := range []string{"slots/a", "etc", "run", "data"} {
		if err := os.MkdirAll(filepath.Join(root, d), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.Symlink("slots/a", filepath.Join(root, "system")); err != nil {
		t.Fatal(err)
	}
	return Distribution{Root: root}
}

// version is that of the programs that are used; "" is of those that were there first.
func (d Distribution) version(t *testing.T) string {
	t.Helper()
	b, err := os.ReadFile(d.path("system/bin/program"))
	if err != nil {
		return ""
	}
	text, rest, _ := strings.Cut(string(b), "x")
	if len(rest) != 1<<20-1 {
		t.Fatalf("the programs that are used are not whole: %d bytes behind %q", len(rest), text)
	}
	return text
}

func TestReplace(t *testing.T) {
	d := distribution(t)
	for _, v := range []string{"1", "2", "3"} {
		b, digest := image(t, v)
		if err := d.Replace(digest, bytes.NewReader(b)); err != nil {
			t.Fatal(err)
		}
		if got := d.version(t); got != v {
			t.Errorf("version %q, want %s", got, v)
		}
		if b, _ := os.ReadFile(d.path("etc/wsl.conf")); string(b) != v {
			t.Errorf("settings %q, want %s", b, v)
		}
	}
	if _, err := os.Stat(d.path("etc/passwd")); err == nil {
		t.Error("what is not in the image's slot was unpacked")
	}
	if to, err := os.Readlink(d.path("system/etc")); err != nil || to != "/run/etc" {
		t.Errorf("link: %q %v", to, err)
	}
	// Refused ones change nothing.
	whole, digest := image(t, "4")
	outside := distribution(t)
	link, linkDigest := pack(t, entry{name: "slots/a/out", link: outside.Root, kind: tar.TypeSymlink}, entry{name: "slots/a/out/x", text: "x", kind: tar.TypeReg})
	dots, dotsDigest := pack(t, entry{name: "slots/a/../../x", text: "x", kind: tar.TypeReg})
	device, deviceDigest := pack(t, entry{name: "slots/a/null", kind: tar.TypeChar})
	hard, hardDigest := pack(t, entry{name: "slots/a/hard", link: "/etc/passwd", kind: tar.TypeLink})
	empty, emptyDigest := pack(t, entry{name: "etc/", kind: tar.TypeDir})
	for name, c := range map[string]struct {
		b      []byte
		digest string
	}{
		"another digest": {whole, strings.Repeat("0", 64)}, "no digest": {whole, "../x"}, "cut short": {whole[:len(whole)/2], digest}, "more behind it": {append(bytes.Clone(whole), 'x'), digest},
		"through a link": {link, linkDigest}, "dots": {dots, dotsDigest}, "a device": {device, deviceDigest}, "a hard link": {hard, hardDigest}, "nothing": {empty, emptyDigest}, "no tar": {[]byte("x"), digest},
	} {
		if err := d.Replace(c.digest, bytes.NewReader(c.b)); err == nil {
			t.Errorf("%s is taken", name)
		}
		if got := d.version(t); got != "3" {
			t.Errorf("%s: version %q", name, got)
		}
	}
	if _, err := os.Stat(outside.path("x")); err == nil {
		t.Error("a link led out")
	}
	// Not while a machine runs.
	b, digest := image(t, "3")
	h, err := d.Hold(digest, false)
	if err != nil {
		t.Fatal(err)
	}
	if err := d.Replace(digest, bytes.NewReader(b)); Status(err) != vmwire.DistributionRuns {
		t.Errorf("beside a machine: %v", err)
	}
	h.Close()
}

// TestReplaceKilled kills it after each part of the image: the old programs or the new ones are used, whole, and it can
// be done again.
func TestReplaceKilled(t *testing.T) {
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	d := distribution(t)
	old, oldDigest := image(t, "old")
	if err := d.Replace(oldDigest, bytes.NewReader(old)); err != nil {
		t.Fatal(err)
	}
	b, digest := image(t, "new")
	for part := range 8 {
		cmd := exec.Command(self, digest)
		cmd.Env = append(os.Environ(), envReplace+"="+d.Root)
		in, err := cmd.StdinPipe()
		if err != nil {
			t.Fatal(err)
		}
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		in.Write(b[:len(b)*part/7])
		if part == 7 {
			in.Close() // all came: it is killed somewhere on its way to the end
		}
		cmd.Process.Kill()
		cmd.Wait()
		if got := d.version(t); got != "old" && (got != "new" || part != 7) {
			t.Fatalf("killed in part %d: version %q", part, got)
		}
	}
	if err := d.Replace(digest, bytes.NewReader(b)); err != nil {
		t.Fatal(err)
	}
	if got := d.version(t); got != "new" {
		t.Errorf("version %q", got)
	}
}

// TestHold has machines that find their programs, or do not, and are alone.
func TestHold(t *testing.T) {
	d := distribution(t)
	one, two := strings.Repeat("1", 64), strings.Repeat("2", 64)
	if err := d.Alive(); Status(err) != vmwire.DistributionDead {
		t.Errorf("nothing is alive: %v", err)
	}
	if _, err := d.Hold(one, false); Status(err) != vmwire.DistributionOther {
		t.Errorf("programs of an unknown image: %v", err)
	}
	h, err := d.Hold(one, true)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := d.Hold(one, false); Status(err) != vmwire.DistributionRuns {
		t.Errorf("two machines: %v", err)
	}
	if err := d.Alive(); err != nil {
		t.Error(err)
	}
	if fi, err := os.Stat(d.socket()); err != nil || fi.Mode().Perm() != 0o600 {
		t.Errorf("the port: %v %v", fi, err)
	}
	go func() {
		for {
			c, err := h.Port.Accept()
			if err != nil {
				return
			}
			io.Copy(c, c)
			c.Close()
		}
	}()
	near, far := net.Pipe()
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	joined := make(chan error, 1)
	go func() { joined <- d.Bridge(ctx, far, far) }()
	near.Write([]byte("hello"))
	got := make([]byte, 5)
	if _, err := io.ReadFull(near, got); err != nil || string(got) != "hello" {
		t.Errorf("%q %v", got, err)
	}
	near.Close()
	if err := <-joined; ctx.Err() != nil {
		t.Errorf("a bridge outlives its host: %v", err)
	}
	// Who waits learns how it ended.
	waits := func() chan error {
		ended := make(chan error, 1)
		in, _, err := os.Pipe()
		if err != nil {
			t.Fatal(err)
		}
		go func() { ended <- d.Wait(in) }()
		return ended
	}
	ended := waits()
	h.Close()
	if err := <-ended; err != nil {
		t.Errorf("it ended in order: %v", err)
	}
	if _, err := d.Hold(two, true); Status(err) != vmwire.DistributionOther {
		t.Errorf("another image, and no fresh distribution: %v", err)
	}
	if h, err = d.Hold(one, false); err != nil {
		t.Fatal(err)
	}
	ended = waits()
	h.Port.SetUnlinkOnClose(false) // as one that is killed
	h.Close()
	if err := <-ended; err == nil {
		t.Error("a machine that fell ended in order")
	}
	if err := d.Wait(strings.NewReader("")); err != nil {
		t.Errorf("who waited and left: %v", err)
	}
	if err := d.Bridge(ctx, strings.NewReader(""), io.Discard); Status(err) != vmwire.DistributionDead {
		t.Errorf("the port of no machine: %v", err)
	}
}

func FuzzUnpack(f *testing.F) {
	b, _ := image(f, "1")
	f.Add(b[:1000])
	link, _ := pack(f, entry{name: "slots/a/out", link: "..", kind: tar.TypeSymlink}, entry{name: "slots/a/out/x", text: "x", kind: tar.TypeReg})
	z, err := gzip.NewReader(bytes.NewReader(link))
	if err != nil {
		f.Fatal(err)
	}
	raw, err := io.ReadAll(z)
	if err != nil {
		f.Fatal(err)
	}
	f.Add(raw)
	f.Fuzz(func(t *testing.T, raw []byte) {
		dir, err := os.MkdirTemp("", "unpack")
		if err != nil {
			t.Fatal(err)
		}
		defer os.RemoveAll(dir)
		place := filepath.Join(dir, "in")
		if err := os.Mkdir(place, 0o755); err != nil {
			t.Fatal(err)
		}
		_ = unpackTar(bytes.NewReader(raw), place)
		if left, err := os.ReadDir(dir); err != nil || len(left) != 1 {
			t.Fatalf("it unpacked beside its place: %v %v", left, err)
		}
	})
}
