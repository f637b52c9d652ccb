package image

import (
	"bytes"
	"context"
	"crypto/rand"
	"fmt"
	"io"
	"log"
	"net/http"
	"net/http/httptest"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/distribution/distribution/v3/configuration"
	"github.com/distribution/distribution/v3/registry/handlers"
	_ "github.com/distribution/distribution/v3/registry/storage/driver/inmemory"
	"github.com/google/go-containerregistry/pkg/name"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/random"
	"github.com/google/go-containerregistry/pkg/v1/remote"
	gtypes "github.com/google/go-containerregistry/pkg/v1/types"
	"github.com/moby/moby/api/types/registry"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"github.com/sirupsen/logrus"

	"github.com/cloudos-io/cloudos/internal/fault"
)

// startRegistry runs the reference registry on loopback; wrap may put something
// in front of it.
func startRegistry(t testing.TB, wrap func(http.Handler) http.Handler) string {
	t.Helper()
	logrus.SetOutput(io.Discard)
	conf := &configuration.Configuration{
		Storage: configuration.Storage{"inmemory": configuration.Parameters{}, "maintenance": configuration.Parameters{"uploadpurging": map[any]any{"enabled": false}}},
	}
	conf.Log.Level = "panic"
	conf.Log.AccessLog.Disabled = true
	conf.Catalog.MaxEntries = 1000
	ctx, cancel := context.WithCancel(context.Background())
	t.Cleanup(cancel)
	var h http.Handler = handlers.NewApp(ctx, conf)
	if wrap != nil {
		h = wrap(h)
	}
	srv := httptest.NewUnstartedServer(h)
	srv.Config.ErrorLog = log.New(io.Discard, "", 0)
	srv.Start()
	t.Cleanup(srv.Close)
	return strings.TrimPrefix(srv.URL, "http://")
}

// basicAuth asks for a user and password.
func basicAuth(user, pass string) func(http.Handler) http.Handler {
	return func(next http.Handler) http.Handler {
		return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			if u, p, ok := r.BasicAuth(); !ok || u != user || p != pass {
				w.Header().Set("WWW-Authenticate", `Basic realm="test"`)
				w.WriteHeader(http.StatusUnauthorized)
				return
			}
			next.ServeHTTP(w, r)
		})
	}
}

func randomImage(t testing.TB, size int64, layers int64) v1.Image {
	t.Helper()
	img, err := random.Image(size, layers)
	if err != nil {
		t.Fatal(err)
	}
	return withPlatform(t, img, "amd64")
}

func withPlatform(t testing.TB, img v1.Image, arch string) v1.Image {
	t.Helper()
	cf, err := img.ConfigFile()
	if err != nil {
		t.Fatal(err)
	}
	cf = cf.DeepCopy()
	cf.OS, cf.Architecture = "linux", arch
	if img, err = mutate.ConfigFile(img, cf); err != nil {
		t.Fatal(err)
	}
	return img
}

func seed(t testing.TB, ref string, img v1.Image) {
	t.Helper()
	n, err := name.ParseReference(ref)
	if err != nil {
		t.Fatal(err)
	}
	if err := remote.Write(n, img); err != nil {
		t.Fatal(err)
	}
}

func configID(t testing.TB, img v1.Image) digest.Digest {
	t.Helper()
	h, err := img.ConfigName()
	if err != nil {
		t.Fatal(err)
	}
	return digest.Digest(h.String())
}

// lines collects progress.
type lines struct {
	mu sync.Mutex
	l  []string
}

func (l *lines) add(p Progress) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.l = append(l.l, p.ID+" "+p.Action)
}

func (l *lines) has(sub string) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	return slices.ContainsFunc(l.l, func(s string) bool { return strings.Contains(s, sub) })
}

