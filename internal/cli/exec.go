package cli

import (
	"context"
	"fmt"
	"io"
	"time"

	"github.com/moby/moby/api/types/container"

	"github.com/cloudos-io/cloudos/api"
	"github.com/cloudos-io/cloudos/client"
	"github.com/cloudos-io/cloudos/internal/cli/command"
	"github.com/cloudos-io/cloudos/internal/cli/notation"
)

func (a *App) cmdExec() *command.Command {
	var detach, stdin, tty, privileged bool
	var env, envFiles []string
	var user, workdir, keys string
	return &command.Command{Name: "exec", Args: "CONTAINER COMMAND [ARG...]", Short: "Run a command in a running container",
		Example: `servin exec -it web sh
servin exec -u postgres db psql -l`,
		Min: 2, Max: -1, Inner: true, Complete: []string{"running", ""},
		Flags: func(f *command.FlagSet) {
			f.Bool(&detach, "detach", "d", "Leave the command in the background")
			f.String(&keys, "detach-keys", "", "Keys that leave the command running (default ctrl-p,ctrl-q)")
			f.Strings(&env, "env", "e", "Set an environment variable")
			f.Strings(&envFiles, "env-file", "", "Read environment variables from a file").Of("file")
			f.Bool(&stdin, "interactive", "i", "Connect standard input")
			f.Bool(&tty, "tty", "t", "Give the command a terminal")
			f.Bool(&privileged, "privileged", "", "Give the command all that the host's root may do")
			f.String(&user, "user", "u", "User (name or id, [:group])")
			f.String(&workdir, "workdir", "w", "Working directory in the container")
		},
		Run: func(ctx context.Context, args []string) error {
			req := container.ExecCreateRequest{User: user, Privileged: privileged, Tty: tty, WorkingDir: workdir, Cmd: args[1:],
				AttachStdin: stdin && !detach, AttachStdout: !detach, AttachStderr: !detach}
			var err error
			if req.Env, err = notation.Env(env, envFiles, a.LookupEnv); err != nil {
				return exitWith(exitEngine, err)
			}
			if err := a.checkTTY(tty, req.AttachStdin); err != nil {
				return err
			}
			if tty && !detach {
				if req.DetachKeys, err = a.detachKeys(keys); err != nil {
					return err
				}
				if s := a.consoleSize(); s[0] > 0 {
					req.ConsoleSize = &s
				}
			}
			return a.exec(ctx, args[0], req, detach)
		}}
}

func (a *App) exec(ctx context.Context, name string, req container.ExecCreateRequest, detach bool) error {
	c, err := a.client()
	if err != nil {
		return err
	}
	if detach {
		id, err := c.ExecCreate(ctx, name, req)
		if err != nil {
			return execError(err)
		}
		return execError(c.ExecStartDetached(ctx, id, container.ExecStartRequest{Tty: req.Tty}))
	}
	r, err := c.Exec(ctx, name, req)
	if err != nil {
		return execError(err)
	}
	defer r.Close()
	id := r.Started.ID
	ses := &session{app: a, stream: r.Stream, tty: req.Tty, stdin: req.AttachStdin,
		resize: func(ctx context.Context, w, h uint16) error { return c.ExecResize(ctx, id, w, h) }}
	var end *api.RunExited
	err = ses.run(ctx, func(stdout, stderr io.Writer) error {
		var err error
		end, err = r.Copy(stdout, stderr)
		return err
	})
	switch {
	case err != nil:
		return err
	case end == nil: // the engine left; the next one knows the command
		return a.execEnd(ctx, c, id)
	case end.Detached:
		fmt.Fprintf(a.Stderr, "\nservin: detached; the command goes on\n")
		return nil
	}
	return exitWithCode(end.ExitCode)
}

// execEnd finds the exit code of an exec whose engine has gone while it ran.
func (a *App) execEnd(ctx context.Context, c *client.Client, id string) error {
	limit := time.Now().Add(10 * time.Second)
	for pause := time.Millisecond; ; pause = min(2*pause, 100*time.Millisecond) {
		info, err := c.ExecInspect(ctx, id)
		if err == nil && !info.Running && info.ExitCode != nil {
			return exitWithCode(*info.ExitCode)
		}
		if time.Now().After(limit) {
			if err == nil {
				err = fmt.Errorf("the engine was restarted; the command goes on, its output is no longer shown")
			}
			return err
		}
		select {
		case <-time.After(pause):
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

// execError keeps the codes that the engine names (126, 127); else a failure is 1.
func execError(err error) error {
	if x, ok := engineError(err).(*exitError); ok && x.code != exitEngine {
		return x
	}
	return err
}
