package cli

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"runtime"
	"slices"
	"strings"

	"github.com/cloudos-io/cloudos/internal/cli/command"
)

// pluginPrefix begins the names of programs that are commands.
const pluginPrefix = "servin-"

// notPlugins are programs of ours that are no commands.
func notPlugin(name string) bool {
	switch name {
	case "shim", "runtime", "buildd", "scan", "vmd":
		return true
	}
	return false
}

func validPlugin(name string) bool {
	if name == "" || name[0] == '-' {
		return false
	}
	for _, c := range name {
		if !(c >= 'a' && c <= 'z' || c >= '0' && c <= '9' || c == '-' || c == '_') {
			return false
		}
	}
	return true
}

// findPlugin looks on the PATH, then beside this program.
func (a *App) findPlugin(name string) string {
	if !validPlugin(name) || notPlugin(name) {
		return ""
	}
	if p, err := exec.LookPath(pluginPrefix + name); err == nil {
		return p
	}
	if self, err := os.Executable(); err == nil {
		p := filepath.Join(filepath.Dir(self), pluginPrefix+name)
		if runtime.GOOS == "windows" {
			p += ".exe"
		}
		if st, err := os.Stat(p); err == nil && !st.IsDir() && (runtime.GOOS == "windows" || st.Mode()&0o111 != 0) {
			return p
		}
	}
	return ""
}

// runPlugin runs servin-NAME; done is false when there is
// no such program.
func (a *App) runPlugin(ctx context.Context, name string, args []string) (done bool, err error) {
	p := a.findPlugin(name)
	if p == "" {
		return false, nil
	}
	return true, a.execProgram(ctx, p, args)
}

// execProgram runs a program in our place and takes over its exit code. It finds
// the engine that was chosen in SERVIN_HOST and its like.
func (a *App) execProgram(ctx context.Context, path string, args []string) error {
	env := slices.DeleteFunc(a.Environ(), func(s string) bool {
		k, _, _ := strings.Cut(s, "=")
		return k == "SERVIN_HOST" && a.host != "" || k == "SERVIN_CONTEXT" && a.ctxName != ""
	})
	if a.host != "" {
		env = append(env, "SERVIN_HOST="+a.host)
	}
	if a.ctxName != "" {
		env = append(env, "SERVIN_CONTEXT="+a.ctxName)
	}
	if self, err := os.Executable(); err == nil {
		env = append(env, "SERVIN_CLI="+self)
	}
	cmd := exec.CommandContext(ctx, path, args...)
	cmd.Env = env
	cmd.Stdin, cmd.Stdout, cmd.Stderr = a.Stdin, a.Stdout, a.Stderr
	// Ctrl-C reaches the program by itself; we wait for what it makes of it.
	sig := make(chan os.Signal, 1)
	signal.Notify(sig, os.Interrupt)
	defer signal.Stop(sig)
	err := cmd.Run()
	var ee *exec.ExitError
	if errors.As(err, &ee) {
		if c := ee.ExitCode(); c >= 0 {
			return exitWith(c, nil)
		}
		return exitWith(exitFailure, fmt.Errorf("%s ended: %v", path, ee))
	}
	if err != nil {
		return fmt.Errorf("cannot run %s: %w", path, err)
	}
	return nil
}

// pluginList finds the plugins for the help.
func (a *App) pluginList() [][2]string {
	var out [][2]string
	seen := map[string]bool{}
	root := a.root()
	dirs := filepath.SplitList(a.Getenv("PATH"))
	if self, err := os.Executable(); err == nil {
		dirs = append(dirs, filepath.Dir(self))
	}
	for _, dir := range dirs {
		if dir == "" {
			continue
		}
		names, err := filepath.Glob(filepath.Join(dir, pluginPrefix+"*"))
		if err != nil {
			continue
		}
		for _, p := range names {
			name := strings.TrimSuffix(strings.TrimPrefix(filepath.Base(p), pluginPrefix), ".exe")
			if seen[name] || !validPlugin(name) || notPlugin(name) || root.Find(name) != nil || a.findPlugin(name) == "" {
				continue
			}
			seen[name] = true
			out = append(out, [2]string{name, p})
		}
	}
	slices.SortFunc(out, func(x, y [2]string) int { return strings.Compare(x[0], y[0]) })
	return out
}

// bundled is a command that is a program of its own, shipped beside this one.
func (a *App) bundled(name, short, group string) *command.Command {
	return &command.Command{Name: name, Short: short, Group: group, Raw: true, Max: -1,
		Run: func(ctx context.Context, args []string) error {
			p := a.findPlugin(name)
			if p == "" {
				return fmt.Errorf("cannot run %s: the program servin-%s is neither on the PATH nor beside servin: install it", name, name)
			}
			return a.execProgram(ctx, p, args)
		}}
}
