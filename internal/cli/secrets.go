package cli

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"strconv"
	"strings"
	"time"

	"github.com/cloudos-io/cloudos/api"
	"github.com/cloudos-io/cloudos/client"
	"github.com/cloudos-io/cloudos/internal/cli/command"
	"github.com/cloudos-io/cloudos/internal/cli/format"
	"github.com/cloudos-io/cloudos/internal/cli/notation"
	"github.com/cloudos-io/cloudos/internal/cli/terminal"
)

// secrets are the commands about secrets, or about configs.
func (a *App) secrets(k api.SecretKind) []*command.Command {
	l := []*command.Command{a.cmdSecretLs(k), a.cmdSecretCreate(k), a.cmdSecretUpdate(k), a.cmdSecretInspect(k), a.cmdSecretRm(k)}
	if k == api.KindSecret {
		l = append(l, a.cmdSecretUnlock(), a.cmdSecretLock(), a.cmdSecretRekey())
	}
	return l
}

func (a *App) cmdSecretLs(k api.SecretKind) *command.Command {
	var o listFlags
	return &command.Command{Name: "ls", Aliases: []string{"list"}, Short: "List " + string(k) + "s",
		Flags: func(f *command.FlagSet) { o.declare(f, true) },
		Run: func(ctx context.Context, args []string) error {
			c, err := a.client()
			if err != nil {
				return err
			}
			list, err := c.SecretList(ctx, k)
			if err != nil {
				return err
			}
			if list, err = filterSecrets(list, o.filters); err != nil {
				return err
			}
			if o.json {
				return format.JSONLines(a.out, list)
			}
			return secretColumns(o.noTrunc).Print(a.out, list, o.options())
		}}
}

// filterSecrets keeps what matches name=, id= and label=.
func filterSecrets(list []api.Secret, filters []string) ([]api.Secret, error) {
	out := []api.Secret{}
	for _, s := range list {
		keep := true
		for _, f := range filters {
			key, v, _ := strings.Cut(f, "=")
			switch key {
			case "name":
				keep = keep && strings.Contains(s.Name, v)
			case "id":
				keep = keep && strings.HasPrefix(s.ID, v)
			case "label":
				lk, lv, exact := strings.Cut(v, "=")
				got, ok := s.Labels[lk]
				keep = keep && ok && (!exact || got == lv)
			default:
				return nil, usagef("filter %q is none of name, id, label", key)
			}
		}
		if keep {
			out = append(out, s)
		}
	}
	return out, nil
}

func secretColumns(noTrunc bool) *format.List[api.Secret] {
	type S = api.Secret
	ago := func(t time.Time) string { return format.Ago(t, time.Now()) }
	return &format.List[S]{
		Quiet: "ID", Table: []string{"ID", "Name", "Revision", "Updated", "UsedBy"},
		Labels: func(s S) map[string]string { return s.Labels },
		Columns: []format.Column[S]{
			{Name: "ID", Heading: "ID", Text: func(s S) string { return trunc(s.ID, noTrunc) }},
			{Name: "Name", Heading: "NAME", Text: func(s S) string { return s.Name }},
			{Name: "Revision", Heading: "REVISION", Text: func(s S) string { return strconv.FormatUint(s.Revision, 10) }},
			{Name: "Created", Heading: "CREATED", Text: func(s S) string { return ago(s.CreatedAt) }},
			{Name: "Updated", Heading: "UPDATED", Text: func(s S) string { return ago(s.UpdatedAt) }},
			{Name: "UsedBy", Heading: "USED BY", Text: func(s S) string { return strings.Join(s.UsedBy, ",") }},
			{Name: "Size", Heading: "SIZE", Text: func(s S) string { return format.Size(int64(s.Size)) }},
			{Name: "Labels", Heading: "LABELS", Text: func(s S) string { return labelText(s.Labels) }},
		}}
}

// maxValue is more than the engine takes.
const maxValue = 2 << 20

// value reads a secret's value from a file, standard input, or the terminal, where
// it is not shown. It is never an argument: those show in lists of processes.
func (a *App) value(k api.SecretKind, path string) ([]byte, error) {
	var r io.Reader = a.Stdin
	switch {
	case path != "" && path != "-":
		f, err := os.Open(path)
		if err != nil {
			return nil, fmt.Errorf("cannot read the %s: %w", k, err)
		}
		defer f.Close()
		r = f
	case terminal.Is(a.Stdin):
		fmt.Fprintf(a.Stderr, "Value of the %s: ", k)
		p, err := terminal.ReadPassword(a.Stdin)
		fmt.Fprintln(a.Stderr)
		if err == nil && p == "" {
			err = fmt.Errorf("cannot use an empty %s", k)
		}
		return []byte(p), err
	}
	b, err := io.ReadAll(io.LimitReader(r, maxValue+1))
	switch {
	case err != nil:
		return nil, fmt.Errorf("cannot read the %s: %w", k, err)
	case len(b) > maxValue:
		return nil, fmt.Errorf("the %s is too large", k)
	case len(b) == 0:
		return nil, fmt.Errorf("cannot use an empty %s", k)
	}
	return b, nil
}

