package image

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"context"
	"errors"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-containerregistry/pkg/name"
	"github.com/google/go-containerregistry/pkg/v1/tarball"
	"github.com/klauspost/compress/zstd"
	dockerspec "github.com/moby/docker-image-spec/specs-go/v1"
	mimage "github.com/moby/moby/api/types/image"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/cloudos-io/cloudos/internal/fault"
)

// withImage loads a small image under tags and returns its id.
func withImage(t testing.TB, s *Service, seed string, tags ...string) digest.Digest {
	t.Helper()
	l := layerTar(t, file{name: "base", body: "base"}, file{name: "seed", body: seed})
	cfg := configFor(t, func(i *dockerspec.DockerOCIImage) {
		i.Config.Labels = map[string]string{"seed": seed}
		c := i.Created.Add(time.Duration(seed[0]) * time.Hour)
		i.Created = &c
	}, l)
	if _, err := s.Load(context.Background(), bytes.NewReader(dockerTar(t, cfg, tags, l)), nil, nil); err != nil {
		t.Fatal(err)
	}
	return digest.FromBytes(cfg)
}

func TestSaveLoadRoundTrip(t *testing.T) {
	s := newService(t, t.TempDir())
	ctx := context.Background()
	a, b := withImage(t, s, "a", "x:1", "x:2"), withImage(t, s, "b", "y:1")
	var buf bytes.Buffer
	if err := s.Save(ctx, []string{"x", "y:1", a.Encoded()[:12]}, nil, &buf); err != nil {
		t.Fatal(err)
	}
	gz, zs := &bytes.Buffer{}, &bytes.Buffer{}
	g := gzip.NewWriter(gz)
	_, _ = g.Write(buf.Bytes())
	g.Close()
	z, _ := zstd.NewWriter(zs)
	_, _ = z.Write(buf.Bytes())
	z.Close()
	forms := map[string][]byte{"plain": buf.Bytes(), "gzip": gz.Bytes(), "zstd": zs.Bytes()}
	if _, err := exec.LookPath("xz"); err == nil {
		c := exec.Command("xz", "-c")
		c.Stdin = bytes.NewReader(buf.Bytes())
		if forms["xz"], err = c.Output(); err != nil {
			t.Fatal(err)
		}
	}
	for form, data := range forms {
		t.Run(form, func(t *testing.T) {
			s2 := newService(t, t.TempDir())
			got, err := s2.Load(ctx, bytes.NewReader(data), nil, nil)
			if err != nil {
				t.Fatal(err)
			}
			if !slices.Equal(got, []string{"x:1", "x:2", "y:1"}) {
				t.Errorf("loaded %q", got)
			}
			for ref, id := range map[string]digest.Digest{"x:1": a, "x:2": a, "y:1": b} {
				if r, err := s2.Resolve(ctx, ref, ""); err != nil || r.ID != id {
					t.Errorf("%s: %v %v", ref, r.ID, err)
				}
			}
		})
	}
	// Another implementation reads docker's half.
	p := filepath.Join(t.TempDir(), "i.tar")
	if err := os.WriteFile(p, buf.Bytes(), 0o600); err != nil {
		t.Fatal(err)
	}
	tag, _ := name.NewTag("x:2")
	img, err := tarball.ImageFromPath(p, &tag)
	if err != nil {
		t.Fatal(err)
	}
	if id := configID(t, img); id != a {
		t.Errorf("tarball's id %s, want %s", id, a)
	}
	if err := s.Save(ctx, []string{"nosuch"}, nil, io.Discard); !fault.Is(err, fault.NotFound) {
		t.Errorf("save of none: %v", err)
	}
	if err := s.Save(ctx, []string{"x:1"}, []ocispec.Platform{{OS: "linux", Architecture: "arm64"}}, io.Discard); !fault.Is(err, fault.NotFound) {
		t.Errorf("save of another platform: %v", err)
	}
}

