package image

import (
	"archive/tar"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"io"
	"os"
	"path/filepath"
	"testing"
	"time"

	dockerspec "github.com/moby/docker-image-spec/specs-go/v1"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/cloudos-io/cloudos/internal/fault"
)

func newService(t testing.TB, root string, change ...func(*Config)) *Service {
	t.Helper()
	if os.Getuid() != 0 {
		t.Skip("SKIP: unpacking needs root")
	}
	cfg := Config{Root: root}
	for _, c := range change {
		c(&cfg)
	}
	s, err := New(context.Background(), cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { s.Close() })
	return s
}

// file is an entry of a layer under test.
type file struct {
	name, body, link string
	typ              byte
	mode             int64
	uid              int
}

func layerTar(t testing.TB, files ...file) []byte {
	t.Helper()
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	for _, f := range files {
		h := &tar.Header{Name: f.name, Linkname: f.link, Typeflag: f.typ, Mode: f.mode, Uid: f.uid, Size: int64(len(f.body)), ModTime: time.Unix(1700000000, 0)}
		if h.Typeflag == 0 {
			h.Typeflag = tar.TypeReg
		}
		if h.Mode == 0 {
			h.Mode = 0o644
			if h.Typeflag == tar.TypeDir {
				h.Mode = 0o755
			}
		}
		if err := w.WriteHeader(h); err != nil {
			t.Fatal(err)
		}
		if _, err := io.WriteString(w, f.body); err != nil {
			t.Fatal(err)
		}
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

// configFor is the config of an image of uncompressed layers.
func configFor(t testing.TB, change func(*dockerspec.DockerOCIImage), layers ...[]byte) []byte {
	t.Helper()
	created := time.Unix(1700000000, 0).UTC()
	img := dockerspec.DockerOCIImage{Image: ocispec.Image{Created: &created, Platform: ocispec.Platform{OS: "linux", Architecture: "amd64"}, RootFS: ocispec.RootFS{Type: "layers", DiffIDs: []digest.Digest{}}}}
	for _, l := range layers {
		img.RootFS.DiffIDs = append(img.RootFS.DiffIDs, digest.FromBytes(l))
		img.History = append(img.History, ocispec.History{Created: &created, CreatedBy: "test"})
	}
	if change != nil {
		change(&img)
	}
	b, err := json.Marshal(img)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// dockerTar is an archive such as docker save makes.
func dockerTar(t testing.TB, config []byte, tags []string, layers ...[]byte) []byte {
	t.Helper()
	files := []file{{name: "config.json", body: string(config)}}
	m := dockerManifest{Config: "config.json", RepoTags: tags}
	for i, l := range layers {
		n := string(rune('a'+i)) + "/layer.tar"
		files = append(files, file{name: n, body: string(l)})
		m.Layers = append(m.Layers, n)
	}
	b, err := json.Marshal([]dockerManifest{m})
	if err != nil {
		t.Fatal(err)
	}
	return layerTar(t, append(files, file{name: "manifest.json", body: string(b)})...)
}

func TestLoadAndResolve(t *testing.T) {
	root := t.TempDir()
	s := newService(t, root)
	ctx := context.Background()
	l1 := layerTar(t, file{name: "etc/", typ: tar.TypeDir, mode: 0o750, uid: 7}, file{name: "etc/a", body: "1"}, file{name: "etc/gone", body: "x"}, file{name: "d/x", body: "x"})
	l2 := layerTar(t, file{name: "etc/a", body: "two"}, file{name: "etc/.wh.gone"}, file{name: "d/.wh..wh..opq"}, file{name: "d/y", body: "y"}, file{name: "hl", typ: tar.TypeLink, link: "d/x"})
	cfg := configFor(t, func(i *dockerspec.DockerOCIImage) { i.Config.Env = []string{"A=b"} }, l1, l2)
	got, err := s.Load(ctx, bytes.NewReader(dockerTar(t, cfg, []string{"busy:1", "example.com/x/y:z"}, l1, l2)), nil, nil)
	if err != nil {
		t.Fatal(err)
	}
	if len(got) != 2 || got[0] != "busy:1" || got[1] != "example.com/x/y:z" {
		t.Errorf("loaded %q", got)
	}
	id := digest.FromBytes(cfg)
	for _, ref := range []string{"busy:1", "docker.io/library/busy:1", "example.com/x/y:z", id.String(), id.Encoded(), id.Encoded()[:12]} {
		r, err := s.Resolve(ctx, ref, "")
		if err != nil {
			t.Errorf("Resolve(%q): %v", ref, err)
			continue
		}
		if r.ID != id || len(r.Chain.Dirs) != 2 || len(r.Config.Env) != 1 {
			t.Errorf("Resolve(%q) = %+v", ref, r)
		}
	}
	r, _ := s.Resolve(ctx, "busy:1", "")
	top, low := r.Chain.Dirs[0], r.Chain.Dirs[1]
	if b, _ := os.ReadFile(filepath.Join(top, "etc/a")); string(b) != "two" {
		t.Errorf("top etc/a = %q", b)
	}
	if fi, err := os.Lstat(filepath.Join(top, "etc/gone")); err != nil || fi.Mode()&os.ModeCharDevice == 0 {
		t.Errorf("etc/gone is no whiteout: %v %v", fi, err)
	}
	// The implied etc has the attributes of the one below.
	if fi, err := os.Lstat(filepath.Join(top, "etc")); err != nil || fi.Mode().Perm() != 0o750 {
		t.Errorf("etc: %v %v", fi, err)
	}
	// A hard link to a file below was copied up.
	if b, err := os.ReadFile(filepath.Join(top, "hl")); string(b) != "x" {
		t.Errorf("hl = %q, %v", b, err)
	}
	if _, err := os.Lstat(filepath.Join(low, "etc/gone")); err != nil {
		t.Error(err)
	}
	for ref, kind := range map[string]fault.Kind{"nosuch": fault.NotFound, "busy:2": fault.NotFound, "": fault.Invalid, "UPPER//": fault.Invalid, "deadbeef": fault.NotFound} {
		if _, err := s.Resolve(ctx, ref, ""); !fault.Is(err, kind) {
			t.Errorf("Resolve(%q) = %v, want kind %d", ref, err, kind)
		}
	}
	if _, err := s.Resolve(ctx, "busy:1", "linux/s390x"); !fault.Is(err, fault.NotFound) {
		t.Errorf("other platform: %v", err)
	}

	// All of it is there after a restart and a collection.
	s.Close()
	s = newService(t, root)
	if err := s.Collect(ctx); err != nil {
		t.Fatal(err)
	}
	r2, err := s.Resolve(ctx, "busy:1", "")
	if err != nil || len(r2.Chain.Dirs) != 2 || r2.Chain.Dirs[0] != top {
		t.Errorf("after a restart: %+v, %v", r2, err)
	}
	if _, err := os.Lstat(filepath.Join(top, "hl")); err != nil {
		t.Error(err)
	}
}

func TestLoadRefuses(t *testing.T) {
	l := layerTar(t, file{name: "a", body: "1"})
	cfg := configFor(t, nil, l)
	evil := layerTar(t, file{name: "../out", body: "1"})
	for name, b := range map[string][]byte{
		"empty":         {},
		"no tar":        []byte("hello, this is not an archive at all"),
		"no manifest":   layerTar(t, file{name: "x", body: "1"}),
		"other layer":   dockerTar(t, cfg, nil, layerTar(t, file{name: "b"})),
		"fewer layers":  dockerTar(t, cfg, nil),
		"bad reference": dockerTar(t, cfg, []string{"UP//x"}, l),
		"climbing":      dockerTar(t, configFor(t, nil, evil), nil, evil),
		"truncated":     dockerTar(t, cfg, nil, l)[:2000],
	} {
		t.Run(name, func(t *testing.T) {
			s := newService(t, t.TempDir())
			_, err := s.Load(context.Background(), bytes.NewReader(b), nil, nil)
			if !fault.Is(err, fault.Invalid) {
				t.Errorf("err = %v, want invalid", err)
			}
			if n := len(s.cat.all()); n != 0 {
				t.Errorf("%d images recorded", n)
			}
		})
	}
}

func TestLoadCancelled(t *testing.T) {
	s := newService(t, t.TempDir())
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	if _, err := s.Load(ctx, bytes.NewReader(dockerTar(t, configFor(t, nil), nil)), nil, nil); !errors.Is(err, context.Canceled) {
		t.Errorf("err = %v", err)
	}
}

func BenchmarkResolve(b *testing.B) {
	s := newService(b, b.TempDir())
	l := layerTar(b, file{name: "a", body: "1"})
	if _, err := s.Load(context.Background(), bytes.NewReader(dockerTar(b, configFor(b, nil, l), []string{"x:1"}, l)), nil, nil); err != nil {
		b.Fatal(err)
	}
	b.ReportAllocs()
	for b.Loop() {
		if _, err := s.Resolve(context.Background(), "x:1", ""); err != nil {
			b.Fatal(err)
		}
	}
}
