package history

import (
	"bytes"
	"context"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"testing"

	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/containerd/v2/core/leases"
	"github.com/containerd/containerd/v2/core/metadata"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/containerd/containerd/v2/plugins/content/local"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	bolt "go.etcd.io/bbolt"
)

// engine is a store of another process's.
func engine(t *testing.T) (content.Store, leases.Manager) {
	t.Helper()
	dir := t.TempDir()
	blobs, err := local.NewStore(dir)
	if err != nil {
		t.Fatal(err)
	}
	b, err := bolt.Open(filepath.Join(dir, "db"), 0o600, nil)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = b.Close() })
	db := metadata.NewDB(b, blobs, nil)
	return db.ContentStore(), metadata.NewLeaseManager(db)
}

func put(ctx context.Context, t *testing.T, cs content.Store, lm leases.Manager, lease string, data []byte) digest.Digest {
	t.Helper()
	l, err := lm.Create(ctx, leases.WithID(lease))
	if err != nil {
		t.Fatal(err)
	}
	d := ocispec.Descriptor{Digest: digest.FromBytes(data), Size: int64(len(data))}
	if err := content.WriteBlob(leases.WithLease(ctx, l.ID), cs, "ref-"+lease, bytes.NewReader(data), d); err != nil {
		t.Fatal(err)
	}
	return d.Digest
}

func TestHistoryIsKeptApart(t *testing.T) {
	ec, el := engine(t)
	root := t.TempDir()
	s, err := Open(root, "ours_history")
	if err != nil {
		t.Fatal(err)
	}
	cs, lm := s.Content(ec), s.Leases(el)
	ours := namespaces.WithNamespace(context.Background(), "ours_history")
	theirs := namespaces.WithNamespace(context.Background(), "ours")

	record := put(ours, t, cs, lm, "a", []byte("a log"))
	layer := put(theirs, t, cs, lm, "b", []byte("a layer"))
	for _, c := range []struct {
		what string
		s    content.Store
		ctx  context.Context
		d    digest.Digest
		ok   bool
	}{
		{"a record", cs, ours, record, true},
		{"a record with the engine", ec, ours, record, false},
		{"a layer", cs, theirs, layer, true},
		{"a layer with the engine", ec, theirs, layer, true},
		{"a layer in the history", cs, ours, layer, false},
	} {
		if _, err := c.s.Info(c.ctx, c.d); (err == nil) != c.ok {
			t.Errorf("%s: %v", c.what, err)
		}
	}
	if l, err := el.List(ours); err != nil || len(l) > 0 {
		t.Errorf("the engine has leases of the history: %v %v", l, err)
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}

	// It is there for the next builder, and goes with its lease.
	if s, err = Open(root, "ours_history"); err != nil {
		t.Fatal(err)
	}
	cs, lm = s.Content(ec), s.Leases(el)
	if b, err := content.ReadBlob(ours, cs, ocispec.Descriptor{Digest: record}); err != nil || string(b) != "a log" {
		t.Errorf("after a restart: %q %v", b, err)
	}
	for i := range 3 * sweepAfter {
		id := fmt.Sprint("l", i)
		put(ours, t, cs, lm, id, fmt.Append(nil, "log ", i))
		if err := lm.Delete(ours, leases.Lease{ID: id}); err != nil {
			t.Fatal(err)
		}
	}
	s.wg.Wait()
	if n := blobs(t, root); n > sweepAfter {
		t.Errorf("%d blobs stay while the builder runs", n)
	}
	if err := lm.Delete(ours, leases.Lease{ID: "a"}); err != nil {
		t.Fatal(err)
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	if n := blobs(t, root); n != 0 {
		t.Errorf("%d blobs stay", n)
	}
}

func blobs(t *testing.T, root string) (n int) {
	t.Helper()
	err := filepath.WalkDir(filepath.Join(root, "records", "blobs"), func(_ string, d fs.DirEntry, err error) error {
		if err == nil && d.Type().IsRegular() {
			n++
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return n
}

// TestDamagedRecords keeps a builder able to start when its records are not readable.
func TestDamagedRecords(t *testing.T) {
	ec, el := engine(t)
	root := t.TempDir()
	if err := os.WriteFile(filepath.Join(root, "records.db"), bytes.Repeat([]byte("torn"), 8192), 0o600); err != nil {
		t.Fatal(err)
	}
	s, err := Open(root, "ours_history")
	if err != nil {
		t.Fatal(err)
	}
	ours := namespaces.WithNamespace(context.Background(), "ours_history")
	put(ours, t, s.Content(ec), s.Leases(el), "l", []byte("a record"))
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
}
