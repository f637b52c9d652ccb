//go:build linux

package durable_test

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"

	"github.com/hanwen/go-fuse/v2/fs"
	"github.com/hanwen/go-fuse/v2/fuse"

	"github.com/cloudos-io/cloudos/internal/durable"
)

// seen is a file system that notes in which order files are written, synced and renamed.
type seen struct {
	fs.LoopbackNode
	d *deeds
}

type deeds struct {
	mu   sync.Mutex
	list []string
	fail string // this deed fails
}

func (d *deeds) note(what string) syscall.Errno {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.list = append(d.list, what)
	if what == d.fail {
		return syscall.EIO
	}
	return 0
}

func (d *deeds) begin(fail string) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.list, d.fail = nil, fail
}

func (d *deeds) done() []string {
	d.mu.Lock()
	defer d.mu.Unlock()
	return slices.Clone(d.list)
}

type seenFile struct {
	fs.FileHandle
	d *deeds
}

type seenDirectory struct {
	fs.FileHandle
	d *deeds
}

func (s *seen) Create(ctx context.Context, name string, flags, mode uint32, out *fuse.EntryOut) (*fs.Inode, fs.FileHandle, uint32, syscall.Errno) {
	n, f, fl, errno := s.LoopbackNode.Create(ctx, name, flags, mode, out)
	s.d.note("create " + name)
	return n, seenFile{f, s.d}, fl, errno
}

func (s *seen) Rename(ctx context.Context, name string, to fs.InodeEmbedder, as string, flags uint32) syscall.Errno {
	if errno := s.d.note("rename " + name + " " + as); errno != 0 {
		return errno
	}
	return s.LoopbackNode.Rename(ctx, name, to, as, flags)
}

func (s *seen) Fsync(context.Context, fs.FileHandle, uint32) syscall.Errno {
	return s.d.note("sync")
}

func (s *seen) OpendirHandle(ctx context.Context, flags uint32) (fs.FileHandle, uint32, syscall.Errno) {
	f, fl, errno := s.LoopbackNode.OpendirHandle(ctx, flags)
	return seenDirectory{f, s.d}, fl, errno
}

func (f seenDirectory) Fsyncdir(context.Context, uint32) syscall.Errno {
	return f.d.note("sync directory")
}

func (f seenDirectory) Releasedir(ctx context.Context, flags uint32) {
	f.FileHandle.(fs.FileReleasedirer).Releasedir(ctx, flags)
}

func (f seenFile) Write(ctx context.Context, b []byte, off int64) (uint32, syscall.Errno) {
	if errno := f.d.note("write " + string(b)); errno != 0 {
		return 0, errno
	}
	return f.FileHandle.(fs.FileWriter).Write(ctx, b, off)
}

func (f seenFile) Release(ctx context.Context) syscall.Errno {
	return f.FileHandle.(fs.FileReleaser).Release(ctx)
}

func TestOrder(t *testing.T) {
	dir, at := t.TempDir(), t.TempDir()
	root, err := fs.NewLoopbackRoot(dir)
	if err != nil {
		t.Fatal(err)
	}
	d := &deeds{}
	base := root.(*fs.LoopbackNode).RootData
	base.NewNode = func(r *fs.LoopbackRoot, _ *fs.Inode, _ string, _ *syscall.Stat_t) fs.InodeEmbedder {
		return &seen{fs.LoopbackNode{RootData: r}, d}
	}
	top := &seen{fs.LoopbackNode{RootData: base}, d}
	base.RootNode = top
	srv, err := fs.Mount(at, top, &fs.Options{MountOptions: fuse.MountOptions{DirectMountStrict: true}})
	if errors.Is(err, os.ErrPermission) || errors.Is(err, os.ErrNotExist) {
		t.Skipf("SKIP: cannot mount a file system of our own: %v", err)
	}
	if err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := srv.Unmount(); err != nil {
			t.Error(err)
		}
	}()
	path := filepath.Join(at, "f")
	all := []string{"create .f.new", "write one", "sync", "rename .f.new f", "sync directory"}
	for _, c := range []struct {
		sync durable.Sync
		fail string
		want []string
		left string
	}{
		{durable.Nothing, "", slices.Concat(all[:2], all[3:4]), "f"},
		{durable.Content, "", all[:4], "f"},
		{durable.Everything, "", all, "f"},
		{durable.Everything, "write one", all[:2], ""},
		{durable.Everything, "sync", all[:3], ""},
		{durable.Everything, "rename .f.new f", all[:4], ""},
		{durable.Everything, "sync directory", all, "f"},
	} {
		d.begin(c.fail)
		d.begin(c.fail)
		err := durable.WriteFile(path, []byte("one"), 0o600, c.sync)
		if (err != nil) != (c.fail != "") || !slices.Equal(d.done(), c.want) || names(t, dir) != c.left {
			t.Errorf("%+v: %s, %v; left %q", c, strings.Join(d.done(), ", "), err, names(t, dir))
		}
		_ = os.Remove(path)
	}
}
