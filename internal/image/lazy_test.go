package image

import (
	"archive/tar"
	"bytes"
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/containerd/stargz-snapshotter/estargz"
	"github.com/containerd/stargz-snapshotter/estargz/zstdchunked"
	"github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	gtypes "github.com/google/go-containerregistry/pkg/v1/types"
	"github.com/klauspost/compress/zstd"
	"github.com/opencontainers/go-digest"
	"golang.org/x/sys/unix"

	"github.com/cloudos-io/cloudos/internal/image/lazy"
	"github.com/cloudos-io/cloudos/internal/snapshot"
	"github.com/cloudos-io/cloudos/internal/snapshot/overlay"
)

// counting counts the bytes of blobs that a registry sends, and can refuse or
// spoil them.
type counting struct {
	sent atomic.Int64
	down atomic.Bool
	// spoil, if set, changes what is sent of a range from an offset on.
	spoil atomic.Pointer[func(off int64, p []byte)]
}

func (c *counting) wrap(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.Method != http.MethodGet || !strings.Contains(r.URL.Path, "/blobs/sha256:") {
			next.ServeHTTP(w, r)
			return
		}
		if c.down.Load() {
			w.WriteHeader(http.StatusServiceUnavailable)
			return
		}
		cw := &countWriter{ResponseWriter: w, c: c}
		fmt.Sscanf(r.Header.Get("Range"), "bytes=%d-", &cw.off)
		next.ServeHTTP(cw, r)
	})
}

type countWriter struct {
	http.ResponseWriter
	c   *counting
	off int64
}

func (w *countWriter) Write(p []byte) (int, error) {
	w.c.sent.Add(int64(len(p)))
	q := bytes.Clone(p)
	if f := w.c.spoil.Load(); f != nil {
		(*f)(w.off, q)
	}
	w.off += int64(len(p))
	return w.ResponseWriter.Write(q)
}

// chunkedLayer is a layer in one of the formats that can be pulled lazily.
type chunkedLayer struct {
	blob        []byte
	diffID      digest.Digest
	annotations map[string]string
	mediaType   gtypes.MediaType
}

func (l chunkedLayer) Digest() (v1.Hash, error) { return v1.NewHash(digest.FromBytes(l.blob).String()) }
func (l chunkedLayer) DiffID() (v1.Hash, error) { return v1.NewHash(l.diffID.String()) }
func (l chunkedLayer) Compressed() (io.ReadCloser, error) {
	return io.NopCloser(bytes.NewReader(l.blob)), nil
}
func (l chunkedLayer) Uncompressed() (io.ReadCloser, error) { return nil, errors.New("not kept") }
func (l chunkedLayer) Size() (int64, error)                 { return int64(len(l.blob)), nil }
func (l chunkedLayer) MediaType() (gtypes.MediaType, error) { return l.mediaType, nil }

func makeLayer(t testing.TB, kind lazy.Kind, plain []byte) chunkedLayer {
	t.Helper()
	var out bytes.Buffer
	l := chunkedLayer{annotations: map[string]string{}, mediaType: gtypes.OCILayer}
	var w *estargz.Writer
	meta := map[string]string{}
	if kind == lazy.ZstdChunked {
		l.mediaType = gtypes.OCILayerZStd
		w = estargz.NewWriterWithCompressor(&out, &zstdchunked.Compressor{CompressionLevel: zstd.SpeedDefault, Metadata: meta})
	} else {
		w = estargz.NewWriterLevel(&out, 1)
	}
	w.ChunkSize = 1 << 20
	if err := w.AppendTar(bytes.NewReader(plain)); err != nil {
		t.Fatal(err)
	}
	toc, err := w.Close()
	if err != nil {
		t.Fatal(err)
	}
	l.blob, l.diffID = out.Bytes(), digest.Digest(w.DiffID())
	if kind == lazy.ZstdChunked {
		for k, v := range meta {
			l.annotations[strings.Replace(k, "io.containers.", "io.github.containers.", 1)] = v
		}
	} else {
		l.annotations[estargz.TOCJSONDigestAnnotation] = toc.String()
	}
	return l
}

