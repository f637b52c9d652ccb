package cli

import (
	"context"
	"fmt"
	"path/filepath"
	"strings"

	"github.com/moby/moby/api/types/container"

	"github.com/cloudos-io/cloudos/client"
	"github.com/cloudos-io/cloudos/internal/cli/command"
	"github.com/cloudos-io/cloudos/internal/filesync"
)

func (a *App) cmdWatch() *command.Command {
	var syncs, ignore, include []string
	var restart, initial bool
	var run string
	return &command.Command{Name: "watch", Args: "CONTAINER", Short: "Copy files into a container as they change", Min: 1, Max: 1, Complete: []string{"container"},
		Long: `Copy files into a container as they change, and restart it or run a command in
it then if that is wanted. It goes on until it is interrupted.`,
		Example: `servin watch web --sync ./src:/app/src
servin watch web --sync .:/app --ignore node_modules --restart
servin watch api --sync ./conf:/etc/api --exec 'kill -HUP 1'`,
		Flags: func(f *command.FlagSet) {
			f.Strings(&syncs, "sync", "s", "Folder or file here, and its place in the container: PATH:TARGET")
			f.Strings(&ignore, "ignore", "", "Leave out what matches, as in .dockerignore")
			f.Strings(&include, "include", "", "Copy what matches only")
			f.Bool(&restart, "restart", "r", "Restart the container after each change")
			f.String(&run, "exec", "", "Run this in the container's shell after each change")
			f.Bool(&initial, "initial", "", "Copy everything first")
		},
		Run: func(ctx context.Context, args []string) error {
			rules, err := watchRules(syncs, include, ignore)
			if err != nil {
				return exitWith(exitEngine, err)
			}
			if restart && run != "" {
				return usagef("--restart and --exec exclude each other")
			}
			c, err := a.client()
			if err != nil {
				return err
			}
			info, _, err := c.ContainerInspect(ctx, args[0], false)
			if err != nil {
				return err
			}
			ctx, stop := interruptible(ctx)
			defer stop()
			w := &fileWatch{app: a, c: c, id: info.ID, name: args[0], rules: rules, restart: restart, run: run}
			if initial {
				var all []filesync.Change
				for _, r := range rules {
					list, err := r.Everything()
					if err != nil {
						return err
					}
					all = append(all, list...)
				}
				if err := w.bring(ctx, all); err != nil {
					return err
				}
			}
			return filesync.Watch(ctx, rules, func() { fmt.Fprintf(a.Stderr, "servin: watching; press Ctrl-C to end\n") }, w.batch)
		}}
}

// watchRules reads the flags of watch.
func watchRules(syncs, include, ignore []string) ([]*filesync.Rule, error) {
	if len(syncs) == 0 {
		return nil, fmt.Errorf("nothing to watch: give --sync PATH:TARGET")
	}
	var out []*filesync.Rule
	for _, s := range syncs {
		i := strings.LastIndexByte(s, ':')
		if i <= 0 || !strings.HasPrefix(s[i+1:], "/") {
			return nil, fmt.Errorf("cannot use --sync %q: write PATH:TARGET with an absolute target", s)
		}
		host, err := filepath.Abs(s[:i])
		if err != nil {
			return nil, err
		}
		r := &filesync.Rule{Path: host, Target: s[i+1:], Include: include, Ignore: ignore}
		if err := r.Compile(); err != nil {
			return nil, err
		}
		out = append(out, r)
	}
	return out, nil
}

// fileWatch is one run of watch.
type fileWatch struct {
	app      *App
	c        *client.Client
	id, name string
	rules    []*filesync.Rule
	restart  bool
	run      string
}

// batch tells failures and goes on: the next change may be the cure.
func (w *fileWatch) batch(ctx context.Context, paths []string) error {
	var list []filesync.Change
	for _, r := range w.rules {
		for _, p := range paths {
			if ch, ok := r.Match(p); ok {
				list = append(list, ch)
			}
		}
	}
	if len(list) == 0 {
		return nil
	}
	err := w.bring(ctx, list)
	if client.IsNotFound(err) {
		return err
	}
	if err != nil && ctx.Err() == nil {
		fmt.Fprintf(w.app.Stderr, "servin: %v\n", err)
	}
	return nil
}

// bring copies changes and does what follows from them.
func (w *fileWatch) bring(ctx context.Context, list []filesync.Change) error {
	if err := filesync.Sync(ctx, w.c, w.id, list); err != nil {
		return err
	}
	what := fmt.Sprintf("%d files", len(list))
	if len(list) == 1 {
		what = list[0].Container
	}
	fmt.Fprintf(w.app.Stderr, "servin: copied %s\n", what)
	switch {
	case w.restart:
		if err := w.c.ContainerRestart(ctx, w.id, client.StopOptions{}); err != nil {
			return err
		}
		fmt.Fprintf(w.app.Stderr, "servin: restarted %s\n", w.name)
	case w.run != "":
		id, err := w.c.ExecCreate(ctx, w.id, container.ExecCreateRequest{Cmd: []string{"sh", "-c", w.run}, AttachStdout: true, AttachStderr: true})
		if err != nil {
			return err
		}
		st, err := w.c.ExecStart(ctx, id, container.ExecStartRequest{})
		if err != nil {
			return err
		}
		defer st.Close()
		return client.Demux(w.app.Stdout, w.app.Stderr, st)
	}
	return nil
}
