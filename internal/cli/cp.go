package cli

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"runtime"
	"strings"

	"github.com/moby/moby/api/types/container"

	"github.com/cloudos-io/cloudos/client"
	"github.com/cloudos-io/cloudos/internal/cli/command"
	"github.com/cloudos-io/cloudos/internal/cli/format"
	"github.com/cloudos-io/cloudos/internal/cli/tree"
)

type cpFlags struct{ archive, follow, quiet bool }

func (a *App) cmdCp() *command.Command {
	var o cpFlags
	return &command.Command{Name: "cp", Args: "CONTAINER:SRC_PATH DEST_PATH|-  or  SRC_PATH|- CONTAINER:DEST_PATH", Short: "Copy files between a container and the host", Min: 2, Max: 2, Complete: []string{"containerpath"},
		Long: `Copy files between a container and the host.

"-" as source reads a tar archive from standard input, as destination writes one to
standard output. SRC_PATH/. copies what is in a directory rather than the directory.`,
		Example: `servin cp web:/etc/nginx/nginx.conf .
servin cp ./site/. web:/usr/share/nginx/html
servin cp web:/var/log - | tar t`,
		Flags: func(f *command.FlagSet) {
			f.Bool(&o.archive, "archive", "a", "Keep user and group ids")
			f.Bool(&o.follow, "follow-link", "L", "Follow a symbolic link that the source is")
			f.Bool(&o.quiet, "quiet", "q", "Do not tell how much was copied")
		},
		Run: func(ctx context.Context, args []string) error {
			srcC, src := splitPath(args[0])
			dstC, dst := splitPath(args[1])
			c, err := a.client()
			if err != nil {
				return err
			}
			switch {
			case srcC != "" && dstC != "":
				return usagef("cannot copy between two containers: go through the host, or pipe: servin cp %s - | servin cp - %s", args[0], args[1])
			case srcC == "" && dstC == "":
				return usagef("neither path is a container's: write CONTAINER:PATH for one of them")
			case srcC != "":
				return a.copyOut(ctx, c, srcC, src, dst, o)
			}
			return a.copyIn(ctx, c, src, dstC, dst, o)
		}}
}

// splitPath splits CONTAINER:PATH; a path of the host has no container. Paths
// with a colon are told by a leading / or . (or a drive letter).
func splitPath(s string) (ctr, p string) {
	if s == "-" || strings.HasPrefix(s, "/") || strings.HasPrefix(s, ".") || runtime.GOOS == "windows" && filepath.IsAbs(s) {
		return "", s
	}
	ctr, p, ok := strings.Cut(s, ":")
	if !ok {
		return "", s
	}
	if p == "" {
		p = "/"
	}
	return ctr, p
}

// contentsOf reports whether a path names what is in a directory: it ends in /.
func contentsOf(p string) bool { return p == "." || strings.HasSuffix(p, "/.") }

func wantsDir(p string) bool { return strings.HasSuffix(p, "/") || contentsOf(p) }

// counter counts what passes.
type counter struct {
	r io.Reader
	n int64
}

func (c *counter) Read(p []byte) (int, error) {
	n, err := c.r.Read(p)
	c.n += int64(n)
	return n, err
}

func (a *App) copied(o cpFlags, n int64, to string) {
	if !o.quiet && a.errIsTerminal() {
		fmt.Fprintf(a.Stderr, "Copied %s to %s\n", format.Size(n), to)
	}
}

func (a *App) warnf(s string) { fmt.Fprintln(a.Stderr, "servin:", s) }

func (a *App) copyOut(ctx context.Context, c *client.Client, ctr, src, dst string, o cpFlags) error {
	if o.follow {
		if st, err := c.ContainerStatPath(ctx, ctr, src); err == nil && st.Mode&fs.ModeSymlink != 0 {
			if path.IsAbs(st.LinkTarget) {
				src = st.LinkTarget
			} else {
				src = path.Join(path.Dir(path.Clean("/"+src)), st.LinkTarget)
			}
		}
	}
	if dst == "-" {
		if a.outIsTerminal() {
			return errors.New("cannot write a tar archive to the terminal: redirect the output")
		}
		r, _, err := c.ContainerGetArchive(ctx, ctr, src)
		if err != nil {
			return err
		}
		defer r.Close()
		_, err = io.Copy(a.Stdout, r)
		return err
	}
	st, statErr := os.Stat(dst)
	switch {
	case statErr == nil, errors.Is(statErr, fs.ErrNotExist):
	default:
		return statErr
	}
	if statErr != nil {
		if _, err := os.Stat(filepath.Dir(filepath.Clean(dst))); err != nil {
			return fmt.Errorf("cannot copy to %s: the directory it should be in does not exist", dst)
		}
	}
	r, stat, err := c.ContainerGetArchive(ctx, ctr, src)
	if err != nil {
		return err
	}
	defer r.Close()
	in := &counter{r: r}
	if st != nil && !st.IsDir() && !st.Mode().IsRegular() {
		return a.copyThrough(in, dst)
	}
	x := tree.ExtractOptions{From: stat.Name, Owners: o.archive, Warn: a.warnf}
	dir, err := placeOut(&x, stat, src, dst, st)
	if err != nil {
		return err
	}
	if err := tree.Extract(in, dir, x); err != nil {
		return err
	}
	a.copied(o, in.n, dst)
	return nil
}

