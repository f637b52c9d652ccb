package secret

import (
	"bytes"
	"encoding/json"
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/cloudos-io/cloudos/api"
	"github.com/cloudos-io/cloudos/internal/fault"
)

func open(t *testing.T, dir string) *Store {
	t.Helper()
	s, err := New(Config{Dir: dir})
	if err != nil {
		t.Fatal(err)
	}
	s.work = 2 // the tests' passphrases need no protection
	return s
}

func put(t *testing.T, s *Store, k api.SecretKind, name, value string) api.Secret {
	t.Helper()
	x, err := s.Create(k, api.SecretSpec{Name: name, Data: []byte(value)})
	if err != nil {
		t.Fatal(err)
	}
	return x
}

func value(t *testing.T, s *Store, k api.SecretKind, name string) string {
	t.Helper()
	b, _, err := s.Reveal(k, name)
	if err != nil {
		t.Fatalf("%s: %v", name, err)
	}
	return string(b)
}

func TestRoundTrip(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "secrets")
	s := open(t, dir)
	if _, err := os.Stat(dir); err == nil {
		t.Error("an engine without secrets makes their directory")
	}
	x := put(t, s, api.KindSecret, "db", "hunter2-hunter2")
	put(t, s, api.KindConfig, "db", "other kind")
	if _, err := s.Create(api.KindSecret, api.SecretSpec{Name: "db", Data: []byte("x")}); !fault.Is(err, fault.Conflict) {
		t.Errorf("twice: %v", err)
	}
	for _, name := range []string{"", "a/b", "-a", "a-", "..", strings.Repeat("x", 65), "a b"} {
		if _, err := s.Create(api.KindSecret, api.SecretSpec{Name: name, Data: []byte("x")}); !fault.Is(err, fault.Invalid) {
			t.Errorf("name %q: %v", name, err)
		}
	}
	for _, n := range []int{0, maxSecret + 1} {
		if _, err := s.Create(api.KindSecret, api.SecretSpec{Name: "big", Data: make([]byte, n)}); !fault.Is(err, fault.Invalid) {
			t.Errorf("%d bytes: %v", n, err)
		}
	}
	s = open(t, dir)
	if got := value(t, s, api.KindSecret, x.ID[:8]); got != "hunter2-hunter2" {
		t.Errorf("after reopening: %q", got)
	}
	u, err := s.Update(api.KindSecret, "db", api.SecretSpec{Data: []byte("new value")})
	if err != nil || u.Revision != 2 || u.ID != x.ID {
		t.Errorf("update: %+v %v", u, err)
	}
	s = open(t, dir)
	if got := value(t, s, api.KindSecret, "db"); got != "new value" {
		t.Errorf("after an update: %q", got)
	}
	if err := s.Remove(api.KindSecret, "db"); err != nil {
		t.Fatal(err)
	}
	if got := value(t, open(t, dir), api.KindConfig, "db"); got != "other kind" {
		t.Errorf("the config: %q", got)
	}
}

// TestAtRest looks for values on the disk and at the modes of what is there.
func TestAtRest(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "secrets")
	s := open(t, dir)
	put(t, s, api.KindSecret, "db", "hunter2-hunter2")
	list, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range list {
		b, err := os.ReadFile(filepath.Join(dir, f.Name()))
		if err != nil {
			t.Fatal(err)
		}
		if bytes.Contains(b, []byte("hunter2")) {
			t.Errorf("%s holds the value", f.Name())
		}
		if fi, _ := f.Info(); fi.Mode().Perm() != 0o600 {
			t.Errorf("%s has mode %v", f.Name(), fi.Mode())
		}
	}
	if fi, _ := os.Stat(dir); fi.Mode().Perm() != 0o700 {
		t.Errorf("the directory has mode %v", fi.Mode())
	}
	// A key that others can read is not used.
	if err := os.Chmod(filepath.Join(dir, "key"), 0o644); err != nil {
		t.Fatal(err)
	}
	if _, err := New(Config{Dir: dir}); !fault.Is(err, fault.Invalid) {
		t.Errorf("a readable key: %v", err)
	}
}

