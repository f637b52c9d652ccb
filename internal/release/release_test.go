package release

import (
	"bytes"
	"crypto/ed25519"
	"encoding/json"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/cloudos-io/cloudos/internal/fault"
)

// sample is a release of two and a half pieces of root.
func sample(t testing.TB) (*Manifest, map[string][]byte) {
	t.Helper()
	files := map[string][]byte{"kernel": []byte("kernel"), "boot.cfg": []byte("slot @slot@"), "root.img": bytes.Repeat([]byte("root"), ChunkSize*5/8)}
	m := &Manifest{FormatVersion: 1, Product: Product, Version: "1.2.3", Arch: "amd64", Platform: Metal, Kernel: "6.1"}
	for _, x := range []struct {
		name string
		use  Use
	}{{"kernel", Boot}, {"boot.cfg", Template}, {"root.img", Root}} {
		p, err := NewPart(x.name, x.use, bytes.NewReader(files[x.name]))
		if err != nil {
			t.Fatal(err)
		}
		m.Parts = append(m.Parts, p)
	}
	return m, files
}

func key(t testing.TB) (ed25519.PrivateKey, Key) {
	t.Helper()
	public, private, err := ed25519.GenerateKey(nil)
	if err != nil {
		t.Fatal(err)
	}
	return private, Key{Public: public}
}

func TestSignatures(t *testing.T) {
	m, _ := sample(t)
	one, oneKey := key(t)
	_, other := key(t)
	sealed, err := Seal(m, one)
	if err != nil {
		t.Fatal(err)
	}
	unsigned, err := Seal(m)
	if err != nil {
		t.Fatal(err)
	}
	// The signature of another manifest, under this one's.
	m.Version = "1.2.4"
	second, err := Seal(m, one)
	if err != nil {
		t.Fatal(err)
	}
	var a, b envelope
	if json.Unmarshal(sealed, &a) != nil || json.Unmarshal(second, &b) != nil {
		t.Fatal("an envelope is not JSON")
	}
	a.Payload = b.Payload
	moved, _ := json.Marshal(a)
	for name, c := range map[string]struct {
		sealed []byte
		keys   []Key
		want   string
	}{
		"signed":             {sealed, []Key{other, oneKey}, ""},
		"by nobody":          {unsigned, []Key{oneKey}, "not signed"},
		"by another":         {sealed, []Key{other}, "none of the keys"},
		"nobody is trusted":  {sealed, nil, "no key is trusted"},
		"another's signed":   {moved, []Key{oneKey}, "none of the keys"},
		"no envelope":        {[]byte("{}"), []Key{oneKey}, "instead of"},
		"no JSON":            {[]byte("x"), []Key{oneKey}, "cannot read"},
		"too large":          {make([]byte, MaxEnvelope+1), []Key{oneKey}, "larger"},
		"another type of it": {bytes.Replace(sealed, []byte("release.v1"), []byte("release.v2"), 1), []Key{oneKey}, "instead of"},
	} {
		got, signer, err := Signed(c.sealed, c.keys)
		if c.want == "" {
			if err != nil || signer != oneKey.ID() || got.Version != "1.2.3" {
				t.Errorf("%s: %v, %q", name, err, signer)
			}
			continue
		}
		if err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s: %v, want %q", name, err, c.want)
		}
	}
	if _, signer, err := Open(unsigned, []Key{oneKey}); err != nil || signer != "" {
		t.Errorf("an unsigned one opens with %q, %v", signer, err)
	}
}