func TestImportAndCommit(t *testing.T) {
	s := newService(t, t.TempDir())
	ctx := context.Background()
	root := layerTar(t, file{name: "bin/", typ: tar.TypeDir}, file{name: "bin/x", body: "x", mode: 0o755})
	id, err := s.Import(ctx, bytes.NewReader(root), "imp:1", "hello", "", []string{
		`CMD ["/bin/x", "y"]`, `ENV A=1 B="two words"`, "LABEL k=v", "EXPOSE 80 53/udp", "USER 7", "WORKDIR /w", `HEALTHCHECK --interval=5s --retries=2 CMD /bin/x`, "ENTRYPOINT echo hi",
	})
	if err != nil {
		t.Fatal(err)
	}
	r, err := s.Resolve(ctx, "imp:1", "")
	if err != nil || r.ID != id {
		t.Fatalf("%+v %v", r, err)
	}
	if !slices.Equal(r.Config.Cmd, []string{"/bin/x", "y"}) || !slices.Equal(r.Config.Env, []string{"A=1", "B=two words"}) || r.Config.User != "7" ||
		len(r.Config.ExposedPorts) != 2 || r.Healthcheck == nil || r.Healthcheck.Retries != 2 || !slices.Equal(r.Config.Entrypoint, []string{"/bin/sh", "-c", "echo hi"}) {
		t.Errorf("config %+v health %+v", r.Config, r.Healthcheck)
	}
	for _, bad := range []string{"RUN x", "ENV", "ENV a", `LABEL a="b`, "HEALTHCHECK FOO", "SHELL x", "HEALTHCHECK --retries=x CMD y"} {
		if _, err := s.Import(ctx, bytes.NewReader(root), "", "", "", []string{bad}); !fault.Is(err, fault.Invalid) {
			t.Errorf("change %q: %v", bad, err)
		}
	}
	conf := dockerspec.DockerOCIImageConfig{ImageConfig: r.Config}
	conf.Cmd = []string{"/new"}
	cid, err := s.Commit(ctx, CommitRequest{Parent: r, Ref: "com:1", Config: conf, Author: "me", Comment: "c", CreatedBy: "/bin/x"},
		bytes.NewReader(layerTar(t, file{name: "bin/y", body: "yy"}, file{name: "bin/.wh.x"})))
	if err != nil {
		t.Fatal(err)
	}
	c, err := s.Resolve(ctx, cid.String(), "")
	if err != nil || len(c.Chain.Dirs) != 2 || c.Chain.Dirs[1] != r.Chain.Dirs[0] {
		t.Fatalf("%+v %v", c, err)
	}
	h, err := s.History(ctx, "com:1", "")
	if err != nil || len(h) != 2 || h[0].CreatedBy != "/bin/x" || h[0].Size != 2 || h[1].Comment != "hello" || h[1].ID != "<missing>" || h[0].ID != cid.String() {
		t.Errorf("history %+v %v", h, err)
	}
	// The parent cannot go before its child.
	if _, err := s.Remove(ctx, id.String(), RemoveOptions{}); !fault.Is(err, fault.Conflict) || !strings.Contains(err.Error(), "image has dependent child images") {
		t.Errorf("remove of a parent: %v", err)
	}
}

// texts is what docker rmi prints.
func texts(rs []mimage.DeleteResponse, keepLayers bool) []string {
	var out []string
	for _, r := range rs {
		switch {
		case r.Untagged != "":
			out = append(out, "Untagged: "+r.Untagged)
		default:
			out = append(out, "Deleted: "+r.Deleted)
		}
	}
	return out
}