func TestPullPushRoundTrip(t *testing.T) {
	reg := startRegistry(t, nil)
	img := randomImage(t, 4096, 3)
	seed(t, reg+"/a/one:v1", img)
	s := newService(t, t.TempDir())
	ctx := context.Background()
	var events []string
	s.Subscribe(func(e Event) { events = append(events, e.Action) })
	var p lines
	if err := s.Pull(ctx, PullOptions{Ref: reg + "/a/one:v1", Progress: p.add}); err != nil {
		t.Fatal(err)
	}
	for _, w := range []string{"v1 Pulling from a/one", "Pulling fs layer", "Download complete", "Pull complete", " Digest: sha256:", " Status: Downloaded newer image for " + reg + "/a/one:v1"} {
		if !p.has(w) {
			t.Errorf("progress lacks %q: %q", w, p.l)
		}
	}
	r, err := s.Resolve(ctx, reg+"/a/one:v1", "")
	if err != nil {
		t.Fatal(err)
	}
	if r.ID != configID(t, img) || len(r.Chain.Dirs) != 3 {
		t.Errorf("resolved %+v", r)
	}
	in, err := s.Inspect(ctx, r.ID.Encoded()[:12], "", true)
	if err != nil {
		t.Fatal(err)
	}
	if len(in.RepoTags) != 1 || len(in.RepoDigests) != 1 || len(in.RootFS.Layers) != 3 || in.Architecture != "amd64" {
		t.Errorf("inspect %+v", in)
	}
	// Again: nothing to do.
	p = lines{}
	if err := s.Pull(ctx, PullOptions{Ref: reg + "/a/one:v1", Progress: p.add}); err != nil {
		t.Fatal(err)
	}
	if !p.has("Status: Image is up to date") || !p.has("Already exists") || p.has("Downloading") {
		t.Errorf("second pull: %q", p.l)
	}
	// To another repository: mounted, not sent.
	if err := s.Tag(ctx, reg+"/a/one:v1", reg+"/b/two:v2"); err != nil {
		t.Fatal(err)
	}
	p = lines{}
	if err := s.Push(ctx, PushOptions{Ref: reg + "/b/two:v2", Progress: p.add}); err != nil {
		t.Fatal(err)
	}
	if !p.has("Mounted from a/one") || !p.has("The push refers to repository ["+reg+"/b/two]") || !p.has("v2: digest: sha256:") {
		t.Errorf("push: %q", p.l)
	}
	// To another registry: sent, then pulled by digest from there.
	reg2 := startRegistry(t, nil)
	if err := s.Tag(ctx, r.ID.String(), reg2+"/c:x"); err != nil {
		t.Fatal(err)
	}
	p = lines{}
	if err := s.Push(ctx, PushOptions{Ref: reg2 + "/c:x", Progress: p.add}); err != nil {
		t.Fatal(err)
	}
	if !p.has(" Pushed") {
		t.Errorf("push: %q", p.l)
	}
	s2 := newService(t, t.TempDir())
	byDigest := reg2 + "/c@" + r.Manifest.Digest.String()
	if err := s2.Pull(ctx, PullOptions{Ref: byDigest}); err != nil {
		t.Fatal(err)
	}
	r2, err := s2.Resolve(ctx, byDigest, "")
	if err != nil || r2.ID != r.ID {
		t.Errorf("by digest: %+v, %v", r2, err)
	}
	if !slices.Equal(events, []string{"pull", "pull", "tag", "push", "tag", "push"}) {
		t.Errorf("events %q", events)
	}
}