func packed(t testing.TB, hs ...tarEntry) []byte {
	t.Helper()
	var b bytes.Buffer
	tw := tar.NewWriter(&b)
	for _, e := range hs {
		h := e.Header
		h.Size = int64(len(e.data))
		if h.Mode == 0 {
			h.Mode = 0o644
		}
		if h.Typeflag == 0 {
			h.Typeflag = tar.TypeReg
		}
		if err := tw.WriteHeader(&h); err != nil {
			t.Fatal(err)
		}
		if _, err := tw.Write(e.data); err != nil {
			t.Fatal(err)
		}
	}
	if err := tw.Close(); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

type tarEntry struct {
	tar.Header
	data []byte
}

func plain(name string, data []byte) tarEntry { return tarEntry{tar.Header{Name: name}, data} }

func dirEntry(name string, mode int64) tarEntry {
	return tarEntry{tar.Header{Name: name, Typeflag: tar.TypeDir, Mode: mode}, nil}
}

func noise(n int) []byte {
	p := make([]byte, n)
	_, _ = rand.Read(p)
	return p
}

func chunkedImage(t testing.TB, layers ...chunkedLayer) v1.Image {
	t.Helper()
	img := mutate.ConfigMediaType(mutate.MediaType(empty.Image, gtypes.OCIManifestSchema1), gtypes.OCIConfigJSON)
	for _, l := range layers {
		var err error
		if img, err = mutate.Append(img, mutate.Addendum{Layer: l, Annotations: l.annotations, MediaType: l.mediaType}); err != nil {
			t.Fatal(err)
		}
	}
	return withPlatform(t, img, "amd64")
}

// lazyEngine is a Service with layers above, as the engine has them.
type lazyEngine struct {
	*Service
	layers *overlay.Store
	stop   func()
}

func newLazy(t testing.TB, root, run string, idle time.Duration) *lazyEngine {
	t.Helper()
	if err := lazy.Available(); err != nil {
		t.Skipf("SKIP: FUSE cannot be used: %v", err)
	}
	layers, err := overlay.New(overlay.Config{Root: filepath.Join(root, "rw")})
	if err != nil {
		t.Fatal(err)
	}
	s, err := New(context.Background(), Config{Root: filepath.Join(root, "images"), LazyDir: run, LazyIdle: idle, PinnedChains: layers.ChainIDs})
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan struct{})
	go func() { defer close(done); _ = s.Run(ctx) }()
	e := &lazyEngine{Service: s, layers: layers}
	stopped := false
	e.stop = func() {
		if !stopped {
			stopped = true
			cancel()
			<-done
			if err := s.Close(); err != nil {
				t.Error(err)
			}
		}
	}
	t.Cleanup(func() {
		e.stop()
		// Whatever a failed test left.
		for _, m := range lazyMounts(t, root) {
			_ = lazy.Detach(m)
		}
	})
	return e
}

func lazyMounts(t testing.TB, root string) []string {
	t.Helper()
	b, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		t.Fatal(err)
	}
	var out []string
	for l := range strings.Lines(string(b)) {
		if f := strings.Fields(l); strings.Contains(l, "fuse.servin") && strings.HasPrefix(f[4], root) {
			out = append(out, f[4])
		}
	}
	return out
}

// container mounts an image as a container would and returns its root.
func (e *lazyEngine) container(t testing.TB, ref, id string, m snapshot.IDMap) string {
	t.Helper()
	ctx := context.Background()
	r, err := e.Resolve(ctx, ref, "")
	if err != nil {
		t.Fatal(err)
	}
	if err := e.layers.Create(ctx, id, r.Chain, true, 0); err != nil {
		t.Fatal(err)
	}
	f, err := e.layers.Mount(ctx, id, false, m)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.Close() })
	return fmt.Sprintf("/proc/self/fd/%d", f.Fd())
}

