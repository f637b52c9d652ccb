package build

import (
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/cloudos-io/cloudos/test/harness"
)

// size is what a directory takes on disk.
func size(t *testing.T, dir string) int64 {
	t.Helper()
	var sum int64
	err := filepath.WalkDir(dir, func(_ string, d fs.DirEntry, err error) error {
		if err != nil {
			return nil // removed meanwhile
		}
		if i, err := d.Info(); err == nil {
			sum += i.Sys().(*syscall.Stat_t).Blocks * 512
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return sum
}

const mib = 1 << 20

// TestOneStore builds and looks for second copies: layers of base images and of
// results are in the engine's store once, unpacked once, and a result is run from
// the directory that its build wrote.
func TestOneStore(t *testing.T) {
	e := start(t, "")
	layers := filepath.Join(e.Dir, "root/images/layers/snapshots")
	content := filepath.Join(e.Dir, "root/images/content")
	ctx := e.context(map[string]string{"Dockerfile": "FROM bb\nRUN head -c 8388608 /dev/urandom > /big\nRUN head -c 4194304 /dev/urandom > /small\n"})
	l0, c0 := size(t, layers), size(t, content)
	e.must("build", "-t", "one", ctx)
	e.must("run", "--rm", "one", "test", "-s", "/big")
	l1, c1 := size(t, layers), size(t, content)
	if grew := l1 - l0; grew < 12*mib || grew > 13*mib {
		t.Errorf("layers of 12 MiB took %d bytes unpacked", grew)
	}
	if grew := c1 - c0; grew > 13*mib {
		t.Errorf("layers of 12 MiB took %d bytes of blobs", grew)
	}
	// A build on the result, and one by BuildKit's own cache.
	e.must("build", "-t", "two", e.context(map[string]string{"Dockerfile": "FROM one\nRUN touch /more\n"}))
	e.must("run", "--rm", "two", "test", "-s", "/small")
	if grew := size(t, layers) - l1; grew > mib {
		t.Errorf("a build on it took %d bytes more", grew)
	}
	// Without the cache the image stays whole, and can still be built on.
	e.must("builder", "prune", "--all", "--force")
	e.must("run", "--rm", "one", "sh", "-c", "test $(stat -c %s /big) = 8388608")
	e.must("build", "-t", "three", e.context(map[string]string{"Dockerfile": "FROM one\nRUN touch /again\n"}))
	if grew := size(t, layers) - l1; grew > mib {
		t.Errorf("a build after the prune took %d bytes more", grew)
	}
	// Without the images the cache stays whole.
	e.must("rmi", "--force", "one", "two", "three")
	e.must("build", "-t", "three", e.context(map[string]string{"Dockerfile": "FROM bb\nRUN echo new\n"}))
	// Without either nothing is left. A new engine, for one keeps what it ran a while.
	e.must("rmi", "three")
	e.must("builder", "prune", "--all", "--force")
	e.Kill()
	e.Boot()
	e.must("system", "prune", "--force")
	harness.Eventually(t, "layers that nothing uses go", 20*time.Second, func() bool { return size(t, layers) < l0+mib && size(t, content) < c0+mib })
	if got := e.must("run", "--rm", "bb", "echo", "well"); got != "well" {
		t.Errorf("the base image: %q", got)
	}
}

// TestNames moves a name: the image that had it stays, untagged, as Docker has it.
func TestNames(t *testing.T) {
	e := start(t, "")
	for i := range 2 {
		e.must("build", "-t", "moved", e.context(map[string]string{"Dockerfile": fmt.Sprintf("FROM bb\nRUN echo %d > /n\n", i)}))
	}
	if got := e.must("images", "--filter", "dangling=true", "-q"); len(strings.Fields(got)) != 1 {
		t.Errorf("untagged images: %q", got)
	}
	id := e.must("build", "-q", e.context(map[string]string{"Dockerfile": "FROM bb\nRUN echo unnamed > /n\n"}))
	if got := e.must("run", "--rm", id, "cat", "/n"); got != "unnamed" {
		t.Errorf("an image without a name: %q", got)
	}
	e.must("build", "-t", "byid", e.context(map[string]string{"Dockerfile": "FROM " + strings.TrimPrefix(id, "sha256:")[:12] + "\n"}))
	if got := e.must("run", "--rm", "byid", "cat", "/n"); got != "unnamed" {
		t.Errorf("built on an id: %q", got)
	}
}

// TestCacheBudget keeps the cache within its configured size, and shows and
// removes it without and with a running builder.
func TestCacheBudget(t *testing.T) {
	e := start(t, "build:\n  cache: 20m\n  idle: 500ms\n")
	for i := range 3 {
		e.must("build", "-o", e.Dir+"/o", "--target", "x", e.context(map[string]string{"Dockerfile": fmt.Sprintf(
			"FROM bb AS b\nRUN echo %d && head -c 15728640 /dev/urandom > /f\nFROM scratch AS x\nCOPY --from=b /etc/passwd /\n", i)}))
	}
	harness.Eventually(t, "an idle builder leaves", 20*time.Second, func() bool { return e.builder() == 0 })
	harness.Eventually(t, "the cache is within its budget", 20*time.Second, func() bool {
		return size(t, filepath.Join(e.Dir, "root/images/layers/snapshots")) < 28*mib
	})
	du := e.must("system", "df")
	contains(t, du, "Build Cache")
	contains(t, e.must("builder", "du"), "Total: ")
	if e.builder() != 0 {
		t.Error("looking at the cache started a builder")
	}
	contains(t, e.must("builder", "prune", "--all", "--force"), "reclaimed")
	r := e.exec(nil, nil, "docker", "system", "df")
	if r.code != 0 || !strings.Contains(r.out, "Build Cache     0") {
		t.Errorf("after the prune: %s", r)
	}
	if _, err := os.Stat(filepath.Join(e.Dir, "root/build")); err != nil {
		t.Error(err)
	}
	for _, q := range []string{`filters={"until":{"24h":true}}`, `filters={"type":["regular"]}`, "keep-storage=1g", "all=1"} {
		resp, err := e.HTTP().Post("http://engine/v1.50/build/prune?"+q, "", nil)
		if err != nil || resp.StatusCode != 200 {
			t.Errorf("prune %s: %v %v", q, resp, err)
		}
	}
	for _, q := range []string{`filters={"nosuch":["x"]}`, `filters={"until":["never"]}`, "keep-storage=much", "filters=x"} {
		resp, err := e.HTTP().Post("http://engine/v1.50/build/prune?"+q, "", nil)
		if err != nil || resp.StatusCode != 400 {
			t.Errorf("prune %s: %v %v", q, resp, err)
		}
	}
}
