package cli

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/docker/go-units"

	"github.com/cloudos-io/cloudos/api"
	"github.com/cloudos-io/cloudos/client"
	"github.com/cloudos-io/cloudos/internal/cli/command"
	"github.com/cloudos-io/cloudos/internal/cli/format"
)

func (a *App) cmdCheckpoint() *command.Command {
	var o api.CheckpointCreate
	leave, image, quiet, list, jsonOut := false, false, false, false, false
	export, remove := "", ""
	return &command.Command{Name: "checkpoint", Args: "CONTAINER [NAME]", Short: "Write a running container down, to go on from there later", Min: 1, Max: 2, Complete: []string{"container", ""},
		Long: `Write the processes of a running container down, with its files, and end it: a restore
goes on from there. The engine keeps the checkpoint under the name given, or writes it
to a file that another engine can restore from. It takes CRIU on the engine's host, and
one that knows its kernel: "criu check" says whether it does.

With --pre the memory is written down while the container goes on; the checkpoint of
the same name that follows stops it for what has changed since alone.`,
		Example: "servin containers checkpoint web before-upgrade\nservin containers checkpoint --leave-running --export web.tar web",
		Flags: func(f *command.FlagSet) {
			f.Bool(&leave, "leave-running", "R", "Let the container go on afterwards")
			f.String(&export, "export", "e", "Write a file instead (- is standard output)").Of("file")
			f.Bool(&o.TCPEstablished, "tcp-established", "", "Write open TCP connections down, too; they can go on at the same address alone")
			f.Bool(&o.FileLocks, "file-locks", "", "Write file locks down, too")
			f.Bool(&o.Pre, "pre", "P", "Write the memory alone, while the container goes on")
			f.Bool(&o.Volumes, "volumes", "v", "Keep the content of volumes with it")
			f.Bool(&image, "image", "", "Put the image into the file, too")
			f.Bool(&list, "ls", "", "List the checkpoints of the container instead")
			f.Bool(&jsonOut, "json", "", "With --ls: print JSON, one a line")
			f.String(&remove, "rm", "", "Remove this checkpoint of the container instead")
			f.Bool(&quiet, "quiet", "q", "Do not show progress")
		},
		Run: func(ctx context.Context, args []string) error {
			c, err := a.client()
			if err != nil {
				return err
			}
			switch {
			case list && remove != "", (list || remove != "") && (len(args) > 1 || export != "" || o.Pre):
				return usagef("--ls and --rm go with a container's name alone")
			case list:
				return a.listCheckpoints(ctx, c, args[0], jsonOut)
			case remove != "":
				if err := c.CheckpointRemove(ctx, args[0], remove); err != nil {
					return err
				}
				fmt.Fprintln(a.out, remove)
				return nil
			case export != "" && (len(args) > 1 || o.Pre):
				return usagef("--export keeps nothing on the engine: no name, and no --pre")
			case image && export == "":
				return usagef("--image goes with --export: the engine has the image")
			case export != "":
				return a.exportCheckpoint(ctx, c, args[0], export, api.CheckpointStart{LeaveRunning: leave, Volumes: o.Volumes, Image: image,
					TCPEstablished: o.TCPEstablished, FileLocks: o.FileLocks}, quiet)
			}
			o.CheckpointID, o.Exit = "checkpoint-"+time.Now().UTC().Format("20060102-150405"), !leave && !o.Pre
			if len(args) > 1 {
				o.CheckpointID = args[1]
			}
			if err := c.CheckpointCreate(ctx, args[0], o); err != nil {
				return err
			}
			fmt.Fprintln(a.out, o.CheckpointID)
			return nil
		}}
}

func (a *App) listCheckpoints(ctx context.Context, c *client.Client, name string, jsonOut bool) error {
	l, err := c.CheckpointList(ctx, name)
	if err != nil {
		return err
	}
	if jsonOut {
		return format.JSONLines(a.out, l)
	}
	w := tabwriter.NewWriter(a.out, 0, 4, 3, ' ', 0)
	fmt.Fprintln(w, "NAME\tCREATED\tSIZE\tVOLUMES")
	for _, x := range l {
		created := "pre-dump only"
		if !x.Created.IsZero() {
			created = units.HumanDuration(time.Since(x.Created)) + " ago"
		}
		fmt.Fprintf(w, "%s\t%s\t%s\t%s\n", x.Name, created, units.HumanSize(float64(x.Size)), strings.Join(x.Volumes, ","))
	}
	return w.Flush()
}

// exportCheckpoint writes a checkpoint to a file; the container ends only once that
// is whole on the disk.
func (a *App) exportCheckpoint(ctx context.Context, c *client.Client, name, path string, o api.CheckpointStart, quiet bool) error {
	if path == "-" {
		path = ""
	}
	show := a.showMove(quiet)
	defer show.end()
	return c.Checkpoint(ctx, name, o, show.tell, func(r io.Reader) error {
		return a.writeStream(path, func() (io.ReadCloser, error) { return io.NopCloser(show.count(r)), nil })
	})
}