func TestPullIndexAndAllTags(t *testing.T) {
	reg := startRegistry(t, nil)
	amd, arm := randomImage(t, 1024, 1), withPlatform(t, randomImage(t, 1024, 2), "arm64")
	idx := mutate.AppendManifests(mutate.IndexMediaType(empty.Index, gtypes.OCIImageIndex),
		mutate.IndexAddendum{Add: arm, Descriptor: v1.Descriptor{Platform: &v1.Platform{OS: "linux", Architecture: "arm64"}}},
		mutate.IndexAddendum{Add: amd, Descriptor: v1.Descriptor{Platform: &v1.Platform{OS: "linux", Architecture: "amd64"}}})
	n, _ := name.ParseReference(reg + "/multi:1")
	if err := remote.WriteIndex(n, idx); err != nil {
		t.Fatal(err)
	}
	seed(t, reg+"/multi:2", amd)
	s := newService(t, t.TempDir())
	ctx := context.Background()
	if err := s.Pull(ctx, PullOptions{Ref: reg + "/multi", AllTags: true}); err != nil {
		t.Fatal(err)
	}
	for _, tag := range []string{"1", "2"} {
		if r, err := s.Resolve(ctx, reg+"/multi:"+tag, ""); err != nil || r.ID != configID(t, amd) {
			t.Errorf("tag %s: %v %v", tag, r.ID, err)
		}
	}
	if _, err := s.Resolve(ctx, reg+"/multi:1", "linux/arm64"); !fault.Is(err, fault.NotFound) {
		t.Errorf("arm64 before its pull: %v", err)
	}
	if err := s.Pull(ctx, PullOptions{Ref: reg + "/multi:1", Platform: "linux/arm64"}); err != nil {
		t.Fatal(err)
	}
	if r, err := s.Resolve(ctx, reg+"/multi:1", "linux/arm64"); err != nil || r.ID != configID(t, arm) || len(r.Chain.Dirs) != 2 {
		t.Errorf("arm64: %+v %v", r, err)
	}
	if r, err := s.Resolve(ctx, reg+"/multi:1", ""); err != nil || r.ID != configID(t, amd) {
		t.Errorf("host's after arm64: %+v %v", r, err)
	}
	if err := s.Pull(ctx, PullOptions{Ref: reg + "/multi:1", Platform: "linux/s390x"}); !fault.Is(err, fault.NotFound) {
		t.Errorf("s390x: %v", err)
	}
	d, err := s.Distribution(ctx, reg+"/multi:1", nil)
	if err != nil || len(d.Platforms) != 2 {
		t.Errorf("distribution: %+v %v", d, err)
	}
	// Both platforms are here now, so the whole index goes.
	if err := s.Tag(ctx, reg+"/multi:1", reg+"/copy:1"); err != nil {
		t.Fatal(err)
	}
	if err := s.Push(ctx, PushOptions{Ref: reg + "/copy:1"}); err != nil {
		t.Fatal(err)
	}
	d2, err := s.Distribution(ctx, reg+"/copy:1", nil)
	if err != nil || d2.Descriptor.Digest != d.Descriptor.Digest {
		t.Errorf("pushed index: %+v %v", d2, err)
	}
	list, err := s.List(ctx, nil, false, true, true)
	if err != nil || len(list) != 1 || len(list[0].RepoTags) != 3 {
		t.Errorf("list: %+v %v", list, err)
	}
}

func TestAuth(t *testing.T) {
	reg := startRegistry(t, basicAuth("u", "p"))
	s := newService(t, t.TempDir())
	ctx := context.Background()
	good, bad := &registry.AuthConfig{Username: "u", Password: "p", ServerAddress: reg}, registry.AuthConfig{Username: "u", Password: "x", ServerAddress: reg}
	if r, err := s.Login(ctx, *good); err != nil || r.Status != "Login Succeeded" {
		t.Errorf("login: %+v %v", r, err)
	}
	if _, err := s.Login(ctx, bad); !fault.Is(err, fault.Unauthorized) {
		t.Errorf("bad login: %v", err)
	}
	l := layerTar(t, file{name: "a", body: "1"})
	if _, err := s.Load(ctx, bytes.NewReader(dockerTar(t, configFor(t, nil, l), []string{reg + "/x:1"}, l)), nil, nil); err != nil {
		t.Fatal(err)
	}
	if err := s.Push(ctx, PushOptions{Ref: reg + "/x:1"}); !fault.Is(err, fault.Unauthorized) {
		t.Errorf("push without credentials: %v", err)
	}
	if err := s.Push(ctx, PushOptions{Ref: reg + "/x:1", Auth: good}); err != nil {
		t.Errorf("push: %v", err)
	}
	s2 := newService(t, t.TempDir())
	if err := s2.Pull(ctx, PullOptions{Ref: reg + "/x:1"}); !fault.Is(err, fault.NotFound) {
		t.Errorf("pull without credentials: %v", err)
	}
	if err := s2.Pull(ctx, PullOptions{Ref: reg + "/x:1", Auth: &bad}); !fault.Is(err, fault.Unauthorized) {
		t.Errorf("pull with wrong credentials: %v", err)
	}
	if err := s2.Pull(ctx, PullOptions{Ref: reg + "/x:1", Auth: good}); err != nil {
		t.Errorf("pull: %v", err)
	}
}

