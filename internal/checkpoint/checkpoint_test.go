package checkpoint

import (
	"archive/tar"
	"bytes"
	"context"
	"encoding/json"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	mcontainer "github.com/moby/moby/api/types/container"
	"github.com/moby/moby/api/types/network"

	"github.com/cloudos-io/cloudos/internal/fault"
)

func manifest() *Manifest {
	return &Manifest{Version: 1, Created: time.Unix(1700000000, 0).UTC(), Arch: "amd64", Rounds: 3, CRIU: 31701, Streams: [3]string{"", "pipe:[1]", "pipe:[2]"},
		Binds: []string{"/etc/hosts"}, Volumes: []Volume{{"data", "/data"}}, WithImage: true,
		Container: Container{ID: strings.Repeat("0a", 32), Name: "web", Config: &mcontainer.Config{Image: "i"}, HostConfig: &mcontainer.HostConfig{},
			Image: Image{ID: "sha256:" + strings.Repeat("1", 64), Ref: "i"}}}
}

type part struct{ name, data string }

func parts() []part {
	return []part{{ImageName, "image"}, {"criu/1/pages-1.img", "one"}, {"criu/1/inventory.img", "inv"}, {"criu/2/pages-1.img", ""}, {LayerName, "layer"}, {VolumeName(1), "volume"}}
}