func (a *App) cmdSecretCreate(k api.SecretKind) *command.Command {
	var labels []string
	return &command.Command{Name: "create", Args: strings.ToUpper(string(k)) + " [FILE|-]", Short: "Store a " + string(k) + ", read from a file or standard input", Min: 1, Max: 2, Complete: []string{"", "file"},
		Example: "servin " + string(k) + "s create app-key ./key.pem",
		Flags:   func(f *command.FlagSet) { f.Strings(&labels, "label", "l", "Set a label") },
		Run: func(ctx context.Context, args []string) error {
			spec := api.SecretSpec{Name: args[0]}
			var err error
			if spec.Labels, err = notation.Map(labels); err != nil {
				return err
			}
			if spec.Data, err = a.value(k, second(args)); err != nil {
				return err
			}
			c, err := a.client()
			if err != nil {
				return err
			}
			s, err := c.SecretCreate(ctx, k, spec)
			if err != nil {
				return err
			}
			fmt.Fprintln(a.out, s.ID)
			return nil
		}}
}

func second(args []string) string {
	if len(args) < 2 {
		return ""
	}
	return args[1]
}

func (a *App) cmdSecretUpdate(k api.SecretKind) *command.Command {
	var labels []string
	restart, labelsOnly := false, false
	return &command.Command{Name: "update", Aliases: []string{"rotate"}, Args: strings.ToUpper(string(k)) + " [FILE|-]", Short: "Store a new value under the same name", Min: 1, Max: 2, Complete: []string{string(k), "file"},
		Flags: func(f *command.FlagSet) {
			f.Strings(&labels, "label", "l", "Set a label; those that were there go")
			f.Bool(&labelsOnly, "labels-only", "", "Keep the value")
			f.Bool(&restart, "restart", "", "Restart the containers that see the new value only then")
		},
		Run: func(ctx context.Context, args []string) error {
			var spec api.SecretSpec
			var err error
			if len(labels) > 0 || labelsOnly {
				if spec.Labels, err = notation.Map(labels); err != nil {
					return err
				}
				if spec.Labels == nil {
					spec.Labels = map[string]string{}
				}
			}
			if !labelsOnly {
				if spec.Data, err = a.value(k, second(args)); err != nil {
					return err
				}
			}
			c, err := a.client()
			if err != nil {
				return err
			}
			u, err := c.SecretUpdate(ctx, k, args[0], spec)
			if err != nil {
				return err
			}
			fmt.Fprintln(a.out, u.ID)
			if !restart && len(u.Restart) > 0 {
				fmt.Fprintf(a.Stderr, "Still with the old value, until they are restarted: %s\n", strings.Join(u.Restart, ", "))
				return nil
			}
			var errs []error
			for _, name := range u.Restart {
				errs = append(errs, c.ContainerRestart(ctx, name, client.StopOptions{}))
			}
			return joined(errs)
		}}
}

func (a *App) cmdSecretInspect(k api.SecretKind) *command.Command {
	return a.inspectOf(strings.ToUpper(string(k)), "Show all about "+string(k)+"s", string(k), nil,
		func(ctx context.Context, c *client.Client, name string) (json.RawMessage, error) {
			_, raw, err := c.SecretInspect(ctx, k, name)
			return raw, err
		})
}

func (a *App) cmdSecretRm(k api.SecretKind) *command.Command {
	force := false
	up := strings.ToUpper(string(k))
	return &command.Command{Name: "rm", Aliases: []string{"remove"}, Args: up + " [" + up + "...]", Short: "Remove " + string(k) + "s", Min: 1, Max: -1, Complete: []string{string(k)},
		Flags: func(f *command.FlagSet) {
			f.Bool(&force, "force", "f", "Remove what containers have, too; they do not start again")
		},
		Run: func(ctx context.Context, args []string) error {
			c, err := a.client()
			if err != nil {
				return err
			}
			return a.eachName(args, func(n string) error { return c.SecretRemove(ctx, k, n, force) })
		}}
}

func (a *App) cmdSecretUnlock() *command.Command {
	file := ""
	return &command.Command{Name: "unlock", Short: "Give the passphrase that the secrets are encrypted with", Max: 0,
		Flags: func(f *command.FlagSet) {
			f.String(&file, "passphrase-file", "", "File of the passphrase").Of("file")
		},
		Run: func(ctx context.Context, args []string) error {
			p, err := a.ask(file, false)
			if err != nil {
				return err
			}
			c, err := a.client()
			if err != nil {
				return err
			}
			return c.SecretUnlock(ctx, p)
		}}
}

func (a *App) cmdSecretLock() *command.Command {
	return &command.Command{Name: "lock", Short: "Make the engine forget the passphrase of the secrets", Max: 0,
		Run: func(ctx context.Context, args []string) error {
			c, err := a.client()
			if err != nil {
				return err
			}
			return c.SecretLock(ctx)
		}}
}

func (a *App) cmdSecretRekey() *command.Command {
	file, passphrase, keyFile := "", false, false
	return &command.Command{Name: "rotate-key", Short: "Encrypt all secrets and configs anew", Max: 0,
		Flags: func(f *command.FlagSet) {
			f.Bool(&passphrase, "passphrase", "p", "With a passphrase, which is asked for")
			f.String(&file, "passphrase-file", "", "With the passphrase in a file").Of("file")
			f.Bool(&keyFile, "key-file", "", "With a new key in the engine's key file")
		},
		Run: func(ctx context.Context, args []string) error {
			withPassphrase := passphrase || file != ""
			if withPassphrase == keyFile {
				return usagef("say either --key-file or one of --passphrase and --passphrase-file")
			}
			p := ""
			if withPassphrase {
				var err error
				if p, err = a.ask(file, true); err != nil {
					return err
				}
				if len(p) < 8 {
					return errors.New("a passphrase needs 8 characters at least")
				}
			}
			c, err := a.client()
			if err != nil {
				return err
			}
			return c.SecretRekey(ctx, p)
		}}
}