// tamper changes answers to layer downloads.
type tamper struct {
	mu   sync.Mutex
	do   func(w http.ResponseWriter, r *http.Request, next http.Handler) bool // true: dealt with
	gets int
}

func (l *tamper) wrap(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		l.mu.Lock()
		do := l.do
		if r.Method == http.MethodGet && strings.Contains(r.URL.Path, "/blobs/") {
			l.gets++
		}
		l.mu.Unlock()
		if do != nil && do(w, r, next) {
			return
		}
		next.ServeHTTP(w, r)
	})
}

func TestLyingRegistry(t *testing.T) {
	var l tamper
	reg := startRegistry(t, l.wrap)
	img := randomImage(t, 200_000, 2)
	seed(t, reg+"/x:1", img)
	layers, _ := img.Layers()
	h, _ := layers[0].Digest()
	layerPath := "/blobs/" + h.String()
	ctx := context.Background()
	cases := map[string]struct {
		do   func(w http.ResponseWriter, r *http.Request, next http.Handler) bool
		want fault.Kind
	}{
		"other layer": {func(w http.ResponseWriter, r *http.Request, next http.Handler) bool {
			if r.Method != http.MethodGet || !strings.HasSuffix(r.URL.Path, layerPath) {
				return false
			}
			size, _ := layers[0].Size()
			b := make([]byte, size)
			_, _ = rand.Read(b)
			_, _ = w.Write(b)
			return true
		}, fault.Invalid},
		"endless layer": {func(w http.ResponseWriter, r *http.Request, next http.Handler) bool {
			if r.Method != http.MethodGet || !strings.HasSuffix(r.URL.Path, layerPath) {
				return false
			}
			b := make([]byte, 1<<20)
			for range 64 {
				if _, err := w.Write(b); err != nil {
					break
				}
			}
			return true
		}, fault.Invalid},
		"other manifest": {func(w http.ResponseWriter, r *http.Request, next http.Handler) bool {
			if r.Method != http.MethodGet || !strings.Contains(r.URL.Path, "/manifests/") {
				return false
			}
			w.Header().Set("Content-Type", "application/vnd.oci.image.manifest.v1+json")
			fmt.Fprint(w, `{"schemaVersion":2}`)
			return true
		}, fault.Invalid},
		"schema 1": {func(w http.ResponseWriter, r *http.Request, next http.Handler) bool {
			if !strings.Contains(r.URL.Path, "/manifests/") {
				return false
			}
			body := `{"schemaVersion":1,"fsLayers":[{"blobSum":"sha256:00"}]}`
			w.Header().Set("Content-Type", "application/vnd.docker.distribution.manifest.v1+prettyjws")
			w.Header().Set("Docker-Content-Digest", digest.FromString(body).String())
			w.Header().Set("Content-Length", fmt.Sprint(len(body)))
			if r.Method == http.MethodGet {
				fmt.Fprint(w, body)
			}
			return true
		}, fault.Unsupported},
		"huge manifest": {func(w http.ResponseWriter, r *http.Request, next http.Handler) bool {
			if !strings.Contains(r.URL.Path, "/manifests/") {
				return false
			}
			body := strings.Repeat(" ", maxManifest+1)
			w.Header().Set("Content-Type", "application/vnd.oci.image.manifest.v1+json")
			w.Header().Set("Docker-Content-Digest", digest.FromString(body).String())
			w.Header().Set("Content-Length", fmt.Sprint(len(body)))
			if r.Method == http.MethodGet {
				fmt.Fprint(w, body)
			}
			return true
		}, fault.Invalid},
	}
	for n, c := range cases {
		t.Run(n, func(t *testing.T) {
			s := newService(t, t.TempDir())
			l.mu.Lock()
			l.do = c.do
			l.mu.Unlock()
			err := s.Pull(ctx, PullOptions{Ref: reg + "/x:1"})
			if !fault.Is(err, c.want) {
				t.Errorf("err = %v, want kind %d", err, c.want)
			}
			if n := len(s.cat.all()); n != 0 {
				t.Errorf("%d images recorded", n)
			}
			// An honest registry heals it.
			l.mu.Lock()
			l.do = nil
			l.mu.Unlock()
			if err := s.Pull(ctx, PullOptions{Ref: reg + "/x:1"}); err != nil {
				t.Errorf("after: %v", err)
			}
		})
	}
}