func until(t testing.TB, what string, ok func() bool) {
	t.Helper()
	for end := time.Now().Add(30 * time.Second); !ok(); time.Sleep(20 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("in vain waited until %s", what)
		}
	}
}

func TestLazyPull(t *testing.T) {
	for _, kind := range []lazy.Kind{lazy.EStargz, lazy.ZstdChunked} {
		t.Run(string(kind), func(t *testing.T) { testLazyPull(t, kind) })
	}
}

func testLazyPull(t *testing.T, kind lazy.Kind) {
	var c counting
	reg := startRegistry(t, c.wrap)
	big, little := noise(24<<20), noise(1<<20)
	tall := packed(t, plain("big", big), plain("sub/little", little), tarEntry{tar.Header{Name: "sub/hard", Typeflag: tar.TypeLink, Linkname: "sub/little"}, nil},
		tarEntry{tar.Header{Name: "link", Typeflag: tar.TypeSymlink, Linkname: "sub/little"}, nil},
		tarEntry{tar.Header{Name: "empty", PAXRecords: map[string]string{"SCHILY.xattr.user.colour": "blue"}, Uid: 7, Gid: 8, Mode: 0o4755, ModTime: time.Unix(1000, 0)}, nil})
	ref := reg + "/lazy:1"
	seed(t, ref, chunkedImage(t, makeLayer(t, kind, tall)))
	root, run := t.TempDir(), t.TempDir()
	e := newLazy(t, root, run, -1)
	ctx := context.Background()
	if err := e.Pull(ctx, PullOptions{Ref: ref, Lazy: true}); err != nil {
		t.Fatal(err)
	}
	if len(lazyMounts(t, root)) != 1 {
		t.Fatal("nothing is mounted")
	}
	dir := e.container(t, ref, "c1", snapshot.IDMap{})
	got, err := os.ReadFile(dir + "/link")
	if err != nil || !bytes.Equal(got, little) {
		t.Fatalf("read %d bytes: %v", len(got), err)
	}
	if n := c.sent.Load(); n > 4<<20 {
		t.Fatalf("%d bytes were sent for 1 MB of 25", n)
	}
	var hard, orig, st unix.Stat_t
	if err := errors.Join(unix.Lstat(dir+"/sub/hard", &hard), unix.Lstat(dir+"/sub/little", &orig), unix.Lstat(dir+"/empty", &st)); err != nil {
		t.Fatal(err)
	}
	if hard.Ino != orig.Ino || hard.Nlink != 2 {
		t.Errorf("hard link: inodes %d and %d, %d links", hard.Ino, orig.Ino, hard.Nlink)
	}
	if st.Uid != 7 || st.Gid != 8 || st.Mode != unix.S_IFREG|0o4755 || st.Mtim.Sec != 1000 {
		t.Errorf("attributes of empty: %+v", st)
	}
	val := make([]byte, 10)
	if n, err := unix.Lgetxattr(dir+"/empty", "user.colour", val); err != nil || string(val[:n]) != "blue" {
		t.Errorf("attribute %q: %v", val[:max(n, 0)], err)
	}
	// Writing goes above, and saving waits for all of it.
	if err := os.WriteFile(dir+"/sub/little", []byte("mine"), 0o644); err != nil {
		t.Fatal(err)
	}
	var archive bytes.Buffer
	if err := e.Save(ctx, []string{ref}, nil, &archive); err != nil {
		t.Fatal(err)
	}
	if archive.Len() < 24<<20 {
		t.Errorf("the archive has %d bytes", archive.Len())
	}
	until(t, "the layer is ordinary", func() bool { return len(lazyMounts(t, root)) == 0 })
	// The first container still has what it mounted, the next has the directory.
	if got, err := os.ReadFile(dir + "/big"); err != nil || !bytes.Equal(got, big) {
		t.Errorf("the first container: %d bytes, %v", len(got), err)
	}
	dir2 := e.container(t, ref, "c2", snapshot.IDMap{})
	if got, err := os.ReadFile(dir2 + "/sub/hard"); err != nil || !bytes.Equal(got, little) {
		t.Errorf("the next container: %d bytes, %v", len(got), err)
	}
	if n := c.sent.Load(); n > 29<<20 {
		t.Errorf("%d bytes were sent for 25 MB: some were fetched twice", n)
	}
}