func (a *App) cmdRestore() *command.Command {
	var o api.RestoreOptions
	in, quiet := "", false
	return &command.Command{Name: "restore", Args: "[CONTAINER CHECKPOINT]", Short: "Go on from a checkpoint", Min: 0, Max: 2, Complete: []string{"container", ""},
		Long: `Go on from a checkpoint: in the stopped container that it is of, in a new one (--name),
or on this engine from a file that another has written (--import).

A file from elsewhere brings processes in any state: restore only what you trust as
much as a program that you run as root on the host.`,
		Example: "servin containers restore web before-upgrade\nservin containers restore --import web.tar --name web2",
		Flags: func(f *command.FlagSet) {
			f.String(&in, "import", "i", "File to read (- is standard input)").Of("file")
			f.String(&o.Name, "name", "n", "Make a new container of this name")
			f.Bool(&o.KeepAddress, "keep-address", "", "Give the new container the addresses that the old one had")
			f.Bool(&o.KeepVolumes, "keep-volumes", "", "Use volumes of the same names as they are")
			f.Bool(&quiet, "quiet", "q", "Do not show progress")
		},
		Run: func(ctx context.Context, args []string) error {
			c, err := a.client()
			if err != nil {
				return err
			}
			if in != "" {
				if len(args) > 0 {
					return usagef("--import takes the file's container: give it another name with --name")
				}
				return a.importCheckpoint(ctx, c, in, o, quiet)
			}
			if len(args) != 2 {
				return usagef("give a container and the name of its checkpoint, or --import FILE")
			}
			if o.Name == "" {
				if o.KeepAddress || o.KeepVolumes {
					return usagef("--keep-address and --keep-volumes go with --name or --import")
				}
				if err := c.CheckpointStart(ctx, args[0], args[1]); err != nil {
					return err
				}
				fmt.Fprintln(a.out, args[0])
				return nil
			}
			o.Checkpoint = args[1]
			res, err := c.CheckpointRestore(ctx, args[0], o)
			if err != nil {
				return err
			}
			a.warn(res.Warnings)
			fmt.Fprintln(a.out, res.ID)
			return nil
		}}
}

func (a *App) importCheckpoint(ctx context.Context, c *client.Client, path string, o api.RestoreOptions, quiet bool) error {
	r, size, done, err := a.volumeIn(path)
	if err != nil {
		return err
	}
	defer done()
	in, end := a.counting("checkpoint", r, size, quiet)
	res, err := c.CheckpointImport(ctx, o, in)
	end()
	if err != nil {
		return err
	}
	a.warn(res.Warnings)
	fmt.Fprintln(a.out, res.ID)
	return nil
}

// target connects to another engine: the name of a context, or a URL.
func (a *App) target(ctx context.Context, name string) (*client.Client, error) {
	cfg := client.Config{Host: name, UserAgent: "servin/" + a.Version}
	if !strings.Contains(name, "://") {
		k, err := a.findContext(name)
		if err != nil {
			return nil, err
		}
		cfg.Host = k.Host
		if k.TLS() {
			cfg.TLS = &client.TLS{CA: k.CA, Cert: k.Cert, Key: k.Key, ServerName: k.ServerName, SkipVerify: k.SkipTLSVerify}
		}
	} else if strings.HasPrefix(name, "tcp://") || strings.HasPrefix(name, "https://") {
		if dir := os.Getenv("SERVIN_CERT_PATH"); dir != "" {
			cfg.TLS = &client.TLS{CA: dir + "/ca.pem", Cert: dir + "/cert.pem", Key: dir + "/key.pem"}
		}
	}
	return client.Negotiate(ctx, cfg)
}

