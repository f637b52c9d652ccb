package image

import (
	"bytes"
	"context"
	"os"
	"path/filepath"
	"testing"

	"github.com/containerd/containerd/v2/core/images"
	"github.com/containerd/containerd/v2/core/leases"
	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"

	"github.com/cloudos-io/cloudos/internal/fault"
)

// commitDir makes a committed snapshot with one file.
func commitDir(t *testing.T, s *Service, ctx context.Context, name, parent, file string) string {
	t.Helper()
	if _, err := s.snaps.Prepare(ctx, name+"-active", parent); err != nil {
		t.Fatal(err)
	}
	if err := s.snaps.Commit(ctx, name, name+"-active"); err != nil {
		t.Fatal(err)
	}
	info, err := s.snaps.Stat(ctx, name)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(info.Labels[upperLabel], file), []byte(file), 0o644); err != nil {
		t.Fatal(err)
	}
	return info.Labels[upperLabel]
}

func TestAlias(t *testing.T) {
	s := newService(t, t.TempDir())
	ctx, done, err := s.begin(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	base, top := digest.FromString("base"), digest.FromString("top")
	dir := commitDir(t, s, ctx, "one", "", "a")
	dir2 := commitDir(t, s, ctx, "two", "one", "b")

	if err := s.Adopt(ctx, []string{base.String(), top.String()}, []string{"one", "two"}); err != nil {
		t.Fatal(err)
	}
	chain, err := s.chainOf(ctx, top)
	if err != nil || len(chain.Dirs) != 2 || chain.Dirs[0] != dir2 || chain.Dirs[1] != dir {
		t.Fatalf("chain %v, %v: want %s on %s", chain.Dirs, err, dir2, dir)
	}
	// Again is no error, on another parent it is.
	if err := s.Adopt(ctx, []string{base.String(), top.String()}, []string{"one", "two"}); err != nil {
		t.Error(err)
	}
	if err := s.Alias(ctx, "two", "other", ""); err == nil {
		t.Error("a snapshot was put on a parent that is not its own")
	}
	if err := s.Alias(ctx, "nosuch", "other", ""); !fault.Is(err, fault.NotFound) {
		t.Errorf("no such snapshot: %v", err)
	}
	if _, err := s.snaps.Prepare(ctx, "active", ""); err != nil {
		t.Fatal(err)
	}
	if err := s.Alias(ctx, "active", "other", ""); !fault.Is(err, fault.Invalid) {
		t.Errorf("an active snapshot was named twice: %v", err)
	}
	// What one name holds, collection leaves under the other too.
	keep, err := s.leases.Create(ctx, leases.WithID("keep"))
	if err != nil {
		t.Fatal(err)
	}
	if err := s.leases.AddResource(ctx, keep, leases.Resource{ID: top.String(), Type: "snapshots/" + snapshotterName}); err != nil {
		t.Fatal(err)
	}
	done()
	if err := s.Collect(t.Context()); err != nil {
		t.Fatal(err)
	}
	if b, err := os.ReadFile(filepath.Join(dir2, "b")); err != nil || string(b) != "b" {
		t.Errorf("the layer is gone: %v", err)
	}
	if err := s.leases.Delete(s.ctx(t.Context()), keep); err != nil {
		t.Fatal(err)
	}
	if err := s.Collect(t.Context()); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(dir2); !os.IsNotExist(err) {
		t.Errorf("the layer of no name is still there: %v", err)
	}
}

func TestBuilderLeases(t *testing.T) {
	s := newService(t, t.TempDir())
	ctx := s.ctx(t.Context())
	st := s.BuilderStores()
	l, err := st.Leases.Create(ctx, leases.WithID("b1"))
	if err != nil {
		t.Fatal(err)
	}
	if _, err := s.leases.Create(ctx, leases.WithID("engine's")); err != nil {
		t.Fatal(err)
	}
	list, err := st.Leases.List(ctx)
	if err != nil || len(list) != 1 || list[0].ID != l.ID {
		t.Errorf("a builder sees %v, %v", list, err)
	}
	if err := s.SweepBuilder(ctx, Namespace, "servin_history"); err != nil {
		t.Fatal(err)
	}
	all, err := s.leases.List(ctx)
	if err != nil || len(all) != 1 || all[0].ID != "engine's" {
		t.Errorf("after the sweep: %v, %v", all, err)
	}
}

func TestBuilderImages(t *testing.T) {
	s := newService(t, t.TempDir())
	ctx := s.ctx(t.Context())
	id, err := s.Import(ctx, bytes.NewReader(layerTar(t)), "base:1", "", "", nil)
	if err != nil {
		t.Fatal(err)
	}
	st := s.BuilderStores().Images
	i, err := st.Get(ctx, "docker.io/library/base:1")
	if err != nil {
		t.Fatal(err)
	}
	if j, err := st.Get(ctx, "docker.io/library/"+id.Encoded()[:12]+":latest"); err != nil || j.Target.Digest != i.Target.Digest {
		t.Errorf("by id: %v, %v", j.Target, err)
	}
	if _, err := st.Get(ctx, "docker.io/library/nosuch:latest"); !errdefs.IsNotFound(err) {
		t.Errorf("no such image: %v", err)
	}
	if _, err := st.Create(ctx, images.Image{Name: "Not A Name", Target: i.Target}); !errdefs.IsInvalidArgument(err) {
		t.Errorf("a bad name: %v", err)
	}
	if _, err := st.Create(ctx, images.Image{Name: danglingName + digest.FromString("x").String(), Target: i.Target}); !errdefs.IsInvalidArgument(err) {
		t.Errorf("a wrong dangling name: %v", err)
	}
	if err := st.Delete(ctx, i.Name); !errdefs.IsPermissionDenied(err) {
		t.Errorf("delete: %v", err)
	}
	// A name that moves leaves the image that had it.
	id2, err := s.Import(ctx, bytes.NewReader(layerTar(t, file{name: "f", body: "x"})), "next:1", "", "", nil)
	if err != nil {
		t.Fatal(err)
	}
	next, _ := st.Get(ctx, "docker.io/library/next:1")
	if _, err := st.Update(ctx, images.Image{Name: "docker.io/library/base:1", Target: next.Target}); err != nil {
		t.Fatal(err)
	}
	for ref, want := range map[string]digest.Digest{"base:1": id2, id.String(): id} {
		if in, err := s.Inspect(ctx, ref, "", false); err != nil || in.ID != want.String() {
			t.Errorf("%s is %s, %v; want %s", ref, in.ID, err, want)
		}
	}
}
