package cli

import (
	"context"

	"github.com/moby/moby/api/types/container"

	"github.com/cloudos-io/cloudos/api"
	"github.com/cloudos-io/cloudos/internal/cli/command"
	"github.com/cloudos-io/cloudos/internal/cli/notation"
	"github.com/cloudos-io/cloudos/internal/cli/terminal"
)

func (a *App) cmdDebug() *command.Command {
	var o createFlags
	var noTTY, privileged bool
	var env []string
	var image, user, workdir string
	return &command.Command{Name: "debug", Args: "CONTAINER [COMMAND] [ARG...]", Short: "Look into a container with tools that it need not have", Min: 1, Max: -1, Inner: true, Complete: []string{"container", ""},
		Long: `Look into a container with tools that it need not have.

A shell (or the command) runs from an image of its own, in the container's
process, network and IPC namespaces. The container's files are at /target: of
one that runs as it sees them, of one that has ended read-only. Nothing is
put into the container.

On CloudOS, @host in place of a container is the machine itself: with all its
namespaces and powers, its files at /target, if that is switched on (servin
system debug-shell).`,
		Example: `servin debug web
servin debug web ps -ef
servin debug --image nicolaka/netshoot web tcpdump -i any`,
		Flags: func(f *command.FlagSet) {
			f.String(&image, "image", "", "Image with the tools (default the engine's own, busybox)").Of("image")
			f.String(&o.pull, "pull", "", "Pull the image: always, missing, never")
			f.Bool(&o.quiet, "quiet", "q", "Pull without showing progress")
			f.Bool(&noTTY, "no-tty", "T", "No terminal (default: as standard input and output are)")
			f.Strings(&env, "env", "e", "Set an environment variable")
			f.String(&user, "user", "u", "User (name or id, [:group])")
			f.String(&workdir, "workdir", "w", "Working directory")
			f.Bool(&privileged, "privileged", "", "Give the command all that the host's root may do")
		},
		Run: func(ctx context.Context, args []string) error {
			if err := checkPull(o.pull); err != nil {
				return err
			}
			vars, err := notation.Env(env, nil, a.LookupEnv)
			if err != nil {
				return exitWith(exitEngine, err)
			}
			o.tty = !noTTY && terminal.Is(a.Stdin) && a.outIsTerminal()
			o.stdin = true
			req := &api.RunRequest{Config: &container.Config{Image: image, Cmd: args[1:], Env: vars, User: user, WorkingDir: workdir, Tty: o.tty},
				HostConfig: &container.HostConfig{Privileged: privileged, AutoRemove: true}, Extra: api.CreateExtra{Debug: args[0]}}
			if err := a.attachments(&o, req, false); err != nil {
				return err
			}
			if o.tty {
				req.HostConfig.ConsoleSize = a.consoleSize()
				if req.DetachKeys, err = a.detachKeys(""); err != nil {
					return err
				}
			}
			c, err := a.client()
			if err != nil {
				return engineError(err)
			}
			if image != "" && o.pull != "always" && o.pull != "never" && a.imageMissing(ctx, c, image, "") {
				if err := a.pullFor(ctx, c, image, &o); err != nil {
					return engineError(err)
				}
			}
			if image != "" && o.pull == "always" {
				if err := a.pullFor(ctx, c, image, &o); err != nil {
					return engineError(err)
				}
			}
			r, err := c.Run(ctx, req)
			if err != nil {
				return engineError(err)
			}
			defer r.Close()
			a.warn(r.Started.Warnings)
			return a.follow(ctx, c, r, req, &o)
		}}
}