func TestRemove(t *testing.T) {
	ctx := context.Background()
	running := func(id digest.Digest) func(digest.Digest) map[string]bool {
		return func(d digest.Digest) map[string]bool {
			if d == id {
				return map[string]bool{"0123456789abcdef": true}
			}
			return nil
		}
	}
	stopped := func(id digest.Digest) func(digest.Digest) map[string]bool {
		return func(d digest.Digest) map[string]bool {
			if d == id {
				return map[string]bool{"0123456789abcdef": false}
			}
			return nil
		}
	}
	s := newService(t, t.TempDir())
	a := withImage(t, s, "a", "x:1", "x:2", "z:1")
	sa := a.Encoded()[:12]
	wantErr := func(ref string, o RemoveOptions, want string) {
		t.Helper()
		_, err := s.Remove(ctx, ref, o)
		if !fault.Is(err, fault.Conflict) || err.Error() != want {
			t.Errorf("Remove(%s) = %v, want %q", ref, err, want)
		}
	}
	want := func(ref string, o RemoveOptions, lines ...string) {
		t.Helper()
		got, err := s.Remove(ctx, ref, o)
		if err != nil {
			t.Errorf("Remove(%s): %v", ref, err)
			return
		}
		if l := texts(got, true); !slices.Equal(l, lines) {
			t.Errorf("Remove(%s) = %q, want %q", ref, l, lines)
		}
	}
	wantErr(sa, RemoveOptions{}, "conflict: unable to delete "+sa+" (must be forced) - image is referenced in multiple repositories")
	want("x:2", RemoveOptions{InUse: running(a)}, "Untagged: x:2")
	want("z:1", RemoveOptions{}, "Untagged: z:1")
	wantErr("x:1", RemoveOptions{InUse: stopped(a)}, `conflict: unable to remove repository reference "x:1" (must force) - container 0123456789ab is using its referenced image `+sa)
	wantErr(sa, RemoveOptions{InUse: stopped(a)}, "conflict: unable to delete "+sa+" (must be forced) - image is being used by stopped container 0123456789ab")
	wantErr(sa, RemoveOptions{InUse: running(a), Force: true}, "conflict: unable to delete "+sa+" (cannot be forced) - image is being used by running container 0123456789ab")
	// Forced off its name while a container runs, the image stays, untagged.
	want("x:1", RemoveOptions{InUse: running(a), Force: true}, "Untagged: x:1")
	list, err := s.List(ctx, map[string]map[string]bool{"dangling": {"true": true}}, false, false, false)
	if err != nil || len(list) != 1 || list[0].ID != a.String() || len(list[0].RepoTags) != 0 {
		t.Errorf("dangling: %+v %v", list, err)
	}
	r, err := s.Resolve(ctx, a.String(), "")
	if err != nil {
		t.Fatal(err)
	}
	want(sa, RemoveOptions{}, "Deleted: "+a.String(), "Deleted: "+r.Chain.ID)
	if _, err := s.Remove(ctx, sa, RemoveOptions{}); !fault.Is(err, fault.NotFound) || err.Error() != "No such image: "+sa+":latest" && err.Error() != "No such image: "+sa {
		t.Errorf("second: %v", err)
	}
	if _, err := s.Remove(ctx, "no/such", RemoveOptions{}); err == nil || err.Error() != "No such image: no/such:latest" {
		t.Errorf("none: %v", err)
	}
}

func TestCollectionKeepsWhatIsUsed(t *testing.T) {
	ctx := context.Background()
	pinned := map[string]struct{}{}
	s := newService(t, t.TempDir(), func(c *Config) { c.PinnedChains = func() map[string]struct{} { return pinned } })
	withImage(t, s, "a", "a:1")
	withImage(t, s, "b", "b:1")
	ra, _ := s.Resolve(ctx, "a:1", "")
	rb, _ := s.Resolve(ctx, "b:1", "")
	pinned[ra.Chain.ID] = struct{}{}
	for _, n := range []string{"a:1", "b:1"} {
		if _, err := s.Remove(ctx, n, RemoveOptions{Force: true}); err != nil {
			t.Fatal(err)
		}
	}
	// Handed out a moment ago: a container may be on its way.
	if err := s.Collect(ctx); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(rb.Chain.Dirs[0]); err != nil {
		t.Errorf("a chain went while it was being handed out: %v", err)
	}
	s.ready = readyCache{}
	if err := s.Collect(ctx); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(ra.Chain.Dirs[0]); err != nil {
		t.Errorf("a chain in use went: %v", err)
	}
	if _, err := os.Stat(rb.Chain.Dirs[0]); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("an unused chain stays: %v", err)
	}
	delete(pinned, ra.Chain.ID)
	if err := s.Collect(ctx); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(ra.Chain.Dirs[0]); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("a chain no longer in use stays: %v", err)
	}
	if n, err := s.stored(ctx); err != nil || n != 0 {
		t.Errorf("%d bytes left, %v", n, err)
	}
}