// copyThrough writes the one file of an archive into a pipe or device.
func (a *App) copyThrough(r io.Reader, dst string) error {
	f, err := os.OpenFile(dst, os.O_WRONLY, 0)
	if err != nil {
		return err
	}
	return errors.Join(tree.CopyFile(f, r), f.Close())
}

// placeOut decides where an archive goes on the host, as cp -a would: into a
// directory that exists, else under the name given.
func placeOut(x *tree.ExtractOptions, stat container.PathStat, src, dst string, st fs.FileInfo) (dir string, err error) {
	isDir := stat.Mode.IsDir()
	if contentsOf(src) || src == "/" {
		x.From = "." // names are relative to the directory
	}
	switch {
	case st != nil && st.IsDir():
		if !isDir || !contentsOf(src) && strings.Trim(stat.Name, "/.") != "" {
			x.To = path.Base(path.Clean(stat.Name))
		}
		return dst, nil
	case st != nil && isDir:
		return "", fmt.Errorf("cannot copy a directory over the file %s", dst)
	case st == nil && !isDir && wantsDir(filepath.ToSlash(dst)):
		return "", fmt.Errorf("cannot copy to %s: there is no such directory", dst)
	}
	clean := filepath.Clean(dst)
	x.To = filepath.Base(clean)
	return filepath.Dir(clean), nil
}

func (a *App) copyIn(ctx context.Context, c *client.Client, src, ctr, dst string, o cpFlags) error {
	put := client.PutArchiveOptions{CopyUIDGID: o.archive, NoOverwriteDirNonDir: true}
	if src == "-" {
		return c.ContainerPutArchive(ctx, ctr, dst, a.Stdin, put)
	}
	stat := os.Lstat
	if o.follow || wantsDir(filepath.ToSlash(src)) {
		stat = os.Stat
		if real, err := filepath.EvalSymlinks(src); err == nil && !contentsOf(filepath.ToSlash(src)) {
			base := filepath.Base(filepath.Clean(src))
			return a.copyTree(ctx, c, real, base, src, ctr, dst, o, put, stat)
		}
	}
	return a.copyTree(ctx, c, src, baseOf(src), src, ctr, dst, o, put, stat)
}

// baseOf is the last name of a path; of "." and the like, the directory's own.
func baseOf(p string) string {
	if abs, err := filepath.Abs(p); err == nil {
		return filepath.Base(abs)
	}
	return filepath.Base(filepath.Clean(p))
}

func (a *App) copyTree(ctx context.Context, c *client.Client, real, base, src, ctr, dst string, o cpFlags, put client.PutArchiveOptions, stat func(string) (fs.FileInfo, error)) error {
	fi, err := stat(real)
	if err != nil {
		return err
	}
	if contentsOf(filepath.ToSlash(src)) && !fi.IsDir() {
		return fmt.Errorf("cannot copy %s: it is not a directory", src)
	}
	dir, name, err := placeIn(ctx, c, fi, contentsOf(filepath.ToSlash(src)), base, ctr, dst)
	if err != nil {
		return err
	}
	pr, pw := io.Pipe()
	packed := make(chan error, 1)
	go func() {
		err := tree.Pack(pw, real, name, a.warnf)
		pw.CloseWithError(err)
		packed <- err
	}()
	in := &counter{r: pr}
	err = c.ContainerPutArchive(ctx, ctr, dir, in, put)
	pr.Close()
	if perr := <-packed; perr != nil && !errors.Is(perr, io.ErrClosedPipe) {
		return perr
	}
	if err != nil {
		return err
	}
	a.copied(o, in.n, ctr+":"+dst)
	return nil
}

// placeIn decides into which directory of the container an archive goes and what
// its top is called there.
func placeIn(ctx context.Context, c *client.Client, fi fs.FileInfo, contents bool, base, ctr, dst string) (dir, name string, err error) {
	abs := path.Clean("/" + dst)
	st, err := c.ContainerStatPath(ctx, ctr, abs)
	if err == nil && st.Mode&fs.ModeSymlink != 0 {
		target := st.LinkTarget
		if !path.IsAbs(target) {
			target = path.Join(path.Dir(abs), target)
		}
		if t, terr := c.ContainerStatPath(ctx, ctr, target); terr == nil {
			abs, st = target, t
		} else {
			err = terr
			abs = target
		}
	}
	if err != nil && !client.IsNotFound(err) {
		return "", "", err
	}
	exists := err == nil
	switch {
	case exists && st.Mode.IsDir():
		if contents {
			return abs, ".", nil
		}
		return abs, base, nil
	case exists && fi.IsDir():
		return "", "", fmt.Errorf("cannot copy a directory over the file %s:%s", ctr, dst)
	case !exists && !fi.IsDir() && wantsDir(dst):
		return "", "", fmt.Errorf("cannot copy to %s:%s: there is no such directory", ctr, dst)
	}
	if !exists {
		// Tell a missing container from a missing path.
		if _, err := c.ContainerStatPath(ctx, ctr, path.Dir(abs)); err != nil {
			if client.IsNotFound(err) {
				if _, _, ierr := c.ContainerInspect(ctx, ctr, false); ierr != nil {
					return "", "", ierr
				}
				return "", "", fmt.Errorf("cannot copy to %s:%s: the directory it should be in does not exist", ctr, dst)
			}
			return "", "", err
		}
	}
	return path.Dir(abs), path.Base(abs), nil
}
