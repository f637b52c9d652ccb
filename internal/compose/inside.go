package compose

import (
	"context"
	"errors"
	"fmt"
	"os"
	"slices"
	"strings"

	"github.com/cloudos-io/cloudos/internal/cli/command"
	"github.com/cloudos-io/cloudos/internal/cli/terminal"
	"github.com/cloudos-io/cloudos/internal/compose/engine"
	"github.com/cloudos-io/cloudos/internal/compose/model"
)

func (a *app) cmdExec() *command.Command {
	var detach, privileged bool
	var noTTY, tty, stdin *bool
	var env []string
	var user, workdir string
	index := 0
	return &command.Command{Name: "exec", Args: "SERVICE COMMAND [ARG...]", Short: "Run a command in a running container of a service", Min: 2, Max: -1, Inner: true, Complete: []string{"service", ""},
		Flags: func(f *command.FlagSet) {
			f.Bool(&detach, "detach", "d", "Leave the command in the background")
			f.Strings(&env, "env", "e", "Set an environment variable")
			f.Int(&index, "index", "", "Which container of the service")
			f.Bool(&privileged, "privileged", "", "Give the command all that the host's root may do")
			f.String(&user, "user", "u", "User (name or id, [:group])")
			f.OptBool(&noTTY, "no-tty", "T", "No terminal (default: as standard output is)")
			f.OptBool(&noTTY, "no-TTY", "", "").Hide()
			f.String(&workdir, "workdir", "w", "Working directory in the container")
			f.OptBool(&stdin, "interactive", "i", "").Hide()
			f.OptBool(&tty, "tty", "t", "").Hide()
		},
		Run: func(ctx context.Context, args []string) error {
			c, err := a.one(ctx, args[0], index, false, engine.WithOneOff)
			if err != nil {
				return err
			}
			if a.dryRun {
				return nil
			}
			cmd := []string{"exec"}
			add := func(on bool, words ...string) {
				if on {
					cmd = append(cmd, words...)
				}
			}
			withTTY := terminal.Is(a.Stdout) && terminal.Is(a.Stdin)
			if noTTY != nil {
				withTTY = !*noTTY
			}
			if tty != nil && *tty && noTTY == nil {
				withTTY = terminal.Is(a.Stdout) && terminal.Is(a.Stdin)
			}
			add(detach, "--detach")
			add(stdin == nil || *stdin, "--interactive")
			add(withTTY && !detach, "--tty")
			add(privileged, "--privileged")
			add(user != "", "--user", user)
			add(workdir != "", "--workdir", workdir)
			for _, e := range env {
				if k, _, ok := strings.Cut(e, "="); !ok {
					v, has := a.env[k]
					if !has {
						continue
					}
					e = k + "=" + v
				}
				cmd = append(cmd, "--env", e)
			}
			return a.servin(ctx, append(append(cmd, c), args[1:]...)...)
		}}
}

// one finds a container of a service.
func (a *app) one(ctx context.Context, service string, index int, all bool, one engine.OneOff) (string, error) {
	name, err := a.projectName(ctx)
	if err != nil {
		return "", err
	}
	e, err := a.engine()
	if err != nil {
		return "", err
	}
	c, err := e.One(ctx, name, service, index, all, one)
	return c.ID, err
}

func (a *app) cmdAttach() *command.Command {
	index, keys, noStdin, proxy := 0, "", false, true
	return &command.Command{Name: "attach", Args: "SERVICE", Short: "Connect to the standard streams of a service's container", Min: 1, Max: 1, Complete: []string{"service"},
		Flags: func(f *command.FlagSet) {
			f.Int(&index, "index", "", "Which container of the service")
			f.String(&keys, "detach-keys", "", "Keys that leave the container running")
			f.Bool(&noStdin, "no-stdin", "", "Do not connect standard input")
			f.Bool(&proxy, "sig-proxy", "", "Pass signals on to the container")
		},
		Run: func(ctx context.Context, args []string) error {
			c, err := a.one(ctx, args[0], index, false, engine.WithOneOff)
			if err != nil {
				return err
			}
			cmd := []string{"attach", fmt.Sprintf("--sig-proxy=%t", proxy), fmt.Sprintf("--no-stdin=%t", noStdin)}
			if keys != "" {
				cmd = append(cmd, "--detach-keys", keys)
			}
			return a.servin(ctx, append(cmd, c)...)
		}}
}