// write makes a tar; a part called FinalName stands for the second manifest.
func write(t testing.TB, m, final *Manifest, ps []part) []byte {
	t.Helper()
	var b bytes.Buffer
	w, err := NewWriter(&b, m)
	if err != nil {
		t.Fatal(err)
	}
	for _, p := range ps {
		if err := w.Put(p.name, int64(len(p.data)), strings.NewReader(p.data)); err != nil {
			t.Fatal(err)
		}
	}
	if final != nil {
		if err := w.Final(final); err != nil {
			t.Fatal(err)
		}
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

func read(t testing.TB, b []byte, o ReadOptions) (*Manifest, string, error) {
	t.Helper()
	path := t.TempDir()
	dir, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { dir.Close() })
	m, err := Read(context.Background(), bytes.NewReader(b), dir, o)
	return m, path, err
}

func TestRoundTrip(t *testing.T) {
	m, final := manifest(), manifest()
	final.Rounds = 2 // one was not worth it
	asked := 0
	got, path, err := read(t, write(t, m, final, parts()), ReadOptions{Manifest: func(*Manifest) error { asked++; return nil }})
	if err != nil || asked != 1 {
		t.Fatal(err, asked)
	}
	want, _ := json.Marshal(final)
	if have, _ := json.Marshal(got); !bytes.Equal(have, want) {
		t.Errorf("%s\nis not\n%s", have, want)
	}
	for _, p := range parts() {
		if b, err := os.ReadFile(filepath.Join(path, p.name)); err != nil || string(b) != p.data {
			t.Errorf("%s: %q, %v", p.name, b, err)
		}
	}
	if l, err := os.Readlink(filepath.Join(path, "criu/2/parent")); err != nil || l != "../1" {
		t.Errorf("%q, %v", l, err)
	}
	dir, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer dir.Close()
	if l, err := Load(dir); err != nil || l.Rounds != 2 {
		t.Errorf("%v, %v", l, err)
	}
	if err := os.Remove(filepath.Join(path, SealName)); err != nil {
		t.Fatal(err)
	}
	if _, err := Load(dir); !fault.Is(err, fault.Invalid) || !strings.Contains(err.Error(), "not whole") {
		t.Errorf("without its seal: %v", err)
	}
}

func TestStore(t *testing.T) {
	path := t.TempDir()
	dir, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer dir.Close()
	m := manifest()
	if err := Store(dir, m); err != nil {
		t.Fatal(err)
	}
	if got, err := Load(dir); err != nil || got.Container.Name != "web" {
		t.Errorf("%v, %v", got, err)
	}
	if err := Store(dir, m); err == nil {
		t.Error("it is stored twice")
	}
}

func TestRefused(t *testing.T) {
	with := func(change func(*Manifest)) *Manifest {
		m := manifest()
		change(m)
		return m
	}
	more := func(p ...part) []part { return append(parts(), p...) }
	for name, c := range map[string]struct {
		m, final *Manifest
		ps       []part
		want     string
	}{
		"no version":      {m: with(func(m *Manifest) { m.Version = 0 }), want: "no version"},
		"later version":   {m: with(func(m *Manifest) { m.Version = 9 }), want: "version 9"},
		"no container":    {m: with(func(m *Manifest) { m.Container.Config = nil }), want: "describes no container"},
		"id":              {m: with(func(m *Manifest) { m.Container.ID = "../../etc" }), want: "id is none"},
		"rounds":          {m: with(func(m *Manifest) { m.Rounds = 1000 }), want: "1000 rounds"},
		"cold with some":  {m: with(func(m *Manifest) { m.Cold = true }), want: "3 rounds"},
		"image id":        {m: with(func(m *Manifest) { m.Container.Image.ID = "x" }), want: "image's id"},
		"image digest":    {m: with(func(m *Manifest) { m.Container.Image.Digest = "x" }), want: "image's digest"},
		"volume":          {m: with(func(m *Manifest) { m.Volumes[0].Target = "/a/../b" }), want: "no place of its own"},
		"volume twice":    {m: with(func(m *Manifest) { m.Volumes = append(m.Volumes, m.Volumes[0]) }), want: "no place of its own"},
		"bind":            {m: with(func(m *Manifest) { m.Binds = []string{"etc"} }), want: "has no place"},
		"stream":          {m: with(func(m *Manifest) { m.Streams[0] = "/etc/passwd" }), want: "is no stream"},
		"endpoint":        {m: with(func(m *Manifest) { m.Container.Endpoints = map[string]*network.EndpointSettings{"n": nil} }), want: "endpoint"},
		"up":              {ps: more(part{"../x", ""}), want: "no part of it"},
		"absolute":        {ps: more(part{"/etc/passwd", ""}), want: "no part of it"},
		"deep":            {ps: more(part{"criu/1/a/b", ""}), want: "no part of it"},
		"hidden":          {ps: more(part{"criu/1/.x", ""}), want: "no part of it"},
		"dots":            {ps: more(part{"criu/1/..", ""}), want: "no part of it"},
		"another round":   {ps: more(part{"criu/4/x", ""}), want: "no part of it"},
		"another volume":  {ps: more(part{VolumeName(2), ""}), want: "no part of it"},
		"parent":          {ps: more(part{"criu/3/x", ""}, part{"criu/3/parent", "x"}), want: "no part of it"},
		"twice":           {ps: more(part{LayerName, "layer"}), want: "comes twice"},
		"no layer":        {ps: slices.DeleteFunc(parts(), func(p part) bool { return p.name == LayerName }), want: "lacks layer.tar"},
		"no image":        {ps: parts()[1:], want: "lacks image.tar"},
		"no volume":       {ps: parts()[:5], want: "lacks volumes/1.tar.zst"},
		"no last round":   {ps: parts(), want: "round 3 of its images is missing"},
		"other container": {final: with(func(m *Manifest) { m.Container.HostConfig.Privileged = true; m.Rounds = 2 }), want: "contradict"},
		"more rounds":     {final: with(func(m *Manifest) { m.Rounds = 4 }), want: "contradict"},
		"other volumes":   {final: with(func(m *Manifest) { m.Rounds, m.Volumes = 2, nil }), want: "contradict"},
		"no image then":   {final: with(func(m *Manifest) { m.Rounds, m.WithImage = 2, false }), want: "contradict"},
		"cold then":       {final: with(func(m *Manifest) { m.Rounds, m.Cold = 0, true }), want: "contradict"},
	} {
		t.Run(name, func(t *testing.T) {
			if c.m == nil {
				c.m = manifest()
			}
			if c.ps == nil {
				c.ps = parts()
			}
			_, path, err := read(t, write(t, c.m, c.final, c.ps), ReadOptions{})
			if err == nil || !strings.Contains(err.Error(), c.want) {
				t.Errorf("%v, want %q", err, c.want)
			}
			if _, err := os.Lstat(filepath.Join(path, SealName)); err == nil {
				t.Error("it is sealed")
			}
		})
	}
}

// TestBounds: what is too large is refused before it is written.
func TestBounds(t *testing.T) {
	final := manifest()
	final.Rounds = 2
	b := write(t, manifest(), final, append(parts()[:4:4], part{LayerName, strings.Repeat("x", 1<<20)}, part{VolumeName(1), "v"}))
	if _, path, err := read(t, b, ReadOptions{MaxBytes: 1 << 19}); !fault.Is(err, fault.Exhausted) {
		t.Error(err)
	} else if _, err := os.Lstat(filepath.Join(path, LayerName)); err == nil {
		t.Error("it has been written")
	}
	if _, _, err := read(t, b, ReadOptions{MaxBytes: 1 << 21}); err != nil {
		t.Error(err)
	}
	if _, _, err := read(t, b, ReadOptions{Manifest: func(*Manifest) error { return fault.New(fault.Forbidden, "no") }}); !fault.Is(err, fault.Forbidden) {
		t.Error(err)
	}
}

// TestDamaged: no byte that counts can be another, and nothing can be missing.
func TestDamaged(t *testing.T) {
	final := manifest()
	final.Rounds = 2
	whole := write(t, manifest(), final, parts())
	for n := 0; n < len(whole)-1024; n += 1280 {
		if _, _, err := read(t, whole[:n], ReadOptions{}); err == nil {
			t.Errorf("%d of %d bytes are taken for the whole", n, len(whole))
		}
	}
	want, _ := json.Marshal(final)
	for at := 0; at < len(whole); at += 173 {
		b := bytes.Clone(whole)
		b[at] ^= 1
		got, path, err := read(t, b, ReadOptions{})
		if err != nil {
			continue
		}
		// It was padding, or an attribute of the tar's that nothing looks at.
		if have, _ := json.Marshal(got); !bytes.Equal(have, want) {
			t.Errorf("byte %d: %s", at, have)
		}
		for _, p := range parts() {
			if b, err := os.ReadFile(filepath.Join(path, p.name)); err != nil || string(b) != p.data {
				t.Errorf("byte %d: %s: %q, %v", at, p.name, b, err)
			}
		}
	}
	// A link in the place of a file.
	var b bytes.Buffer
	tw := tar.NewWriter(&b)
	m, _ := json.Marshal(manifest())
	_ = tw.WriteHeader(&tar.Header{Name: ManifestName, Typeflag: tar.TypeReg, Size: int64(len(m))})
	_, _ = tw.Write(m)
	_ = tw.WriteHeader(&tar.Header{Name: LayerName, Typeflag: tar.TypeSymlink, Linkname: "/etc/passwd"})
	_ = tw.Close()
	if _, _, err := read(t, b.Bytes(), ReadOptions{}); err == nil || !strings.Contains(err.Error(), "no plain file") {
		t.Error(err)
	}
}

func TestName(t *testing.T) {
	for name, ok := range map[string]bool{"a": true, "a.b-c_1": true, "": false, ".a": false, "-a": false, "a/b": false, "..": false, strings.Repeat("a", 129): false, "a\n": false} {
		if err := CheckName(name); (err == nil) != ok {
			t.Errorf("%q: %v", name, err)
		}
	}
}

func FuzzManifest(f *testing.F) {
	b, _ := json.Marshal(manifest())
	f.Add(b)
	f.Add([]byte(`{"Version":1}`))
	f.Fuzz(func(t *testing.T, b []byte) {
		m, err := ParseManifest(b)
		if err != nil {
			return
		}
		again, err := json.Marshal(m)
		if err != nil {
			return // values that have no JSON, such as years beyond 9999
		}
		if _, err := ParseManifest(again); err != nil {
			t.Errorf("%s: %v", again, err)
		}
		for _, v := range m.Volumes {
			if !filepath.IsAbs(v.Target) || strings.Contains(v.Target, "..") && filepath.Clean(v.Target) != v.Target {
				t.Errorf("%q", v.Target)
			}
		}
	})
}

func FuzzRead(f *testing.F) {
	final := manifest()
	final.Rounds = 2
	f.Add(write(f, manifest(), final, parts()))
	f.Fuzz(func(t *testing.T, b []byte) {
		path := t.TempDir()
		dir, err := os.Open(path)
		if err != nil {
			t.Fatal(err)
		}
		defer dir.Close()
		if _, err := Read(context.Background(), bytes.NewReader(b), dir, ReadOptions{MaxBytes: 1 << 20}); err != nil {
			return
		}
		if _, err := Load(dir); err != nil {
			t.Error(err)
		}
	})
}
