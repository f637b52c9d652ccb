package plugin

import (
	"context"
	"errors"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/cloudos-io/cloudos/internal/fault"
)

func serve(t *testing.T, sock string, h http.HandlerFunc) *http.Server {
	t.Helper()
	l, err := net.Listen("unix", sock)
	if err != nil {
		t.Fatal(err)
	}
	s := &http.Server{Handler: h}
	go func() { _ = s.Serve(l) }()
	t.Cleanup(func() { s.Close() })
	return s
}

func implements(kinds string, next http.HandlerFunc) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path == "/Plugin.Activate" {
			_, _ = io.WriteString(w, `{"Implements":[`+kinds+`]}`)
			return
		}
		next(w, r)
	}
}

func TestFind(t *testing.T) {
	dir, other := t.TempDir(), t.TempDir()
	none := func(w http.ResponseWriter, _ *http.Request) { _, _ = io.WriteString(w, "{}") }
	serve(t, dir+"/one.sock", implements(`"VolumeDriver"`, none))
	if err := os.Mkdir(dir+"/two", 0o755); err != nil {
		t.Fatal(err)
	}
	serve(t, dir+"/two/two.sock", implements(`"NetworkDriver","VolumeDriver"`, none))
	serve(t, dir+"/net.sock", implements(`"NetworkDriver"`, none))
	serve(t, other+"/hidden", implements(`"VolumeDriver"`, none))
	files := map[string]string{
		"spec.spec": "unix://" + other + "/hidden\n", "json.json": `{"Name":"json","Addr":"unix://` + other + `/hidden"}`,
		"dead.spec": "unix://" + other + "/nobody", "bad.spec": "file:///etc/passwd", "rel.spec": "unix://relative", "junk.json": "{",
		"user.spec": "tcp://user:pass@127.0.0.1:1", "path.spec": "http://127.0.0.1:1/x", "big.spec": strings.Repeat("x", maxSpec+1),
	}
	for name, text := range files {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	if err := errors.Join(os.WriteFile(dir+"/open.spec", []byte(files["spec.spec"]), 0o644), os.Chmod(dir+"/open.spec", 0o666)); err != nil {
		t.Fatal(err)
	}
	s := New(Config{Dirs: []string{"/no/such/dir", dir}, Patience: 50 * time.Millisecond})
	if got := s.Names(t.Context(), "VolumeDriver"); !slices.Equal(got, []string{"json", "one", "spec", "two"}) {
		t.Errorf("names: %v", got)
	}
	for _, name := range []string{"one", "two", "spec", "json"} {
		if _, err := s.Find(t.Context(), "VolumeDriver", name); err != nil {
			t.Errorf("%s: %v", name, err)
		}
	}
	for _, name := range []string{"net", "nobody", "open", "", "../one", "a/b", strings.Repeat("a", 200)} {
		if _, err := s.Find(t.Context(), "VolumeDriver", name); !fault.Is(err, fault.NotFound) {
			t.Errorf("%.20s: %v", name, err)
		}
	}
	for _, name := range []string{"bad", "rel", "junk", "user", "path", "big"} {
		if _, err := s.Find(t.Context(), "VolumeDriver", name); !fault.Is(err, fault.Invalid) {
			t.Errorf("%s: %v", name, err)
		}
	}
	if _, err := s.Find(t.Context(), "VolumeDriver", "dead"); !fault.Is(err, fault.Unavailable) {
		t.Errorf("dead: %v", err)
	}
}

// TestHostile asks plugins that answer anything but what they should.
func TestHostile(t *testing.T) {
	dir := t.TempDir()
	var calls atomic.Int32
	answer := map[string]http.HandlerFunc{
		"endless": func(w http.ResponseWriter, _ *http.Request) {
			b := make([]byte, 1<<16)
			for range 1000 {
				if _, err := w.Write(b); err != nil {
					return
				}
			}
		},
		"deep":   func(w http.ResponseWriter, _ *http.Request) { _, _ = io.WriteString(w, strings.Repeat("[", 1<<20)) },
		"silent": func(_ http.ResponseWriter, r *http.Request) { <-r.Context().Done() },
		"redirect": func(w http.ResponseWriter, r *http.Request) {
			http.Redirect(w, r, "http://127.0.0.1:1/", http.StatusFound)
		},
		"type": func(w http.ResponseWriter, _ *http.Request) { _, _ = io.WriteString(w, `{"Err":7}`) },
		"refused": func(w http.ResponseWriter, _ *http.Request) {
			w.WriteHeader(500)
			_, _ = io.WriteString(w, `{"Err":"no\u001b[31m\n`+strings.Repeat("x", 5000)+`"}`)
		},
		"cut": func(w http.ResponseWriter, _ *http.Request) {
			calls.Add(1)
			c, _, _ := w.(http.Hijacker).Hijack()
			_, _ = io.WriteString(c, "HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\n{")
			c.Close()
		},
	}
	serve(t, dir+"/p.sock", implements(`"VolumeDriver"`, func(w http.ResponseWriter, r *http.Request) {
		_, what, _ := strings.Cut(r.URL.Path, ".")
		answer[what](w, r)
	}))
	s := New(Config{Dirs: []string{dir}, Patience: time.Second})
	p, err := s.Find(t.Context(), "VolumeDriver", "p")
	if err != nil {
		t.Fatal(err)
	}
	for what := range answer {
		ctx, cancel := context.WithTimeout(t.Context(), 300*time.Millisecond)
		var out struct{ Mountpoint string }
		err := p.Call(ctx, "VolumeDriver."+what, nil, &out)
		cancel()
		if err == nil {
			t.Errorf("%s: no error", what)
			continue
		}
		if strings.ContainsAny(err.Error(), "\x1b\n") || len(err.Error()) > 2000 {
			t.Errorf("%s: %q", what, err)
		}
		var r *Refused
		if what == "refused" && !errors.As(err, &r) {
			t.Errorf("%v", err)
		}
		if what == "silent" && !fault.Is(err, fault.DeadlineExceeded) {
			t.Errorf("%v", err)
		}
	}
	if n := calls.Load(); n != 1 {
		t.Errorf("a request that may have arrived was sent %d times", n)
	}
}

// TestLate: a plugin that is just starting is waited for.
func TestLate(t *testing.T) {
	dir := t.TempDir()
	sock := dir + "/late.sock"
	l, err := net.Listen("unix", sock)
	if err != nil {
		t.Fatal(err)
	}
	l.(*net.UnixListener).SetUnlinkOnClose(false)
	l.Close() // a socket that nobody serves
	s := New(Config{Dirs: []string{dir}, Patience: 10 * time.Second})
	time.AfterFunc(200*time.Millisecond, func() {
		_ = os.Remove(sock)
		l, err := net.Listen("unix", sock)
		if err == nil {
			go func() {
				_ = http.Serve(l, implements(`"VolumeDriver"`, func(http.ResponseWriter, *http.Request) {}))
			}()
		}
	})
	if _, err := s.Find(t.Context(), "VolumeDriver", "late"); err != nil {
		t.Error(err)
	}
}
