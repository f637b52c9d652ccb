package native

import (
	"archive/tar"
	"bytes"
	"crypto/rand"
	"crypto/sha256"
	"fmt"
	"io"
	"net/http"
	"os"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/containerd/stargz-snapshotter/estargz"
	"github.com/google/go-containerregistry/pkg/name"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/remote"
	"github.com/google/go-containerregistry/pkg/v1/types"
	"github.com/opencontainers/go-digest"

	"github.com/cloudos-io/cloudos/test/harness"
)

// stargzLayer is an eStargz layer.
type stargzLayer struct {
	blob   []byte
	diffID string
}

func (l stargzLayer) Digest() (v1.Hash, error) { return v1.NewHash(digest.FromBytes(l.blob).String()) }
func (l stargzLayer) DiffID() (v1.Hash, error) { return v1.NewHash(l.diffID) }
func (l stargzLayer) Compressed() (io.ReadCloser, error) {
	return io.NopCloser(bytes.NewReader(l.blob)), nil
}
func (l stargzLayer) Uncompressed() (io.ReadCloser, error) { return l.Compressed() }
func (l stargzLayer) Size() (int64, error)                 { return int64(len(l.blob)), nil }
func (l stargzLayer) MediaType() (types.MediaType, error)  { return types.OCILayer, nil }

// pushLazy stores an eStargz image of busybox, 1 MB in /little and size bytes in
// /big, and returns the sums of both.
func (h *registryHost) pushLazy(t *testing.T, repo string, size int) (ref string, little, big string) {
	t.Helper()
	var plain, out bytes.Buffer
	tw := tar.NewWriter(&plain)
	add := func(h tar.Header, data []byte) {
		h.Size = int64(len(data))
		if err := tw.WriteHeader(&h); err != nil {
			t.Fatal(err)
		}
		if _, err := tw.Write(data); err != nil {
			t.Fatal(err)
		}
	}
	busybox, err := os.ReadFile("/usr/bin/busybox")
	if err != nil {
		t.Skipf("SKIP: no busybox here: %v", err)
	}
	add(tar.Header{Name: "bin/", Typeflag: tar.TypeDir, Mode: 0o755}, nil)
	add(tar.Header{Name: "bin/busybox", Mode: 0o755}, busybox)
	for _, a := range []string{"sh", "sleep", "sha256sum", "cat"} {
		add(tar.Header{Name: "bin/" + a, Typeflag: tar.TypeSymlink, Linkname: "busybox"}, nil)
	}
	a, b := make([]byte, 1<<20), make([]byte, size)
	_, _ = rand.Read(a)
	_, _ = rand.Read(b)
	add(tar.Header{Name: "little", Mode: 0o644}, a)
	add(tar.Header{Name: "big", Mode: 0o644}, b)
	if err := tw.Close(); err != nil {
		t.Fatal(err)
	}
	w := estargz.NewWriterLevel(&out, 1)
	if err := w.AppendTar(&plain); err != nil {
		t.Fatal(err)
	}
	toc, err := w.Close()
	if err != nil {
		t.Fatal(err)
	}
	img := mutate.ConfigMediaType(mutate.MediaType(empty.Image, types.OCIManifestSchema1), types.OCIConfigJSON)
	img, err = mutate.Append(img, mutate.Addendum{Layer: stargzLayer{out.Bytes(), w.DiffID()}, MediaType: types.OCILayer,
		Annotations: map[string]string{estargz.TOCJSONDigestAnnotation: toc.String()}})
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
	ref = h.addr + "/" + repo + ":1"
	n, err := name.ParseReference(ref)
	if err != nil {
		t.Fatal(err)
	}
	if err := remote.Write(n, img); err != nil {
		t.Fatal(err)
	}
	return ref, fmt.Sprintf("%x", sha256.Sum256(a)), fmt.Sprintf("%x", sha256.Sum256(b))
}

// throttled counts the bytes of blobs asked for by range and sends them slowly.
func throttled(h *registryHost, sent *atomic.Int64, pause *atomic.Int64) {
	h.set(func(w http.ResponseWriter, r *http.Request) bool {
		var from, to int64
		if n, _ := fmt.Sscanf(r.Header.Get("Range"), "bytes=%d-%d", &from, &to); n == 2 && strings.Contains(r.URL.Path, "/blobs/") {
			sent.Add(to - from + 1)
			time.Sleep(time.Duration(pause.Load()))
		}
		return false
	})
}

func TestLazyImageAndKilledDaemon(t *testing.T) {
	if _, err := os.OpenFile("/dev/fuse", os.O_RDWR, 0); err != nil {
		t.Skipf("SKIP: FUSE cannot be used: %v", err)
	}
	h := startRegistry(t)
	ref, little, big := h.pushLazy(t, "lazy", 100<<20)
	var sent, pause atomic.Int64
	pause.Store(int64(400 * time.Millisecond))
	throttled(h, &sent, &pause)
	e := start(t)
	e.must("pull", "--lazy", ref)
	if got := e.must("run", "--rm", ref, "sha256sum", "/little"); !strings.HasPrefix(got, little) {
		t.Fatalf("read %q, want %s", got, little)
	}
	if n := sent.Load(); n > 12<<20 {
		t.Errorf("%d MB of 100 were sent for 1", n>>20)
	}
	// The engine is gone while the container reads.
	e.must("run", "-d", "--name", "reader", ref, "sh", "-c", "sleep 0.5; sha256sum /big; sleep 1000")
	e.Kill()
	pause.Store(0)
	before := sent.Load()
	harness.Eventually(t, "the rest is fetched without the engine", 60*time.Second, func() bool { return sent.Load() >= 100<<20 })
	if before >= 100<<20 {
		t.Error("all was fetched before the engine was killed: the test shows nothing")
	}
	e.Boot()
	harness.Eventually(t, "the sum of /big in the log", 60*time.Second, func() bool { return strings.HasPrefix(e.must("logs", "reader"), big) })
	mounted := func() bool {
		b, err := os.ReadFile("/proc/self/mountinfo")
		return err != nil || strings.Contains(string(b), e.Dir+"/root/images/layers")
	}
	harness.Eventually(t, "the layer is ordinary", 60*time.Second, func() bool { return !mounted() })
	if got := e.must("exec", "reader", "sha256sum", "/little"); !strings.HasPrefix(got, little) {
		t.Errorf("the old container reads %q", got)
	}
	if got := e.must("run", "--rm", ref, "sha256sum", "/big"); !strings.HasPrefix(got, big) {
		t.Errorf("a new container reads %q", got)
	}
	e.must("rm", "-f", "reader")
	e.must("rmi", ref)
	harness.Eventually(t, "the process that serves layers is gone", 30*time.Second, func() bool {
		_, err := os.Stat(e.Dir + "/run/lazy/lazy-1.sock")
		return os.IsNotExist(err)
	})
}

func TestLazyImageAndShutdown(t *testing.T) {
	h := startRegistry(t)
	ref, _, _ := h.pushLazy(t, "lazy", 8<<20)
	e := start(t)
	h.set(func(http.ResponseWriter, *http.Request) bool { time.Sleep(50 * time.Millisecond); return false })
	e.must("pull", "--lazy", ref)
	// The end of the test fails if anything is still mounted in the folders.
}
