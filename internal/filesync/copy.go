package filesync

import (
	"archive/tar"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strings"

	"github.com/moby/moby/api/types/container"

	"github.com/cloudos-io/cloudos/client"
)

// Sync brings changes into a container: what exists is copied, what is gone is
// removed.
func Sync(ctx context.Context, c *client.Client, id string, changes []Change) error {
	var put []Change
	var drop []string
	for _, ch := range changes {
		if ch.Container == "" {
			continue
		}
		if _, err := os.Lstat(ch.Host); errors.Is(err, fs.ErrNotExist) {
			drop = append(drop, ch.Container)
		} else if err != nil {
			return fmt.Errorf("cannot copy: %w", err)
		} else {
			put = append(put, ch)
		}
	}
	if len(drop) > 0 {
		if err := remove(ctx, c, id, drop); err != nil {
			return err
		}
	}
	if len(put) == 0 {
		return nil
	}
	r, w := io.Pipe()
	go func() { w.CloseWithError(pack(w, put)) }()
	err := c.ContainerPutArchive(ctx, id, "/", r, client.PutArchiveOptions{CopyUIDGID: true})
	r.CloseWithError(errors.New("nobody reads"))
	return err
}

// remove deletes files in a container. It takes rm in there: an archive cannot
// say that something is gone.
func remove(ctx context.Context, c *client.Client, id string, paths []string) error {
	for len(paths) > 0 {
		n := min(len(paths), 1000)
		xid, err := c.ExecCreate(ctx, id, container.ExecCreateRequest{User: "0", Cmd: append([]string{"rm", "-rf", "--"}, paths[:n]...), AttachStdout: true, AttachStderr: true})
		if client.IsConflict(err) { // it does not run: what is gone here stays there
			return nil
		}
		if err != nil {
			return err
		}
		st, err := c.ExecStart(ctx, xid, container.ExecStartRequest{})
		if err != nil {
			return fmt.Errorf("cannot remove %s in the container: %w", paths[0], err)
		}
		var text strings.Builder
		err = client.Demux(&text, &text, st)
		st.Close()
		if err != nil {
			return err
		}
		if in, err := c.ExecInspect(ctx, xid); err == nil && in.ExitCode != nil && *in.ExitCode != 0 {
			return fmt.Errorf("cannot remove %s in the container: %s", paths[0], strings.TrimSpace(text.String()))
		}
		paths = paths[n:]
	}
	return nil
}

// pack writes the changes as a tar archive, folders before what they hold.
func pack(w io.Writer, list []Change) error {
	slices.SortFunc(list, func(a, b Change) int { return strings.Compare(a.Container, b.Container) })
	tw := tar.NewWriter(w)
	for _, ch := range list {
		if err := packOne(tw, ch); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
	}
	return tw.Close()
}

func packOne(tw *tar.Writer, ch Change) error {
	fi, err := os.Lstat(ch.Host)
	if err != nil {
		return err
	}
	link := ""
	switch {
	case fi.Mode()&fs.ModeSymlink != 0:
		if link, err = os.Readlink(ch.Host); err != nil {
			return err
		}
	case fi.IsDir(), fi.Mode().IsRegular():
	default:
		return nil // sockets, pipes and devices stay here
	}
	h, err := tar.FileInfoHeader(fi, link)
	if err != nil {
		return err
	}
	h.Name = strings.TrimPrefix(path.Clean(ch.Container), "/")
	if h.Name == "" {
		return nil
	}
	// The container's root owns what is brought in, as in images that are built.
	h.Uid, h.Gid, h.Uname, h.Gname = 0, 0, "", ""
	if !fi.Mode().IsRegular() {
		if fi.IsDir() {
			h.Name += "/"
		}
		return tw.WriteHeader(h)
	}
	// The size in the header has to be the file's, which may be being written.
	b, err := os.Open(ch.Host)
	if err != nil {
		return err
	}
	defer b.Close()
	if fi, err = b.Stat(); err != nil {
		return err
	}
	h.Size = fi.Size()
	if err := tw.WriteHeader(h); err != nil {
		return err
	}
	n, err := io.Copy(tw, io.LimitReader(b, h.Size))
	if err != nil {
		return err
	}
	for zero := make([]byte, 32<<10); n < h.Size; {
		// It became shorter: another event brings its true content.
		m, err := tw.Write(zero[:min(int64(len(zero)), h.Size-n)])
		if err != nil {
			return err
		}
		n += int64(m)
	}
	return nil
}

// Everything lists all files below a rule's path that count, for a first copy.
func (r *Rule) Everything() ([]Change, error) {
	var out []Change
	err := filepath.WalkDir(r.Path, func(p string, d fs.DirEntry, err error) error {
		if errors.Is(err, fs.ErrNotExist) || errors.Is(err, fs.ErrPermission) {
			return nil
		}
		if err != nil {
			return err
		}
		if d.IsDir() && r.skips(p) {
			return fs.SkipDir
		}
		if ch, ok := r.Match(p); ok && (p != r.Path || !d.IsDir()) {
			out = append(out, ch)
		}
		return nil
	})
	if err != nil {
		return nil, fmt.Errorf("cannot read %s: %w", r.Path, err)
	}
	return out, nil
}