func (a *app) cmdCp() *command.Command {
	var all, follow, archive bool
	index := 0
	return &command.Command{Name: "cp", Args: "SERVICE:PATH PATH|- | PATH|- SERVICE:PATH", Short: "Copy files between a service's containers and this machine", Min: 2, Max: 2,
		Flags: func(f *command.FlagSet) {
			f.Bool(&all, "all", "", "Include containers that run made")
			f.Bool(&follow, "follow-link", "L", "Follow symbolic links in the source")
			f.Bool(&archive, "archive", "a", "Keep owners")
			f.Int(&index, "index", "", "Which container of the service")
		},
		Run: func(ctx context.Context, args []string) error {
			src, srcPath, from := cutService(args[0])
			dst, dstPath, to := cutService(args[1])
			if from == to {
				return errors.New("cannot copy: one side has to be SERVICE:PATH, the other a path of this machine")
			}
			cmd := []string{"cp"}
			if follow {
				cmd = append(cmd, "--follow-link")
			}
			if archive {
				cmd = append(cmd, "--archive")
			}
			one := engine.WithoutOneOff
			if all {
				one = engine.WithOneOff
			}
			if from {
				id, err := a.one(ctx, src, index, true, one)
				if err != nil {
					return err
				}
				return a.servin(ctx, append(cmd, id+":"+srcPath, args[1])...)
			}
			name, err := a.projectName(ctx)
			if err != nil {
				return err
			}
			e, err := a.engine()
			if err != nil {
				return err
			}
			// Into all containers of the service, unless one is named.
			list, err := e.Containers(ctx, name, true, one, dst)
			if err != nil {
				return err
			}
			n := 0
			for i := range list {
				if index > 0 && model.Number(&list[i]) != index {
					continue
				}
				n++
				if a.dryRun {
					continue
				}
				if err := a.servin(ctx, append(slices.Clone(cmd), args[0], list[i].ID+":"+dstPath)...); err != nil {
					return err
				}
				if args[0] == "-" {
					break // standard input comes once
				}
			}
			if n == 0 {
				return fmt.Errorf("no container found for service %q", dst)
			}
			return nil
		}}
}

// cutService splits SERVICE:PATH; a path of this machine has no service.
func cutService(s string) (service, path string, ok bool) {
	if s == "-" || strings.HasPrefix(s, "/") || strings.HasPrefix(s, ".") {
		return "", s, false
	}
	service, path, ok = strings.Cut(s, ":")
	if !ok || len(service) == 1 && os.PathSeparator == '\\' {
		return "", s, false
	}
	return service, path, true
}

func (a *app) cmdCommit() *command.Command {
	var index int
	var author, message string
	var changes []string
	pause := true
	return &command.Command{Name: "commit", Args: "SERVICE [REPOSITORY[:TAG]]", Short: "Make an image of a service's container", Min: 1, Max: 2, Complete: []string{"service", ""},
		Flags: func(f *command.FlagSet) {
			f.Int(&index, "index", "", "Which container of the service")
			f.String(&author, "author", "a", "Author")
			f.String(&message, "message", "m", "Message")
			f.Strings(&changes, "change", "c", "Dockerfile instruction to apply")
			f.Bool(&pause, "pause", "p", "Freeze the container meanwhile")
		},
		Run: func(ctx context.Context, args []string) error {
			c, err := a.one(ctx, args[0], index, false, engine.WithOneOff)
			if err != nil || a.dryRun {
				return err
			}
			cmd := []string{"commit", fmt.Sprintf("--pause=%t", pause), "--author", author, "--message", message}
			for _, ch := range changes {
				cmd = append(cmd, "--change", ch)
			}
			return a.servin(ctx, append(append(cmd, c), args[1:]...)...)
		}}
}

func (a *app) cmdExport() *command.Command {
	index, output := 0, ""
	return &command.Command{Name: "export", Args: "SERVICE", Short: "Write a container's files as a tar archive", Min: 1, Max: 1, Complete: []string{"service"},
		Flags: func(f *command.FlagSet) {
			f.Int(&index, "index", "", "Which container of the service")
			f.String(&output, "output", "o", "File to write to").Of("file")
		},
		Run: func(ctx context.Context, args []string) error {
			c, err := a.one(ctx, args[0], index, false, engine.WithOneOff)
			if err != nil || a.dryRun {
				return err
			}
			cmd := []string{"export"}
			if output != "" {
				cmd = append(cmd, "--output", output)
			}
			return a.servin(ctx, append(cmd, c)...)
		}}
}

func (a *app) cmdStats() *command.Command {
	var all, noStream, noTrunc bool
	format := ""
	return &command.Command{Name: "stats", Args: "[SERVICE]", Short: "Show what containers use of the machine, live", Max: 1, Complete: []string{"service"},
		Flags: func(f *command.FlagSet) {
			f.Bool(&all, "all", "a", "Show stopped containers too")
			f.Bool(&noStream, "no-stream", "", "Show one reading and leave")
			f.Bool(&noTrunc, "no-trunc", "", "Do not shorten")
			f.String(&format, "format", "", "table, json or a template")
		},
		Run: func(ctx context.Context, args []string) error {
			p, err := a.named(ctx)
			if err != nil {
				return err
			}
			list, err := a.eng.Containers(ctx, p.Name, all, engine.WithOneOff, args...)
			if err != nil {
				return err
			}
			if len(list) == 0 {
				return nil
			}
			cmd := []string{"stats", fmt.Sprintf("--no-stream=%t", noStream), fmt.Sprintf("--no-trunc=%t", noTrunc)}
			if format != "" {
				cmd = append(cmd, "--format", format)
			}
			for i := range list {
				cmd = append(cmd, list[i].ID)
			}
			return a.servin(ctx, cmd...)
		}}
}