func TestListFiltersAndPrune(t *testing.T) {
	ctx := context.Background()
	s := newService(t, t.TempDir())
	a, b := withImage(t, s, "a", "one/x:1"), withImage(t, s, "b", "two:2")
	withImage(t, s, "c", "two:2") // b loses its name
	ids := func(f map[string]map[string]bool) []string {
		t.Helper()
		l, err := s.List(ctx, f, false, false, false)
		if err != nil {
			t.Fatal(err)
		}
		var out []string
		for _, i := range l {
			out = append(out, i.Labels["seed"])
		}
		return out
	}
	one := func(k, v string) map[string]map[string]bool { return map[string]map[string]bool{k: {v: true}} }
	for _, c := range []struct {
		f    map[string]map[string]bool
		want []string
	}{
		{nil, []string{"c", "b", "a"}},
		{one("dangling", "true"), []string{"b"}},
		{one("dangling", "false"), []string{"c", "a"}},
		{one("label", "seed=a"), []string{"a"}},
		{one("label", "seed"), []string{"c", "b", "a"}},
		{one("reference", "two"), []string{"c"}},
		{one("reference", "*/x"), []string{"a"}},
		{one("reference", "one/*:1"), []string{"a"}},
		{one("before", "two:2"), []string{"b", "a"}},
		{one("since", "one/x:1"), []string{"c", "b"}},
	} {
		if got := ids(c.f); !slices.Equal(got, c.want) {
			t.Errorf("%v: %q, want %q", c.f, got, c.want)
		}
	}
	for _, f := range []map[string]map[string]bool{one("nosuch", "x"), one("dangling", "perhaps"), one("until", "soon")} {
		if _, err := s.List(ctx, f, false, false, false); !fault.Is(err, fault.Invalid) {
			t.Errorf("%v: %v", f, err)
		}
	}
	rep, err := s.Prune(ctx, nil, nil)
	if err != nil || len(rep.ImagesDeleted) == 0 || rep.ImagesDeleted[0].Deleted != b.String() || rep.SpaceReclaimed == 0 {
		t.Errorf("prune: %+v %v", rep, err)
	}
	rep, err = s.Prune(ctx, one("dangling", "false"), func(d digest.Digest) map[string]bool {
		if d == a {
			return map[string]bool{"c": false}
		}
		return nil
	})
	if err != nil || len(rep.ImagesDeleted) < 2 || rep.ImagesDeleted[0].Untagged != "two:2" {
		t.Errorf("prune all: %+v %v", rep, err)
	}
	if got := ids(nil); !slices.Equal(got, []string{"a"}) {
		t.Errorf("left: %q", got)
	}
}

func TestEnsureEmbedded(t *testing.T) {
	s := newService(t, t.TempDir())
	ctx := context.Background()
	if err := s.EnsureEmbedded(ctx); err != nil {
		t.Fatal(err)
	}
	r, err := s.Resolve(ctx, "servin/hello", "")
	if fault.Is(err, fault.NotFound) {
		t.Skip("SKIP: this build carries no image (make hello)")
	}
	if err != nil {
		t.Fatal(err)
	}
	if err := s.EnsureEmbedded(ctx); err != nil {
		t.Fatal(err)
	}
	if r2, err := s.Resolve(ctx, "servin/hello:latest", ""); err != nil || r2.ID != r.ID {
		t.Errorf("%+v %v", r2, err)
	}
	// A user's image under the name stays.
	id := withImage(t, s, "u", "servin/hello:latest")
	if err := s.EnsureEmbedded(ctx); err != nil {
		t.Fatal(err)
	}
	if r3, err := s.Resolve(ctx, "servin/hello:latest", ""); err != nil || r3.ID != id {
		t.Errorf("%+v %v", r3, err)
	}
}