func TestManifestIsChecked(t *testing.T) {
	for name, spoil := range map[string]func(m *Manifest){
		"format":       func(m *Manifest) { m.FormatVersion = 2 },
		"product":      func(m *Manifest) { m.Product = "other" },
		"version":      func(m *Manifest) { m.Version = "../1" },
		"arch":         func(m *Manifest) { m.Arch = "sparc" },
		"platform":     func(m *Manifest) { m.Platform = "" },
		"path":         func(m *Manifest) { m.Parts[0].Name = "../kernel" },
		"long name":    func(m *Manifest) { m.Parts[0].Name = "kernelimage" },
		"our own name": func(m *Manifest) { m.Parts[0].Name = "release.jsn" },
		"twice":        func(m *Manifest) { m.Parts[0].Name = m.Parts[1].Name },
		"use":          func(m *Manifest) { m.Parts[0].Use = "data" },
		"no root":      func(m *Manifest) { m.Parts = m.Parts[:2] },
		"two roots":    func(m *Manifest) { m.Parts[0].Use = Root },
		"nothing":      func(m *Manifest) { m.Parts = nil },
		"negative":     func(m *Manifest) { m.Parts[2].Size = -1 },
		"huge":         func(m *Manifest) { m.Parts[2].Size = 1 << 62 },
		"fewer pieces": func(m *Manifest) { m.Parts[2].Chunks = m.Parts[2].Chunks[:2] },
		"no digest":    func(m *Manifest) { m.Parts[2].Chunks[1] = "x" },
		"late loader":  func(m *Manifest) { m.Parts[0].Use, m.Parts[1].Use = Boot, BIOS },
		"late base":    func(m *Manifest) { m.Parts[0].Use, m.Parts[1].Use = ESP, Base },
		"large base": func(m *Manifest) {
			p := &m.Parts[0]
			p.Use, p.Size = Base, BaseLimit+1
			for int64(len(p.Chunks)) < (p.Size+ChunkSize-1)/ChunkSize {
				p.Chunks = append(p.Chunks, p.SHA256)
			}
		},
		"template": func(m *Manifest) { m.Parts[2].Use = Template },
	} {
		m, _ := sample(t)
		spoil(m)
		if _, err := Seal(m); fault.Of(err) != fault.Invalid {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// pack makes an archive of the sample's files, which may have been changed.
func pack(t testing.TB, m *Manifest, sealed []byte, files map[string][]byte) []byte {
	t.Helper()
	var b bytes.Buffer
	if err := Pack(&b, sealed, m, func(p *Part) (io.ReadCloser, error) { return io.NopCloser(bytes.NewReader(files[p.Name])), nil }); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

func read(b []byte, m *Manifest) (map[string][]byte, error) {
	a, err := ReadArchive(bytes.NewReader(b))
	if err != nil {
		return nil, err
	}
	got, buf := map[string][]byte{}, make([]byte, ChunkSize)
	for i := range m.Parts {
		p := &m.Parts[i]
		r, err := a.Open(p)
		if err != nil {
			return got, err
		}
		if err := p.Copy(r, buf, func(piece []byte, at int64) error { got[p.Name] = append(got[p.Name], piece...); return nil }); err != nil {
			return got, err
		}
	}
	return got, nil
}

func TestArchive(t *testing.T) {
	m, files := sample(t)
	private, trusted := key(t)
	sealed, err := Seal(m, private)
	if err != nil {
		t.Fatal(err)
	}
	b := pack(t, m, sealed, files)
	got, err := read(b, m)
	if err != nil {
		t.Fatal(err)
	}
	for name, want := range files {
		if !bytes.Equal(got[name], want) {
			t.Errorf("%s came back with %d bytes", name, len(got[name]))
		}
	}
	if a, err := ReadArchive(bytes.NewReader(b)); err != nil {
		t.Error(err)
	} else if _, _, err := Signed(a.Envelope(), []Key{trusted}); err != nil {
		t.Error(err)
	}
	// The last byte of the second piece of the root is changed: the first piece and
	// nothing else is handed on.
	at := bytes.Index(b, []byte("rootroot")) + 2*ChunkSize - 1
	b[at] ^= 1
	got, err = read(b, m)
	if fault.Of(err) != fault.Forbidden || len(got["root.img"]) != ChunkSize {
		t.Errorf("a changed piece: %v, with %d bytes handed on", err, len(got["root.img"]))
	}
	b[at] ^= 1
	if _, err := read(b[:at], m); err == nil {
		t.Error("half an archive passed")
	}
	if _, err := read([]byte("no archive at all, but some text"), m); err == nil {
		t.Error("a text passed")
	}
}

func TestOlder(t *testing.T) {
	for _, c := range []struct {
		a, b         string
		older, known bool
	}{
		{"1.2.3", "1.2.3", false, true}, {"1.2.3", "1.2.4", true, true}, {"v1.10.0", "1.9.0", false, true},
		{"1.0.0-rc.1", "1.0.0", true, true}, {"v1.0.0", "v1.0.0-4-gabcdef1", true, true}, {"v1.0.0-10-gabcdef1", "v1.0.0-9-g1234567-dirty", false, true},
		{"dev", "dev", false, true}, {"dev", "1.0.0", false, false}, {"2621927", "1.0.0", false, false}, {"26f1927", "1.0.0", false, false},
	} {
		older, known := Older(c.a, c.b)
		if older != c.older || known != c.known {
			t.Errorf("%s before %s: %v, %v", c.a, c.b, older, known)
		}
	}
}

func TestKeys(t *testing.T) {
	dir := t.TempDir()
	file := filepath.Join(dir, "key")
	k, err := Generate(file)
	if err != nil {
		t.Fatal(err)
	}
	if st, err := os.Stat(file); err != nil || st.Mode().Perm() != 0o600 {
		t.Errorf("the private key: %v, %v", st.Mode(), err)
	}
	if _, err := Generate(file); err == nil {
		t.Error("a key was overwritten")
	}
	private, err := ReadPrivate(file)
	if err != nil || !private.Public().(ed25519.PublicKey).Equal(k.Public) {
		t.Errorf("the private key came back as another: %v", err)
	}
	if keys, err := KeysIn(dir); err != nil || len(keys) != 1 || keys[0].ID() != k.ID() {
		t.Errorf("the folder has %v, %v", keys, err)
	}
	if _, err := ReadPublic(file); err == nil || strings.Contains(err.Error(), "PRIVATE") {
		t.Errorf("a private key as a public one: %v", err)
	}
}

func FuzzOpen(f *testing.F) {
	m, _ := sample(f)
	private, trusted := key(f)
	sealed, _ := Seal(m, private)
	f.Add(sealed)
	f.Add([]byte(`{"payloadType":"application/vnd.cloudos.release.v1+json","payload":"e30=","signatures":[{}]}`))
	f.Fuzz(func(t *testing.T, b []byte) {
		m, signer, err := Open(b, []Key{trusted})
		if err == nil && m.check() != nil {
			t.Fatal("a manifest passed that is not right")
		}
		if signer != "" && err == nil && !bytes.Contains(sealed, []byte(`"sig"`)) {
			t.Fatal("somebody else's signature passed")
		}
	})
}

func FuzzArchive(f *testing.F) {
	m, files := sample(f)
	sealed, _ := Seal(m)
	f.Add(pack(f, m, sealed, files)[:4096])
	f.Fuzz(func(t *testing.T, b []byte) { read(b, m) })
}
