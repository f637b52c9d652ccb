package cli

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"

	"github.com/cloudos-io/cloudos/client"
	"github.com/cloudos-io/cloudos/internal/cli/command"
	"github.com/cloudos-io/cloudos/internal/cli/terminal"
)

// writeStream copies a stream to a file, made whole or not at all, or to standard
// output.
func (a *App) writeStream(path string, open func() (io.ReadCloser, error)) error {
	if path == "" {
		if a.outIsTerminal() {
			return errors.New("cannot write a tar archive to the terminal: name a file with -o, or redirect the output")
		}
		r, err := open()
		if err != nil {
			return err
		}
		defer r.Close()
		_, err = io.Copy(a.Stdout, r)
		return err
	}
	r, err := open()
	if err != nil {
		return err
	}
	defer r.Close()
	if st, err := os.Stat(path); err == nil && !st.Mode().IsRegular() { // a pipe or device
		f, err := os.OpenFile(path, os.O_WRONLY, 0)
		if err != nil {
			return err
		}
		_, err = io.Copy(f, r)
		return errors.Join(err, f.Close())
	}
	part := path + ".part"
	f, err := os.OpenFile(part, os.O_WRONLY|os.O_CREATE|os.O_TRUNC, 0o600)
	if err != nil {
		return err
	}
	_, err = io.Copy(f, r)
	if err == nil {
		err = f.Sync()
	}
	if cerr := f.Close(); err == nil {
		err = cerr
	}
	if err == nil {
		err = os.Rename(part, path)
	}
	if err != nil {
		os.Remove(part)
		return fmt.Errorf("cannot write %s: %w", path, err)
	}
	return nil
}

func (a *App) cmdExport() *command.Command {
	out := ""
	return &command.Command{Name: "export", Args: "CONTAINER", Short: "Write a container's file system as a tar archive", Min: 1, Max: 1, Complete: []string{"container"},
		Flags: func(f *command.FlagSet) { f.String(&out, "output", "o", "File to write").Of("file") },
		Run: func(ctx context.Context, args []string) error {
			c, err := a.client()
			if err != nil {
				return err
			}
			return a.writeStream(out, func() (io.ReadCloser, error) { return c.ContainerExport(ctx, args[0]) })
		}}
}

func (a *App) cmdSave() *command.Command {
	out := ""
	var platforms []string
	return &command.Command{Name: "save", Args: "IMAGE [IMAGE...]", Short: "Write images as a tar archive that load reads", Min: 1, Max: -1, Complete: []string{"image"},
		Flags: func(f *command.FlagSet) {
			f.String(&out, "output", "o", "File to write").Of("file")
			f.Strings(&platforms, "platform", "", "Platform to write, os/arch[/variant]").Of("platform")
		},
		Run: func(ctx context.Context, args []string) error {
			c, err := a.client()
			if err != nil {
				return err
			}
			return a.writeStream(out, func() (io.ReadCloser, error) { return c.ImageSave(ctx, args, platforms) })
		}}
}

func (a *App) cmdLoad() *command.Command {
	in, quiet := "", false
	var platforms []string
	return &command.Command{Name: "load", Short: "Read images from a tar archive", Max: 0,
		Flags: func(f *command.FlagSet) {
			f.String(&in, "input", "i", "File to read instead of standard input").Of("file")
			f.Bool(&quiet, "quiet", "q", "Show the result only")
			f.Strings(&platforms, "platform", "", "Platform to read, os/arch[/variant]").Of("platform")
		},
		Run: func(ctx context.Context, args []string) error {
			var r io.Reader = a.Stdin
			if in != "" {
				f, err := os.Open(in)
				if err != nil {
					return fmt.Errorf("cannot read the archive: %w", err)
				}
				defer f.Close()
				r = f
			} else if terminal.Is(a.Stdin) {
				return errors.New("cannot read an archive from the terminal: name a file with -i, or redirect the input")
			}
			c, err := a.client()
			if err != nil {
				return err
			}
			p := a.progress(a.Stdout)
			err = c.ImageLoad(ctx, r, quiet, platforms, p.Show)
			return errors.Join(p.Flush(), err)
		}}
}

func (a *App) cmdImport() *command.Command {
	var o client.ImportOptions
	return &command.Command{Name: "import", Args: "FILE|URL|- [REPOSITORY[:TAG]]", Short: "Make an image of a root file system's tar archive", Min: 1, Max: 2, Complete: []string{"file", ""},
		Flags: func(f *command.FlagSet) {
			f.Strings(&o.Changes, "change", "c", "Dockerfile instruction to apply")
			f.String(&o.Message, "message", "m", "Comment of the image")
			f.String(&o.Platform, "platform", "", "Platform of the image, os/arch[/variant]").Of("platform")
		},
		Run: func(ctx context.Context, args []string) error {
			if len(args) == 2 {
				o.Repo, o.Tag = client.SplitTag(args[1])
			}
			var r io.Reader
			switch src := args[0]; {
			case src == "-":
				r = a.Stdin
			case strings.HasPrefix(src, "http://"), strings.HasPrefix(src, "https://"):
				o.Source = src
			default:
				f, err := os.Open(src)
				if err != nil {
					return fmt.Errorf("cannot read the archive: %w", err)
				}
				defer f.Close()
				r = f
			}
			c, err := a.client()
			if err != nil {
				return err
			}
			p := a.progress(a.Stdout)
			err = c.ImageImport(ctx, r, o, p.Show)
			return errors.Join(p.Flush(), err)
		}}
}

func (a *App) cmdCommit() *command.Command {
	var o client.CommitOptions
	pause := true
	return &command.Command{Name: "commit", Args: "CONTAINER [REPOSITORY[:TAG]]", Short: "Make an image of a container's changes", Min: 1, Max: 2, Complete: []string{"container", ""},
		Flags: func(f *command.FlagSet) {
			f.String(&o.Author, "author", "a", "Author, such as \"Ada <ada@example.com>\"")
			f.Strings(&o.Changes, "change", "c", "Dockerfile instruction to apply")
			f.String(&o.Comment, "message", "m", "Comment of the image")
			f.Bool(&pause, "pause", "p", "Pause the container meanwhile")
			f.Bool(&o.NoPause, "no-pause", "", "Do not pause the container")
		},
		Run: func(ctx context.Context, args []string) error {
			if len(args) == 2 {
				o.Repo, o.Tag = client.SplitTag(args[1])
			}
			o.NoPause = o.NoPause || !pause
			c, err := a.client()
			if err != nil {
				return err
			}
			id, err := c.ContainerCommit(ctx, args[0], o)
			if err != nil {
				return err
			}
			fmt.Fprintln(a.out, id)
			return nil
		}}
}
