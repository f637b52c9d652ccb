package cli

import (
	"context"
	"errors"
	"fmt"
	"io"

	"github.com/moby/moby/api/types/container"

	"github.com/cloudos-io/cloudos/client"
	"github.com/cloudos-io/cloudos/internal/cli/command"
	"github.com/cloudos-io/cloudos/internal/cli/terminal"
)

func (a *App) cmdAttach() *command.Command {
	keys, noStdin, sigProxy := "", false, true
	return &command.Command{Name: "attach", Args: "CONTAINER", Short: "Connect to the standard streams of a running container",
		Min: 1, Max: 1, Complete: []string{"running"},
		Flags: func(f *command.FlagSet) {
			f.String(&keys, "detach-keys", "", "Keys that leave the container running (default ctrl-p,ctrl-q)")
			f.Bool(&noStdin, "no-stdin", "", "Do not connect standard input")
			f.Bool(&sigProxy, "sig-proxy", "", "Pass signals on to the container")
		},
		Run: func(ctx context.Context, args []string) error {
			c, err := a.client()
			if err != nil {
				return err
			}
			info, _, err := c.ContainerInspect(ctx, args[0], false)
			if err != nil {
				return err
			}
			switch st := info.State; {
			case st == nil || !st.Running:
				return fmt.Errorf("cannot attach to %s: it does not run; start it with 'servin start -a %s'", args[0], args[0])
			case st.Paused:
				return fmt.Errorf("cannot attach to %s: it is paused; let it go on with 'servin unpause %s'", args[0], args[0])
			case st.Restarting:
				return fmt.Errorf("cannot attach to %s: it is restarting", args[0])
			}
			return a.join(ctx, c, &info, joinOptions{keys: keys, stdin: !noStdin && info.Config.OpenStdin, sigProxy: sigProxy, cond: container.WaitConditionNotRunning})
		}}
}

type joinOptions struct {
	keys            string
	stdin, sigProxy bool
	cond            container.WaitCondition
	// start runs once the streams are joined and the wait is registered.
	start func() error
}

// join connects to a container's streams until it ends and gives its exit code.
func (a *App) join(ctx context.Context, c *client.Client, info *container.InspectResponse, o joinOptions) error {
	tty := info.Config.Tty
	if err := a.checkTTY(tty, o.stdin); err != nil {
		return err
	}
	keys, err := a.detachKeys(o.keys)
	if err != nil {
		return err
	}
	st, err := c.ContainerAttach(ctx, info.ID, client.AttachOptions{Stdin: o.stdin, Stdout: true, Stderr: true, DetachKeys: keys})
	if err != nil {
		return err
	}
	defer st.Close()
	if o.sigProxy && !(tty && o.stdin && terminal.Is(a.Stdin)) {
		ready := make(chan struct{})
		close(ready)
		kill := func(ctx context.Context, sig string) error { return c.ContainerKill(ctx, info.ID, sig) }
		defer a.proxySignals(ctx, ready, kill, func() string { return short(info.ID) })()
	}
	wctx, cancel := context.WithCancel(ctx)
	defer cancel()
	wait, err := c.ContainerWaitBegin(wctx, info.ID, o.cond)
	if err != nil {
		return err
	}
	if o.start != nil {
		if err := o.start(); err != nil {
			return engineError(err)
		}
	}
	ses := &session{app: a, stream: st, tty: tty, stdin: o.stdin, resizeNow: true,
		resize: func(ctx context.Context, w, h uint16) error { return c.ContainerResize(ctx, info.ID, w, h) }}
	err = ses.run(ctx, func(stdout, stderr io.Writer) error { return copyOutput(st, tty, stdout, stderr) })
	if err != nil {
		return err
	}
	// The stream ended: with the container, or because we detached.
	if now, _, err := c.ContainerInspect(ctx, info.ID, false); err == nil && now.State != nil && now.State.Running && o.cond == container.WaitConditionNotRunning {
		fmt.Fprintf(a.Stderr, "\nservin: detached\n")
		return nil
	} else if err == nil && now.State != nil && now.State.Running && now.State.StartedAt == info.State.StartedAt {
		fmt.Fprintf(a.Stderr, "\nservin: detached\n")
		return nil
	}
	w, err := wait()
	if err != nil {
		return err
	}
	if w.Error != nil && w.Error.Message != "" {
		return exitWith(exitEngine, errors.New(w.Error.Message))
	}
	return exitWithCode(int(w.StatusCode))
}

func copyOutput(st *client.Stream, tty bool, stdout, stderr io.Writer) error {
	if tty || !st.Multiplexed {
		_, err := io.Copy(stdout, st)
		return err
	}
	return client.Demux(stdout, stderr, st)
}

func (a *App) cmdStart() *command.Command {
	keys, attach, stdin, sigProxy := "", false, false, true
	return &command.Command{Name: "start", Args: "CONTAINER [CONTAINER...]", Short: "Start stopped containers", Min: 1, Max: -1, Complete: []string{"stopped"},
		Flags: func(f *command.FlagSet) {
			f.Bool(&attach, "attach", "a", "Show its output, pass signals on")
			f.Bool(&stdin, "interactive", "i", "Connect standard input")
			f.Bool(&sigProxy, "sig-proxy", "", "Pass signals on to the container").Hide()
			f.String(&keys, "detach-keys", "", "Keys that leave the container running (default ctrl-p,ctrl-q)")
		},
		Run: func(ctx context.Context, args []string) error {
			c, err := a.client()
			if err != nil {
				return err
			}
			if !attach && !stdin {
				return a.eachName(args, func(n string) error { return c.ContainerStart(ctx, n, "") })
			}
			if len(args) > 1 {
				return usagef("cannot attach to several containers at once: start one at a time")
			}
			info, _, err := c.ContainerInspect(ctx, args[0], false)
			if err != nil {
				return err
			}
			cond := container.WaitConditionNextExit
			if info.HostConfig != nil && info.HostConfig.AutoRemove {
				cond = container.WaitConditionRemoved
			}
			if info.State != nil && info.State.Running {
				cond = container.WaitConditionNotRunning
			}
			return a.join(ctx, c, &info, joinOptions{keys: keys, stdin: stdin && info.Config.OpenStdin, sigProxy: sigProxy, cond: cond,
				start: func() error { return c.ContainerStart(ctx, info.ID, keys) }})
		}}
}