func (a *App) cmdMigrate() *command.Command {
	o := api.CheckpointStart{Rounds: 3, Remove: true}
	var ro api.RestoreOptions
	keep, quiet, noImage := false, false, false
	timeout := -1
	return &command.Command{Name: "migrate", Args: "CONTAINER TARGET", Short: "Move a container to another engine", Min: 2, Max: 2, Complete: []string{"container", "context"},
		Long: `Move a container to another engine: TARGET is a context, or the address of an engine
(unix:///path, tcp://host:port, ssh://user@host). A running one goes on there where it
was: its memory is copied while it runs, in rounds, and it stands still only for what
has changed in the end. That takes CRIU on both hosts; with --cold it is stopped
instead, and started there.

Until it runs on the target nothing is changed here: whatever fails, and when you
press Ctrl-C, it goes on here and nothing is left there. Then it is removed here,
unless --keep is given; its volumes stay here in any case.`,
		Example: "servin containers migrate web ssh://root@other\nservin containers migrate --cold --volumes db other",
		Flags: func(f *command.FlagSet) {
			f.Bool(&o.Cold, "cold", "", "Stop it here and start it there; takes no CRIU")
			f.Int(&o.Rounds, "rounds", "", "Copy the memory up to this many times while it runs")
			f.Bool(&o.Volumes, "volumes", "v", "Take the content of its volumes along")
			f.Bool(&noImage, "no-image", "", "Do not take the image along: the target has it, or can pull it")
			f.Bool(&o.TCPEstablished, "tcp-established", "", "Take open TCP connections along; needs --keep-address and the network between the hosts")
			f.Bool(&o.FileLocks, "file-locks", "", "Take file locks along")
			f.String(&ro.Name, "name", "", "Give it another name there")
			f.Bool(&ro.KeepAddress, "keep-address", "", "Give it the addresses that it has here")
			f.Bool(&ro.KeepVolumes, "keep-volumes", "", "Use volumes of the same names there as they are")
			f.Bool(&keep, "keep", "", "Keep the stopped container here")
			f.Int(&timeout, "time", "t", "Seconds that it has to stop (with --cold)")
			f.Bool(&quiet, "quiet", "q", "Do not show progress")
		},
		Run: func(ctx context.Context, args []string) error {
			ctx, cancel := interruptible(ctx)
			defer cancel()
			src, err := a.client()
			if err != nil {
				return err
			}
			dst, err := a.target(ctx, args[1])
			if errors.Is(err, client.ErrConnectionLost) {
				// The hint that goes with it is about the engine here.
				return fmt.Errorf("cannot reach the target %s: no engine answers there; is servind running, and may you log in?", args[1])
			}
			if err != nil {
				return fmt.Errorf("cannot reach the target: %w", err)
			}
			o.Image, o.Remove = !noImage, !keep
			if timeout >= 0 {
				o.Timeout = &timeout
			}
			return a.migrate(ctx, src, dst, args[0], o, ro, quiet)
		}}
}

// migrate moves a container. What it must never do is leave two of it running, or
// none.
func (a *App) migrate(ctx context.Context, src, dst *client.Client, name string, o api.CheckpointStart, ro api.RestoreOptions, quiet bool) error {
	was, _, err := src.ContainerInspect(ctx, name, false)
	if err != nil {
		return err
	}
	running := was.State != nil && was.State.Running
	if !running && !o.Cold {
		return fmt.Errorf("cannot migrate %s: it does not run; --cold moves it as it is", name)
	}
	show := a.showMove(quiet)
	defer show.end()
	var res api.Restored
	err = src.Checkpoint(ctx, was.ID, o, show.tell, func(r io.Reader) error {
		// Not broken off but starved: whether it runs there must be known in the end.
		var err error
		res, err = dst.CheckpointImport(context.WithoutCancel(ctx), ro, &starved{ctx, show.count(r)})
		if err != nil && ctx.Err() == nil {
			err = fmt.Errorf("the target refuses it: %w", err)
		}
		if err == nil {
			err = ctx.Err()
		}
		return err
	})
	show.end()
	if err != nil {
		return a.migrationFailed(ctx, src, dst, was.ID, res, err)
	}
	a.warn(res.Warnings)
	if !quiet && a.errIsTerminal() && show.frozen > 0 {
		fmt.Fprintf(a.Stderr, "It stood still for %s\n", show.frozen.Round(time.Millisecond))
	}
	fmt.Fprintln(a.out, res.ID)
	return nil
}

// migrationFailed removes what the target has, if the source goes on.
func (a *App) migrationFailed(ctx context.Context, src, dst *client.Client, id string, res api.Restored, err error) error {
	if ctx.Err() != nil {
		err = errors.New("interrupted; it goes on here")
	}
	if res.ID == "" {
		return err
	}
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), time.Minute)
	defer cancel()
	now, _, ierr := src.ContainerInspect(ctx, id, false)
	switch {
	case ierr != nil && !client.IsNotFound(ierr):
		return fmt.Errorf("%w; whether it still runs here cannot be found out (%w): it runs on the target as %s", err, ierr, res.ID)
	case ierr != nil, res.Running && !(now.State != nil && now.State.Running):
		a.warn([]string{"it has moved, though: " + err.Error()})
		fmt.Fprintln(a.out, res.ID)
		return nil
	}
	if rerr := dst.ContainerRemove(ctx, res.ID, client.RemoveOptions{Force: true}); rerr != nil && !client.IsNotFound(rerr) {
		return fmt.Errorf("%w; and cannot remove it from the target, where it is %s: %w", err, res.ID, rerr)
	}
	return err
}

// starved ends with its context.
type starved struct {
	ctx context.Context
	r   io.Reader
}

func (i *starved) Read(p []byte) (int, error) {
	if err := i.ctx.Err(); err != nil {
		return 0, err
	}
	return i.r.Read(p)
}
