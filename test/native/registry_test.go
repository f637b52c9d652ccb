package native

import (
	"crypto/sha256"
	"fmt"
	"io"
	"log"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/google/go-containerregistry/pkg/name"
	"github.com/google/go-containerregistry/pkg/registry"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/random"
	"github.com/google/go-containerregistry/pkg/v1/remote"

	"github.com/cloudos-io/cloudos/test/harness"
)

// lie replaces a registry's answer; it reports whether it has answered.
type lie func(w http.ResponseWriter, r *http.Request) bool

// registryHost is a registry on loopback that can be made to lie.
type registryHost struct {
	addr string
	lie  atomic.Pointer[lie]
}

func startRegistry(t *testing.T) *registryHost {
	t.Helper()
	h := new(registryHost)
	inner := registry.New(registry.Logger(log.New(io.Discard, "", 0)))
	srv := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if l := h.lie.Load(); l != nil && (*l)(w, r) {
			return
		}
		inner.ServeHTTP(w, r)
	}))
	t.Cleanup(srv.Close)
	h.addr = strings.TrimPrefix(srv.URL, "http://")
	return h
}

// push stores an image of random layers and returns it with its reference.
func (h *registryHost) push(t *testing.T, repo string, size, layers int64) (string, v1.Image) {
	t.Helper()
	img, err := random.Image(size, layers)
	if err != nil {
		t.Fatal(err)
	}
	cf, err := img.ConfigFile()
	if err != nil {
		t.Fatal(err)
	}
	cf = cf.DeepCopy()
	cf.OS, cf.Architecture = "linux", "amd64"
	if img, err = mutate.ConfigFile(img, cf); err != nil {
		t.Fatal(err)
	}
	ref := h.addr + "/" + repo
	n, err := name.ParseReference(ref)
	if err != nil {
		t.Fatal(err)
	}
	if err := remote.Write(n, img); err != nil {
		t.Fatal(err)
	}
	return ref, img
}

// set makes the registry lie from now on; nil makes it honest.
func (h *registryHost) set(l lie) {
	if l == nil {
		h.lie.Store(nil)
		return
	}
	h.lie.Store(&l)
}

// layerOf tells whether a request is for the blob of the image's first layer.
func layerOf(t *testing.T, img v1.Image) func(*http.Request) bool {
	t.Helper()
	ls, err := img.Layers()
	if err != nil {
		t.Fatal(err)
	}
	d, err := ls[0].Digest()
	if err != nil {
		t.Fatal(err)
	}
	return func(r *http.Request) bool {
		return r.Method == http.MethodGet && strings.HasSuffix(r.URL.Path, d.String())
	}
}

