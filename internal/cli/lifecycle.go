package cli

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"strings"
	"sync"

	"github.com/moby/moby/api/types/container"

	"github.com/cloudos-io/cloudos/client"
	"github.com/cloudos-io/cloudos/internal/cli/command"
	"github.com/cloudos-io/cloudos/internal/cli/notation"
)

// readLine reads a line without reading beyond it.
func readLine(r io.Reader) (string, error) {
	var b strings.Builder
	var one [1]byte
	for b.Len() < 64<<10 {
		n, err := r.Read(one[:])
		if n == 1 {
			if one[0] == '\n' {
				return strings.TrimSuffix(b.String(), "\r"), nil
			}
			b.WriteByte(one[0])
		}
		if err != nil {
			return b.String(), err
		}
	}
	return b.String(), bufio.ErrTooLong
}

// parallel is how many containers are worked on at a time.
const parallel = 50

// eachContainer runs fn for all names at once and prints, in order, those that
// went well.
func (a *App) eachContainer(names []string, fn func(name string) error) error {
	errs := make([]error, len(names))
	if len(names) == 1 {
		errs[0] = fn(names[0])
	} else {
		var wg sync.WaitGroup
		slots := make(chan struct{}, parallel)
		for i, n := range names {
			wg.Add(1)
			slots <- struct{}{}
			go func() {
				defer wg.Done()
				errs[i] = fn(n)
				<-slots
			}()
		}
		wg.Wait()
	}
	var failed []error
	for i, n := range names {
		if errs[i] != nil {
			failed = append(failed, errs[i])
			continue
		}
		fmt.Fprintln(a.out, n)
	}
	return joined(failed)
}

// simple is a command that does one thing to each container named.
func (a *App) simple(name, short string, flags func(*command.FlagSet), fn func(ctx context.Context, c *client.Client, name string) error) *command.Command {
	return &command.Command{Name: name, Args: "CONTAINER [CONTAINER...]", Short: short, Min: 1, Max: -1, Complete: []string{"container"},
		Flags: flags,
		Run: func(ctx context.Context, args []string) error {
			c, err := a.client()
			if err != nil {
				return err
			}
			return a.eachContainer(args, func(n string) error { return fn(ctx, c, n) })
		}}
}

func stopFlags(o *client.StopOptions) func(*command.FlagSet) {
	return func(f *command.FlagSet) {
		f.String(&o.Signal, "signal", "s", "Signal to send first").Of("signal")
		f.OptInt(&o.Timeout, "timeout", "t", "Seconds to wait before SIGKILL; -1 waits for ever")
		f.OptInt(&o.Timeout, "time", "", "").Hide()
	}
}

func (a *App) cmdStop() *command.Command {
	var o client.StopOptions
	return a.simple("stop", "Stop running containers", stopFlags(&o), func(ctx context.Context, c *client.Client, n string) error {
		return c.ContainerStop(ctx, n, o)
	})
}

func (a *App) cmdRestart() *command.Command {
	var o client.StopOptions
	return a.simple("restart", "Stop containers and start them again", stopFlags(&o), func(ctx context.Context, c *client.Client, n string) error {
		return c.ContainerRestart(ctx, n, o)
	})
}

func (a *App) cmdKill() *command.Command {
	signal := ""
	return a.simple("kill", "Send a signal to containers, SIGKILL by default", func(f *command.FlagSet) {
		f.String(&signal, "signal", "s", "Signal to send").Of("signal")
	}, func(ctx context.Context, c *client.Client, n string) error { return c.ContainerKill(ctx, n, signal) })
}

func (a *App) cmdPause() *command.Command {
	return a.simple("pause", "Freeze the processes of containers", nil, func(ctx context.Context, c *client.Client, n string) error {
		return c.ContainerPause(ctx, n)
	})
}

func (a *App) cmdUnpause() *command.Command {
	return a.simple("unpause", "Let the processes of frozen containers go on", nil, func(ctx context.Context, c *client.Client, n string) error {
		return c.ContainerUnpause(ctx, n)
	})
}

