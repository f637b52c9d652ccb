package cri

import (
	"archive/tar"
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"net"
	"net/http"
	"os"
	"os/exec"
	"strings"
	"sync"
	"testing"
	"time"
)

// content is an image of the host's static busybox: a layer and a configuration.
type content struct{ layer, config []byte }

func digest(b []byte) string { h := sha256.Sum256(b); return "sha256:" + hex.EncodeToString(h[:]) }

// busybox makes the image; salt makes it one of its own.
func busybox(t *testing.T, salt string) content {
	t.Helper()
	box, err := os.ReadFile("/usr/bin/busybox")
	if err != nil {
		t.Fatal(err)
	}
	list, err := exec.Command("/usr/bin/busybox", "--list").Output()
	if err != nil {
		t.Fatal(err)
	}
	a := newArchive(t)
	for _, d := range []string{"bin", "etc", "tmp", "proc", "sys", "dev", "root", "var", "data"} {
		mode := int64(0o755)
		if d == "tmp" {
			mode = 0o1777
		}
		a.add(&tar.Header{Name: d + "/", Typeflag: tar.TypeDir, Mode: mode}, nil)
	}
	a.add(&tar.Header{Name: "bin/busybox", Mode: 0o755}, box)
	for _, name := range strings.Fields(string(list)) {
		if name != "busybox" {
			a.add(&tar.Header{Name: "bin/" + name, Typeflag: tar.TypeSymlink, Linkname: "busybox", Mode: 0o777}, nil)
		}
	}
	a.file("etc/passwd", []byte("root:x:0:0:root:/root:/bin/sh\nweb:x:1000:1000::/:/bin/sh\n"))
	a.file("etc/group", []byte("root:x:0:\nweb:x:1000:\nextra:x:2000:web\n"))
	a.file("etc/salt", []byte(salt))
	// containerd's pods wait in this one.
	a.add(&tar.Header{Name: "pause", Typeflag: tar.TypeSymlink, Linkname: "bin/busybox", Mode: 0o777}, nil)
	c := content{layer: a.bytes()}
	c.config, _ = json.Marshal(map[string]any{
		"architecture": "amd64", "os": "linux", "config": map[string]any{"Cmd": []string{"sleep", "1000000"}, "Env": []string{"PATH=/bin"}},
		"rootfs": map[string]any{"type": "layers", "diff_ids": []string{digest(c.layer)}},
	})
	return c
}

// save writes a docker archive of an image.
func (c content) save(t *testing.T, path string, tags ...string) {
	t.Helper()
	name := strings.TrimPrefix(digest(c.config), "sha256:") + ".json"
	manifest, _ := json.Marshal([]any{map[string]any{"Config": name, "RepoTags": tags, "Layers": []string{"layer.tar"}}})
	a := newArchive(t)
	a.file(name, c.config)
	a.file("layer.tar", c.layer)
	a.file("manifest.json", manifest)
	if err := os.WriteFile(path, a.bytes(), 0o644); err != nil {
		t.Fatal(err)
	}
}

type tarball struct {
	t *testing.T
	b *bytes.Buffer
	w *tar.Writer
}

func newArchive(t *testing.T) *tarball {
	b := new(bytes.Buffer)
	return &tarball{t, b, tar.NewWriter(b)}
}

func (a *tarball) file(name string, b []byte) { a.add(&tar.Header{Name: name, Mode: 0o644}, b) }

func (a *tarball) add(h *tar.Header, b []byte) {
	h.Size = int64(len(b))
	if err := a.w.WriteHeader(h); err != nil {
		a.t.Fatal(err)
	}
	if _, err := a.w.Write(b); err != nil {
		a.t.Fatal(err)
	}
}

func (a *tarball) bytes() []byte {
	if err := a.w.Close(); err != nil {
		a.t.Fatal(err)
	}
	return a.b.Bytes()
}

// registry serves images on the loopback.
type registry struct {
	host string
	mu   sync.Mutex
	have map[string][]byte // by digest, and manifests by NAME:TAG too
}

const (
	mediaManifest = "application/vnd.docker.distribution.manifest.v2+json"
	mediaConfig   = "application/vnd.docker.container.image.v1+json"
	mediaLayer    = "application/vnd.docker.image.rootfs.diff.tar"
)

func newRegistry(t *testing.T) *registry {
	t.Helper()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	r := &registry{host: ln.Addr().String(), have: map[string][]byte{}}
	srv := &http.Server{Handler: r}
	go func() { _ = srv.Serve(ln) }()
	t.Cleanup(func() { srv.Close() })
	return r
}

// push puts an image there and returns its name.
func (r *registry) push(c content, name string) string {
	item := func(media string, b []byte) map[string]any {
		r.have[digest(b)] = b
		return map[string]any{"mediaType": media, "digest": digest(b), "size": len(b)}
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	m, _ := json.Marshal(map[string]any{"schemaVersion": 2, "mediaType": mediaManifest,
		"config": item(mediaConfig, c.config), "layers": []any{item(mediaLayer, c.layer)}})
	r.have[digest(m)], r.have[name+":1"] = m, m
	return r.host + "/" + name + ":1"
}

func (r *registry) ServeHTTP(w http.ResponseWriter, q *http.Request) {
	r.mu.Lock()
	defer r.mu.Unlock()
	parts := strings.Split(strings.Trim(q.URL.Path, "/"), "/") // v2 NAME manifests|blobs REF
	if len(parts) == 1 {
		return
	}
	if len(parts) != 4 {
		http.NotFound(w, q)
		return
	}
	b, ok := r.have[parts[3]]
	if !ok {
		b, ok = r.have[parts[1]+":"+parts[3]]
	}
	if !ok {
		http.NotFound(w, q)
		return
	}
	w.Header().Set("Docker-Content-Digest", digest(b))
	w.Header().Set("Content-Type", "application/octet-stream")
	if parts[2] == "manifests" {
		w.Header().Set("Content-Type", mediaManifest)
	}
	http.ServeContent(w, q, "", time.Time{}, bytes.NewReader(b))
}