func TestPullResumes(t *testing.T) {
	var l tamper
	reg := startRegistry(t, l.wrap)
	img := randomImage(t, 3<<20, 1)
	seed(t, reg+"/x:1", img)
	layers, _ := img.Layers()
	h, _ := layers[0].Digest()
	size, _ := layers[0].Size()
	root := t.TempDir()
	ctx, cancel := context.WithCancel(context.Background())
	// The first pull stops half way, for good.
	l.do = func(w http.ResponseWriter, r *http.Request, next http.Handler) bool {
		if r.Method != http.MethodGet || !strings.HasSuffix(r.URL.Path, h.String()) {
			return false
		}
		rc, err := layers[0].Compressed()
		if err != nil {
			return false
		}
		defer rc.Close()
		w.Header().Set("Content-Length", fmt.Sprint(size))
		_, _ = io.CopyN(w, rc, size/2)
		// Trickle on until the client has seen enough and leaves.
		for r.Context().Err() == nil {
			_, _ = io.CopyN(w, rc, 10)
			w.(http.Flusher).Flush()
			time.Sleep(10 * time.Millisecond)
		}
		return true
	}
	s := newService(t, root)
	enough := func(p Progress) {
		if p.Action == "Downloading" && p.Current >= size/2 {
			cancel()
		}
	}
	if err := s.Pull(ctx, PullOptions{Ref: reg + "/x:1", Progress: enough}); err == nil {
		t.Fatal("the first pull succeeded")
	}
	if err := s.Collect(context.Background()); err != nil {
		t.Fatal(err)
	}
	s.Close()
	// Another process goes on where it stopped, and asks for the rest alone.
	var ranges []string
	l.mu.Lock()
	l.do = func(w http.ResponseWriter, r *http.Request, next http.Handler) bool {
		if r.Method == http.MethodGet && strings.HasSuffix(r.URL.Path, h.String()) {
			ranges = append(ranges, r.Header.Get("Range"))
		}
		return false
	}
	l.mu.Unlock()
	s = newService(t, root)
	if err := s.Pull(context.Background(), PullOptions{Ref: reg + "/x:1"}); err != nil {
		t.Fatal(err)
	}
	if len(ranges) != 1 || !strings.HasPrefix(ranges[0], "bytes=") || ranges[0] == "bytes=0-" {
		t.Errorf("asked for %q", ranges)
	}
	if r, err := s.Resolve(context.Background(), reg+"/x:1", ""); err != nil || r.ID != configID(t, img) {
		t.Errorf("resolved %+v, %v", r, err)
	}
}

func TestPullSurvivesCutConnections(t *testing.T) {
	var l tamper
	reg := startRegistry(t, l.wrap)
	img := randomImage(t, 1<<20, 2)
	seed(t, reg+"/x:1", img)
	cut := map[string]int{}
	l.do = func(w http.ResponseWriter, r *http.Request, next http.Handler) bool {
		if r.Method != http.MethodGet || !strings.Contains(r.URL.Path, "/blobs/") {
			return false
		}
		l.mu.Lock()
		cut[r.URL.Path]++
		n := cut[r.URL.Path]
		l.mu.Unlock()
		if n > 2 {
			return false
		}
		next.ServeHTTP(&cutter{ResponseWriter: w, left: 100_000}, r)
		return true
	}
	s := newService(t, t.TempDir())
	if err := s.Pull(context.Background(), PullOptions{Ref: reg + "/x:1"}); err != nil {
		t.Fatal(err)
	}
}