// TestLyingRegistry pulls from registries that do what they must not. Each pull
// fails with a reason, leaves no image, and the honest registry is served after.
func TestLyingRegistry(t *testing.T) {
	e := start(t)
	h := startRegistry(t)
	ref, img := h.push(t, "x:1", 2<<20, 2)
	isLayer := layerOf(t, img)
	ls, _ := img.Layers()
	size, _ := ls[0].Size()
	manifest := func(body func() string, kind string) lie {
		return func(w http.ResponseWriter, r *http.Request) bool {
			if !strings.Contains(r.URL.Path, "/manifests/") {
				return false
			}
			b := body()
			w.Header().Set("Content-Type", kind)
			// The lie is a consistent one, so that what it says is looked at.
			w.Header().Set("Docker-Content-Digest", fmt.Sprintf("sha256:%x", sha256.Sum256([]byte(b))))
			w.Header().Set("Content-Length", fmt.Sprint(len(b)))
			if r.Method != http.MethodHead {
				_, _ = io.WriteString(w, b)
			}
			return true
		}
	}
	layer := func(answer func(w http.ResponseWriter, r *http.Request)) lie {
		return func(w http.ResponseWriter, r *http.Request) bool {
			if !isLayer(r) {
				return false
			}
			answer(w, r)
			return true
		}
	}
	const kind = "application/vnd.docker.distribution.manifest.v2+json"
	junk := strings.Repeat("j", 64<<10)
	cases := []struct {
		name string
		lie  lie
	}{
		{"other bytes of the right size", layer(func(w http.ResponseWriter, _ *http.Request) {
			w.Header().Set("Content-Length", fmt.Sprint(size))
			for left := size; left > 0; left -= int64(len(junk)) {
				_, _ = io.WriteString(w, junk[:min(left, int64(len(junk)))])
			}
		})},
		{"cut off each time", layer(func(w http.ResponseWriter, _ *http.Request) {
			w.Header().Set("Content-Length", fmt.Sprint(size))
			_, _ = io.WriteString(w, junk[:1000])
			panic(http.ErrAbortHandler)
		})},
		{"endless", layer(func(w http.ResponseWriter, r *http.Request) {
			for r.Context().Err() == nil {
				if _, err := io.WriteString(w, junk); err != nil {
					return
				}
			}
		})},
		{"a byte more", layer(func(w http.ResponseWriter, _ *http.Request) {
			rc, err := ls[0].Compressed()
			if err == nil {
				_, _ = io.Copy(w, rc)
				rc.Close()
			}
			_, _ = io.WriteString(w, "x")
		})},
		{"other manifest than asked for", func(w http.ResponseWriter, r *http.Request) bool {
			if !strings.Contains(r.URL.Path, "/manifests/") || r.Method != http.MethodGet {
				return false
			}
			w.Header().Set("Content-Type", kind)
			_, _ = io.WriteString(w, `{"schemaVersion":2}`)
			return true
		}},
		{"gone", layer(func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(http.StatusNotFound) })},
		{"no json", manifest(func() string { return "<html>welcome</html>" }, kind)},
		{"deep json", manifest(func() string { return strings.Repeat("[", 1<<20) }, kind)},
		{"huge manifest", manifest(func() string { return strings.Repeat(" ", 64<<20) + "{}" }, kind)},
		{"empty manifest", manifest(func() string { return "{}" }, kind)},
		{"unknown type", manifest(func() string { return "{}" }, "text/plain")},
		{"digest with a path", manifest(func() string {
			return `{"schemaVersion":2,"mediaType":"` + kind + `","config":{"mediaType":"application/vnd.docker.container.image.v1+json","size":2,"digest":"sha256:../../../../etc/passwd"},"layers":[]}`
		}, kind)},
		{"negative size", manifest(func() string {
			return `{"schemaVersion":2,"mediaType":"` + kind + `","config":{"mediaType":"application/vnd.docker.container.image.v1+json","size":-1,"digest":"sha256:` + strings.Repeat("a", 64) + `"},"layers":[]}`
		}, kind)},
	}
	for _, c := range cases {
		t.Run(c.name, func(t *testing.T) {
			h.set(c.lie)
			defer h.set(nil)
			r := e.run("pull", ref)
			if r.code == 0 {
				t.Fatalf("pulled: %s", r)
			}
			if !strings.Contains(r.err, "cannot") && !strings.Contains(r.err, "not found") {
				t.Errorf("no clear error: %s", r)
			}
			if r.took > 60*time.Second {
				t.Errorf("took %s", r.took)
			}
			if out := e.must("images", "-q", h.addr+"/x"); out != "" {
				t.Errorf("an image is there: %q", out)
			}
			t.Logf("%s: %s", r.took.Round(time.Millisecond), strings.TrimSpace(r.err))
		})
	}
	// Cut off twice, it comes whole: the download is taken up again.
	cut := 0
	h.set(layer(func(w http.ResponseWriter, r *http.Request) {
		rc, err := ls[0].Compressed()
		if err != nil {
			t.Error(err)
			return
		}
		defer rc.Close()
		body, _ := io.ReadAll(rc)
		from := 0
		if _, err := fmt.Sscanf(r.Header.Get("Range"), "bytes=%d-", &from); err == nil {
			w.Header().Set("Content-Range", fmt.Sprintf("bytes %d-%d/%d", from, len(body)-1, len(body)))
			w.WriteHeader(http.StatusPartialContent)
		}
		if cut++; cut <= 2 {
			_, _ = w.Write(body[from : from+(len(body)-from)/2])
			w.(http.Flusher).Flush()
			panic(http.ErrAbortHandler)
		}
		_, _ = w.Write(body[from:])
	}))
	e.must("pull", ref)
	h.set(nil)
	e.must("rmi", ref)
	e.must("pull", ref)
	harness.Eventually(t, "no unfinished downloads", 10*time.Second, func() bool {
		return len(glob(e.Dir+"/root/images/content/ingest/*")) == 0
	})
}