func TestLazyWhiteouts(t *testing.T) {
	var c counting
	reg := startRegistry(t, c.wrap)
	// The padding keeps a layer from being complete as soon as its table is here.
	bottom := makeLayer(t, lazy.EStargz, packed(t, dirEntry("d/", 0o700), plain("d/gone", []byte("1")), plain("d/stays", []byte("2")),
		dirEntry("o/", 0o755), plain("o/hidden", []byte("3")), dirEntry("r/", 0o755), plain("r/old", []byte("4")), plain("d/pad", noise(1<<20))))
	top := makeLayer(t, lazy.ZstdChunked, packed(t, plain("d/.wh.gone", nil), dirEntry("o/", 0o755), plain("o/.wh..wh..opq", nil), plain("o/new", []byte("5")), plain(".wh.r", nil), plain("o/pad", noise(1<<20))))
	ref := reg + "/white:1"
	seed(t, ref, chunkedImage(t, bottom, top))
	root := t.TempDir()
	e := newLazy(t, root, t.TempDir(), -1)
	check := func(dir string) {
		t.Helper()
		for name, want := range map[string]string{"d/gone": "", "d/stays": "2", "o/hidden": "", "o/new": "5", "r/old": ""} {
			got, err := os.ReadFile(dir + "/" + name)
			if string(got) != want || (want == "") != errors.Is(err, os.ErrNotExist) {
				t.Errorf("%s: %q, %v", name, got, err)
			}
		}
		ents, err := os.ReadDir(dir + "/")
		if err != nil || len(ents) != 2+countTable(ents) {
			t.Errorf("the root has %v, %v", ents, err)
		}
		// A directory that the upper layer leaves out is as below.
		if st, err := os.Stat(dir + "/d"); err != nil || st.Mode().Perm() != 0o700 {
			t.Errorf("d: %v, %v", st, err)
		}
	}
	ctx := context.Background()
	if err := e.Pull(ctx, PullOptions{Ref: ref, Lazy: true}); err != nil {
		t.Fatal(err)
	}
	if n := len(lazyMounts(t, root)); n != 2 {
		t.Fatalf("%d mounts", n)
	}
	check(e.container(t, ref, "c1", snapshot.IDMap{}))
	if err := e.Pull(ctx, PullOptions{Ref: ref}); err != nil { // now in the ordinary way
		t.Fatal(err)
	}
	if n := len(lazyMounts(t, root)); n != 0 {
		t.Fatalf("%d mounts after an ordinary pull", n)
	}
	check(e.container(t, ref, "c2", snapshot.IDMap{}))
}

// countTable counts the table among a root's files: the tar has it.
func countTable(ents []os.DirEntry) int {
	for _, e := range ents {
		if e.Name() == estargz.TOCTarName {
			return 1
		}
	}
	return 0
}

func TestLazyTamperedChunk(t *testing.T) {
	var c counting
	reg := startRegistry(t, c.wrap)
	data := noise(3 << 20)
	ref := reg + "/bad:1"
	seed(t, ref, chunkedImage(t, makeLayer(t, lazy.EStargz, packed(t, plain("first", noise(1<<20)), plain("f", data), plain("last", noise(1<<20))))))
	root := t.TempDir()
	e := newLazy(t, root, t.TempDir(), -1)
	if err := e.Pull(context.Background(), PullOptions{Ref: ref, Lazy: true}); err != nil {
		t.Fatal(err)
	}
	dir := e.container(t, ref, "c1", snapshot.IDMap{})
	bad := func(off int64, p []byte) {
		// Stored in blocks by deflate, noise can be changed without breaking gzip
		// but for its sum, which only the digest must be trusted to find.
		for i := range p {
			if at := off + int64(i); at == 2<<20 {
				p[i] ^= 1
			}
		}
	}
	c.spoil.Store(&bad)
	if _, err := os.ReadFile(dir + "/f"); !errors.Is(err, unix.EIO) {
		t.Fatalf("a spoiled chunk was read: %v", err)
	}
	until(t, "the trouble is known", func() bool { return len(e.LazyTrouble()) == 1 })
	c.spoil.Store(nil)
	if got, err := os.ReadFile(dir + "/f"); err != nil || !bytes.Equal(got, data) {
		t.Fatalf("once the registry is right again: %v", err)
	}
	until(t, "the trouble is over", func() bool { return len(e.LazyTrouble()) == 0 })
}