func (a *App) cmdRm() *command.Command {
	var o client.RemoveOptions
	cmd := a.simple("rm", "Remove containers", func(f *command.FlagSet) {
		f.Bool(&o.Force, "force", "f", "Remove running containers too (they are killed)")
		f.Bool(&o.Volumes, "volumes", "v", "Remove anonymous volumes of the container")
		f.Bool(&o.Link, "link", "l", "Remove the link named")
	}, func(ctx context.Context, c *client.Client, n string) error {
		n = strings.Trim(n, "/")
		if n == "" {
			return errors.New("a container's name is empty")
		}
		err := c.ContainerRemove(ctx, n, o)
		if o.Force && client.IsNotFound(err) {
			fmt.Fprintln(a.Stderr, "servin:", err)
			return nil
		}
		return err
	})
	cmd.Aliases = []string{"remove"}
	return cmd
}

func (a *App) cmdWait() *command.Command {
	return &command.Command{Name: "wait", Args: "CONTAINER [CONTAINER...]", Short: "Wait for containers to stop and print their exit codes",
		Min: 1, Max: -1, Complete: []string{"container"},
		Run: func(ctx context.Context, args []string) error {
			c, err := a.client()
			if err != nil {
				return err
			}
			var errs []error
			for _, n := range args {
				w, err := c.ContainerWait(ctx, n, "")
				if err == nil && w.Error != nil && w.Error.Message != "" {
					err = errors.New(w.Error.Message)
				}
				if err != nil {
					errs = append(errs, err)
					continue
				}
				fmt.Fprintln(a.out, w.StatusCode)
				a.out.Flush()
			}
			return joined(errs)
		}}
}

func (a *App) cmdRename() *command.Command {
	return &command.Command{Name: "rename", Args: "CONTAINER NEW_NAME", Short: "Give a container another name", Min: 2, Max: 2, Complete: []string{"container", ""},
		Run: func(ctx context.Context, args []string) error {
			c, err := a.client()
			if err != nil {
				return err
			}
			return c.ContainerRename(ctx, args[0], args[1])
		}}
}

func (a *App) cmdUpdate() *command.Command {
	var u container.UpdateConfig
	restart := ""
	cmd := a.simple("update", "Change limits and the restart policy of containers", func(f *command.FlagSet) {
		declareResources(f, &u.Resources)
		f.String(&restart, "restart", "", "When to start it again: no, always, unless-stopped, on-failure[:max]").Of("restart")
	}, nil)
	cmd.Run = func(ctx context.Context, args []string) error {
		if restart != "" {
			var err error
			if u.RestartPolicy, err = notation.Restart(restart); err != nil {
				return exitWith(exitEngine, err)
			}
		}
		c, err := a.client()
		if err != nil {
			return err
		}
		return a.eachName(args, func(n string) error {
			r, err := c.ContainerUpdate(ctx, n, u)
			a.warn(r.Warnings)
			return err
		})
	}
	return cmd
}

func (a *App) cmdCreate() *command.Command {
	var o createFlags
	return &command.Command{Name: "create", Args: "IMAGE [COMMAND] [ARG...]", Short: "Make a container of an image without starting it",
		Min: 1, Max: -1, Inner: true, Complete: []string{"image"}, Flags: o.declare,
		Run: func(ctx context.Context, args []string) error {
			s, err := a.build(&o, args)
			if err != nil {
				return err
			}
			if err := checkPull(o.pull); err != nil {
				return err
			}
			cfg := s.config
			cfg.AttachStdout, cfg.AttachStderr = true, true
			cfg.AttachStdin, cfg.StdinOnce = o.stdin, o.stdin
			cid, err := newCIDFile(o.cidfile)
			if err != nil {
				return err
			}
			defer cid.close()
			c, err := a.client()
			if err != nil {
				return engineError(err)
			}
			if o.pull == "always" {
				if err := a.pullFor(ctx, c, cfg.Image, &o); err != nil {
					return engineError(err)
				}
			}
			co := client.ContainerCreateOptions{Name: o.name, Platform: o.platform, Config: cfg, HostConfig: s.host, Networking: s.net, Extra: s.extra}
			r, err := c.ContainerCreate(ctx, co)
			if client.IsNotFound(err) && o.pull != "never" && a.imageMissing(ctx, c, cfg.Image, o.platform) {
				fmt.Fprintf(a.Stderr, "The image %s is not here yet: pulling it\n", cfg.Image)
				if err = a.pullFor(ctx, c, cfg.Image, &o); err == nil {
					r, err = c.ContainerCreate(ctx, co)
				}
			}
			if err != nil {
				return engineError(err)
			}
			a.warn(r.Warnings)
			if err := cid.write(r.ID); err != nil {
				return exitWith(exitEngine, err)
			}
			fmt.Fprintln(a.out, r.ID)
			return nil
		}}
}
