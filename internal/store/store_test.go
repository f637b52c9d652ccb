package store

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"github.com/cloudos-io/cloudos/internal/fault"
)

func open(t *testing.T, c Config) *DB {
	t.Helper()
	c.Buckets = []string{"a", "b"}
	d, err := Open(c)
	if err != nil {
		t.Fatal(err)
	}
	return d
}

func all(t *testing.T, d *DB, bucket string) map[string]string {
	t.Helper()
	m := map[string]string{}
	if bad, err := d.Load(bucket, func(k string, v []byte) error { m[k] = string(v); return nil }); err != nil || bad != nil {
		t.Fatal(bad, err)
	}
	return m
}

func TestChangesAreKeptInOrder(t *testing.T) {
	for _, ephemeral := range []bool{false, true} {
		c := Config{Path: filepath.Join(t.TempDir(), "x.db"), Ephemeral: ephemeral, BootID: "1"}
		d := open(t, c)
		var wg sync.WaitGroup
		for i := range 50 {
			wg.Go(func() {
				k := fmt.Sprint(i)
				d.Put("a", k, []byte("first"))
				d.Put("a", k, []byte("second"))
				p := d.Put("b", k, []byte("x"))
				if i%2 == 0 {
					p = d.Delete("b", k)
				}
				if err := p.Wait(); err != nil {
					t.Error(err)
				}
			})
		}
		wg.Wait()
		if err := d.Close(); err != nil {
			t.Fatal(err)
		}
		if err := d.Put("a", "late", []byte("x")).Wait(); !fault.Is(err, fault.Unavailable) {
			t.Errorf("after close: %v", err)
		}
		d = open(t, c)
		a, b := all(t, d, "a"), all(t, d, "b")
		if len(a) != 50 || len(b) != 25 {
			t.Errorf("kept %d and %d", len(a), len(b))
		}
		for k, v := range a {
			if v != "second" {
				t.Errorf("%s = %s", k, v)
			}
		}
		if err := d.Close(); err != nil {
			t.Fatal(err)
		}
	}
}

func TestOneDaemonAtATime(t *testing.T) {
	c := Config{Path: filepath.Join(t.TempDir(), "x.db"), LockTimeout: 50 * time.Millisecond}
	d := open(t, c)
	defer d.Close()
	if _, err := Open(c); !fault.Is(err, fault.Conflict) {
		t.Errorf("second open: %v", err)
	}
}

func TestQuarantine(t *testing.T) {
	c := Config{Path: filepath.Join(t.TempDir(), "x.db")}
	d := open(t, c)
	defer d.Close()
	d.Put("a", "good", []byte("1"))
	if err := d.Put("a", "bad", []byte("2")).Wait(); err != nil {
		t.Fatal(err)
	}
	why := errors.New("torn")
	n := 0
	bad, err := d.Load("a", func(k string, _ []byte) error {
		n++
		if k == "bad" {
			return why
		}
		return nil
	})
	if err != nil || len(bad) != 1 || bad[0].Key != "bad" || !errors.Is(bad[0].Err, why) || n != 2 {
		t.Fatalf("%+v, %v", bad, err)
	}
	if m := all(t, d, "a"); len(m) != 1 || m["good"] != "1" {
		t.Errorf("left: %v", m)
	}
	if m := all(t, d, quarantine); m["a/bad"] != "2" {
		t.Errorf("quarantine: %v", m)
	}
}

func TestDamagedFileIsSetAside(t *testing.T) {
	for name, spoil := range map[string]func(b []byte) []byte{
		"cut":     func(b []byte) []byte { return b[:100] },
		"garbage": func(b []byte) []byte { return append([]byte("not a database at all"), make([]byte, 20000)...) },
		"metas":   func(b []byte) []byte { clear(b[:2*os.Getpagesize()]); return b },
		"root":    func(b []byte) []byte { clear(b[2*os.Getpagesize():]); return b },
	} {
		c := Config{Path: filepath.Join(t.TempDir(), "x.db")}
		d := open(t, c)
		if err := d.Put("a", "k", []byte("v")).Wait(); err != nil {
			t.Fatal(err)
		}
		d.Close()
		b, err := os.ReadFile(c.Path)
		if err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(c.Path, spoil(b), 0o600); err != nil {
			t.Fatal(err)
		}
		d, err = Open(Config{Path: c.Path, Buckets: []string{"a", "b"}})
		if err != nil {
			t.Errorf("%s: %v", name, err)
			continue
		}
		if _, err := os.Stat(d.SetAside); err != nil {
			t.Errorf("%s: not set aside: %v", name, err)
		}
		if m := all(t, d, "a"); len(m) != 0 {
			t.Errorf("%s: %v", name, m)
		}
		d.Close()
	}
}

func TestEphemeralEndsWithTheBoot(t *testing.T) {
	c := Config{Path: filepath.Join(t.TempDir(), "x.db"), Ephemeral: true, BootID: "1"}
	for i, want := range []int{0, 1, 0} {
		if i == 2 {
			c.BootID = "2"
		}
		d := open(t, c)
		if m := all(t, d, "a"); len(m) != want {
			t.Errorf("opening %d: %v", i, m)
		}
		d.Put("a", "k", []byte("v"))
		d.Close()
	}
}

func TestNames(t *testing.T) {
	n := NewNames()
	if err := n.Reserve("web", "1"); err != nil {
		t.Fatal(err)
	}
	if err := n.Reserve("web", "1"); err != nil {
		t.Error(err)
	}
	if err := n.Reserve("web", "2"); !fault.Is(err, fault.Conflict) {
		t.Errorf("taken name: %v", err)
	}
	n.Release("web", "2")
	if id, ok := n.Lookup("web"); !ok || id != "1" {
		t.Error("released by a stranger")
	}
	n.Release("web", "1")
	if _, ok := n.Lookup("web"); ok {
		t.Error("not released")
	}
}

func BenchmarkPutEphemeral(b *testing.B) {
	d, err := Open(Config{Path: filepath.Join(b.TempDir(), "x.db"), Buckets: []string{"a"}, Ephemeral: true, BootID: "1"})
	if err != nil {
		b.Fatal(err)
	}
	defer d.Close()
	v := make([]byte, 3000)
	for i := range b.N {
		if err := d.Put("a", fmt.Sprint(i%64), v).Wait(); err != nil {
			b.Fatal(err)
		}
	}
}

func BenchmarkPutDurable(b *testing.B) {
	d, err := Open(Config{Path: filepath.Join(b.TempDir(), "x.db"), Buckets: []string{"a"}})
	if err != nil {
		b.Fatal(err)
	}
	defer d.Close()
	v := make([]byte, 3000)
	for i := range b.N {
		if err := d.Put("a", fmt.Sprint(i%64), v).Wait(); err != nil {
			b.Fatal(err)
		}
	}
}