func TestLazyNetworkLoss(t *testing.T) {
	var c counting
	reg := startRegistry(t, c.wrap)
	data := noise(1 << 20)
	ref := reg + "/net:1"
	seed(t, ref, chunkedImage(t, makeLayer(t, lazy.EStargz, packed(t, plain("f", data), plain("g", noise(4<<20))))))
	e := newLazy(t, t.TempDir(), t.TempDir(), -1)
	if err := e.Pull(context.Background(), PullOptions{Ref: ref, Lazy: true}); err != nil {
		t.Fatal(err)
	}
	dir := e.container(t, ref, "c1", snapshot.IDMap{})
	c.down.Store(true)
	if _, err := os.ReadFile(dir + "/f"); !errors.Is(err, unix.EIO) {
		t.Fatalf("read without a registry: %v", err)
	}
	until(t, "the trouble is known", func() bool { return len(e.LazyTrouble()) == 1 })
	c.down.Store(false)
	if got, err := os.ReadFile(dir + "/f"); err != nil || !bytes.Equal(got, data) {
		t.Fatalf("read with the registry back: %v", err)
	}
}

func TestLazyCompletesUnaskedAndLeavesNothing(t *testing.T) {
	var c counting
	reg := startRegistry(t, c.wrap)
	ref := reg + "/full:1"
	seed(t, ref, chunkedImage(t, makeLayer(t, lazy.EStargz, packed(t, plain("f", noise(6<<20))))))
	root, run := t.TempDir(), t.TempDir()
	e := newLazy(t, root, run, 100*time.Millisecond)
	ctx := context.Background()
	if err := e.Pull(ctx, PullOptions{Ref: ref, Lazy: true}); err != nil {
		t.Fatal(err)
	}
	until(t, "the layer is ordinary", func() bool { return len(lazyMounts(t, root)) == 0 })
	r, err := e.Resolve(ctx, ref, "")
	if err != nil {
		t.Fatal(err)
	}
	if st, err := os.Stat(r.Chain.Dirs[0] + "/f"); err != nil || st.Size() != 6<<20 {
		t.Fatalf("unpacked: %v, %v", st, err)
	}
	until(t, "the process is gone", func() bool {
		_, err := e.lazy.client.Status(ctx)
		return errors.Is(err, lazy.ErrNoProcess)
	})
	if err := e.Collect(ctx); err != nil {
		t.Fatal(err)
	}
	if left, err := os.ReadDir(filepath.Join(root, "images", "lazy")); err != nil || len(left) != 0 {
		t.Errorf("left in the state directory: %v, %v", left, err)
	}
}