// TestTampering changes records in every way that somebody who can write to the
// disk might try.
func TestTampering(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "secrets")
	s := open(t, dir)
	a, b := put(t, s, api.KindSecret, "a", "value a"), put(t, s, api.KindSecret, "b", "value b")
	path := func(id string) string { return filepath.Join(dir, id+".secret") }
	read := func(id string) *record {
		raw, err := os.ReadFile(path(id))
		if err != nil {
			t.Fatal(err)
		}
		r := new(record)
		if err := json.Unmarshal(raw, r); err != nil {
			t.Fatal(err)
		}
		return r
	}
	good, _ := os.ReadFile(path(a.ID))
	for what, change := range map[string]func(r *record){
		"other value":    func(r *record) { r.Sealed = read(b.ID).Sealed },
		"other name":     func(r *record) { r.Name = "c" },
		"other kind":     func(r *record) { r.Kind = api.KindConfig },
		"other revision": func(r *record) { r.Revision++ },
		"flipped":        func(r *record) { r.Sealed[30] ^= 1 },
		"cut":            func(r *record) { r.Sealed = r.Sealed[:10] },
		"other key":      func(r *record) { r.Key = "00" },
	} {
		r := read(a.ID)
		change(r)
		raw, _ := json.Marshal(r)
		if err := os.WriteFile(path(a.ID), raw, 0o600); err != nil {
			t.Fatal(err)
		}
		s := open(t, dir)
		if v, _, err := s.Reveal(r.Kind, a.ID); err == nil {
			t.Errorf("%s: opened as %q", what, v)
		} else if strings.Contains(err.Error(), "value") && !strings.Contains(err.Error(), "changed") {
			t.Errorf("%s: %v", what, err)
		}
		if err := os.WriteFile(path(a.ID), good, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	for _, junk := range []string{"", "{", `{"Version":9}`, `[]`, strings.Repeat("x", maxRecord+2)} {
		if err := os.WriteFile(path(a.ID), []byte(junk), 0o600); err != nil {
			t.Fatal(err)
		}
		s := open(t, dir)
		if l := s.List(api.KindSecret); len(l) != 1 || l[0].Name != "b" {
			t.Errorf("with %.10q: %v", junk, l)
		}
	}
	// Without its keyring or key nothing starts as if there were no secrets.
	for _, f := range []string{"key", ringFile} {
		b, _ := os.ReadFile(filepath.Join(dir, f))
		os.Remove(filepath.Join(dir, f))
		if _, err := New(Config{Dir: dir}); err == nil {
			t.Errorf("opened without %s", f)
		}
		if err := os.WriteFile(filepath.Join(dir, f), b, 0o600); err != nil {
			t.Fatal(err)
		}
	}
}

func TestKeys(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "secrets")
	s := open(t, dir)
	put(t, s, api.KindSecret, "a", "value a")
	key, _ := os.ReadFile(filepath.Join(dir, "key"))
	if err := s.Rekey(""); err != nil {
		t.Fatal(err)
	}
	if k, _ := os.ReadFile(filepath.Join(dir, "key")); bytes.Equal(k, key) {
		t.Error("the key is the old one")
	}
	if got := value(t, open(t, dir), api.KindSecret, "a"); got != "value a" {
		t.Errorf("with the new key: %q", got)
	}
	if err := s.Rekey("correct horse"); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(filepath.Join(dir, "key")); err == nil {
		t.Error("a key file lies beside the passphrase")
	}
	s = open(t, dir)
	if _, _, err := s.Reveal(api.KindSecret, "a"); !fault.Is(err, fault.Unavailable) || !s.Locked() {
		t.Errorf("locked: %v", err)
	}
	if _, err := s.Create(api.KindSecret, api.SecretSpec{Name: "b", Data: []byte("x")}); !fault.Is(err, fault.Unavailable) {
		t.Errorf("create while locked: %v", err)
	}
	if err := s.Unlock("wrong horse"); !fault.Is(err, fault.Forbidden) {
		t.Errorf("a wrong passphrase: %v", err)
	}
	if err := s.Unlock("correct horse"); err != nil {
		t.Fatal(err)
	}
	if got := value(t, s, api.KindSecret, "a"); got != "value a" {
		t.Errorf("unlocked: %q", got)
	}
	if err := s.Lock(); err != nil || !s.Locked() {
		t.Errorf("lock: %v", err)
	}
	// From a file.
	pass := filepath.Join(t.TempDir(), "pass")
	if err := os.WriteFile(pass, []byte("correct horse\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	s, err := New(Config{Dir: dir, PassphraseFile: pass})
	if err != nil || s.Locked() {
		t.Fatalf("with a passphrase file: %v", err)
	}
}

// TestRekeyCutShort stops a change of keys before every change of the disk.
func TestRekeyCutShort(t *testing.T) {
	for _, passphrase := range []string{"", "correct horse"} {
		cut := errors.New("cut")
		for n := 0; ; n++ {
			dir := filepath.Join(t.TempDir(), "secrets")
			s := open(t, dir)
			for _, name := range []string{"a", "b", "c"} {
				put(t, s, api.KindSecret, name, "value "+name)
			}
			left := n
			s.step = func() error {
				if left--; left < 0 {
					return cut
				}
				return nil
			}
			err := s.Rekey(passphrase)
			s = open(t, dir)
			if s.Locked() {
				if err := s.Unlock(passphrase); err != nil {
					t.Fatalf("cut at step %d: %v", n, err)
				}
			}
			for _, name := range []string{"a", "b", "c"} {
				if got := value(t, s, api.KindSecret, name); got != "value "+name {
					t.Errorf("cut at step %d: %s is %q", n, name, got)
				}
			}
			// And it can be done again.
			if n%3 == 0 {
				if err := s.Rekey(""); err != nil {
					t.Errorf("cut at step %d, then again: %v", n, err)
				}
				if got := value(t, open(t, dir), api.KindSecret, "c"); got != "value c" {
					t.Errorf("cut at step %d, then again: %q", n, got)
				}
			}
			if err == nil {
				if n < 5 {
					t.Errorf("only %d steps", n)
				}
				break
			}
		}
	}
}

func FuzzRecord(f *testing.F) {
	f.Add([]byte(`{"Version":1,"Kind":"secret","ID":"00","Name":"a","Sealed":"AAAA"}`))
	f.Fuzz(func(t *testing.T, b []byte) {
		dir := t.TempDir()
		if err := os.WriteFile(filepath.Join(dir, "00.secret"), b, 0o600); err != nil {
			t.Fatal(err)
		}
		s := &Store{c: Config{Dir: dir}, items: map[string]*record{}, ring: &keyring{Current: "k", keys: map[string][]byte{"k": make([]byte, 32)}}}
		r, err := s.read("00")
		if err != nil {
			return
		}
		if _, err := s.open(r); err == nil {
			t.Error("opened what nobody sealed")
		}
	})
}

func TestRefs(t *testing.T) {
	var got []string
	for _, s := range []string{"a", "a,target=/x/y,uid=7,gid=8,mode=0400", "source=a,target=b"} {
		r, err := api.ParseSecretRef(api.KindSecret, s)
		if err != nil {
			t.Errorf("%q: %v", s, err)
		}
		got = append(got, r.Name+" "+r.Target)
	}
	if !slices.Equal(got, []string{"a ", "a /x/y", "a b"}) {
		t.Errorf("%q", got)
	}
	for _, s := range []string{"", "a,x", "a,target=../b", "a,target=b/c", "a,target=/", "a,mode=1777", "a,mode=z", "a,uid=-1", "a,uid=4294967295", "a,color=red", "target=/x"} {
		if _, err := api.ParseSecretRef(api.KindSecret, s); err == nil {
			t.Errorf("%q was accepted", s)
		}
	}
}
