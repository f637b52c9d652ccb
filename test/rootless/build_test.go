package rootless

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// TestBuild builds as an ordinary user: the builder is in the engine's namespaces
// and gets namespaces of its own there.
func TestBuild(t *testing.T) {
	u := newUser(t, "slirp4netns", "newuidmap", "newgidmap", "runc")
	for _, p := range []string{"servin-build", "servin-buildd", "servin-runtime"} {
		data, err := os.ReadFile(filepath.Join(os.Getenv("SERVIN_BIN"), p))
		if err != nil {
			data, err = os.ReadFile(filepath.Join("../../bin", p))
		}
		must(t, err)
		must(t, os.WriteFile(filepath.Join(u.bin, p), data, 0o755))
	}
	u.start()
	defer u.shutdown()
	u.importImage("bb", rootfs(t))
	ctx := filepath.Join(u.dir, "home", "ctx")
	must(t, os.Mkdir(ctx, 0o755))
	must(t, os.WriteFile(filepath.Join(ctx, "Dockerfile"), []byte(`FROM bb
RUN id -u > /id && ip -o link | grep -c eth0 > /links && touch /f && chown 1000 /f
RUN --mount=type=cache,target=/c touch /c/x
COPY --chown=7 Dockerfile /d
`), 0o644))
	if res := u.run("build", "-t", "made", ctx); res.code != 0 {
		t.Fatalf("build: %s", res)
	}
	res := u.run("run", "--rm", "made", "sh", "-c", "cat /id /links; stat -c %u /f /d")
	if got := strings.Fields(res.out); strings.Join(got, " ") != "0 1 1000 7" {
		t.Errorf("the image holds %s", res)
	}
}
