package luks

import (
	"bytes"
	"crypto/rand"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
)

func volume(t testing.TB) (*os.File, *Header, []byte) {
	t.Helper()
	f, err := os.Create(filepath.Join(t.TempDir(), "disk"))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.Close() })
	if err := f.Truncate(DataOffset + 8<<20); err != nil {
		t.Fatal(err)
	}
	key := make([]byte, KeySize)
	rand.Read(key)
	h, err := New("cloudos-data", key)
	if err != nil {
		t.Fatal(err)
	}
	return f, h, key
}

// TestVolume has cryptsetup judge and open what was written, and opens what
// cryptsetup added.
func TestVolume(t *testing.T) {
	f, h, key := volume(t)
	for _, s := range []struct {
		secret   string
		strength Strength
	}{{"0123456789abcdef0123456789abcdef", Random}, {"correct horse", Chosen}} {
		if _, err := h.Add(f, key, []byte(s.secret), s.strength); err != nil {
			t.Fatal(err)
		}
	}
	if err := h.SetToken("cloudos-test", 0, map[string]any{"x": []int{7}}); err != nil {
		t.Fatal(err)
	}
	for _, x := range []int{1, 2} { // the second instead of the first
		if err := h.SetToken("cloudos-other", 0, map[string]int{"x": x}); err != nil {
			t.Fatal(err)
		}
	}
	if other := h.Tokens("cloudos-other"); len(other) != 1 || !bytes.Contains(other[0], []byte(`"x":2`)) {
		t.Fatalf("the tokens are %v", other)
	}
	if err := h.Write(f); err != nil {
		t.Fatal(err)
	}
	h, err := Read(f)
	if err != nil {
		t.Fatal(err)
	}
	if got, n, err := h.Open(f, []byte("correct horse")); err != nil || n != 1 || !bytes.Equal(got, key) {
		t.Fatalf("slot %d, %v", n, err)
	}
	if _, _, err := h.Open(f, []byte("wrong")); err == nil {
		t.Fatal("a wrong key opened it")
	}
	if len(h.Tokens("cloudos-test")) != 1 {
		t.Fatal("the token is gone")
	}
	if !h.DropTokens("cloudos-other") || h.DropTokens("cloudos-other") || len(h.Tokens("cloudos-test")) != 1 {
		t.Fatal("tokens of one type are not dropped alone")
	}
	if tool, err := exec.LookPath("cryptsetup"); err == nil {
		run := func(in string, args ...string) (string, error) {
			c := exec.Command(tool, args...)
			c.Stdin = bytes.NewBufferString(in)
			out, err := c.CombinedOutput()
			return string(out), err
		}
		if out, err := run("", "luksDump", f.Name()); err != nil {
			t.Fatalf("luksDump: %v\n%s", err, out)
		}
		for _, s := range []string{"correct horse", "0123456789abcdef0123456789abcdef"} {
			if out, err := run(s, "open", "--test-passphrase", "--key-file=-", f.Name()); err != nil {
				t.Fatalf("open: %v\n%s", err, out)
			}
		}
		if out, err := run("wrong", "open", "--test-passphrase", "--key-file=-", f.Name()); err == nil {
			t.Fatalf("a wrong key: %s", out)
		}
		added := filepath.Join(t.TempDir(), "k")
		if err := os.WriteFile(added, []byte("added"), 0o600); err != nil {
			t.Fatal(err)
		}
		if out, err := run("correct horse", "luksAddKey", "-q", "--pbkdf", "pbkdf2", "--pbkdf-force-iterations", "1000", "--key-file=-", f.Name(), added); err != nil {
			t.Fatalf("luksAddKey: %v\n%s", err, out)
		}
		if h, err = Read(f); err != nil {
			t.Fatal(err)
		}
		if got, _, err := h.Open(f, []byte("added")); err != nil || !bytes.Equal(got, key) {
			t.Fatal(err)
		}
	} else {
		t.Log("SKIP: cryptsetup is not installed")
	}
	if err := h.Remove(f, 1); err != nil {
		t.Fatal(err)
	}
	if h, err = Read(f); err != nil {
		t.Fatal(err)
	}
	if _, _, err := h.Open(f, []byte("correct horse")); err == nil {
		t.Fatal("a removed key opened it")
	}
}

// TestCut loses one copy of the header, as a power cut may.
func TestCut(t *testing.T) {
	f, h, key := volume(t)
	if _, err := h.Add(f, key, []byte("one"), Random); err != nil {
		t.Fatal(err)
	}
	if err := h.Write(f); err != nil {
		t.Fatal(err)
	}
	for _, at := range []int64{100, headerSize + 5000} {
		b := make([]byte, 64)
		f.ReadAt(b, at)
		f.WriteAt(make([]byte, 64), at)
		f.WriteAt([]byte{0xff}, at)
		got, err := Read(f)
		if err != nil {
			t.Fatal(err)
		}
		if _, _, err := got.Open(f, []byte("one")); err != nil {
			t.Fatal(err)
		}
		f.WriteAt(b, at)
	}
}

func FuzzDecode(f *testing.F) {
	file, h, _ := volume(f)
	if err := h.Write(file); err != nil {
		f.Fatal(err)
	}
	b := make([]byte, headerSize)
	file.ReadAt(b, 0)
	f.Add(b[binarySize : binarySize+2000])
	f.Fuzz(func(t *testing.T, doc []byte) {
		b := make([]byte, headerSize)
		file.ReadAt(b, 0)
		clear(b[binarySize:])
		copy(b[binarySize:], doc)
		if h, err := decodeUnchecked(b); err == nil {
			h.Data()
			h.Tokens("x")
		}
	})
}
