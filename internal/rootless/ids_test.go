package rootless

import (
	"os"
	"path/filepath"
	"testing"
)

func TestStartTime(t *testing.T) {
	first := startTime(os.Getpid())
	if again := startTime(os.Getpid()); first == "" || first != again {
		t.Errorf("start times of this process: %q, %q", first, again)
	}
	if startTime(0) != "" {
		t.Error("a start time of no process")
	}
}

func TestRecord(t *testing.T) {
	path := filepath.Join(t.TempDir(), recordName)
	h := holder{Version: recordVersion, process: identify(os.Getpid()), Boot: bootID(), CgroupBase: "/x", Link: link{Kind: Pasta, process: process{7, "8"}}}
	if err := save(path, h); err != nil {
		t.Fatal(err)
	}
	if got, alive := load(path); !alive || got != h {
		t.Errorf("got %+v (alive: %v), want %+v", got, alive, h)
	}
	for name, spoil := range map[string]func(*holder){
		"another process of that number": func(h *holder) { h.Started += "0" },
		"a former boot":                  func(h *holder) { h.Boot = "x" },
		"another version":                func(h *holder) { h.Version++ },
		"init":                           func(h *holder) { h.process = identify(1) },
	} {
		other := h
		spoil(&other)
		if err := save(path, other); err != nil {
			t.Fatal(err)
		}
		if _, alive := load(path); alive {
			t.Errorf("%s passed for the holder", name)
		}
	}
}

func TestInside(t *testing.T) {
	for _, env := range []string{"", "x", `{"UID":1}`} {
		t.Setenv(Marker, env)
		m, _ := os.ReadFile("/proc/self/uid_map")
		if Inside().Active && len(m) > 0 && env != `{"UID":1}` {
			t.Errorf("%q passed for being inside", env)
		}
	}
}

func TestReachable(t *testing.T) {
	for text, want := range map[string]bool{
		"nameserver 10.0.0.1\n":                          true,
		"nameserver 127.0.0.53\noptions edns0\n":         false,
		"nameserver 127.0.0.1\nnameserver 2001:db8::1\n": true,
		"nameserver ::1\n":                               false,
		"# nameserver 10.0.0.1\n":                        false,
		"":                                               false,
	} {
		path := filepath.Join(t.TempDir(), "resolv.conf")
		if err := os.WriteFile(path, []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
		if got := reachable(path) != nil; got != want {
			t.Errorf("%q: %v, want %v", text, got, want)
		}
	}
}

func TestOurs(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "run")
	if err := os.Mkdir(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	if err := ours(dir); err != nil {
		t.Error(err)
	}
	if err := os.Chmod(dir, 0o770); err != nil {
		t.Fatal(err)
	}
	if ours(dir) == nil {
		t.Error("a group's folder passed")
	}
	if os.Getuid() != 0 {
		return
	}
	if err := os.Chmod(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.Chown(dir, 1, 1); err != nil {
		t.Fatal(err)
	}
	if ours(dir) == nil {
		t.Error("another user's folder passed")
	}
}
