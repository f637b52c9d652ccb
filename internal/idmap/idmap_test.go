package idmap

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"reflect"
	"sync"
	"testing"

	"github.com/cloudos-io/cloudos/internal/fault"
	"github.com/cloudos-io/cloudos/internal/snapshot"
)

func testConfig(t *testing.T, files map[string]string) Config {
	t.Helper()
	dir := t.TempDir()
	path := func(name string) string {
		p := filepath.Join(dir, name)
		if s, ok := files[name]; ok {
			if err := os.WriteFile(p, []byte(s), 0o644); err != nil {
				t.Fatal(err)
			}
		}
		return p
	}
	return Config{
		Dir: filepath.Join(dir, "ranges"), SubUID: path("subuid"), SubGID: path("subgid"),
		Passwd: path("passwd"), Group: path("group"), UIDMap: path("uid_map"), GIDMap: path("gid_map"),
	}
}

func open(t *testing.T, cfg Config) *Allocator {
	t.Helper()
	a, err := New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { a.Close() })
	return a
}

func start(t *testing.T, a *Allocator, id string) uint32 {
	t.Helper()
	m, err := a.Allocate(t.Context(), id, false)
	if err != nil {
		t.Fatal(err)
	}
	if len(m.UIDs) != 1 || m.UIDs[0].Size != Size || m.UIDs[0].Container != 0 || !reflect.DeepEqual(m.UIDs, m.GIDs) {
		t.Fatalf("mapping %+v", m)
	}
	return m.UIDs[0].Host
}

func TestRangesAvoidOthers(t *testing.T) {
	a := open(t, testConfig(t, map[string]string{
		// One entry ends inside the second range, one begins inside the fourth,
		// and one user has an id in the fifth.
		"subuid":  fmt.Sprintf("# comment\nalice:%d:%d\n\n", first, Size+1),
		"subgid":  fmt.Sprintf("bob:%d:10\n1000:100000:65536\n", first+3*Size+7),
		"passwd":  fmt.Sprintf("x:x:%d:0::/:\n", first+4*Size),
		"uid_map": "         0          0 4294967295\n",
		"gid_map": "         0          0 4294967295\n",
	}))
	for i, want := range []uint32{first + 2*Size, first + 5*Size, first + 6*Size} {
		if got := start(t, a, fmt.Sprint("c", i)); got != want {
			t.Errorf("range %d starts at %d, want %d", i, got, want)
		}
	}
}

func TestRangesSurvive(t *testing.T) {
	cfg := testConfig(t, nil)
	a := open(t, cfg)
	one, two := start(t, a, "one"), start(t, a, "two")
	if again := start(t, a, "one"); again != one {
		t.Fatalf("another range for the same container: %d, %d", one, again)
	}
	b := open(t, cfg)
	if m, ok := b.Lookup("two"); !ok || m.UIDs[0].Host != two {
		t.Fatalf("after restart: %+v %v", m, ok)
	}
	if got := start(t, b, "three"); got == one || got == two {
		t.Fatalf("range %d is taken", got)
	}
	if err := b.Retain(func(id string) bool { return id != "one" }); err != nil {
		t.Fatal(err)
	}
	if got := start(t, b, "four"); got != one {
		t.Fatalf("freed range %d was not used again but %d", one, got)
	}
	for range 2 {
		if err := b.Release("two"); err != nil {
			t.Fatal(err)
		}
	}
	if _, ok := open(t, cfg).Lookup("two"); ok {
		t.Fatal("a released range came back")
	}
}

func TestConcurrentRangesAreDisjoint(t *testing.T) {
	a := open(t, testConfig(t, nil))
	var mu sync.Mutex
	seen := map[uint32]int{}
	var wg sync.WaitGroup
	for i := range 200 {
		wg.Go(func() {
			m, err := a.Allocate(context.Background(), fmt.Sprint(i%100), true)
			if err != nil {
				t.Error(err)
				return
			}
			mu.Lock()
			seen[m.UIDs[0].Host]++
			mu.Unlock()
		})
	}
	wg.Wait()
	if len(seen) != 100 {
		t.Fatalf("%d ranges for 100 containers", len(seen))
	}
}

func TestNoRange(t *testing.T) {
	for name, files := range map[string]map[string]string{
		"all subordinate": {"subuid": fmt.Sprintf("containers:%d:%d\n", first, last-first)},
		"user namespace":  {"uid_map": "0 1000 1\n1 100000 65536\n"},
	} {
		a := open(t, testConfig(t, files))
		if _, err := a.Allocate(t.Context(), "c", false); !fault.Is(err, fault.Unsupported) {
			t.Errorf("%s: got %v", name, err)
		}
		if left, _ := os.ReadDir(a.cfg.Dir); len(left) != 0 {
			t.Errorf("%s: record %v", name, left)
		}
	}
	a := open(t, testConfig(t, nil))
	for i := range int(last-first) / Size {
		if _, err := a.Allocate(t.Context(), fmt.Sprint(i), true); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := a.Allocate(t.Context(), "one more", false); !fault.Is(err, fault.Exhausted) {
		t.Errorf("got %v", err)
	}
	if _, err := a.Allocate(t.Context(), "../x", false); !fault.Is(err, fault.Invalid) {
		t.Errorf("got %v", err)
	}
}

func TestSubordinate(t *testing.T) {
	cfg := testConfig(t, map[string]string{
		"subuid": "bob:100000:65536\nalice:200000:1000\n1000:300000:10\nalice:200500:5\n",
		"subgid": "alice:500000:65536\n",
	})
	got, err := Subordinate(cfg, "alice", 1000, 1001)
	want := snapshot.IDMap{
		UIDs: []snapshot.IDRange{{Container: 0, Host: 1000, Size: 1}, {Container: 1, Host: 200000, Size: 1000}, {Container: 1001, Host: 300000, Size: 10}},
		GIDs: []snapshot.IDRange{{Container: 0, Host: 1001, Size: 1}, {Container: 1, Host: 500000, Size: 65536}},
	}
	if err != nil || !reflect.DeepEqual(got, want) {
		t.Errorf("got %+v %v", got, err)
	}
	if _, err := Subordinate(cfg, "carol", 1002, 1002); !fault.Is(err, fault.Unsupported) {
		t.Errorf("got %v", err)
	}
}