func TestLazyRemove(t *testing.T) {
	var c counting
	reg := startRegistry(t, c.wrap)
	ref := reg + "/rm:1"
	seed(t, ref, chunkedImage(t, makeLayer(t, lazy.EStargz, packed(t, plain("f", noise(6<<20))))))
	root, run := t.TempDir(), t.TempDir()
	e := newLazy(t, root, run, -1)
	ctx := context.Background()
	if err := e.Pull(ctx, PullOptions{Ref: ref, Lazy: true}); err != nil {
		t.Fatal(err)
	}
	if _, err := e.Remove(ctx, ref, RemoveOptions{}); err != nil {
		t.Fatal(err)
	}
	until(t, "the mount is gone", func() bool { return len(lazyMounts(t, root)) == 0 })
	until(t, "the process is gone", func() bool {
		_, err := e.lazy.client.Status(ctx)
		return errors.Is(err, lazy.ErrNoProcess)
	})
	if left, err := os.ReadDir(filepath.Join(root, "images", "layers", "snapshots")); err != nil || len(left) != 0 {
		t.Errorf("left of layers: %v, %v", left, err)
	}
	if _, err := os.Stat(filepath.Join(run, "lazy-1.sock")); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the socket is left: %v", err)
	}
}

func TestLazyIDMapped(t *testing.T) {
	var c counting
	reg := startRegistry(t, c.wrap)
	ref := reg + "/map:1"
	seed(t, ref, chunkedImage(t, makeLayer(t, lazy.EStargz, packed(t, plain("f", []byte("mapped")), plain("pad", noise(1<<20))))))
	e := newLazy(t, t.TempDir(), t.TempDir(), -1)
	if err := e.Pull(context.Background(), PullOptions{Ref: ref, Lazy: true}); err != nil {
		t.Fatal(err)
	}
	m := snapshot.IDMap{UIDs: []snapshot.IDRange{{Container: 0, Host: 100000, Size: 65536}}, GIDs: []snapshot.IDRange{{Container: 0, Host: 100000, Size: 65536}}}
	dir := e.container(t, ref, "c1", m)
	got, err := os.ReadFile(dir + "/f")
	if err != nil || string(got) != "mapped" {
		t.Fatalf("read %q: %v", got, err)
	}
	var st unix.Stat_t
	if err := unix.Stat(dir+"/f", &st); err != nil || st.Uid != 100000 {
		t.Fatalf("owner %d: %v", st.Uid, err)
	}
}

func TestLazyProcessKilled(t *testing.T) {
	var c counting
	reg := startRegistry(t, c.wrap)
	data := noise(1 << 20)
	ref := reg + "/kill:1"
	seed(t, ref, chunkedImage(t, makeLayer(t, lazy.EStargz, packed(t, plain("f", data), plain("g", noise(4<<20))))))
	root, run := t.TempDir(), t.TempDir()
	e := newLazy(t, root, run, -1)
	if err := e.Pull(context.Background(), PullOptions{Ref: ref, Lazy: true}); err != nil {
		t.Fatal(err)
	}
	// An engine that ends takes nothing with it, and the next takes the mounts over.
	dir := e.container(t, ref, "c1", snapshot.IDMap{})
	e.stop()
	if got, err := os.ReadFile(dir + "/f"); err != nil || !bytes.Equal(got, data) {
		t.Fatalf("read without an engine: %v", err)
	}
	e = newLazy(t, root, run, -1)
	if n := len(lazyMounts(t, root)); n != 1 {
		t.Fatalf("%d mounts after the next start", n)
	}
	killed := false
	procs, err := filepath.Glob("/proc/[0-9]*/cmdline")
	if err != nil {
		t.Fatal(err)
	}
	for _, p := range procs {
		if b, _ := os.ReadFile(p); string(b) == lazy.Argv0+"\x00"+run+"\x00" {
			var pid int
			if _, err := fmt.Sscanf(p, "/proc/%d/", &pid); err != nil {
				t.Fatal(err)
			}
			killed = unix.Kill(pid, unix.SIGKILL) == nil
		}
	}
	if !killed {
		t.Fatal("no process serves layers")
	}
	r, err := e.Resolve(context.Background(), ref, "")
	if err != nil {
		t.Fatal(err)
	}
	until(t, "the layer is served again", func() bool { return lazy.Mounted(r.Chain.Dirs[0]) })
	dir = e.container(t, ref, "c2", snapshot.IDMap{})
	if got, err := os.ReadFile(dir + "/f"); err != nil || !bytes.Equal(got, data) {
		t.Fatalf("read from the next process: %v", err)
	}
}