// cutter breaks the connection after some bytes.
type cutter struct {
	http.ResponseWriter
	left int
}

func (c *cutter) Write(b []byte) (int, error) {
	if len(b) > c.left {
		_, _ = c.ResponseWriter.Write(b[:c.left])
		panic(http.ErrAbortHandler)
	}
	c.left -= len(b)
	return c.ResponseWriter.Write(b)
}

func TestConcurrentPullsAreOne(t *testing.T) {
	var l tamper
	reg := startRegistry(t, l.wrap)
	img := randomImage(t, 500_000, 3)
	seed(t, reg+"/x:1", img)
	l.mu.Lock()
	l.gets = 0
	l.mu.Unlock()
	s := newService(t, t.TempDir())
	var wg sync.WaitGroup
	for range 8 {
		wg.Go(func() {
			if err := s.Pull(context.Background(), PullOptions{Ref: reg + "/x:1"}); err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.gets > 5 { // three layers and a config, once
		t.Errorf("%d blobs were fetched", l.gets)
	}
}

func TestMirrorIsAskedFirst(t *testing.T) {
	mirror, origin := startRegistry(t, nil), startRegistry(t, nil)
	img := randomImage(t, 1000, 1)
	seed(t, mirror+"/x:1", img)
	only := randomImage(t, 1000, 1)
	seed(t, origin+"/y:1", only)
	s := newService(t, t.TempDir(), func(c *Config) {
		c.Registries = Registries{Hosts: map[string]Registry{origin: {Mirrors: []string{"http://" + mirror}}}}
	})
	for ref, want := range map[string]v1.Image{"/x:1": img, "/y:1": only} {
		if err := s.Pull(context.Background(), PullOptions{Ref: origin + ref}); err != nil {
			t.Errorf("%s: %v", ref, err)
			continue
		}
		if r, err := s.Resolve(context.Background(), origin+ref, ""); err != nil || r.ID != configID(t, want) {
			t.Errorf("%s: %+v, %v", ref, r, err)
		}
	}
}

func TestPullFaults(t *testing.T) {
	reg := startRegistry(t, nil)
	s := newService(t, t.TempDir())
	for ref, want := range map[string]fault.Kind{
		reg + "/nosuch:1":    fault.NotFound,
		"127.0.0.1:1/x:1":    fault.Unavailable,
		"BAD//ref":           fault.Invalid,
		reg + "/x@sha256:zz": fault.Invalid,
	} {
		if err := s.Pull(context.Background(), PullOptions{Ref: ref}); !fault.Is(err, want) {
			t.Errorf("Pull(%q) = %v (kind %d), want kind %d", ref, err, fault.Of(err), want)
		}
	}
}

// TestPullHugeManifest: a manifest that is too large is called that, not missing.
func TestPullHugeManifest(t *testing.T) {
	reg := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if strings.HasSuffix(r.URL.Path, "/manifests/huge") {
			w.Header().Set("Content-Type", ocispec.MediaTypeImageManifest)
			w.Header().Set("Docker-Content-Digest", digest.FromString("x").String())
			w.Header().Set("Content-Length", strconv.Itoa(64<<20))
			return
		}
		if r.URL.Path != "/v2/" {
			http.NotFound(w, r)
		}
	}))
	defer reg.Close()
	s := newService(t, t.TempDir())
	host := strings.TrimPrefix(reg.URL, "http://")
	if err := s.Pull(t.Context(), PullOptions{Ref: host + "/x:huge"}); !fault.Is(err, fault.Invalid) || !strings.Contains(err.Error(), "67108864 bytes") {
		t.Errorf("a huge manifest: %v", err)
	}
	if err := s.Pull(t.Context(), PullOptions{Ref: host + "/x:none"}); !fault.Is(err, fault.NotFound) {
		t.Errorf("a missing manifest: %v", err)
	}
}
