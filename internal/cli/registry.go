package cli

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"strings"

	"github.com/moby/moby/api/types/registry"

	"github.com/cloudos-io/cloudos/internal/cli/command"
	"github.com/cloudos-io/cloudos/internal/cli/config"
	"github.com/cloudos-io/cloudos/internal/cli/format"
	"github.com/cloudos-io/cloudos/internal/cli/terminal"
)

func (a *App) registries() []*command.Command {
	return []*command.Command{a.cmdLogin(), a.cmdLogout()}
}

// maxPassword bounds what is read as one.
const maxPassword = 64 << 10

func (a *App) cmdLogin() *command.Command {
	user, fromStdin, password := "", false, ""
	return &command.Command{Name: "login", Args: "[REGISTRY]", Short: "Log in to a registry", Max: 1,
		Long: `Log in to a registry, docker.io if none is named.

The password is asked for, or read from standard input with --password-stdin. It is
kept by the credential helper that the configuration names (credsStore, credHelpers),
else in the configuration file, readable by you alone.`,
		Flags: func(f *command.FlagSet) {
			f.String(&user, "username", "u", "Name of the user")
			f.Bool(&fromStdin, "password-stdin", "", "Read the password from standard input")
			f.String(&password, "password", "p", "").Hide()
		},
		Run: func(ctx context.Context, args []string) error {
			if password != "" {
				return usagef("cannot take a password as an argument: every user of this host can read arguments; use --password-stdin")
			}
			host := "docker.io"
			if len(args) == 1 {
				host = args[0]
			}
			auth := registry.AuthConfig{ServerAddress: config.ServerName(host), Username: user}
			if err := a.readCredentials(&auth, fromStdin, host); err != nil {
				return err
			}
			c, err := a.client()
			if err != nil {
				return err
			}
			r, err := c.RegistryLogin(ctx, auth)
			if err != nil {
				return fmt.Errorf("cannot log in to %s: %w", host, err)
			}
			if r.IdentityToken != "" {
				auth.Password, auth.IdentityToken = "", r.IdentityToken
			}
			f, err := a.file()
			if err != nil {
				return err
			}
			where, err := config.Credentials(f, a.Getenv).Put(ctx, auth)
			if err != nil {
				return fmt.Errorf("cannot keep the credentials: %w", err)
			}
			if where == f.Path() {
				fmt.Fprintf(a.Stderr, "servin: the password is kept unencrypted in %s; a credential helper (credsStore) keeps it better\n", where)
			}
			fmt.Fprintln(a.out, pick(r.Status, "Login Succeeded"))
			return nil
		}}
}

// readCredentials asks for what is missing.
func (a *App) readCredentials(auth *registry.AuthConfig, fromStdin bool, host string) error {
	if fromStdin {
		if auth.Username == "" {
			return usagef("--password-stdin needs --username")
		}
		b, err := io.ReadAll(io.LimitReader(a.Stdin, maxPassword))
		if err != nil {
			return fmt.Errorf("cannot read the password: %w", err)
		}
		auth.Password = strings.TrimRight(string(b), "\r\n")
	} else {
		if !terminal.Is(a.Stdin) {
			return usagef("cannot ask for a password: standard input is no terminal; use --password-stdin")
		}
		if auth.Username == "" {
			fmt.Fprintf(a.Stderr, "User name at %s: ", host)
			name, err := readLine(a.Stdin)
			if err != nil {
				return err
			}
			auth.Username = strings.TrimSpace(name)
		}
		fmt.Fprintf(a.Stderr, "Password of %s: ", auth.Username)
		p, err := terminal.ReadPassword(a.Stdin)
		fmt.Fprintln(a.Stderr)
		if err != nil {
			return fmt.Errorf("cannot read the password: %w", err)
		}
		auth.Password = p
	}
	if auth.Username == "" || auth.Password == "" {
		return errors.New("a user name and a password are needed")
	}
	return nil
}

func (a *App) cmdLogout() *command.Command {
	return &command.Command{Name: "logout", Args: "[REGISTRY]", Short: "Forget the credentials for a registry", Max: 1,
		Run: func(ctx context.Context, args []string) error {
			host := "docker.io"
			if len(args) == 1 {
				host = args[0]
			}
			f, err := a.file()
			if err != nil {
				return err
			}
			found, err := config.Credentials(f, a.Getenv).Erase(ctx, host)
			if err != nil {
				return err
			}
			if !found {
				fmt.Fprintf(a.Stderr, "servin: no credentials were kept for %s\n", host)
				return nil
			}
			fmt.Fprintf(a.out, "Removed the credentials for %s\n", host)
			return nil
		}}
}

// printObjects prints values of our own as inspect does.
func printObjects[T any](a *App, list []T, o *inspectFlags) error {
	tmpl := o.format
	if o.json {
		tmpl = "json"
	}
	if tmpl == "" {
		b, err := json.MarshalIndent(list, "", "    ")
		if err != nil {
			return err
		}
		_, err = a.out.Write(append(b, '\n'))
		return err
	}
	for _, v := range list {
		var raw bytes.Buffer
		if err := json.NewEncoder(&raw).Encode(v); err != nil {
			return err
		}
		if err := format.Object(a.out, v, raw.Bytes(), tmpl); err != nil {
			return err
		}
	}
	return nil
}
